// LLM.int8's row quantization: round(x · 127 / absmax), ties to even, of float16 (other types are rounded to it first).
#include "common.cuh"

static constexpr int THREADS = 256;
static constexpr u32 ALL = 0xffffffffu;

// One CTA per row at a time. Elements of the threshold's magnitude or more don't count for absmax, get code 0, and mark their column.
template <class T> static DEVICE void quantize_rows(const gq_rows_args &a) {
    __shared__ float partial[THREADS / 32];
    const u8 *src = pointer<const u8>(a.src);
    for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
        const int64_t start = row * a.cols;
        const auto element = [&](int64_t c) {
            const float x = load<T>(src, start + c);
            return F16::widen(F16::narrow(x));
        };
        const auto outlier = [&](float x) { return a.threshold > 0 && fabsf(x) >= a.threshold; };
        float absmax = -0.0f; // what an empty row keeps
        for (int64_t c = threadIdx.x; c < a.cols; c += THREADS) {
            const float x = element(c);
            if (outlier(x)) pointer<u8>(a.outliers)[c] = 1;
            else if (x == x) absmax = larger(absmax, fabsf(x));
        }
        for (int m = 16; m > 0; m /= 2) absmax = larger(absmax, __shfl_xor_sync(ALL, absmax, m));
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = absmax;
        __syncthreads();
        absmax = partial[0];
#pragma unroll
        for (int w = 1; w < THREADS / 32; w++) absmax = larger(absmax, partial[w]);
        __syncthreads(); // before the next row's partial maxima
        if (threadIdx.x == 0) pointer<float>(a.absmax)[row] = absmax;
        // CUDA's __fdividef: 127 times the approximate reciprocal.
        const float scale = mul_ftz(127, reciprocal(absmax));
        for (int64_t c = threadIdx.x; c < a.cols; c += THREADS) {
            const float x = element(c);
            int code = 0;
            if (!outlier(x)) {
                asm("cvt.rni.s32.f32 %0, %1;" : "=r"(code) : "f"(mul_ftz(x, scale))); // 0 for a NaN
                code = min(127, max(-128, code));
            }
            pointer<signed char>(a.codes)[start + c] = (signed char)code;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) gq_quantize_rows_f32(gq_rows_args a) { quantize_rows<F32>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) gq_quantize_rows_f16(gq_rows_args a) { quantize_rows<F16>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) gq_quantize_rows_bf16(gq_rows_args a) { quantize_rows<BF16>(a); }

// Columns with an outlier get code 0 in all rows. A thread has one column; the host need not know how many there are.
extern "C" __global__ void __launch_bounds__(THREADS) gq_clear_outliers(gq_rows_args a) {
    const int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (c >= a.cols || !pointer<const u8>(a.outliers)[c]) return;
    for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) pointer<u8>(a.codes)[row * a.cols + c] = 0;
}
