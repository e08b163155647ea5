// 8-bit quantization with AVX2.

#include "vector_avx2_amd64.h"
#include "search8.h"

#define BITS 8
#define CODER const struct gq_search *

LEVEL_INLINE __m256i greater(__m256 a, __m256 b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }

// The codes of eight numbers; quantize8_generic.c says the same in scalars. A comparison gives −1 for true.
LEVEL_INLINE __m256i codes8(const struct gq_search *s, __m256 y) {
    const __m256i one = _mm256_set1_epi32(1);
    const __m256 top = _mm256_loadu_ps(s->heap), bottom = _mm256_loadu_ps(s->heap + 8);
    __m256i node = one;
    for (int level = 0; level < 7; level++) {
        const __m256 pivot = level < 3    ? _mm256_permutevar8x32_ps(top, node)
                             : level == 3 ? _mm256_permutevar8x32_ps(bottom, node)
                                          : _mm256_i32gather_ps(s->heap, node, 4);
        node = _mm256_sub_epi32(_mm256_add_epi32(node, node), greater(y, pivot));
    }
    const __m256i leaf = _mm256_sub_epi32(node, _mm256_set1_epi32(128));
    const __m256i code = _mm256_add_epi32(leaf, leaf);
    const __m256i above = greater(y, _mm256_i32gather_ps(s->even, leaf, 4));
    const __m256 middle = _mm256_i32gather_ps(s->middle, _mm256_sub_epi32(code, above), 4);
    const __m256i up = _mm256_and_si256(above, greater(y, middle));
    const __m256i down = _mm256_andnot_si256(above, greater(middle, y));
    const __m256i moved = _mm256_add_epi32(_mm256_sub_epi32(code, up), down);
    return _mm256_max_epi32(moved, _mm256_setzero_si256()); // code 0 has nothing below it
}

LEVEL_INLINE void codes32(const struct gq_search *s, int dtype, const uint8_t *src, float r, uint8_t *codes) {
    const __m256 scale = _mm256_set1_ps(r);
    __m256i c[4];
    for (int i = 0; i < 4; i++) c[i] = codes8(s, _mm256_mul_ps(load8(dtype, src, 8 * i), scale));
    // The packs work on each half of a register, the permutation restores the order.
    const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
    store32(codes, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}

#include "quantize_frame.h"

// Not inlined: the mode is set around it.
static LEVEL_TARGET __attribute__((noinline)) int64_t quantize8(const struct gq_search *s, int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *codes) {
    return quantize(s, dtype, src, n, blocksize, absmax, codes);
}

int64_t gq_quantize8_avx2(const float *table, int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *codes) {
    const struct gq_search search = gq_make_search(table);
    const unsigned mode = gq_enter_ftz();
    const int64_t nonfinite = quantize8(&search, dtype, src, n, blocksize, absmax, codes);
    gq_leave_ftz(mode);
    return nonfinite;
}
