// linear_hopper.cu: what its kernels are made for, and which CTA does what.
#pragma once

#include "hopper.cuh"
#include "linear.cuh"

static constexpr int STEP = GQ_HOPPER_STEP; // elements of k

// What a kernel is made for, and its shared memory, from an address that is a multiple of 1024 on.
template <int ROWS_, int TOKENS_, int X_SLOTS_, int W_SLOTS_, int STAGED_, int ENTRY_> struct Shape {
    static constexpr int TOKENS = TOKENS_, X_SLOTS = X_SLOTS_, W_SLOTS = W_SLOTS_, STAGED = STAGED_, ENTRY = ENTRY_;
    static constexpr int ROWS = ROWS_, WARPS = ROWS / 16, THREADS = 32 * WARPS; // of W in a tile; that multiply
    // Registers of threads that multiply, and of the others: together what the launch gave.
    static constexpr int MANY_REGISTERS = ROWS == 128 ? 224 : 152, FEW_REGISTERS = 56;
    static constexpr int X_SLOT = TOKENS * 128;                  // 64 elements of each token
    static constexpr int W_SLOT = ROWS * STEP / 2;               // rows of 64 bytes, the even ones first
    static constexpr int SCALE_SLOT = ROWS * STEP / 64 * 8;      // a Scale for each row and 64 elements, in the same order
    static constexpr int Y_STRIDE = ROWS * 2 + 16;               // of a token
    static constexpr int W = X_SLOTS * X_SLOT;
    static constexpr int SCALES = W + W_SLOTS * W_SLOT;
    static constexpr int Y = SCALES + W_SLOTS * SCALE_SLOT;      // STAGED tokens of y
    static constexpr int TABLE = Y + STAGED * Y_STRIDE;
    static constexpr int BARRIERS = TABLE + 256 * ENTRY;         // of x: full, empty; of W: full, empty; of a cluster's sums
    static constexpr int BYTES = BARRIERS + (X_SLOTS + W_SLOTS + 1) * 16;
    static_assert(ROWS == 128 || ROWS == 192, "");
    static_assert(BYTES == GQ_HOPPER_SHARED(ROWS, TOKENS, X_SLOTS, W_SLOTS, STAGED, ENTRY) && BYTES <= 232448, "");
    static constexpr int GROUPS = TOKENS / 32; // of a thread's sums
    // A cluster's sums take the place of x and W: in units, a group of each thread of a warp, which are of 16 rows of W and 32 tokens.
    static constexpr int UNIT = 32 * 48, UNITS = GROUPS * WARPS;
    static_assert((UNITS + 7) * UNIT <= Y, "");
};

// A place in a ring, and the parity of the phase that a barrier of it is in.
template <int SLOTS> struct Place {
    u32 slot, parity;
    DEVICE void advance() {
        if (++slot == SLOTS) {
            slot = 0;
            parity ^= 1;
        }
    }
};

// Steps first … first + count of a tile.
struct Segment {
    u32 tile, first, count;
};

// A CTA's segments: its share of the tiles that are dealt out by k, from the last to the first, then whole tiles, or its part of a cluster's.
struct Work {
    const gq_hopper_args &a;
    u32 end, whole;
    DEVICE Work(const gq_hopper_args &args) : a(args), end(start(args.of_dealt, blockIdx.x + 1)), whole(args.dealt + cluster_number()) {}
    // Where the share of number i starts. Without a division: a CTA's first copies wait for this.
    static DEVICE u32 start(const gq_share &share, u32 i) { return i * share.each + min(i, share.more); }
    DEVICE bool next(Segment &s) {
        const u32 begin = start(a.of_dealt, blockIdx.x);
        if (end > begin) {
            s.tile = (end - 1) / a.steps;
            s.first = max(s.tile * a.steps, begin) - s.tile * a.steps;
            s.count = end - s.tile * a.steps - s.first;
            end -= s.count;
            return true;
        }
        if (whole >= a.tiles) return false;
        s.tile = whole;
        s.first = start(a.of_tile, cluster_rank());
        s.count = start(a.of_tile, cluster_rank() + 1) - s.first;
        whole += clusters();
        return true;
    }
};
