// 8-bit quantization in plain C.

#include "vector_generic.h"
#include "search8.h"

#define BITS 8
#define CODER const struct gq_search *

LEVEL_INLINE uint8_t code(const struct gq_search *s, float y) {
    int node = 1;
    for (int level = 0; level < 7; level++) node = 2 * node + (y > s->heap[node]);
    const int leaf = node - 128;
    if (y > s->even[leaf]) return (uint8_t)(2 * leaf + (y > s->middle[2 * leaf + 1]));
    return (uint8_t)(2 * leaf - (leaf > 0 && y < s->middle[2 * leaf]));
}

LEVEL_INLINE void codes32(const struct gq_search *s, int dtype, const uint8_t *src, float r, uint8_t *codes) {
    for (int i = 0; i < GQ_GROUP; i++) codes[i] = code(s, gq_multiply(gq_widen(dtype, gq_load(dtype, src, i)), r));
}

#include "quantize_frame.h"

int64_t gq_quantize8_generic(const float *table, int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *codes) {
    const struct gq_search search = gq_make_search(table);
    return quantize(&search, dtype, src, n, blocksize, absmax, codes);
}
