// The 4-bit linear layer in plain C.

#include "vector_generic.h"
#include "tables.h"
#include "linear4.h"

// Four floats, which compilers keep in a register of their machine.
typedef float vec __attribute__((vector_size(16)));
#define LANES 4
#define TILE 2
#define ROWS(m) ((m) == 1 ? 4 : (m) <= 4 ? 2 : 1)
#define DEQUANTIZE gq_dequantize4_generic

LEVEL_INLINE vec zero(void) { return (vec){0}; }
LEVEL_INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
LEVEL_INLINE vec fuse(vec a, vec b, vec sum) { return a * b + sum; } // fused or not, as the compiler likes

LEVEL_INLINE vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

LEVEL_INLINE float sum1(vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }

LEVEL_INLINE void sum4(vec a, vec b, vec c, vec d, float *sums) {
    sums[0] = sum1(a), sums[1] = sum1(b), sums[2] = sum1(c), sums[3] = sum1(d);
}

struct lut {
    float values[16];
};

LEVEL_INLINE struct lut make_lut(const float *values, float absmax) {
    struct lut lut;
    for (int code = 0; code < 16; code++) lut.values[code] = gq_scaled(values[code], absmax);
    return lut;
}

// Elements in order.
LEVEL_INLINE vec lookup(const struct lut *lut, const uint8_t *packed, int v) {
    const uint8_t a = packed[2 * v], b = packed[2 * v + 1];
    return (vec){lut->values[a >> 4], lut->values[a & 15], lut->values[b >> 4], lut->values[b & 15]};
}

LEVEL_INLINE void arrange32(int dtype, const uint8_t *src, float *out) {
    for (int i = 0; i < GQ_GROUP; i++) out[i] = gq_widen(dtype, gq_load(dtype, src, i));
}

LEVEL_INLINE int narrow_all(int dtype, const float *sums, const uint8_t *bias, uint8_t *dst, int n) {
    (void)dtype, (void)sums, (void)bias, (void)dst, (void)n;
    return 0;
}

#include "linear4_frame.h"

void gq_linear4_generic(const struct gq_linear4 *l) { linear4(l); }
