// Elements to 4-bit and 8-bit codes, in blocks with an absmax each.
//
// quantize_fast takes whole tiles of aligned data: a thread holds groups of 8 neighbouring elements in registers, the threads that share
// a block find its absmax with shuffles, and a table leaves one comparison to make for a code. quantize_plain takes any alignment and length, a warp per block,
// and compares with every threshold as bitsandbytes' decision tree does; it is the reference, and does what quantize_fast leaves over.
#include "common.cuh"

static constexpr int WARP = 32;
static constexpr int LANE = GQ_QUANTIZE_LANE; // neighbouring elements of a thread
static constexpr u32 ALL = 0xffffffffu;

// ---- finding codes

// Numbers equal to a threshold get the lower code. Four of NF4's are 1 ulp away from the middle.
static __constant__ const float NF4_THRESHOLDS[15] = {
    -0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f, -0.23460740596055984f,
    -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f, 0.1202552504837513f, 0.2035212516784668f,
    0.2920137718319893f, 0.3893125355243683f, 0.5016634166240692f, 0.6427869200706482f, 0.8614784181118011f,
};
static __constant__ const float FP4_THRESHOLDS[7] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f};

// FP4's magnitudes by rank have the codes 0 1 6 7 4 5 2 3.
static DEVICE u32 fp4_code(u32 rank, float y) { return (rank ^ (rank & 2) << 1) | (y < 0 ? 8u : 0u); }

// A number is scaled to 0…124 and rounded; its upper five bits are a bucket that holds at most one threshold, since those are at least
// 0.083 apart and a bucket is 1/15.5 wide (for FP4, whose magnitudes are looked up, 1/31). Buckets without one get a threshold that is never passed.
static constexpr float ROUND = 12582912.0f; // 1.5 · 2^23: adding it rounds to an integer, in the lower bits of the sum

template <int N> static DEVICE void fill_buckets(float *threshold, u32 *base, const float *thresholds, float scale, float zero) {
    if (threadIdx.x < 32) {
        const int bucket = threadIdx.x;
        const float start = (4 * bucket - 0.5f - zero) / scale, end = (4 * bucket + 3.5f - zero) / scale;
        u32 below = 0;
        float own = __int_as_float(0x7f800000);
        for (int i = 0; i < N; i++) {
            if (thresholds[i] <= start) below++;
            else if (thresholds[i] < end) own = thresholds[i];
        }
        threshold[bucket] = own;
        base[bucket] = below;
    }
}

struct Buckets {
    float threshold[32];
    u32 base[32];
};

struct NF4 {
    static constexpr int BITS = 4;
    struct Shared : Buckets {};
    static DEVICE void fill(Shared &s, const gq_quantize_args &) { fill_buckets<15>(s.threshold, s.base, NF4_THRESHOLDS, 62, 62); }
    static DEVICE u32 code(const Shared &s, float y) {
        y = fmaxf(y, -1.0f); // a NaN becomes -1, whose code is 0
        const u32 bucket = (__float_as_uint(__fmaf_rn(y, 62, ROUND + 62)) & 0x7c) / 4;
        return s.base[bucket] + (y > s.threshold[bucket] ? 1u : 0u);
    }
    static DEVICE u32 plain_code(const Shared &, float y) {
        u32 rank = 0;
        for (int i = 0; i < 15; i++) rank += y > NF4_THRESHOLDS[i] ? 1 : 0;
        return rank;
    }
};

struct FP4 {
    static constexpr int BITS = 4;
    struct Shared : Buckets {};
    static DEVICE void fill(Shared &s, const gq_quantize_args &) { fill_buckets<7>(s.threshold, s.base, FP4_THRESHOLDS, 124, 0); }
    static DEVICE u32 code(const Shared &s, float y) {
        const float magnitude = fmaxf(fabsf(y), 0.0f); // 0 for a NaN
        const u32 bucket = (__float_as_uint(__fmaf_rn(magnitude, 124, ROUND)) & 0x7c) / 4;
        return fp4_code(s.base[bucket] + (magnitude > s.threshold[bucket] ? 1u : 0u), y);
    }
    static DEVICE u32 plain_code(const Shared &, float y) {
        u32 rank = 0;
        for (int i = 0; i < 7; i++) rank += fabsf(y) > FP4_THRESHOLDS[i] ? 1 : 0;
        return fp4_code(rank, y);
    }
};

// The entry of a table of 256 values that is nearest, as dQuantize of bitsandbytes searches it; core/kernel/ref8.go has the same.
struct Table {
    static constexpr int BITS = 8;
    struct Shared {
        float values[256];
    };
    static DEVICE void fill(Shared &s, const gq_quantize_args &a) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) s.values[i] = flush(pointer<const float>(a.table)[i]);
    }
    static DEVICE u32 code(const Shared &s, float y) {
        int pivot = 127, lower = 0, upper = 255;
#pragma unroll
        for (int step = 64; step > 0; step /= 2) {
            const bool right = y > s.values[pivot];
            lower = right ? pivot : lower;
            upper = right ? upper : pivot;
            pivot += right ? step : -step;
        }
        const float value = s.values[pivot];
        if (y > value) return y > mul_ftz(add_ftz(s.values[upper], value), 0.5f) ? upper : pivot;
        return y < mul_ftz(add_ftz(s.values[lower], value), 0.5f) ? lower : pivot;
    }
    static DEVICE u32 plain_code(const Shared &s, float y) { return code(s, y); }
};

// ---- whole tiles

// The first of two codes is in the high nibble.
static DEVICE constexpr int shift4(int i) { return 4 * (i ^ 1); }

template <class Codebook> static DEVICE void store_codes(u8 *codes, int64_t first, const u32 code[8]) {
    if (Codebook::BITS == 4) {
        u32 word = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) word += code[i] << shift4(i);
        __stcs((u32 *)(codes + first / 2), word);
    } else {
        uint2 words = {0, 0};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            words.x += code[i] << 8 * i;
            words.y += code[i + 4] << 8 * i;
        }
        __stcs((uint2 *)(codes + first), words);
    }
}

static constexpr int CHUNKS = GQ_QUANTIZE_CHUNKS; // of 8 elements in a thread's registers: enough loads under way
static constexpr int MOST_WARPS = 16;             // of a group of threads: one block of 4096

// A tile is CHUNKS chunks of 8 elements for each thread; a chunk of the group is whole blocks.
template <class Codebook, class T> static DEVICE void quantize_fast(const gq_quantize_args &a) {
    __shared__ typename Codebook::Shared shared;
    __shared__ float partial[CHUNKS][MOST_WARPS];
    const int chunk = blockDim.x * LANE, lanes = a.blocksize / LANE; // threads that share a block
    const int64_t base = (int64_t)blockIdx.x * CHUNKS * chunk + threadIdx.x * LANE;

    Eight<T> raw[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) raw[c].load(pointer<const u8>(a.src), base + c * chunk);
    Codebook::fill(shared, a); // while the loads are under way
    __syncthreads();

    const bool shifted = Codebook::BITS == 8 && sizeof(typename T::Bits) == 4 && a.offset;
    const float offset = shifted ? *pointer<const float>(a.offset) : 0;
    const auto elements = [&](int c, float x[8]) {
        raw[c].widen(x);
        if (shifted) {
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] -= offset;
        }
    };

    float absmax[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        float x[8];
        elements(c, x);
        absmax[c] = LOWEST;
#pragma unroll
        for (int i = 0; i < 8; i++) absmax[c] = larger(absmax[c], fabsf(x[i]));
    }
    for (int m = 1; m < lanes && m < WARP; m *= 2) {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) absmax[c] = larger(absmax[c], __shfl_xor_sync(ALL, absmax[c], m));
    }
    if (lanes > WARP) { // several warps share a block
        const int warp = threadIdx.x / WARP, warps = lanes / WARP, first = warp / warps * warps;
        if (threadIdx.x % WARP == 0) {
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) partial[c][warp] = absmax[c];
        }
        __syncthreads();
        for (int w = first; w < first + warps; w++) {
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) absmax[c] = larger(absmax[c], partial[c][w]);
        }
    }

#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int64_t first = base + c * chunk;
        const float scale = flush(absmax[c]), r = reciprocal(scale);
        if (threadIdx.x % lanes == 0) pointer<float>(a.absmax)[first >> a.log2] = scale;
        float x[8];
        elements(c, x);
        u32 code[8];
#pragma unroll
        for (int i = 0; i < 8; i++) code[i] = Codebook::code(shared, mul_ftz(x[i], r));
        store_codes<Codebook>(pointer<u8>(a.codes), first, code);
    }
}

// ---- anything

template <class Codebook, class T> static DEVICE void quantize_plain(const gq_quantize_args &a) {
    __shared__ typename Codebook::Shared shared;
    Codebook::fill(shared, a);
    __syncthreads();
    const u8 *src = pointer<const u8>(a.src);
    const float offset = a.offset ? *pointer<const float>(a.offset) : 0;
    const int64_t warps = (int64_t)gridDim.x * blockDim.x / WARP, blocks = (a.n + a.blocksize - 1) / a.blocksize;
    const int lane = threadIdx.x % WARP;
    for (int64_t block = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP; block < blocks; block += warps) {
        const int64_t start = block * a.blocksize, end = start + a.blocksize < a.n ? start + a.blocksize : a.n;
        const auto element = [&](int64_t i) { return i >= a.n ? 0.0f : a.offset ? load<T>(src, i) - offset : load<T>(src, i); };
        float absmax = LOWEST;
        for (int64_t i = start + lane; i < end; i += WARP) absmax = larger(absmax, fabsf(element(i)));
        for (int m = 1; m < WARP; m *= 2) absmax = larger(absmax, __shfl_xor_sync(ALL, absmax, m));
        absmax = flush(absmax);
        const float r = reciprocal(absmax);
        if (lane == 0) pointer<float>(a.absmax)[block] = absmax;
        u8 *codes = pointer<u8>(a.codes);
        if (Codebook::BITS == 8) {
            for (int64_t i = start + lane; i < end; i += WARP) codes[i] = (u8)Codebook::plain_code(shared, mul_ftz(element(i), r));
        } else {
            // A pair at a time; the partner of an odd last element is 0.
            for (int64_t i = start + 2 * lane; i < end; i += 2 * WARP)
                codes[i / 2] = (u8)(Codebook::plain_code(shared, mul_ftz(element(i), r)) << 4 | Codebook::plain_code(shared, mul_ftz(element(i + 1), r)));
        }
    }
}

// ---- the kernels: gq_quantize_<codebook>_<dtype> for whole tiles, …_plain for anything

#define KERNELS(codebook, Codebook, dtype, T)                                                                         \
    extern "C" __global__ void __launch_bounds__(512) gq_quantize_##codebook##_##dtype(gq_quantize_args a) {         \
        quantize_fast<Codebook, T>(a);                                                                                \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) gq_quantize_##codebook##_##dtype##_plain(gq_quantize_args a) { \
        quantize_plain<Codebook, T>(a);                                                                               \
    }
#define EACH_DTYPE(codebook, Codebook)       \
    KERNELS(codebook, Codebook, f32, F32)    \
    KERNELS(codebook, Codebook, f16, F16)    \
    KERNELS(codebook, Codebook, bf16, BF16)

EACH_DTYPE(nf4, NF4)
EACH_DTYPE(fp4, FP4)
EACH_DTYPE(table, Table)
