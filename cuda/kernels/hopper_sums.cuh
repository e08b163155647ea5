// linear_hopper.cu: what becomes of a tile's sums. sum[4j … 4j+3] of a thread are of tokens 8j + 2t and 8j + 2t + 1 and two rows.
#pragma once

#include "hopper.cuh"
#include "hopper_tile.cuh"

// Writes this CTA's sums where the tile's last CTA finds them.
template <class S> static DEVICE void leave_partial(const gq_hopper_args &a, const float (&sum)[S::TOKENS / 2]) {
    float4 *to = pointer<float4>(a.partial) + (int64_t)blockIdx.x * (S::TOKENS / 8) * S::THREADS + threadIdx.x;
#pragma unroll
    for (int j = 0; j < S::TOKENS / 8; j++) __stcg(to + j * S::THREADS, make_float4(sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]));
    group_sync<1>(S::THREADS);
    if (threadIdx.x == 0)
        asm volatile("fence.acq_rel.gpu; st.release.gpu.global.u64 [%0], %1;" ::"l"(a.flags + blockIdx.x * 8), "l"(a.launch) : "memory");
}

// Adds what other CTAs have of a tile, of whose steps this one has the last. A flag has the number of the launch when the sums are there;
// it is erased, for a graph may repeat the launch.
template <class S> static DEVICE void add_partials(const gq_hopper_args &a, float (&sum)[S::TOKENS / 2], u32 tile) {
    u32 count = 1; // CTAs before this one, of which some may have no share
    while (Work::share(a, blockIdx.x - count) > tile * a.steps) count++;
    if (threadIdx.x < count) {
        const u32 other = blockIdx.x - 1 - threadIdx.x;
        const uint64_t flag = a.flags + other * 8;
        uint64_t seen = a.launch;
        if (Work::share(a, other) < Work::share(a, other + 1)) {
            do asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
            while (seen != a.launch);
            asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"((uint64_t)0) : "memory");
        }
    }
    group_sync<1>(S::THREADS);
    // LOADS at a time are under way: of JS sums by 4, and of so many CTAs.
    constexpr int LOADS = 16, J = S::TOKENS / 8, JS = J < 8 ? J : 8, CTAS = LOADS / JS;
#pragma unroll
    for (int j0 = 0; j0 < J; j0 += JS) {
        for (u32 i0 = 1; i0 <= count; i0 += CTAS) {
            float4 v[CTAS][JS];
#pragma unroll
            for (int i = 0; i < CTAS; i++) {
                const u32 other = blockIdx.x - min(i0 + i, count);
                const bool has = i0 + i <= count && Work::share(a, other) < Work::share(a, other + 1);
                const float4 *from = pointer<const float4>(a.partial) + ((int64_t)other * J + j0) * S::THREADS + threadIdx.x;
#pragma unroll
                for (int j = 0; j < JS; j++) v[i][j] = has ? __ldcg(from + j * S::THREADS) : make_float4(0, 0, 0, 0);
            }
#pragma unroll
            for (int i = 0; i < CTAS; i++) {
#pragma unroll
                for (int j = 0; j < JS; j++) {
                    float *to = sum + 4 * (j0 + j);
                    to[0] += v[i][j].x;
                    to[1] += v[i][j].y;
                    to[2] += v[i][j].z;
                    to[3] += v[i][j].w;
                }
            }
        }
    }
}

// Announces the sums that come to this CTA of a cluster.
template <class S> static DEVICE void expect_sums(const gq_hopper_args &a, u32 barrier) {
    const u32 units = (S::UNITS - blockIdx.x % a.cluster + a.cluster - 1) / a.cluster;
    arrive_expecting(barrier, a.cluster * units * S::UNIT);
}

// Gives each CTA of a cluster its part of the sums of their tile, adds the own part in the order of the CTAs and writes it. Units are dealt out one by one.
template <class T, class S> static DEVICE void gather(const gq_hopper_args &a, const float (&sum)[S::TOKENS / 2], u32 tile, u8 *shared, u32 barrier) {
    const u32 split = a.cluster, rank = blockIdx.x % split, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    cluster_arrive();
    cluster_wait(); // all have done with x and W
    const u32 sums = shared_address(shared) + rank * S::UNIT + lane * 16;
    u32 owner = warp % split, place = warp / split;
#pragma unroll
    for (int j = 0; j < S::TOKENS / 8; j++) {
        store_remote(remote(sums + place * split * S::UNIT, owner), sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3], remote(barrier, owner));
        owner += S::WARPS % split;
        place += S::WARPS / split;
        if (owner >= split) {
            owner -= split;
            place++;
        }
    }
    barrier_wait_cluster(barrier, 0);
    wait_for_kernel_before(); // which may still use y
    const u32 first_row = tile / a.tiles_of_tokens * S::ROWS;
    const int64_t first_token = (int64_t)(tile % a.tiles_of_tokens) * S::TOKENS;
    for (u32 i = warp; i * split + rank < S::UNITS; i += S::WARPS) {
        const u8 *from = shared + i * split * S::UNIT + lane * 16;
        float4 v = *(const float4 *)from;
        for (u32 r = 1; r < split; r++) {
            const float4 w = *(const float4 *)(from + r * S::UNIT);
            v.x += w.x;
            v.y += w.y;
            v.z += w.z;
            v.w += w.w;
        }
        const u32 unit = i * split + rank, row = first_row + unit % S::WARPS * 16 + lane / 4 * 2;
        const int64_t token = first_token + unit / S::WARPS * 8 + lane % 4 * 2;
        if (row >= a.linear.n) continue; // n is even
        const u32 bias = a.linear.bias ? __ldg(pointer<const u16>(a.linear.bias) + row) | __ldg(pointer<const u16>(a.linear.bias) + row + 1) << 16 : 0;
        const float even = a.linear.bias ? T::widen((u16)bias) : 0, odd = a.linear.bias ? T::widen((u16)(bias >> 16)) : 0;
        u16 *y = pointer<u16>(a.linear.y) + token * a.linear.n + row;
        if (token < a.linear.m) *(u32 *)y = T::narrow2(v.x + even, v.z + odd);
        if (token + 1 < a.linear.m) *(u32 *)(y + a.linear.n) = T::narrow2(v.y + even, v.w + odd);
    }
}

// Writes a tile of y, some tokens at a time by way of shared memory, so that a token's rows are written together.
template <class T, class S> static DEVICE void write(const gq_hopper_args &a, const float (&sum)[S::TOKENS / 2], u32 tile, u8 *staged, u32 row) {
    const u32 first_row = tile / a.tiles_of_tokens * S::ROWS, t = threadIdx.x % 4;
    const int64_t first_token = (int64_t)(tile % a.tiles_of_tokens) * S::TOKENS;
    float bias[2] = {0, 0};
    if (a.linear.bias) {
#pragma unroll
        for (int odd = 0; odd < 2; odd++)
            if (first_row + 2 * row + odd < a.linear.n) bias[odd] = T::widen(__ldg(pointer<const u16>(a.linear.bias) + first_row + 2 * row + odd));
    }
#pragma unroll
    for (int q = 0; q < S::TOKENS / S::STAGED; q++) {
        if (first_token + q * S::STAGED >= a.linear.m) break;
        group_sync<1>(S::THREADS);
#pragma unroll
        for (int j = 0; j < S::STAGED / 8; j++) {
            const float *v = sum + 4 * (q * S::STAGED / 8 + j);
            u8 *to = staged + (j * 8 + 2 * t) * S::Y_STRIDE + 4 * row;
            *(u32 *)to = T::narrow2(v[0] + bias[0], v[2] + bias[1]);
            *(u32 *)(to + S::Y_STRIDE) = T::narrow2(v[1] + bias[0], v[3] + bias[1]);
        }
        group_sync<1>(S::THREADS);
        constexpr int PIECES = S::ROWS / 8; // of 16 bytes in a token's rows
#pragma unroll 1
        for (int i = threadIdx.x; i < S::STAGED * PIECES; i += S::THREADS) {
            const int64_t token = first_token + q * S::STAGED + i / PIECES;
            const u32 column = first_row + i % PIECES * 8;
            if (token < a.linear.m && column < a.linear.n)
                *(uint4 *)(pointer<u16>(a.linear.y) + token * a.linear.n + column) = *(const uint4 *)(staged + i / PIECES * S::Y_STRIDE + i % PIECES * 16);
        }
    }
}
