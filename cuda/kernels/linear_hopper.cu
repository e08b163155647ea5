// y = x · Wᵀ + bias for many tokens on Hopper, W packed in 4 bits and read as it lies in memory.
//
// A CTA makes tiles of ROWS rows of W times TOKENS tokens. The decoded weights are wgmma's operand in registers, 64 rows for each warpgroup; x is
// the operand in shared memory, where tensor copies put it. In that operand thread t of a quad has byte t of each word of a row, so the quad
// reads the same 16 bytes, and one PRMT takes the byte and makes the table's address of it. Rows 2g and 2g + 1 of W are rows g and g + 8 of the
// operand (the tensor map splits rows by parity), so that two sums are one store.
//
// The warpgroups decode under the products of the k before, for which they have two sets of registers. Behind them come four warps that are some
// steps of k ahead: one copies W, one x, two make scales of absmax.
//
// Tiles that would not fill the GPU's last wave are dealt out by k (stream-K): each CTA has an equal share of their steps, those that end within a
// tile leave partial sums, and the CTA with the tile's last step adds them, in a fixed order. It waits for CTAs with lower numbers only.
// Or a cluster has a tile: its CTAs have equal parts of the steps, and each adds a part of the sums, which the others put into its shared memory.
#include "hopper_sums.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

// ---- scales: absmax / factor

template <class T, class S, bool NESTED> struct Scales {
    static constexpr int EACH = S::ROWS / 32;
    float2 absmax[EACH]; // of both blocks; nested: .x is that of the block's absmax
    u32 codes[EACH];

    static DEVICE u32 row(int i) { return threadIdx.x % 32 + 32 * i; }

    // Starts to read those of a step. Rows behind the last are like it.
    DEVICE void load(const gq_hopper_args &a, u32 first_row, u32 step) {
        const gq_weight &w = a.linear.weight;
        const int shift = w.log2 - 6; // a block is 64 << shift elements
        const u32 row_blocks = (u32)(a.linear.k >> w.log2), last = (u32)a.linear.n - 1, block_in_row = step * (STEP / 64) >> shift;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const u32 block = min(first_row + row(i), last) * row_blocks + block_in_row;
            if (NESTED) {
                const u8 *p = pointer<const u8>(w.absmax) + block;
                codes[i] = shift == 0 ? __ldg((const u16 *)p) : __ldg(p) * 0x101u;
                absmax[i].x = __ldg(pointer<const float>(w.nested_absmax) + (block >> 8)); // the same for both
            } else {
                const float *p = pointer<const float>(w.absmax) + block;
                if (shift == 0) {
                    absmax[i] = __ldg((const float2 *)p);
                } else {
                    absmax[i].x = absmax[i].y = __ldg(p);
                }
            }
        }
    }

    DEVICE void store(const gq_hopper_args &a, u8 *to, float offset, float scale) const {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            float2 v = absmax[i];
            if (NESTED) {
                const float *codebook = pointer<const float>(a.linear.weight.nested_codebook), outer = v.x;
                v.x = nested_absmax(__ldg(codebook + (codes[i] & 255)), outer, offset);
                v.y = nested_absmax(__ldg(codebook + (codes[i] >> 8)), outer, offset);
            }
            const Scale<T> first(v.x * scale), second(v.y * scale);
            *(uint4 *)(to + ((row(i) & 1) * (S::ROWS / 2) + row(i) / 2) * 16) = make_uint4(first.high, first.low, second.high, second.low);
        }
    }
};

// Brings the scales of the CTA's first step into L2.
template <class S> static DEVICE void prefetch_scales(const gq_hopper_args &a) {
    Work work(a);
    Segment s;
    if (!work.next(s)) return;
    const gq_weight &w = a.linear.weight;
    for (u32 i = threadIdx.x % 64; i < S::ROWS; i += 64) {
        const u32 row = min(s.tile / a.tiles_of_tokens * S::ROWS + i, (u32)a.linear.n - 1);
        const u32 block = row * (u32)(a.linear.k >> w.log2) + (s.first * STEP >> w.log2);
        asm volatile("prefetch.global.L2 [%0];" ::"l"(w.absmax + (uint64_t)block * (w.nested_absmax ? 1 : 4)));
    }
}

// What two warps do: each fills every other slot. It reads before it waits for the slot.
template <class T, class S, bool NESTED> static DEVICE void make_scales(const gq_hopper_args &a, u8 *shared, u32 full, u32 empty, int half) {
    const float scale = 1 / table_factor(T(), a.linear.weight.format), offset = NESTED ? __ldg(pointer<const float>(a.linear.weight.offset)) : 0;
    Work work(a);
    Segment s;
    Scales<T, S, NESTED> scales;
    u32 step = half; // of the segment
    for (u32 number = half; work.next(s);) {
        for (; step < s.count; step += 2, number += 2) {
            scales.load(a, s.tile / a.tiles_of_tokens * S::ROWS, s.first + step);
            const u32 slot = number % S::W_SLOTS;
            barrier_wait(empty + slot * 8, number / S::W_SLOTS & 1 ^ 1);
            scales.store(a, shared + S::SCALES + slot * S::SCALE_SLOT, offset, scale);
            arrive_together(full + slot * 8);
        }
        step -= s.count;
    }
}

// ---- the kernel

template <class T, class S> static DEVICE void linear_hopper(const TensorMap *w_map, const TensorMap *x_map, const gq_hopper_args &a) {
    extern __shared__ __align__(1024) u8 shared[];
    const int thread = threadIdx.x;
    const u32 lane = thread % 32;
    const u32 base = (u32)__cvta_generic_to_shared(shared);
    const u32 x_full = base + S::BARRIERS, x_empty = x_full + S::X_SLOTS * 8, w_full = x_empty + S::X_SLOTS * 8, w_empty = w_full + S::W_SLOTS * 8;
    const u32 sums_full = w_empty + S::W_SLOTS * 8;
    const bool splits = a.cluster > 1; // tiles
    if (thread == S::THREADS) { // which copies W
        prefetch_map(w_map);
        for (int i = 0; i < S::W_SLOTS; i++) {
            barrier_init(w_full + i * 8, 1 + WARP_ARRIVALS); // the copy and the scales
            barrier_init(w_empty + i * 8, S::WARPS * WARP_ARRIVALS);
        }
        publish_barriers();
    } else if (thread == S::THREADS + 32) { // which copies x
        prefetch_map(x_map);
        for (int i = 0; i < S::X_SLOTS; i++) {
            barrier_init(x_full + i * 8, 1);
            barrier_init(x_empty + i * 8, S::WARPS);
        }
        barrier_init(sums_full, 1);
        publish_barriers();
        if (splits) expect_sums<S>(a, sums_full);
    }
    __syncthreads();
    if (thread >= S::THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(S::FEW_REGISTERS));
        const int warp = thread / 32 - S::WARPS;
        if (warp >= 2) {
            if (!is_settled(a.linear)) {
                prefetch_scales<S>(a);
                wait_for_kernel_before();
            }
            if (a.linear.weight.nested_absmax)
                make_scales<T, S, true>(a, shared, w_full, w_empty, warp - 2);
            else
                make_scales<T, S, false>(a, shared, w_full, w_empty, warp - 2);
        } else if (lane == 0) {
            Work work(a);
            Segment s;
            if (warp == 0) {
                Place<S::W_SLOTS> w = {0, 1};
                if (!is_settled(a.linear)) {
                    if (Work(a).next(s)) {
                        for (u32 i = 0; i < min(s.count, (u32)S::W_SLOTS); i++)
                            prefetch_box(w_map, (s.first + i) * (STEP / 2), s.tile / a.tiles_of_tokens * (S::ROWS / 2), 0);
                    }
                    wait_for_kernel_before();
                }
                while (work.next(s)) {
                    for (u32 i = 0; i < s.count; i++, w.advance()) {
                        barrier_wait(w_empty + w.slot * 8, w.parity);
                        arrive_expecting(w_full + w.slot * 8, S::W_SLOT);
                        copy_box(base + S::W + w.slot * S::W_SLOT, w_map, (s.first + i) * (STEP / 2), s.tile / a.tiles_of_tokens * (S::ROWS / 2), 0, w_full + w.slot * 8);
                    }
                }
            } else {
                Place<S::X_SLOTS> x = {0, 1};
                bool more = work.next(s);
                wait_for_kernel_before();
                let_next_kernel_start();
                for (; more; more = work.next(s)) {
                    for (u32 i = s.first * (STEP / 64); i < (s.first + s.count) * (STEP / 64); i++, x.advance()) {
                        barrier_wait(x_empty + x.slot * 8, x.parity);
                        arrive_expecting(x_full + x.slot * 8, S::X_SLOT);
                        copy_box(base + x.slot * S::X_SLOT, x_map, i * 64, s.tile % a.tiles_of_tokens * S::TOKENS, x_full + x.slot * 8);
                    }
                }
            }
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::MANY_REGISTERS));
    fill_table<T, S::ENTRY>(shared + S::TABLE, a.linear.weight.format, thread, S::THREADS);
    group_sync<1>(S::THREADS);

    const u32 t = lane % 4, lane_offset = lane * 4;
    const u32 row = thread / 32 * 8 + lane / 4; // of the even rows of a slot, and of the odd ones
    const u32 swizzle = row >> 1 & 3;           // of the 16-byte pieces of a row of 64 bytes
    const uint64_t x_descriptor = describe(base);
    const u32 select = 0x5504 | t << 4, turn = 8 * t + 25 & 31;
    const u8 *const my_w = shared + S::W + row * 64, *const my_scales = shared + S::SCALES + row * 16;
    const auto pair = [&](u32 word) { // of byte t
        const u32 offset = S::ENTRY == 256 ? __byte_perm(word, lane_offset, select) : __funnelshift_r(word, word, turn) & 0x7f80 | lane_offset;
        return *(const u32 *)(shared + S::TABLE + offset);
    };

    float sum[S::TOKENS / 2];
    u32 operand[2][16];
    uint4 packed[2]; // 32 elements of an even row and of an odd one
    Scale<T> scale[2] = {0, 0};
    Place<S::W_SLOTS> w = {0, 0};
    Place<S::X_SLOTS> x = {0, 0}, done = {0, 0};
    const auto load_packed = [&](int quarter) { // of a slot of W
#pragma unroll
        for (int odd = 0; odd < 2; odd++) packed[odd] = *(const uint4 *)(my_w + w.slot * S::W_SLOT + odd * (S::W_SLOT / 2) + ((quarter ^ swizzle) << 4));
    };
    const auto load = [&](int half) { // what decoding a half begins with
        if (half == 0) barrier_wait(w_full + w.slot * 8, w.parity);
        load_packed(2 * half);
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            const uint2 v = *(const uint2 *)(my_scales + w.slot * S::SCALE_SLOT + odd * (S::SCALE_SLOT / 2) + half * 8);
            scale[odd].high = v.x;
            scale[odd].low = v.y;
        }
    };
    const auto decode = [&](u32 v[8], const uint4 from[2]) {
#pragma unroll
        for (int i = 0; i < 4; i++) { // words of 8 elements: two are an operand
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                const uint4 &q = from[odd];
                v[2 * i + odd] = scale[odd].times(pair(i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w));
            }
        }
    };

    Work work(a);
    Segment s;
    // With while (work.next(s)), or a return in it, ptxas takes the shared memory's address for different in each lane: 10 % slower.
    for (bool more = work.next(s); more; more = work.next(s)) {
#pragma unroll
        for (int i = 0; i < S::TOKENS / 2; i++) sum[i] = 0;
        load(0);
        bool first = true;
#pragma unroll 1
        for (u32 step = 0; step < s.count; step++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32(&v)[16] = operand[half];
                const uint4 early[2] = {packed[0], packed[1]};
                load_packed(2 * half + 1);
                decode(v, early);
                decode(v + 8, packed);
                if (half == 1) {
                    arrive_together(w_empty + w.slot * 8);
                    w.advance();
                }
                barrier_wait(x_full + x.slot * 8, x.parity);
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < 4; i++) wgmma(T(), sum, v + 4 * i, x_descriptor + (x.slot * (S::X_SLOT >> 4) + 2 * i));
                wgmma_commit();
                x.advance();
                if (half == 0)
                    load(1);
                else if (step + 1 < s.count)
                    load(0);
                wgmma_wait<1>();
                if (!first) { // the products before these are done
                    if (lane == 0) arrive(x_empty + done.slot * 8);
                    done.advance();
                }
                first = false;
            }
        }
        wgmma_wait<0>();
        // The compiler does not know that wgmma goes on by itself: the sums may be read from here on only.
#pragma unroll
        for (int i = 0; i < S::TOKENS / 2; i++) asm volatile("" : "+f"(sum[i])::"memory");
        if (lane == 0) arrive(x_empty + done.slot * 8);
        done.advance();

        if (splits) {
            gather<T, S>(a, sum, s.tile, shared, sums_full);
            continue; // to no other tile
        }
        wait_for_kernel_before(); // which may still use the workspace and y
        if (s.first + s.count < a.steps) {
            leave_partial<S>(a, sum);
            continue;
        }
        if (s.first > 0) add_partials<S>(a, sum, s.tile);
        write<T, S>(a, sum, s.tile, shared + S::Y, row);
    }
}
#endif

// ---- the kernels: gq_linear_hopper_<dtype>_<rows>_<tokens>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#define KERNEL(dtype, T, rows, tokens, ...)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(GQ_HOPPER_THREADS(rows), 1) gq_linear_hopper_##dtype##_##rows##_##tokens(                                \
        const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map, const gq_hopper_args a) {                                   \
        linear_hopper<T, Shape<rows, tokens, __VA_ARGS__>>(&w_map, &x_map, a);                                                                      \
    }
#define EACH_DTYPE(...) KERNEL(f16, F16, __VA_ARGS__) KERNEL(bf16, BF16, __VA_ARGS__)
GQ_HOPPER_TILES(EACH_DTYPE)
#endif
