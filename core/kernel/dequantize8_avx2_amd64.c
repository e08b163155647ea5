// 8-bit dequantization with AVX2.

#include "vector_avx2_amd64.h"

LEVEL_INLINE void values8(int dtype, const float *table, const uint8_t *codes, float absmax, uint8_t *dst) {
    const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes));
    const __m256 x = scaled8(dtype, _mm256_i32gather_ps(table, code, 4), _mm256_set1_ps(absmax));
    if (dtype == GQ_F32) {
        store32(dst, _mm256_castps_si256(x));
    } else {
        store16(dst, narrow8(dtype, x));
    }
}

enum { STEP = 8 };
#define VALUES values8
#include "dequantize8_frame.h"

// Not inlined: the mode is set around it.
static LEVEL_TARGET __attribute__((noinline)) void dequantize(const float *table, int dtype, const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst) {
    dequantize8(table, dtype, codes, absmax, n, blocksize, dst);
}

void gq_dequantize8_avx2(const float *table, int dtype, const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst) {
    const unsigned mode = gq_enter_ftz();
    dequantize(table, dtype, codes, absmax, n, blocksize, dst);
    gq_leave_ftz(mode);
}
