// 4-bit dequantization with AVX2.

#include "vector_avx2_amd64.h"
#include "tables.h"

// The results of a block by code: as float32 in two registers, or as the lower and the upper bytes of 16-bit numbers,
// twice, since byte shuffles work on each half of a register.
struct lut {
    __m256 first, second;
    __m256i lower, upper;
};

LEVEL_INLINE struct lut make_lut(int dtype, const float *values, float absmax) {
    const __m256 scale = _mm256_set1_ps(absmax);
    struct lut lut = {
        .first = scaled8(dtype, _mm256_loadu_ps(values), scale),
        .second = scaled8(dtype, _mm256_loadu_ps(values + 8), scale),
    };
    if (dtype != GQ_F32) {
        const __m128i a = narrow8(dtype, lut.first), b = narrow8(dtype, lut.second), low = _mm_set1_epi16(0xff);
        lut.lower = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(a, low), _mm_and_si128(b, low)));
        lut.upper = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
    }
    return lut;
}

LEVEL_INLINE void values32(int dtype, const struct lut *lut, const uint8_t *packed, uint8_t *dst) {
    const __m128i bytes = load16(packed), low = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), low), odd = _mm_and_si128(bytes, low);
    const __m128i a = _mm_unpacklo_epi8(even, odd), b = _mm_unpackhi_epi8(even, odd); // codes 0…15, 16…31
    if (dtype == GQ_F32) {
        const __m128i eights[4] = {a, _mm_srli_si128(a, 8), b, _mm_srli_si128(b, 8)};
        for (int i = 0; i < 4; i++) {
            const __m256i code = _mm256_cvtepu8_epi32(eights[i]);
            const __m256 first = _mm256_permutevar8x32_ps(lut->first, code), second = _mm256_permutevar8x32_ps(lut->second, code);
            const __m256 which = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)); // bit 3 as the sign
            store32(dst + 32 * i, _mm256_castps_si256(_mm256_blendv_ps(first, second, which)));
        }
        return;
    }
    // Codes 0…7 and 16…23 in the lower half, so that interleaving bytes gives elements in order.
    const __m256i codes = _mm256_permute4x64_epi64(_mm256_set_m128i(b, a), 0xd8);
    const __m256i lower = _mm256_shuffle_epi8(lut->lower, codes), upper = _mm256_shuffle_epi8(lut->upper, codes);
    store32(dst, _mm256_unpacklo_epi8(lower, upper));
    store32(dst + 32, _mm256_unpackhi_epi8(lower, upper));
}

#include "dequantize4_frame.h"

// Not inlined: the mode is set around it.
static LEVEL_TARGET __attribute__((noinline)) void dequantize(int codebook, int dtype, const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst) {
    dequantize4(codebook, dtype, codes, absmax, n, blocksize, dst);
}

void gq_dequantize4_avx2(int codebook, int dtype, const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst) {
    const unsigned mode = gq_enter_ftz();
    dequantize(codebook, dtype, codes, absmax, n, blocksize, dst);
    gq_leave_ftz(mode);
}
