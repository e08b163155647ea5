// The bias in every row of y, for products that are added to y, and for those of no elements.
#include "common.cuh"

static constexpr int THREADS = 256;

template <class T> static DEVICE void fill(const gq_bias_args &a) {
    typedef typename T::Bits Bits;
    const Bits *bias = pointer<const Bits>(a.bias);
    for (int64_t row = blockIdx.y; row < a.m; row += gridDim.y)
        for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < a.n; i += (int64_t)gridDim.x * THREADS)
            pointer<Bits>(a.y)[row * a.n + i] = bias[i];
}

extern "C" __global__ void __launch_bounds__(THREADS) gq_bias_f32(gq_bias_args a) { fill<F32>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) gq_bias_f16(gq_bias_args a) { fill<F16>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) gq_bias_bf16(gq_bias_args a) { fill<BF16>(a); }
