// 4-bit quantization with AVX2.

#include "vector_avx2_amd64.h"
#include "tables.h"

#define BITS 4
#define CODER int // the codebook

// One level of the search: node becomes 2·node, or 2·node+1 where y is greater than the node's threshold.
LEVEL_INLINE __m256i descend(__m256i node, __m256 y, __m256 threshold) {
    const __m256i greater = _mm256_castps_si256(_mm256_cmp_ps(y, threshold, _CMP_GT_OQ)); // −1 where it is
    return _mm256_sub_epi32(_mm256_add_epi32(node, node), greater);
}

// The codes of eight numbers. NF4 codes are the leaves of the search, the code plus 16.
LEVEL_INLINE __m256i codes8(int codebook, __m256 y) {
    const __m256i root = _mm256_set1_epi32(1);
    if (codebook == GQ_NF4) {
        // A permutation chooses from eight thresholds by the low three bits: nodes 1…7 from one register, nodes 8…15
        // from another.
        const __m256 top = _mm256_loadu_ps(gq_nf4_heap), bottom = _mm256_loadu_ps(gq_nf4_heap + 8);
        __m256i node = descend(root, y, _mm256_set1_ps(gq_nf4_heap[1]));
        node = descend(node, y, _mm256_permutevar8x32_ps(top, node));
        node = descend(node, y, _mm256_permutevar8x32_ps(top, node));
        return descend(node, y, _mm256_permutevar8x32_ps(bottom, node));
    }
    const __m256 heap = _mm256_loadu_ps(gq_fp4_heap);
    const __m256i leaves = _mm256_loadu_si256((const __m256i *)(gq_fp4_codes + 8));
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), y);
    __m256i node = descend(root, magnitude, _mm256_set1_ps(gq_fp4_heap[1]));
    node = descend(node, magnitude, _mm256_permutevar8x32_ps(heap, node));
    node = descend(node, magnitude, _mm256_permutevar8x32_ps(heap, node));
    const __m256i negative = _mm256_castps_si256(_mm256_cmp_ps(y, _mm256_setzero_ps(), _CMP_LT_OQ));
    return _mm256_or_si256(_mm256_permutevar8x32_epi32(leaves, node), _mm256_and_si256(negative, _mm256_set1_epi32(8)));
}

LEVEL_INLINE void codes32(int codebook, int dtype, const uint8_t *src, float r, uint8_t *packed) {
    const __m256 scale = _mm256_set1_ps(r);
    __m256i c[4];
    for (int i = 0; i < 4; i++) c[i] = codes8(codebook, _mm256_mul_ps(load8(dtype, src, 8 * i), scale));
    // 32 bytes; the packs work on each half of a register, the permutation restores the order.
    __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    bytes = _mm256_and_si256(bytes, _mm256_set1_epi8(15));
    // 16·even + odd
    const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
    store16(packed, _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}

#include "quantize_frame.h"

// Not inlined: the mode is set around them.
static LEVEL_TARGET __attribute__((noinline)) int64_t quantize_nf4(int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *packed) {
    return quantize(GQ_NF4, dtype, src, n, blocksize, absmax, packed);
}

static LEVEL_TARGET __attribute__((noinline)) int64_t quantize_fp4(int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *packed) {
    return quantize(GQ_FP4, dtype, src, n, blocksize, absmax, packed);
}

int64_t gq_quantize4_avx2(int codebook, int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *packed) {
    const unsigned mode = gq_enter_ftz();
    const int64_t nonfinite = codebook == GQ_NF4 ? quantize_nf4(dtype, src, n, blocksize, absmax, packed)
                                                 : quantize_fp4(dtype, src, n, blocksize, absmax, packed);
    gq_leave_ftz(mode);
    return nonfinite;
}
