// Calls through the table of a level, for Go, which cannot call function pointers.
#include "kernel.h"

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
