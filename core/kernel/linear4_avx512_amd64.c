// The 4-bit linear layer with AVX-512.

#include "vector_avx512_amd64.h"
#include "tables.h"
#include "linear4.h"

typedef __m512 vec;
#define LANES 16
#define TILE 6 // 24 sums, 4 vectors of the weight and one of x: 29 of 32 registers
#define ROWS(m) ((m) == 1 ? 8 : (m) <= 4 ? 4 : 2)
#define DEQUANTIZE gq_dequantize4_avx512

LEVEL_INLINE vec zero(void) { return _mm512_setzero_ps(); }
LEVEL_INLINE vec load(const float *p) { return _mm512_loadu_ps(p); }
LEVEL_INLINE void store(float *p, vec v) { _mm512_storeu_ps(p, v); }
LEVEL_INLINE vec fuse(vec a, vec b, vec sum) { return _mm512_fmadd_ps(a, b, sum); }

LEVEL_INLINE void sum4(vec a, vec b, vec c, vec d, float *sums) {
    // Each step halves the addends of a sum and puts those of two sums, then four, into a quarter of the register.
    const vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const vec quarters = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

struct lut {
    __m512 values;
};

LEVEL_INLINE struct lut make_lut(const float *values, float absmax) {
    return (struct lut){_mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(absmax))};
}

// Lane l of vector v has the nibble l/4 + 4v, counted from the lowest, of the 32-bit word l%4. The permutation looks at no
// more than the lower four bits of an index, so that one shift makes all indices.
LEVEL_INLINE vec lookup(const struct lut *lut, const uint8_t *packed, int v) {
    const __m512i words = _mm512_broadcast_i32x4(load16(packed));
    const __m512i shifts = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(words, _mm512_add_epi32(shifts, _mm512_set1_epi32(16 * v))), lut->values);
}

// The even one of two elements is in the higher nibble.
LEVEL_INLINE void arrange32(int dtype, const uint8_t *src, float *out) {
    const vec a = load_floats(dtype, src, 0), b = load_floats(dtype, src, 16);
    const __m512i first = _mm512_setr_epi32(1, 9, 17, 25, 0, 8, 16, 24, 3, 11, 19, 27, 2, 10, 18, 26);
    store(out, _mm512_permutex2var_ps(a, first, b));
    store(out + 16, _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(4)), b));
}

LEVEL_INLINE int narrow_all(int dtype, const float *sums, const uint8_t *bias, uint8_t *dst, int n) {
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        vec x = load(sums + i);
        if (bias) x = _mm512_add_ps(x, load_floats(dtype, bias, i));
        x = one_nan(dtype, x);
        if (dtype == GQ_F32) {
            store64(dst + 4 * i, _mm512_castps_si512(x));
        } else {
            store32(dst + 2 * i, narrow(dtype, x));
        }
    }
    return i;
}

#include "linear4_frame.h"

void gq_linear4_avx512(const struct gq_linear4 *l) {
    const unsigned mode = gq_enter_ftz();
    linear4(l);
    gq_leave_ftz(mode);
}
