// What belongs to quantizing beside the codes: the mean of absmax, and the count of elements that are no numbers.
#include "common.cuh"

static constexpr int THREADS = 256;
static constexpr int EACH = GQ_SUM_SPAN / THREADS; // neighbours that a thread adds
static constexpr u32 ALL = 0xffffffffu;

// Neighbours are added, then neighbouring sums, and so on, the list thought of as filled up with zeros to a power of two: the order of
// core/quant's Mean. A span is a subtree, so that spans can be summed one after the other, level by level.
extern "C" __global__ void __launch_bounds__(THREADS) gq_sum(gq_sum_args a) {
    __shared__ float sums[THREADS / 32];
    const int64_t first = (int64_t)blockIdx.x * GQ_SUM_SPAN + threadIdx.x * EACH;
    float x[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) x[i] = first + i < a.n ? pointer<const float>(a.in)[first + i] : 0.0f;
#pragma unroll
    for (int step = 1; step < EACH; step *= 2) {
#pragma unroll
        for (int i = 0; i < EACH; i += 2 * step) x[i] += x[i + step];
    }
    float sum = x[0];
#pragma unroll
    for (int m = 1; m < 32; m *= 2) sum += __shfl_xor_sync(ALL, sum, m);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
        pointer<float>(a.out)[blockIdx.x] = a.count ? sum / (float)a.count : sum;
    }
}

template <class T> static DEVICE void count_nonfinite(const gq_nonfinite_args &a) {
    int found = 0;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < a.n; i += (int64_t)gridDim.x * blockDim.x) {
        const float x = T::widen(pointer<const typename T::Bits>(a.src)[i]);
        found += x - x != 0 ? 1 : 0;
    }
    for (int m = 16; m > 0; m /= 2) found += __shfl_xor_sync(ALL, found, m);
    if (threadIdx.x % 32 == 0 && found) atomicAdd(pointer<unsigned long long>(a.count), (unsigned long long)found); // integers: any order gives the same
}

extern "C" __global__ void __launch_bounds__(THREADS) gq_nonfinite_f32(gq_nonfinite_args a) { count_nonfinite<F32>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) gq_nonfinite_f16(gq_nonfinite_args a) { count_nonfinite<F16>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) gq_nonfinite_bf16(gq_nonfinite_args a) { count_nonfinite<BF16>(a); }
