// cuBLASLt, NVIDIA's library of matrix products, by way of a table that dlopen and dlsym fill, as driver.h has the driver: it is
// optional, and found at the first call that needs it.
//
// Results are 0, a driver's result code, or a cuBLAS status, negated. The functions run in the context they are given, like the
// driver's.
#ifndef GQUANT_CUBLASLT_H
#define GQUANT_CUBLASLT_H

#include "driver.h"

// Loads the library from a path, or, if that is NULL, finds it by its names: one that the process has already, else one on the
// system's search path. 0, or -1 if there is none and -2 if it lacks a function; *what says which, in memory of the caller.
int gq_lt_open(const char *path, char *what, size_t capacity);

// The name ("CUBLAS_STATUS_…") and text of a status. Static texts.
void gq_lt_error(int status, const char **name, const char **text);

// A handle for the device of a context.
int gq_lt_create(gq_context c, void **handle);

enum { GQ_LT_BIAS_ALIGNMENT = 16 }; // that the bias of an epilogue must have: no preference tells the library of less

// y = x · Wᵀ, plus bias or y itself: W is [rows, k], x [m, k], bias [rows], y [m, rows] with ld elements from a row to the next. All are
// of one dtype, sums are float32.
struct gq_lt_product {
    int64_t m, rows, k, ld;
    int dtype; // a cudaDataType: GQ_LT_F32 …
    int bias;  // what is added: see below
    uint32_t align_weight, align_x, align_y; // bytes that the addresses are multiples of: 2, 4 … 256
    uint64_t workspace_bytes;
};
enum { GQ_LT_F32 = 0, GQ_LT_F16 = 2, GQ_LT_BF16 = 14 };
enum { GQ_LT_NO_BIAS, GQ_LT_EPILOGUE, GQ_LT_ADD_TO_Y };

struct gq_lt_algorithm {
    uint64_t data[8];
};
struct gq_lt_addresses {
    uint64_t weight, x, bias, y, workspace;
};

// What the library thinks is fastest; GQ_LT_NONE if it has nothing that can do it.
int gq_lt_find(gq_context c, void *handle, const struct gq_lt_product *p, struct gq_lt_algorithm *found);
enum { GQ_LT_NONE = -15 }; // CUBLAS_STATUS_NOT_SUPPORTED

int gq_lt_multiply(gq_context c, void *handle, const struct gq_lt_product *p, const struct gq_lt_algorithm *algorithm, const struct gq_lt_addresses *at,
                   gq_stream stream);

#endif
