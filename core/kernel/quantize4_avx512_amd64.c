// 4-bit quantization with AVX-512.

#include "vector_avx512_amd64.h"
#include "tables.h"

#define BITS 4
#define CODER int // the codebook

// One level of the search: node becomes 2·node, or 2·node+1 where y is greater than the node's threshold.
LEVEL_INLINE __m512i descend(__m512i node, __m512 y, __m512 threshold) {
    const __mmask16 greater = _mm512_cmp_ps_mask(y, threshold, _CMP_GT_OQ);
    node = _mm512_add_epi32(node, node);
    return _mm512_mask_add_epi32(node, greater, node, _mm512_set1_epi32(1));
}

// The codes of sixteen numbers, in the lower four bits. A permutation chooses a threshold by the node.
LEVEL_INLINE __m512i codes16(int codebook, __m512 y) {
    const __m512i root = _mm512_set1_epi32(1);
    if (codebook == GQ_NF4) {
        const __m512 heap = _mm512_loadu_ps(gq_nf4_heap);
        __m512i node = descend(root, y, _mm512_set1_ps(gq_nf4_heap[1]));
        for (int level = 1; level < 4; level++) node = descend(node, y, _mm512_permutexvar_ps(node, heap));
        return node;
    }
    const __m512 heap = _mm512_castps256_ps512(_mm256_loadu_ps(gq_fp4_heap));
    const __m512 magnitude = _mm512_abs_ps(y);
    __m512i node = descend(root, magnitude, _mm512_set1_ps(gq_fp4_heap[1]));
    for (int level = 1; level < 3; level++) node = descend(node, magnitude, _mm512_permutexvar_ps(node, heap));
    const __m512i code = _mm512_permutexvar_epi32(node, _mm512_loadu_si512(gq_fp4_codes));
    const __mmask16 negative = _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_or_epi32(code, negative, code, _mm512_set1_epi32(8));
}

LEVEL_INLINE void codes32(int codebook, int dtype, const uint8_t *src, float r, uint8_t *packed) {
    const __m512 scale = _mm512_set1_ps(r);
    __m128i bytes[2];
    for (int i = 0; i < 2; i++) {
        const __m512i codes = codes16(codebook, _mm512_mul_ps(load_floats(dtype, src, 16 * i), scale));
        // A pair of codes is one 64-bit number, whose low byte becomes even<<4 | odd.
        const __m512i even = _mm512_slli_epi64(codes, 4), odd = _mm512_srli_epi64(codes, 32);
        const __m512i pairs = _mm512_ternarylogic_epi64(_mm512_set1_epi64(0xf0), even, odd, 0xca); // bits of even where 0xf0 has them
        bytes[i] = _mm512_cvtepi64_epi8(pairs);
    }
    store16(packed, _mm_unpacklo_epi64(bytes[0], bytes[1]));
}

#include "quantize_frame.h"

// Not inlined: the mode is set around them.
static LEVEL_TARGET __attribute__((noinline)) int64_t quantize_nf4(int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *packed) {
    return quantize(GQ_NF4, dtype, src, n, blocksize, absmax, packed);
}

static LEVEL_TARGET __attribute__((noinline)) int64_t quantize_fp4(int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *packed) {
    return quantize(GQ_FP4, dtype, src, n, blocksize, absmax, packed);
}

int64_t gq_quantize4_avx512(int codebook, int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *packed) {
    const unsigned mode = gq_enter_ftz();
    const int64_t nonfinite = codebook == GQ_NF4 ? quantize_nf4(dtype, src, n, blocksize, absmax, packed)
                                                 : quantize_fp4(dtype, src, n, blocksize, absmax, packed);
    gq_leave_ftz(mode);
    return nonfinite;
}
