// 4-bit quantization in plain C.

#include "vector_generic.h"
#include "tables.h"

#define BITS 4
#define CODER int // the codebook

LEVEL_INLINE unsigned code(int codebook, float y) {
    unsigned node = 1;
    if (codebook == GQ_NF4) {
        for (int level = 0; level < 4; level++) node = 2 * node + (y > gq_nf4_heap[node]);
        return node & 15;
    }
    const float magnitude = y < 0 ? -y : y;
    for (int level = 0; level < 3; level++) node = 2 * node + (magnitude > gq_fp4_heap[node]);
    return (unsigned)gq_fp4_codes[node] | (y < 0 ? 8 : 0);
}

LEVEL_INLINE void codes32(int codebook, int dtype, const uint8_t *src, float r, uint8_t *packed) {
    unsigned codes[GQ_GROUP];
    for (int i = 0; i < GQ_GROUP; i++) {
        const float x = gq_widen(dtype, gq_load(dtype, src, i));
        // NF4 has the same code for all numbers near zero; FP4's sign needs to know which are zero.
        codes[i] = code(codebook, codebook == GQ_NF4 ? gq_flush(x) * r : gq_multiply(x, r));
    }
    for (int i = 0; i < GQ_GROUP / 2; i++) packed[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
}

#include "quantize_frame.h"

int64_t gq_quantize4_generic(int codebook, int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *packed) {
    if (codebook == GQ_NF4) return quantize(GQ_NF4, dtype, src, n, blocksize, absmax, packed);
    return quantize(GQ_FP4, dtype, src, n, blocksize, absmax, packed);
}
