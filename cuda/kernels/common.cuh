// What the kernels share: element types, the arithmetic of bitsandbytes' CUDA kernels, the 4-bit tables.
//
// All is compiled with -fmad=false, -ftz=false and IEEE division, so that an expression means what core/kernel's means on the CPU. Where bitsandbytes,
// which is built with --use_fast_math, flushes subnormal numbers or takes an approximate reciprocal, the instruction is named here.
#pragma once

#include "args.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#define DEVICE __device__ __forceinline__

template <class T> static DEVICE T *pointer(uint64_t address) { return (T *)address; }

// ---- arithmetic

static DEVICE float mul_ftz(float a, float b) {
    float r;
    asm("mul.ftz.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

static DEVICE float add_ftz(float a, float b) {
    float r;
    asm("add.ftz.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

static DEVICE float flush(float a) { return mul_ftz(a, 1.0f); }

static DEVICE float reciprocal(float a) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
    return r;
}

static __device__ const float LOWEST = -3.402823466e+38f; // where CUDA's maximum starts: the absmax of a block of NaN

// The larger number; NaN counts as none.
static DEVICE float larger(float a, float b) { return fmaxf(a, b); }

// ---- element types: their bits, and float32 from and to them. A NaN becomes the one with all bits set.

struct F32 {
    typedef u32 Bits;
    static DEVICE float widen(u32 bits) { return __uint_as_float(bits); }
    static DEVICE u32 narrow(float x) { return x == x ? __float_as_uint(x) : 0x7fffffffu; }
};

struct F16 {
    typedef u16 Bits;
    static DEVICE float widen(u16 bits) {
        float r;
        asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
        return r;
    }
    static DEVICE u16 narrow(float x) {
        u32 r; // not a 16-bit register: ptxas 13.0 stores a wrong lower byte of one
        asm("{.reg .b16 half; cvt.rn.f16.f32 half, %1; cvt.u32.u16 %0, half;}" : "=r"(r) : "f"(x));
        return (u16)r;
    }
    static DEVICE u32 narrow2(float low, float high) {
#if __CUDA_ARCH__ >= 800
        u32 r;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        return r;
#else
        return narrow(low) | (u32)narrow(high) << 16;
#endif
    }
};

struct BF16 {
    typedef u16 Bits;
    static DEVICE float widen(u16 bits) { return __uint_as_float((u32)bits << 16); }
    static DEVICE u32 narrow2(float low, float high) {
#if __CUDA_ARCH__ >= 800
        u32 r;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        return r;
#else
        return narrow(low) | (u32)narrow(high) << 16;
#endif
    }
    static DEVICE u16 narrow(float x) {
#if __CUDA_ARCH__ >= 800
        return (u16)narrow2(x, 0);
#else
        const u32 bits = __float_as_uint(x);
        return x == x ? (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : (u16)0x7fff;
#endif
    }
};

// ---- memory at any alignment

// Element i of an array that starts anywhere.
template <class T> static DEVICE float load(const u8 *array, int64_t i) {
    typename T::Bits bits = 0;
    const u8 *p = array + i * (int64_t)sizeof bits;
#pragma unroll
    for (int k = 0; k < (int)sizeof bits; k++) bits |= (typename T::Bits)((typename T::Bits)p[k] << 8 * k);
    return T::widen(bits);
}

template <class T> static DEVICE void store(u8 *array, int64_t i, float x) {
    const typename T::Bits bits = T::narrow(x);
    u8 *p = array + i * (int64_t)sizeof bits;
#pragma unroll
    for (int k = 0; k < (int)sizeof bits; k++) p[k] = (u8)(bits >> 8 * k);
}

// Data that is read or written once: it leaves the caches first.
static DEVICE uint4 load_once(const uint4 *p) { return __ldcs(p); }

// ---- 8 elements in registers

template <class T> struct Eight;

template <> struct Eight<F32> {
    uint4 low, high;
    DEVICE void load(const u8 *src, int64_t first) {
        const uint4 *p = (const uint4 *)(src + first * 4);
        low = load_once(p);
        high = load_once(p + 1);
    }
    DEVICE void widen(float x[8]) const {
        const u32 bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = __uint_as_float(bits[i]);
    }
};

template <class T> struct Eight {
    uint4 all;
    DEVICE void load(const u8 *src, int64_t first) { all = load_once((const uint4 *)(src + first * 2)); }
    DEVICE void widen(float x[8]) const {
        const u32 bits[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[2 * i] = T::widen((u16)bits[i]);
            x[2 * i + 1] = T::widen((u16)(bits[i] >> 16));
        }
    }
};

// ---- the 4-bit formats (bitsandbytes csrc/kernels.cu)

// The values of the codes. NF4's code is the rank; FP4's is a bit pattern, sign and magnitude.
static __constant__ const float VALUES[2][16] = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
     -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {0.0f, (float)(0.0625 / 12), (float)(8 / 12.), 1.0f, (float)(4 / 12.), 0.5f, (float)(2 / 12.), 0.25f,
     -0.0f, (float)(-0.0625 / 12), (float)(-8 / 12.), -1.0f, (float)(-4 / 12.), -0.5f, (float)(-2 / 12.), -0.25f},
};
