// Calls through the table of a level, for Go, which cannot call function pointers.
#include "linear4.h"

static inline int64_t gq_call_quantize4(const struct gq_level *l, int codebook, int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *packed) {
    return l->quantize4(codebook, dtype, src, n, blocksize, absmax, packed);
}

static inline void gq_call_dequantize4(const struct gq_level *l, int codebook, int dtype, const uint8_t *packed, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst) {
    l->dequantize4(codebook, dtype, packed, absmax, n, blocksize, dst);
}

static inline int64_t gq_call_quantize8(const struct gq_level *l, const float *table, int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *codes) {
    return l->quantize8(table, dtype, src, n, blocksize, absmax, codes);
}

static inline void gq_call_dequantize8(const struct gq_level *l, const float *table, int dtype, const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst) {
    l->dequantize8(table, dtype, codes, absmax, n, blocksize, dst);
}

static inline void gq_call_absmax(const struct gq_level *l, const float *table, const uint8_t *codes, const float *nested, int64_t n, int64_t blocksize, float offset, float *absmax) {
    l->dequantize8(table, GQ_F32, codes, nested, n, blocksize, (uint8_t *)absmax);
    for (int64_t i = 0; i < n; i++) absmax[i] += offset;
}

// cgo lets Go pass no pointer to a struct of pointers, so the struct is made here.
static inline void gq_call_linear4(const struct gq_level *l, int codebook, int dtype, const uint8_t *packed, const float *absmax, int64_t blocksize, int64_t skip, int64_t rows, int64_t k, const uint8_t *x, int64_t m, const uint8_t *bias, uint8_t *y, int64_t stride, float *scratch) {
    const struct gq_linear4 layer = {codebook, dtype, packed, absmax, blocksize, skip, rows, k, x, m, bias, y, stride, scratch};
    l->linear4(&layer);
}
