// The interface between Go and the C kernels: one table of functions per level. kernel.go says what they do.
#ifndef GQUANT_KERNEL_H
#define GQUANT_KERNEL_H

#include <stdint.h>

enum { GQ_NF4, GQ_FP4 };         // as kernel.Codebook
enum { GQ_F32, GQ_F16, GQ_BF16 };

// n is the number of elements. The quantizers return how many of them are NaN or infinite.
struct gq_level {
    int64_t (*quantize4)(int codebook, int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *packed);
    void (*dequantize4)(int codebook, int dtype, const uint8_t *packed, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst);
    int64_t (*quantize8)(const float *table, int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *codes);
    void (*dequantize8)(const float *table, int dtype, const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst);
};

extern const struct gq_level gq_generic;
extern const struct gq_level gq_avx2;   // AVX2, F16C
extern const struct gq_level gq_avx512; // AVX-512 F, BW, DQ, VL

// The members of the tables, one file each: quantize4_avx2_amd64.c and so on.
#define GQ_DECLARE(level)                                                                                      \
    int64_t gq_quantize4_##level(int, int, const uint8_t *, int64_t, int64_t, float *, uint8_t *);             \
    void gq_dequantize4_##level(int, int, const uint8_t *, const float *, int64_t, int64_t, uint8_t *);        \
    int64_t gq_quantize8_##level(const float *, int, const uint8_t *, int64_t, int64_t, float *, uint8_t *);   \
    void gq_dequantize8_##level(const float *, int, const uint8_t *, const float *, int64_t, int64_t, uint8_t *)
GQ_DECLARE(generic);
GQ_DECLARE(avx2);
GQ_DECLARE(avx512);
#undef GQ_DECLARE

#endif
