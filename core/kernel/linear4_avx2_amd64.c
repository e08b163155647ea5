// The 4-bit linear layer with AVX2 and FMA.

#include "vector_avx2_amd64.h"
#include "tables.h"
#include "linear4.h"

#undef LEVEL_TARGET
#define LEVEL_TARGET __attribute__((target("avx2,f16c,fma")))

typedef __m256 vec;
#define LANES 8
#define TILE 3 // 12 sums, 3 vectors of x and one of the weight: all 16 registers
#define ROWS(m) ((m) <= 3 ? 2 : 1)
#define DEQUANTIZE gq_dequantize4_avx2

LEVEL_INLINE vec zero(void) { return _mm256_setzero_ps(); }
LEVEL_INLINE vec load(const float *p) { return _mm256_loadu_ps(p); }
LEVEL_INLINE void store(float *p, vec v) { _mm256_storeu_ps(p, v); }
LEVEL_INLINE vec fuse(vec a, vec b, vec sum) { return _mm256_fmadd_ps(a, b, sum); }

LEVEL_INLINE void sum4(vec a, vec b, vec c, vec d, float *sums) {
    // Each step halves the addends of a sum and puts those of two sums, then four, into a half of the register.
    const vec ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const vec cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const vec halves = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

struct lut {
    __m256 first, second;
};

LEVEL_INLINE struct lut make_lut(const float *values, float absmax) {
    const __m256 scale = _mm256_set1_ps(absmax);
    return (struct lut){_mm256_mul_ps(_mm256_loadu_ps(values), scale), _mm256_mul_ps(_mm256_loadu_ps(values + 8), scale)};
}

// Lane l of vector v has the nibble l/4 + 2v, counted from the lowest, of the 32-bit word l%4. The permutations look at no
// more than the lower three bits of an index, so that one shift makes all indices; another makes the fourth bit the sign.
LEVEL_INLINE vec lookup(const struct lut *lut, const uint8_t *packed, int v) {
    const __m256i words = _mm256_broadcastsi128_si256(load16(packed));
    const __m256i right = _mm256_add_epi32(_mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4), _mm256_set1_epi32(8 * v));
    const __m256i left = _mm256_sub_epi32(_mm256_set1_epi32(28), right);
    const __m256i index = _mm256_srlv_epi32(words, right);
    const __m256 which = _mm256_castsi256_ps(_mm256_sllv_epi32(words, left));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(lut->first, index), _mm256_permutevar8x32_ps(lut->second, index), which);
}

// A transposition of 4×8 elements to 8×4. The even one of two elements is in the higher nibble, so pairs change places.
LEVEL_INLINE void arrange32(int dtype, const uint8_t *src, float *out) {
    const vec a = load8(dtype, src, 0), b = load8(dtype, src, 8), c = load8(dtype, src, 16), d = load8(dtype, src, 24);
    const vec ab = _mm256_unpacklo_ps(a, b), AB = _mm256_unpackhi_ps(a, b);
    const vec cd = _mm256_unpacklo_ps(c, d), CD = _mm256_unpackhi_ps(c, d);
    const vec e0 = _mm256_shuffle_ps(ab, cd, 0x44), e1 = _mm256_shuffle_ps(ab, cd, 0xee); // elements 0 and 4, 1 and 5
    const vec e2 = _mm256_shuffle_ps(AB, CD, 0x44), e3 = _mm256_shuffle_ps(AB, CD, 0xee);
    store(out, _mm256_permute2f128_ps(e1, e0, 0x20));
    store(out + 8, _mm256_permute2f128_ps(e3, e2, 0x20));
    store(out + 16, _mm256_permute2f128_ps(e1, e0, 0x31));
    store(out + 24, _mm256_permute2f128_ps(e3, e2, 0x31));
}

LEVEL_INLINE int narrow_all(int dtype, const float *sums, const uint8_t *bias, uint8_t *dst, int n) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        vec x = load(sums + i);
        if (bias) x = _mm256_add_ps(x, load8(dtype, bias, i));
        x = one_nan8(dtype, x);
        if (dtype == GQ_F32) {
            store32(dst + 4 * i, _mm256_castps_si256(x));
        } else {
            store16(dst + 2 * i, narrow8(dtype, x));
        }
    }
    return i;
}

#include "linear4_frame.h"

void gq_linear4_avx2(const struct gq_linear4 *l) {
    const unsigned mode = gq_enter_ftz();
    linear4(l);
    gq_leave_ftz(mode);
}
