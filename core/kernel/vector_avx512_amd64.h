// What the AVX-512 kernels share: sixteen numbers at a time.
#ifndef GQUANT_VECTOR_H
#define GQUANT_VECTOR_H

#include <immintrin.h>

#include "block.h"
#include "mode_amd64.h"

#define LEVEL_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")))
#define LEVEL_INLINE GQ_INLINE LEVEL_TARGET

LEVEL_INLINE __m512i load64(const uint8_t *src) { return _mm512_loadu_si512(src); }
LEVEL_INLINE __m256i load32(const uint8_t *src) { return _mm256_loadu_si256((const __m256i *)src); }
LEVEL_INLINE __m128i load16(const uint8_t *src) { return _mm_loadu_si128((const __m128i *)src); }
LEVEL_INLINE void store64(uint8_t *dst, __m512i v) { _mm512_storeu_si512(dst, v); }
LEVEL_INLINE void store32(uint8_t *dst, __m256i v) { _mm256_storeu_si256((__m256i *)dst, v); }
LEVEL_INLINE void store16(uint8_t *dst, __m128i v) { _mm_storeu_si128((__m128i *)dst, v); }

// See quantize_frame.h.
LEVEL_INLINE uint32_t largest(int dtype, const uint8_t *src, int64_t n) {
    __m512i top = _mm512_setzero_si512();
    if (dtype == GQ_F32) {
        const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
        for (int64_t i = 0; i < n; i += 16) top = _mm512_max_epu32(top, _mm512_and_si512(load64(src + 4 * i), magnitude));
        return _mm512_reduce_max_epu32(top);
    }
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    for (int64_t i = 0; i < n; i += 32) top = _mm512_max_epu16(top, _mm512_and_si512(load64(src + 2 * i), magnitude));
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(top), _mm512_extracti64x4_epi64(top, 1));
    const __m128i t = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    // The instruction for a horizontal extreme of 16-bit numbers finds the least.
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(t, _mm_set1_epi16(-1)));
    return ~(uint32_t)_mm_cvtsi128_si32(least) & 0xffff;
}

// The elements i … i+15.
LEVEL_INLINE __m512 load_floats(int dtype, const uint8_t *src, int64_t i) {
    if (dtype == GQ_F32) return _mm512_castsi512_ps(load64(src + 4 * i));
    if (dtype == GQ_F16) return _mm512_cvtph_ps(load32(src + 2 * i));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load32(src + 2 * i)), 16));
}

// Every NaN becomes one such that narrow gives the type's NaN with all bits set: bfloat16 rounds by an addition that all
// those bits would overflow.
LEVEL_INLINE __m512 one_nan(int dtype, __m512 x) {
    const __m512i nan = _mm512_set1_epi32(dtype == GQ_BF16 ? 0x7fff0000 : 0x7fffffff);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_castps_si512(x), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), nan));
}

// gq_scaled, sixteen times, in the mode of mode_amd64.h.
LEVEL_INLINE __m512 scaled(int dtype, __m512 values, __m512 absmax) { return one_nan(dtype, _mm512_mul_ps(values, absmax)); }

// Numbers rounded to F16 or BF16.
LEVEL_INLINE __m256i narrow(int dtype, __m512 x) {
    if (dtype == GQ_F16) return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    const __m512i b = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd), 16));
}

#endif
