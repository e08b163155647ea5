// linear_hopper.cu: what becomes of a tile's sums. sum[4j … 4j+3] of a thread are of tokens 8j + 2t and 8j + 2t + 1 and two rows.
#pragma once

#include "hopper.cuh"
#include "hopper_tile.cuh"

// ---- what CTAs give one another of their sums: the upper 24 bits, for it is bytes that take the time, and 2^-16 of a part is little beside the rounding
// of a result. A thread's sums of 32 tokens, a group of 16, are three pieces of 16 bytes.

static constexpr int PIECES = 3;

static DEVICE void pack(uint4 (&to)[PIECES], const float *sum) {
    u32 w[4 * PIECES];
#pragma unroll
    for (int q = 0; q < 4; q++) { // the fourth goes into the free bytes of three
        const u32 fourth = __float_as_uint(sum[4 * q + 3]);
#pragma unroll
        for (int i = 0; i < PIECES; i++) w[PIECES * q + i] = __byte_perm(__float_as_uint(sum[4 * q + i]), fourth, 0x5321 + (i << 12));
    }
#pragma unroll
    for (int i = 0; i < PIECES; i++) to[i] = make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
}

static DEVICE void add_packed(float *sum, const uint4 (&from)[PIECES]) {
    u32 w[4 * PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        w[4 * i] = from[i].x;
        w[4 * i + 1] = from[i].y;
        w[4 * i + 2] = from[i].z;
        w[4 * i + 3] = from[i].w;
    }
#pragma unroll
    for (int q = 0; q < 4; q++) {
        const u32 *three = w + PIECES * q;
#pragma unroll
        for (int i = 0; i < PIECES; i++) sum[4 * q + i] += __uint_as_float(three[i] << 8);
        sum[4 * q + 3] += __uint_as_float(__byte_perm(__byte_perm(three[0], three[1], 0x7300), three[2], 0x7324) & ~255u);
    }
}

// ---- by way of the workspace

// Writes this CTA's sums where the tile's last CTA finds them.
template <class S> static DEVICE void leave_partial(const gq_hopper_args &a, const float (&sum)[S::TOKENS / 2]) {
    uint4 *to = pointer<uint4>(a.partial) + (int64_t)blockIdx.x * (S::GROUPS * PIECES) * S::THREADS + threadIdx.x;
#pragma unroll
    for (int g = 0; g < S::GROUPS; g++) {
        uint4 piece[PIECES];
        pack(piece, sum + 16 * g);
#pragma unroll
        for (int i = 0; i < PIECES; i++) __stcg(to + (PIECES * g + i) * S::THREADS, piece[i]);
    }
    group_sync<1>(S::THREADS);
    if (threadIdx.x == 0)
        asm volatile("fence.acq_rel.gpu; st.release.gpu.global.u64 [%0], %1;" ::"l"(a.flags + blockIdx.x * 8), "l"(a.launch) : "memory");
}

// Adds what other CTAs have of a tile, of whose steps this one has the last. A flag has the number of the launch when the sums are there;
// it is erased, for a graph may repeat the launch.
template <class S> static DEVICE void add_partials(const gq_hopper_args &a, float (&sum)[S::TOKENS / 2], u32 tile) {
    u32 count = 1; // CTAs before this one
    while (Work::start(a.of_dealt, blockIdx.x - count) > tile * a.steps) count++;
    if (threadIdx.x < count) {
        const uint64_t flag = a.flags + (blockIdx.x - 1 - threadIdx.x) * 8;
        uint64_t seen;
        do asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
        while (seen != a.launch);
        asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"((uint64_t)0) : "memory");
    }
    group_sync<1>(S::THREADS);
    // So many groups are under way as registers allow, AT_ONCE of each of some CTAs.
    constexpr int AT_ONCE = S::GROUPS % 4 == 0 ? 4 : S::GROUPS % 3 == 0 ? 3 : S::GROUPS, CTAS = (S::TOKENS <= 128 && S::ROWS == 128 ? 8 : 4) / AT_ONCE;
#pragma unroll
    for (int g0 = 0; g0 < S::GROUPS; g0 += AT_ONCE) {
        for (u32 c0 = 1; c0 <= count; c0 += CTAS) {
            uint4 piece[CTAS][AT_ONCE][PIECES];
#pragma unroll
            for (int c = 0; c < CTAS; c++) {
                const uint4 *from = pointer<uint4>(a.partial) + ((int64_t)(blockIdx.x - min(c0 + c, count)) * S::GROUPS + g0) * PIECES * S::THREADS + threadIdx.x;
#pragma unroll
                for (int i = 0; i < AT_ONCE * PIECES; i++) piece[c][i / PIECES][i % PIECES] = c0 + c <= count ? __ldcg(from + i * S::THREADS) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int c = 0; c < CTAS; c++) {
#pragma unroll
                for (int g = 0; g < AT_ONCE; g++) add_packed(sum + 16 * (g0 + g), piece[c][g]);
            }
        }
    }
}

// ---- by way of a cluster's shared memory

// Announces the sums that come to this CTA from the others of its cluster.
template <class S> static DEVICE void expect_sums(const gq_hopper_args &a, u32 barrier) {
    const u32 units = (S::UNITS - cluster_rank() + a.cluster - 1) / a.cluster;
    arrive_expecting(barrier, (a.cluster - 1) * units * S::UNIT);
}

// Gives each CTA of a cluster its part of the sums of their tile, adds the own part in the order of the CTAs and writes it. Units are dealt out one by one.
template <class T, class S> static DEVICE void gather(const gq_hopper_args &a, const float (&sum)[S::TOKENS / 2], u32 tile, u8 *shared, u32 barrier) {
    constexpr int PIECE = S::UNIT / PIECES;
    const u32 split = a.cluster, rank = cluster_rank(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    cluster_arrive();
    cluster_wait(); // all have done with x and W
    u8 *const sums = shared + rank * S::UNIT + lane * 16;
    u32 owner = warp % split, place = warp / split;
#pragma unroll
    for (int g = 0; g < S::GROUPS; g++) {
        u8 *to = sums + place * split * S::UNIT;
        uint4 piece[PIECES];
        pack(piece, sum + 16 * g);
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            if (owner == rank)
                *(uint4 *)(to + i * PIECE) = piece[i];
            else
                store_remote(remote(shared_address(to + i * PIECE), owner), piece[i], remote(barrier, owner));
        }
        owner += S::WARPS % split;
        place += S::WARPS / split;
        if (owner >= split) {
            owner -= split;
            place++;
        }
    }
    group_sync<1>(S::THREADS);
    barrier_wait_cluster(barrier, 0);
    wait_for_kernel_before(); // which may still use y
    for (u32 i = warp; i * split + rank < S::UNITS; i += S::WARPS) {
        const u32 unit = i * split + rank, row = tile / a.tiles_of_tokens * S::ROWS + unit % S::WARPS * 16 + lane / 4 * 2;
        const int64_t token = (int64_t)(tile % a.tiles_of_tokens) * S::TOKENS + unit / S::WARPS * 32 + lane % 4 * 2;
        if (row >= a.linear.n) continue; // n is even
        const u16 *p = pointer<const u16>(a.linear.bias) + row;
        const float even = a.linear.bias ? T::widen(__ldg(p)) : 0, odd = a.linear.bias ? T::widen(__ldg(p + 1)) : 0;
        float v[16] = {};
        for (u32 r = 0; r < split; r++) {
            uint4 piece[PIECES];
#pragma unroll
            for (int k = 0; k < PIECES; k++) piece[k] = *(const uint4 *)(shared + (i * split + r) * S::UNIT + k * PIECE + lane * 16);
            add_packed(v, piece);
        }
        u16 *y = pointer<u16>(a.linear.y) + token * a.linear.n + row;
#pragma unroll
        for (int j = 0; j < 4; j++, y += 8 * a.linear.n) { // 8 tokens
            if (token + 8 * j < a.linear.m) *(u32 *)y = T::narrow2(v[4 * j] + even, v[4 * j + 2] + odd);
            if (token + 8 * j + 1 < a.linear.m) *(u32 *)(y + a.linear.n) = T::narrow2(v[4 * j + 1] + even, v[4 * j + 3] + odd);
        }
    }
}

// ---- results

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
        constexpr int WIDTH = S::ROWS / 8, EACH = S::STAGED * WIDTH / S::THREADS; // pieces of 16 bytes: in a token's rows, and of a thread
        static_assert(S::STAGED * WIDTH % S::THREADS == 0, "");
        uint4 v[EACH];
        const auto piece = [&](int i) { return threadIdx.x + i * S::THREADS; };
#pragma unroll
        for (int i = 0; i < EACH; i++) v[i] = *(const uint4 *)(staged + piece(i) / WIDTH * S::Y_STRIDE + piece(i) % WIDTH * 16);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int64_t token = first_token + q * S::STAGED + piece(i) / WIDTH;
            const u32 column = first_row + piece(i) % WIDTH * 8;
            if (token < a.linear.m && column < a.linear.n) *(uint4 *)(pointer<u16>(a.linear.y) + token * a.linear.n + column) = v[i];
        }
    }
}
