#include "cublaslt.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

// From the library's documentation (docs.nvidia.com/cuda/cublas, "Using the cuBLASLt API"): the functions and the numbers that they
// take, which are the same in versions 12 and 13. Descriptors are made by the library.
typedef void *descriptor;

struct heuristic { // cublasLtMatmulHeuristicResult_t
    struct gq_lt_algorithm algorithm;
    size_t workspace_bytes;
    int status;
    float waves;
    int reserved[4];
};

#define FUNCTIONS(F)                                                                                                              \
    F(GetStatusName, cublasLtGetStatusName, const char *, (int))                                                                  \
    F(GetStatusString, cublasLtGetStatusString, const char *, (int))                                                              \
    F(Create, cublasLtCreate, int, (void **))                                                                                     \
    F(MatmulDescCreate, cublasLtMatmulDescCreate, int, (descriptor *, int, int))                                                  \
    F(MatmulDescDestroy, cublasLtMatmulDescDestroy, int, (descriptor))                                                            \
    F(MatmulDescSetAttribute, cublasLtMatmulDescSetAttribute, int, (descriptor, int, const void *, size_t))                       \
    F(MatrixLayoutCreate, cublasLtMatrixLayoutCreate, int, (descriptor *, int, uint64_t, uint64_t, int64_t))                      \
    F(MatrixLayoutDestroy, cublasLtMatrixLayoutDestroy, int, (descriptor))                                                        \
    F(MatmulPreferenceCreate, cublasLtMatmulPreferenceCreate, int, (descriptor *))                                                \
    F(MatmulPreferenceDestroy, cublasLtMatmulPreferenceDestroy, int, (descriptor))                                                \
    F(MatmulPreferenceSetAttribute, cublasLtMatmulPreferenceSetAttribute, int, (descriptor, int, const void *, size_t))           \
    F(MatmulAlgoGetHeuristic, cublasLtMatmulAlgoGetHeuristic, int,                                                                \
      (void *, descriptor, descriptor, descriptor, descriptor, descriptor, descriptor, int, struct heuristic *, int *))           \
    F(Matmul, cublasLtMatmul, int,                                                                                                \
      (void *, descriptor, const void *, const void *, descriptor, const void *, descriptor, const void *, const void *, descriptor, void *, \
       descriptor, const struct gq_lt_algorithm *, void *, size_t, gq_stream))

enum {
    INVALID_VALUE = 7,
    NOT_SUPPORTED = 15,
    OPERATION_TRANSPOSED = 1,
    COMPUTE_F32 = 68, // float32 throughout: TF32 is another number
    DESC_TRANSPOSE_A = 3,
    DESC_EPILOGUE = 7,
    DESC_BIAS_POINTER = 8,
    EPILOGUE_BIAS = 4,
    PREFERENCE_WORKSPACE = 1,
    PREFERENCE_REDUCTION = 3,
    PREFERENCE_ALIGN_A = 5, // and of B, C and D
    REDUCTION_COMPUTE_TYPE = 2,
};

static struct {
#define F(field, name, result, arguments) result(*field) arguments;
    FUNCTIONS(F)
#undef F
} lt;

static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
static int opened;

// A copy that the process has already (torch loads one from its own folder, which no search finds) comes first: the library is large.
static void *find_library(const char *path) {
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
    void *library = NULL;
    if (path) return dlopen(path, RTLD_NOW | RTLD_LOCAL);
    for (int load = 0; load < 2; load++)
        for (int i = 0; i < 2 && !library; i++) library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL | (load ? 0 : RTLD_NOLOAD));
    return library;
}

int gq_lt_open(const char *path, char *what, size_t capacity) {
    int result = 0;
    pthread_mutex_lock(&opening);
    if (!opened) {
        void *library = find_library(path);
        if (!library) {
            snprintf(what, capacity, "%s", dlerror());
            result = -1;
        }
#define F(field, name, type, arguments)                                  \
    if (result == 0 && !(*(void **)&lt.field = dlsym(library, #name))) { \
        snprintf(what, capacity, "%s", #name);                           \
        result = -2;                                                     \
    }
        FUNCTIONS(F)
#undef F
        if (result == 0) opened = 1;
        else if (library) dlclose(library);
    }
    pthread_mutex_unlock(&opening);
    return result;
}

void gq_lt_error(int status, const char **name, const char **text) {
    *name = lt.GetStatusName(status);
    *text = lt.GetStatusString(status);
}

int gq_lt_create(gq_context c, void **handle) {
    const int entered = gq_cu_enter(c);
    if (entered < 0) return -entered;
    const int status = lt.Create(handle);
    gq_cu_leave(entered);
    return -status;
}

// The library counts columns first: to it, Wᵀ is A, transposed, with W's rows as columns, xᵀ is B and yᵀ is C and D.
struct descriptors {
    descriptor operation, weight, x, y;
};

static void destroy(struct descriptors *d) {
    if (d->operation) lt.MatmulDescDestroy(d->operation);
    if (d->weight) lt.MatrixLayoutDestroy(d->weight);
    if (d->x) lt.MatrixLayoutDestroy(d->x);
    if (d->y) lt.MatrixLayoutDestroy(d->y);
}

// bias is the address that the epilogue adds, in a search one with the same alignment.
static int describe(const struct gq_lt_product *p, uint64_t bias, struct descriptors *d) {
    const int transposed = OPERATION_TRANSPOSED, epilogue = EPILOGUE_BIAS;
    int status = lt.MatmulDescCreate(&d->operation, COMPUTE_F32, GQ_LT_F32);
    if (status == 0) status = lt.MatmulDescSetAttribute(d->operation, DESC_TRANSPOSE_A, &transposed, sizeof transposed);
    if (status == 0 && p->bias == GQ_LT_EPILOGUE) {
        status = lt.MatmulDescSetAttribute(d->operation, DESC_EPILOGUE, &epilogue, sizeof epilogue);
        if (status == 0) status = lt.MatmulDescSetAttribute(d->operation, DESC_BIAS_POINTER, &bias, sizeof bias);
    }
    if (status == 0) status = lt.MatrixLayoutCreate(&d->weight, p->dtype, (uint64_t)p->k, (uint64_t)p->rows, p->k);
    if (status == 0) status = lt.MatrixLayoutCreate(&d->x, p->dtype, (uint64_t)p->k, (uint64_t)p->m, p->k);
    if (status == 0) status = lt.MatrixLayoutCreate(&d->y, p->dtype, (uint64_t)p->rows, (uint64_t)p->m, p->ld);
    return status;
}

// Parts of a sum that was split may meet only as float32, in a step of their own.
static int prefer(const struct gq_lt_product *p, descriptor preference) {
    const uint32_t reduction = REDUCTION_COMPUTE_TYPE, alignments[] = {p->align_weight, p->align_x, p->align_y, p->align_y};
    int status = lt.MatmulPreferenceSetAttribute(preference, PREFERENCE_WORKSPACE, &p->workspace_bytes, sizeof p->workspace_bytes);
    if (status == 0) status = lt.MatmulPreferenceSetAttribute(preference, PREFERENCE_REDUCTION, &reduction, sizeof reduction);
    for (int i = 0; i < 4 && status == 0; i++)
        status = lt.MatmulPreferenceSetAttribute(preference, PREFERENCE_ALIGN_A + i, &alignments[i], sizeof alignments[i]);
    return status;
}

int gq_lt_find(gq_context c, void *handle, const struct gq_lt_product *p, struct gq_lt_algorithm *found) {
    struct descriptors d = {NULL, NULL, NULL, NULL};
    descriptor preference = NULL;
    struct heuristic heuristic;
    int count = 0;
    const int entered = gq_cu_enter(c);
    if (entered < 0) return -entered;
    int status = describe(p, GQ_LT_BIAS_ALIGNMENT, &d);
    if (status == 0) status = lt.MatmulPreferenceCreate(&preference);
    if (status == 0) status = prefer(p, preference);
    if (status == 0) {
        status = lt.MatmulAlgoGetHeuristic(handle, d.operation, d.weight, d.x, d.y, d.y, preference, 1, &heuristic, &count);
        // Both mean that there is nothing for this product.
        if (status == INVALID_VALUE || (status == 0 && (count < 1 || heuristic.status != 0))) status = NOT_SUPPORTED;
    }
    if (status == 0) *found = heuristic.algorithm;
    if (preference) lt.MatmulPreferenceDestroy(preference);
    destroy(&d);
    gq_cu_leave(entered);
    return -status;
}

int gq_lt_multiply(gq_context c, void *handle, const struct gq_lt_product *p, const struct gq_lt_algorithm *algorithm, const struct gq_lt_addresses *at,
                   gq_stream stream) {
    struct descriptors d = {NULL, NULL, NULL, NULL};
    const float one = 1, added = p->bias == GQ_LT_ADD_TO_Y ? 1 : 0;
    const int entered = gq_cu_enter(c);
    if (entered < 0) return -entered;
    int status = describe(p, at->bias, &d);
    if (status == 0)
        status = lt.Matmul(handle, d.operation, &one, (const void *)(uintptr_t)at->weight, d.weight, (const void *)(uintptr_t)at->x, d.x, &added,
                           (const void *)(uintptr_t)at->y, d.y, (void *)(uintptr_t)at->y, d.y, algorithm, (void *)(uintptr_t)at->workspace,
                           p->workspace_bytes, stream);
    destroy(&d);
    gq_cu_leave(entered);
    return -status;
}
