// 8-bit quantization with AVX-512.

#include "vector_avx512_amd64.h"
#include "search8.h"

#define BITS 8
#define CODER const struct gq_search *

// One level of the search: node becomes 2·node, or 2·node+1 where y is greater than the pivot.
LEVEL_INLINE __m512i descend(__m512i node, __m512 y, __m512 pivot) {
    const __mmask16 greater = _mm512_cmp_ps_mask(y, pivot, _CMP_GT_OQ);
    node = _mm512_add_epi32(node, node);
    return _mm512_mask_add_epi32(node, greater, node, _mm512_set1_epi32(1));
}

// Entry index mod 32 of 32 numbers; mod 64 of 64; mod 128 of 128.
LEVEL_INLINE __m512 choose32(const float *table, __m512i index) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), index, _mm512_loadu_ps(table + 16));
}

LEVEL_INLINE __m512 choose64(const float *table, __m512i index) {
    const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
    return _mm512_mask_mov_ps(choose32(table, index), upper, choose32(table + 32, index));
}

LEVEL_INLINE __m512 choose128(const float *table, __m512i index) {
    const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
    return _mm512_mask_mov_ps(choose64(table, index), upper, choose64(table + 64, index));
}

// The codes of sixteen numbers; quantize8_generic.c says the same in scalars.
LEVEL_INLINE __m512i codes16(const struct gq_search *s, __m512 y) {
    // Permutations of registers are faster than gathers from memory: nodes 1…15 are in one, 16…31 in one, 32…63 in two,
    // 64…127 in four.
    const __m512 top = _mm512_loadu_ps(s->heap), next = _mm512_loadu_ps(s->heap + 16);
    __m512i node = descend(_mm512_set1_epi32(1), y, _mm512_set1_ps(s->heap[1]));
    for (int level = 1; level < 4; level++) node = descend(node, y, _mm512_permutexvar_ps(node, top));
    node = descend(node, y, _mm512_permutexvar_ps(node, next));
    node = descend(node, y, choose32(s->heap + 32, node));
    node = descend(node, y, choose64(s->heap + 64, node));

    const __m512i one = _mm512_set1_epi32(1), leaf = _mm512_sub_epi32(node, _mm512_set1_epi32(128));
    const __m512i code = _mm512_add_epi32(leaf, leaf);
    const __mmask16 above = _mm512_cmp_ps_mask(y, choose128(s->even, leaf), _CMP_GT_OQ);
    const __m512 middle = _mm512_i32gather_ps(_mm512_mask_add_epi32(code, above, code, one), s->middle, 4);
    const __mmask16 up = _mm512_mask_cmp_ps_mask(above, y, middle, _CMP_GT_OQ);
    const __mmask16 down = _mm512_mask_cmp_ps_mask((__mmask16)~above, y, middle, _CMP_LT_OQ);
    const __m512i moved = _mm512_mask_sub_epi32(_mm512_mask_add_epi32(code, up, code, one), down, code, one);
    return _mm512_max_epi32(moved, _mm512_setzero_si512()); // code 0 has nothing below it
}

LEVEL_INLINE void codes32(const struct gq_search *s, int dtype, const uint8_t *src, float r, uint8_t *codes) {
    for (int i = 0; i < 2; i++) {
        store16(codes + 16 * i, _mm512_cvtepi32_epi8(codes16(s, _mm512_mul_ps(load_floats(dtype, src, 16 * i), _mm512_set1_ps(r)))));
    }
}

#include "quantize_frame.h"

// Not inlined: the mode is set around it.
static LEVEL_TARGET __attribute__((noinline)) int64_t quantize8(const struct gq_search *s, int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *codes) {
    return quantize(s, dtype, src, n, blocksize, absmax, codes);
}

int64_t gq_quantize8_avx512(const float *table, int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *codes) {
    const struct gq_search search = gq_make_search(table);
    const unsigned mode = gq_enter_ftz();
    const int64_t nonfinite = quantize8(&search, dtype, src, n, blocksize, absmax, codes);
    gq_leave_ftz(mode);
    return nonfinite;
}
