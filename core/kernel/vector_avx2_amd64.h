// What the AVX2 kernels share: eight numbers at a time.
#ifndef GQUANT_VECTOR_H
#define GQUANT_VECTOR_H

#include <immintrin.h>

#include "block.h"
#include "mode_amd64.h"

#define LEVEL_TARGET __attribute__((target("avx2,f16c")))
#define LEVEL_INLINE GQ_INLINE LEVEL_TARGET

LEVEL_INLINE __m256i load32(const uint8_t *src) { return _mm256_loadu_si256((const __m256i *)src); }
LEVEL_INLINE __m128i load16(const uint8_t *src) { return _mm_loadu_si128((const __m128i *)src); }
LEVEL_INLINE void store32(uint8_t *dst, __m256i v) { _mm256_storeu_si256((__m256i *)dst, v); }
LEVEL_INLINE void store16(uint8_t *dst, __m128i v) { _mm_storeu_si128((__m128i *)dst, v); }

// See quantize_frame.h.
LEVEL_INLINE uint32_t largest(int dtype, const uint8_t *src, int64_t n) {
    __m256i top = _mm256_setzero_si256();
    if (dtype == GQ_F32) {
        const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
        for (int64_t i = 0; i < n; i += 8) top = _mm256_max_epi32(top, _mm256_and_si256(load32(src + 4 * i), magnitude));
        __m128i t = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
        t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4e));
        t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0xb1));
        return (uint32_t)_mm_cvtsi128_si32(t);
    }
    const __m256i magnitude = _mm256_set1_epi16(0x7fff);
    for (int64_t i = 0; i < n; i += 16) top = _mm256_max_epi16(top, _mm256_and_si256(load32(src + 2 * i), magnitude));
    const __m128i t = _mm_max_epi16(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    // The instruction for a horizontal extreme of 16-bit numbers finds the least.
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(t, _mm_set1_epi16(-1)));
    return ~(uint32_t)_mm_cvtsi128_si32(least) & 0xffff;
}

// The elements i … i+7.
LEVEL_INLINE __m256 load8(int dtype, const uint8_t *src, int64_t i) {
    if (dtype == GQ_F32) return _mm256_castsi256_ps(load32(src + 4 * i));
    if (dtype == GQ_F16) return _mm256_cvtph_ps(load16(src + 2 * i));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(src + 2 * i)), 16));
}

// Every NaN becomes one such that narrow8 gives the type's NaN with all bits set: bfloat16 rounds by an addition that all
// those bits would overflow.
LEVEL_INLINE __m256 one_nan8(int dtype, __m256 x) {
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(dtype == GQ_BF16 ? 0x7fff0000 : 0x7fffffff));
    return _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

// gq_scaled, eight times, in the mode of mode_amd64.h.
LEVEL_INLINE __m256 scaled8(int dtype, __m256 values, __m256 absmax) { return one_nan8(dtype, _mm256_mul_ps(values, absmax)); }

// Numbers rounded to F16 or BF16.
LEVEL_INLINE __m128i narrow8(int dtype, __m256 x) {
    if (dtype == GQ_F16) return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    const __m256i b = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(0x7fff)), odd), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

#endif
