// 4-bit codes, one per byte, to two per byte, and back.
#include "common.cuh"

static constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) gq_pack(gq_pack_args a) {
    const u8 *codes = pointer<const u8>(a.codes);
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < (a.n + 1) / 2; i += (int64_t)gridDim.x * THREADS) {
        const u32 even = codes[2 * i] & 15, odd = 2 * i + 1 < a.n ? codes[2 * i + 1] & 15 : 0;
        pointer<u8>(a.packed)[i] = (u8)(a.low_first ? odd << 4 | even : even << 4 | odd);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) gq_unpack(gq_pack_args a) {
    u8 *codes = pointer<u8>(a.codes);
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < (a.n + 1) / 2; i += (int64_t)gridDim.x * THREADS) {
        const u32 both = pointer<const u8>(a.packed)[i], high = both >> 4, low = both & 15;
        codes[2 * i] = (u8)(a.low_first ? low : high);
        if (2 * i + 1 < a.n) codes[2 * i + 1] = (u8)(a.low_first ? high : low);
    }
}
