// 4-bit and 8-bit codes to elements: table[code] · absmax in float32, rounded once to the output type.
//
// A thread of dequantize_fast makes 16 bytes of output at a time, for which the codes are aligned and whole blocks need not be there.
// dequantize_plain makes one element per thread at any alignment; it is the reference, and does what dequantize_fast leaves over.
#include "common.cuh"

static constexpr int THREADS = 256;
static constexpr int CHUNKS = GQ_DEQUANTIZE_CHUNKS; // of 16 bytes per thread: enough loads under way

// ---- absmax of a block

// What memory has of it, so that all loads can be under way before a value is needed.
template <bool NESTED> struct BlockScale {
    float absmax; // or nested_absmax
    u8 code;
    DEVICE void load(const gq_weight &w, int64_t block) {
        absmax = NESTED ? __ldg(pointer<const float>(w.nested_absmax) + (block >> 8)) : __ldg(pointer<const float>(w.absmax) + block);
        if (NESTED) code = __ldg(pointer<const u8>(w.absmax) + block);
    }
    // The product is bitsandbytes', the sum torch's, which does not flush.
    DEVICE float value(const float *nested_codebook, float offset) const {
        return NESTED ? mul_ftz(nested_codebook[code], absmax) + offset : absmax;
    }
};

// The product as bitsandbytes' kernels have it: a NaN is the one with all bits set.
static DEVICE float scaled(float value, float absmax) { return mul_ftz(value, absmax); }

// ---- codes of a thread's elements in registers

// 16 bytes of output are 4 or 8 elements.
template <class T> struct Group {
    static constexpr int SIZE = 16 / (int)sizeof(typename T::Bits);
};

template <int BITS, int SIZE> struct Codes;
template <> struct Codes<4, 8> {
    u32 raw;
    DEVICE void load(const u8 *p) { raw = __ldcs((const u32 *)p); }
    DEVICE u32 operator[](int i) const { return raw >> 4 * (i ^ 1) & 15; }
};
template <> struct Codes<4, 4> {
    u16 raw;
    DEVICE void load(const u8 *p) { raw = __ldcs((const u16 *)p); }
    DEVICE u32 operator[](int i) const { return raw >> 4 * (i ^ 1) & 15; }
};
template <> struct Codes<8, 8> {
    uint2 raw;
    DEVICE void load(const u8 *p) { raw = __ldcs((const uint2 *)p); }
    DEVICE u32 operator[](int i) const { return (i < 4 ? raw.x : raw.y) >> 8 * (i & 3) & 255; }
};
template <> struct Codes<8, 4> {
    u32 raw;
    DEVICE void load(const u8 *p) { raw = __ldcs((const u32 *)p); }
    DEVICE u32 operator[](int i) const { return raw >> 8 * i & 255; }
};

static DEVICE uint4 group_bits(F32, const float x[4]) {
    return make_uint4(F32::narrow(x[0]), F32::narrow(x[1]), F32::narrow(x[2]), F32::narrow(x[3]));
}
template <class T> static DEVICE uint4 group_bits(T, const float x[8]) {
    return make_uint4(T::narrow2(x[0], x[1]), T::narrow2(x[2], x[3]), T::narrow2(x[4], x[5]), T::narrow2(x[6], x[7]));
}

// The table of values in shared memory.
template <int BITS> static DEVICE void fill_values(float *values, const gq_weight &w) {
    if (BITS == 4) {
        if (threadIdx.x < 16) values[threadIdx.x] = VALUES[w.format - GQ_NF4][threadIdx.x];
    } else {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) values[i] = __ldg(pointer<const float>(w.codebook) + i);
    }
}

template <int BITS, class T, bool NESTED> static DEVICE void dequantize_fast(const gq_dequantize_args &a) {
    constexpr int SIZE = Group<T>::SIZE;
    __shared__ float values[BITS == 4 ? 16 : 256];
    __shared__ float nested_codebook[NESTED ? 256 : 1];
    const int64_t groups = a.n / SIZE, start = (int64_t)blockIdx.x * CHUNKS * THREADS + threadIdx.x;
    const u8 *packed = pointer<const u8>(a.weight.packed) + a.first * BITS / 8;

    Codes<BITS, SIZE> codes[CHUNKS];
    BlockScale<NESTED> scales[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int64_t group = start + c * THREADS;
        if (group >= groups) continue;
        codes[c].load(packed + group * SIZE * BITS / 8);
        scales[c].load(a.weight, (a.first + group * SIZE) >> a.weight.log2);
    }
    fill_values<BITS>(values, a.weight); // while the loads are under way
    float offset = 0;
    if (NESTED) {
        for (int i = threadIdx.x; i < 256; i += THREADS) nested_codebook[i] = __ldg(pointer<const float>(a.weight.nested_codebook) + i);
        offset = __ldg(pointer<const float>(a.weight.offset));
    }
    __syncthreads();

#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int64_t group = start + c * THREADS;
        if (group >= groups) return;
        const float absmax = scales[c].value(nested_codebook, offset);
        float x[SIZE];
#pragma unroll
        for (int i = 0; i < SIZE; i++) x[i] = scaled(values[codes[c][i]], absmax);
        __stcs(pointer<uint4>(a.out) + group, group_bits(T(), x));
    }
}

template <bool NESTED> static DEVICE float block_absmax(const gq_weight &w, int64_t block) {
    BlockScale<NESTED> scale;
    scale.load(w, block);
    return scale.value(pointer<const float>(w.nested_codebook), NESTED ? *pointer<const float>(w.offset) : 0);
}

template <int BITS, class T> static DEVICE void dequantize_plain(const gq_dequantize_args &a) {
    __shared__ float values[BITS == 4 ? 16 : 256];
    fill_values<BITS>(values, a.weight);
    __syncthreads();
    const gq_weight &w = a.weight;
    const u8 *packed = pointer<const u8>(w.packed);
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < a.n; i += (int64_t)gridDim.x * blockDim.x) {
        const int64_t element = a.first + i, block = element >> w.log2;
        const u32 code = BITS == 8 ? packed[element] : packed[element / 2] >> (element % 2 ? 0 : 4) & 15;
        const float absmax = w.nested_absmax ? block_absmax<true>(w, block) : block_absmax<false>(w, block);
        store<T>(pointer<u8>(a.out), i, scaled(values[code], absmax));
    }
}

// ---- LLM.int8: code · absmax · (1/127), rounded after each product. A block is a row.

template <class T> static DEVICE void dequantize_rows(const gq_dequantize_args &a) {
    const gq_weight &w = a.weight;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < a.n; i += (int64_t)gridDim.x * blockDim.x) {
        const int64_t element = a.first + i;
        const float x = (float)pointer<const signed char>(w.packed)[element] * pointer<const float>(w.absmax)[element / w.blocksize];
        store<T>(pointer<u8>(a.out), i, x * 7.874015718698502e-3f);
    }
}

// ---- the kernels: gq_dequantize_<4 or 8>[_nested]_<dtype> for aligned groups, …_plain for anything, gq_dequantize_rows_<dtype>

#define KERNEL(name, ...) \
    extern "C" __global__ void __launch_bounds__(THREADS) name(gq_dequantize_args a) { __VA_ARGS__(a); }
#define EACH_DTYPE(dtype, T)                                               \
    KERNEL(gq_dequantize_4_##dtype, dequantize_fast<4, T, false>)          \
    KERNEL(gq_dequantize_4_nested_##dtype, dequantize_fast<4, T, true>)    \
    KERNEL(gq_dequantize_4_##dtype##_plain, dequantize_plain<4, T>)        \
    KERNEL(gq_dequantize_8_##dtype, dequantize_fast<8, T, false>)          \
    KERNEL(gq_dequantize_8_##dtype##_plain, dequantize_plain<8, T>)        \
    KERNEL(gq_dequantize_rows_##dtype, dequantize_rows<T>)

EACH_DTYPE(f32, F32)
EACH_DTYPE(f16, F16)
EACH_DTYPE(bf16, BF16)
