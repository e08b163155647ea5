// The floating-point mode of the vector kernels.
#ifndef GQUANT_MODE_H
#define GQUANT_MODE_H

#include <immintrin.h>

// After enter, SSE and AVX instructions treat subnormal numbers as the GPU does with -ftz=true: operands count as zero
// (DAZ), and so do products that stay below 2^-126 after rounding to 24 bits (FTZ). Both decide that before they know the
// steps of subnormal numbers: 2^-126 less a quarter of such a step becomes 2^-126, less three eighths becomes zero.
// (Measured on an H200.) Conversions to and from float16 are not affected. leave restores what was.
static inline unsigned gq_enter_ftz(void) {
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
    return mode;
}

static inline void gq_leave_ftz(unsigned mode) { _mm_setcsr(mode); }

#endif
