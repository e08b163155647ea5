// What quantizing to 4 and to 8 bits have in common.
#ifndef GQUANT_BLOCK_H
#define GQUANT_BLOCK_H

#include <float.h>
#include <math.h>

#include "reciprocal.h"

// The kernels work on groups of 32 elements. A shorter last group is copied into a buffer and filled up with zeros.
enum { GQ_GROUP = 32 };

// The bits of the magnitude of element i. They order like the numbers, and NaN is above all.
GQ_INLINE uint32_t gq_magnitude(int dtype, const uint8_t *src, int64_t i) {
    return gq_load(dtype, src, i) & (dtype == GQ_F32 ? 0x7fffffff : 0x7fff);
}

// scan gives the scale of a block that has NaN or infinite elements, and how many those are.
static int64_t gq_scan(int dtype, const uint8_t *src, int64_t count, float *absmax) {
    int64_t nonfinite = 0;
    uint32_t top = 0;
    int numbers = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t magnitude = gq_magnitude(dtype, src, i);
        nonfinite += magnitude >= gq_infinity(dtype);
        if (magnitude > gq_infinity(dtype)) continue;
        numbers = 1;
        if (magnitude > top) top = magnitude;
    }
    *absmax = numbers ? gq_flush(gq_widen(dtype, top)) : -FLT_MAX; // NaN only: where CUDA's maximum starts
    return nonfinite;
}

// scale gives the scale of a block whose largest magnitude has the bits top. It returns the number of NaN and infinite
// elements.
GQ_INLINE int64_t gq_scale(int dtype, const uint8_t *src, int64_t count, uint32_t top, float *absmax) {
    if (top >= gq_infinity(dtype)) return gq_scan(dtype, src, count, absmax);
    *absmax = gq_flush(gq_widen(dtype, top));
    return 0;
}

#endif
