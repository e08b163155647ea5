// One number at a time: bits, conversions and the GPU's treatment of subnormal numbers.
//
// No kernel has an expression that multiplies and adds: a compiler may turn one into a fused operation, which
// rounds differently, and cgo does not let a package forbid it.
#ifndef GQUANT_SCALAR_H
#define GQUANT_SCALAR_H

#include <stdint.h>
#include <string.h>

#include "kernel.h"

// Functions of a kernel are inlined into one body per dtype and codebook, where these are constants.
#define GQ_INLINE static inline __attribute__((always_inline))

GQ_INLINE uint32_t gq_bits(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    return b;
}

GQ_INLINE float gq_float(uint32_t b) {
    float x;
    memcpy(&x, &b, 4);
    return x;
}

// Subnormal numbers become zero of the same sign.
GQ_INLINE float gq_flush(float x) {
    uint32_t b = gq_bits(x);
    return (b & 0x7f800000) == 0 ? gq_float(b & 0x80000000) : x;
}

GQ_INLINE int gq_size(int dtype) { return dtype == GQ_F32 ? 4 : 2; }

// Magnitudes with these bits or more are infinite or NaN.
GQ_INLINE uint32_t gq_infinity(int dtype) { return dtype == GQ_F32 ? 0x7f800000 : dtype == GQ_BF16 ? 0x7f80 : 0x7c00; }

// The number with the given bits.
GQ_INLINE float gq_widen(int dtype, uint32_t bits) {
    if (dtype == GQ_F32) return gq_float(bits);
    if (dtype == GQ_BF16) return gq_float(bits << 16);
    uint32_t sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) return gq_float(sign | 0x7f800000 | magnitude << 13);
    if (magnitude < 0x0400) return gq_float(sign | gq_bits((float)magnitude * 0x1p-24f)); // subnormal in f16 only
    return gq_float(sign | (magnitude + (112 << 10)) << 13);                             // bias 15 becomes 127
}

// The bits of element i.
GQ_INLINE uint32_t gq_load(int dtype, const uint8_t *src, int64_t i) {
    if (dtype == GQ_F32) {
        uint32_t b;
        memcpy(&b, src + 4 * i, 4);
        return b;
    }
    uint16_t b;
    memcpy(&b, src + 2 * i, 2);
    return b;
}

// The bits of x rounded to the nearest number of the type, ties to even.
GQ_INLINE uint32_t gq_narrow(int dtype, float x) {
    uint32_t b = gq_bits(x);
    if (dtype == GQ_F32) return b;
    uint32_t sign = b >> 16 & 0x8000, magnitude = b & 0x7fffffff;
    if (dtype == GQ_BF16) {
        if (magnitude > 0x7f800000) return b >> 16 | 0x40;
        return (b + 0x7fff + (b >> 16 & 1)) >> 16;
    }
    if (magnitude > 0x7f800000) return sign | 0x7e00 | (magnitude >> 13 & 0x3ff);
    if (magnitude >= 0x47800000) return sign | 0x7c00; // from 2^16 on infinite; 65520 and above are rounded up to it below
    if (magnitude < 0x38800000) {                      // below 2^-14 f16 has steps of 2^-24, as float32 has at 1/2
        float shifted = gq_float(magnitude) + 0.5f;
        return sign | (gq_bits(shifted) - 0x3f000000);
    }
    return sign | (((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10));
}

// x is rounded and becomes element i.
GQ_INLINE void gq_store(int dtype, uint8_t *dst, int64_t i, float x) {
    uint32_t b = gq_narrow(dtype, x);
    if (dtype == GQ_F32) {
        memcpy(dst + 4 * i, &b, 4);
    } else {
        uint16_t half = (uint16_t)b;
        memcpy(dst + 2 * i, &half, 2);
    }
}

// x·y on the GPU; Multiply in ref4.go explains.
GQ_INLINE float gq_multiply(float x, float y) {
    const double product = (double)gq_flush(x) * (double)gq_flush(y);
    if (-0x1.ffffffp-127 < product && product < 0x1.ffffffp-127) return gq_float((gq_bits(x) ^ gq_bits(y)) & 0x80000000);
    return (float)product;
}

// value·absmax on the GPU: a NaN is the positive one with all bits set.
GQ_INLINE float gq_scaled(float value, float absmax) {
    const float product = gq_multiply(value, absmax);
    return product == product ? product : gq_float(0x7fffffff);
}

#endif
