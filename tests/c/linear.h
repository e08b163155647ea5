/* Linear layers for the tests of gq_linear: random numbers in each dtype, quantized weights with what they stand for, sums in float64. */
#ifndef LINEAR_H
#define LINEAR_H

#include "check.h"

static uint64_t linear_seed = 20261;

static inline uint32_t linear_bits(void) {
    linear_seed = linear_seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(linear_seed >> 32);
}

/* Near normally distributed, as the sum of four. */
static inline float linear_normal(void) {
    float x = 0;
    for (int i = 0; i < 4; i++) x += (float)(int32_t)linear_bits() / 2147483648.0f;
    return x;
}

/* ---- elements */

static inline size_t linear_size(gq_dtype dtype) { return dtype == GQ_F32 ? 4 : 2; }

static inline float linear_get(const void *data, int64_t i, gq_dtype dtype) {
    uint32_t bits;
    float x;
    if (dtype == GQ_F32) return ((const float *)data)[i];
    bits = ((const uint16_t *)data)[i];
    if (dtype == GQ_BF16) bits <<= 16;
    else bits = (bits & 0x8000) << 16 | (bits & 0x7fff) << 13;
    memcpy(&x, &bits, 4);
    return dtype == GQ_BF16 ? x : x * 0x1p112f; /* float16's exponents begin 112 later */
}

/* Rounds to nearest, ties to even, if the number is not too large. */
static inline void linear_put(void *data, int64_t i, float x, gq_dtype dtype) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (dtype == GQ_F32) {
        ((float *)data)[i] = x;
        return;
    }
    if (dtype == GQ_BF16) {
        bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    } else if (bits >= 0x38800000) {
        bits = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    } else { /* a subnormal float16: the sum's last bit is that of float16 */
        x = (x < 0 ? -x : x) + 0.5f;
        memcpy(&bits, &x, 4);
        bits -= 0x3f000000;
    }
    ((uint16_t *)data)[i] = (uint16_t)(sign | bits);
}

/* A number rounded to a dtype's precision. */
static inline double linear_rounded(double x, gq_dtype dtype) {
    const double split = x * ((dtype == GQ_F32 ? 0x1p29 : dtype == GQ_F16 ? 0x1p42 : 0x1p45) + 1);
    return split - (split - x);
}

/* n elements of memory of their own. */
static inline void *linear_random(int64_t n, gq_dtype dtype) {
    void *data = malloc((size_t)n * linear_size(dtype) + 1);
    for (int64_t i = 0; i < n; i++) linear_put(data, i, linear_normal(), dtype);
    return data;
}

/* ---- weights */

struct linear_weight {
    gq_state_desc desc; /* of the state; the parts are this struct's */
    gq_state *state;
    int64_t n, k;
    float *values;      /* what gq_dequantize makes of it */
};

/* A weight of random numbers. */
static inline struct linear_weight linear_weight(gq_format format, int64_t n, int64_t k, int64_t blocksize, int nested) {
    struct linear_weight w = {GQ_STATE_DESC_INIT, NULL, n, k, NULL};
    const int64_t shape[2] = {n, k};
    gq_quantize_options options = GQ_QUANTIZE_OPTIONS_INIT;
    options.blocksize = blocksize;
    options.nested = nested;
    OK(gq_quantized_layout(format, shape, 2, &options, &w.desc.parts));
    w.desc.parts.codebook_bytes = 0;
    gq_addr *part = &w.desc.parts.packed; /* address, bytes, address, bytes, … */
    for (int i = 0; i < 10; i += 2)
        if (part[i + 1]) part[i] = GQ_ADDR(malloc((size_t)part[i + 1]));
    w.desc.format = format;
    w.desc.dtype = GQ_F32;
    w.desc.blocksize = blocksize;
    w.desc.nested_blocksize = nested ? 256 : 0;
    w.desc.shape = GQ_ADDR(shape);
    w.desc.ndim = 2;
    float *source = linear_random(n * k, GQ_F32);
    OK(gq_quantize(format, GQ_ADDR(source), GQ_F32, shape, 2, &options, &w.desc.parts, NULL, NULL));
    free(source);
    OK(gq_state_create(&w.desc, &w.state));
    OK(gq_state_get_desc(w.state, &w.desc)); /* the shape is the state's now */
    w.values = malloc((size_t)(n * k) * 4 + 1);
    OK(gq_dequantize(w.state, GQ_ADDR(w.values), (size_t)(n * k) * 4, GQ_F32, NULL));
    return w;
}

static inline void linear_free(struct linear_weight *w) {
    OK(gq_state_free(w->state));
    const gq_addr *part = &w->desc.parts.packed;
    for (int i = 0; i < 10; i += 2) free((void *)(uintptr_t)part[i]);
    free(w->values);
}

/* ---- sums */

/* y = x · Wᵀ with m rows of x, in float64, without a bias. */
static inline double *linear_exact(const void *x, int64_t m, gq_dtype dtype, const float *weight, int64_t n, int64_t k) {
    double *y = malloc((size_t)(m * n) * 8 + 1), *row = malloc((size_t)k * 8 + 1);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < k; j++) row[j] = linear_get(x, i * k + j, dtype);
        for (int64_t r = 0; r < n; r++) {
            const float *w = weight + r * k;
            double sum = 0;
            for (int64_t j = 0; j < k; j++) sum += row[j] * w[j];
            y[i * n + r] = sum;
        }
    }
    free(row);
    return y;
}

/* Newton's, so that nobody needs libm. */
static inline double linear_root(double x) {
    double root = 1;
    for (int i = 0; i < 200 && x > 0; i++) root = (root + x / root) / 2;
    return x > 0 ? root : 0;
}

#endif
