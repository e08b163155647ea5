// What the plain C kernels share.
#ifndef GQUANT_VECTOR_H
#define GQUANT_VECTOR_H

#include "block.h"

#define LEVEL_TARGET
#define LEVEL_INLINE GQ_INLINE

LEVEL_INLINE uint32_t largest(int dtype, const uint8_t *src, int64_t n) {
    uint32_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t magnitude = gq_magnitude(dtype, src, i);
        top = magnitude > top ? magnitude : top;
    }
    return top;
}

#endif
