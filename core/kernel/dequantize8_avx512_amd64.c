// 8-bit dequantization with AVX-512.

#include "vector_avx512_amd64.h"

LEVEL_INLINE void values16(int dtype, const float *table, const uint8_t *codes, float absmax, uint8_t *dst) {
    const __m512i code = _mm512_cvtepu8_epi32(load16(codes));
    const __m512 x = scaled(dtype, _mm512_i32gather_ps(code, table, 4), _mm512_set1_ps(absmax));
    if (dtype == GQ_F32) {
        store64(dst, _mm512_castps_si512(x));
    } else {
        store32(dst, narrow(dtype, x));
    }
}

enum { STEP = 16 };
#define VALUES values16
#include "dequantize8_frame.h"

// Not inlined: the mode is set around it.
static LEVEL_TARGET __attribute__((noinline)) void dequantize(const float *table, int dtype, const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst) {
    dequantize8(table, dtype, codes, absmax, n, blocksize, dst);
}

void gq_dequantize8_avx512(const float *table, int dtype, const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst) {
    const unsigned mode = gq_enter_ftz();
    dequantize(table, dtype, codes, absmax, n, blocksize, dst);
    gq_leave_ftz(mode);
}
