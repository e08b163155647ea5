// The interface between Go and the C kernels: one table of functions per level. kernel.go says what they do.
#ifndef GQUANT_KERNEL_H
#define GQUANT_KERNEL_H

#include <stdint.h>

enum { GQ_NF4, GQ_FP4 };         // as kernel.Codebook
enum { GQ_F32, GQ_F16, GQ_BF16 };

// A linear layer, y = x·Wᵀ + bias, or some of its columns. W lies in flat blocks, behind skip elements of the first one.
struct gq_linear4 {
    int codebook, dtype; // the dtype of x, bias and y
    const uint8_t *packed;
    const float *absmax;
    int64_t blocksize; // a power of two
    int64_t skip, rows, k;
    const uint8_t *x;
    int64_t m;           // rows of x and of y
    const uint8_t *bias; // or NULL
    uint8_t *y;
    int64_t stride; // elements from one row of y to the next
    float *scratch; // gq_linear4_scratch floats
};

// n is the number of elements. The quantizers return how many of them are NaN or infinite.
struct gq_level {
    int64_t (*quantize4)(int codebook, int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *packed);
    void (*dequantize4)(int codebook, int dtype, const uint8_t *packed, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst);
    int64_t (*quantize8)(const float *table, int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *codes);
    void (*dequantize8)(const float *table, int dtype, const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst);
    void (*linear4)(const struct gq_linear4 *);
};

extern const struct gq_level gq_generic;
extern const struct gq_level gq_avx2;   // AVX2, F16C, FMA
extern const struct gq_level gq_avx512; // AVX-512 F, BW, DQ, VL

// The members of the tables, one file each: quantize4_avx2_amd64.c and so on.
#define GQ_DECLARE(level)                                                                                      \
    int64_t gq_quantize4_##level(int, int, const uint8_t *, int64_t, int64_t, float *, uint8_t *);             \
    void gq_dequantize4_##level(int, int, const uint8_t *, const float *, int64_t, int64_t, uint8_t *);        \
    int64_t gq_quantize8_##level(const float *, int, const uint8_t *, int64_t, int64_t, float *, uint8_t *);   \
    void gq_dequantize8_##level(const float *, int, const uint8_t *, const float *, int64_t, int64_t, uint8_t *); \
    void gq_linear4_##level(const struct gq_linear4 *)
GQ_DECLARE(generic);
GQ_DECLARE(avx2);
GQ_DECLARE(avx512);
#undef GQ_DECLARE

#endif
