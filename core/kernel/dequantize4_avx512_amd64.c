// 4-bit dequantization with AVX-512.

#include "vector_avx512_amd64.h"
#include "tables.h"

// The results of a block by code: as float32, or as 16-bit numbers, twice, so that a permutation of 32 numbers ignores
// the fifth bit of an index.
struct lut {
    __m512i results;
};

LEVEL_INLINE struct lut make_lut(int dtype, const float *values, float absmax) {
    const __m512 results = scaled(dtype, _mm512_loadu_ps(values), _mm512_set1_ps(absmax));
    if (dtype == GQ_F32) return (struct lut){_mm512_castps_si512(results)};
    return (struct lut){_mm512_broadcast_i64x4(narrow(dtype, results))};
}

// Each byte becomes a pair of indices, byte>>4 and byte; the permutations look at no more than the lower five (16 bits) or
// four (float32) bits of an index.
LEVEL_INLINE void values32(int dtype, const struct lut *lut, const uint8_t *packed, uint8_t *dst) {
    if (dtype == GQ_F32) {
        for (int i = 0; i < 2; i++) {
            const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(packed + 8 * i)));
            const __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
            store64(dst + 64 * i, _mm512_permutexvar_epi32(index, lut->results));
        }
        return;
    }
    const __m512i bytes = _mm512_cvtepu8_epi32(load16(packed));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
    store64(dst, _mm512_permutexvar_epi16(index, lut->results));
}

#include "dequantize4_frame.h"

// Not inlined: the mode is set around it.
static LEVEL_TARGET __attribute__((noinline)) void dequantize(int codebook, int dtype, const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst) {
    dequantize4(codebook, dtype, codes, absmax, n, blocksize, dst);
}

void gq_dequantize4_avx512(int codebook, int dtype, const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst) {
    const unsigned mode = gq_enter_ftz();
    dequantize(codebook, dtype, codes, absmax, n, blocksize, dst);
    gq_leave_ftz(mode);
}
