// y = x · Wᵀ + bias for few tokens, W packed in 4 bits and read once, as it lies in memory.
//
// The weights are the 16-row operand of mma.m16n8k16, the tokens its 8 columns. Within a dot product any order of k will do if both operands
// agree, so a thread takes 16 neighbouring weights of two rows (8 bytes each) and the same 16 elements of a token, and feeds them to
// four mma: nothing is repacked. A byte becomes two weights by a table of 256 pairs that each lane has a copy of, in its own bank. The sum
// of each 64 weights is scaled by their absmax in float32, so no weight is rounded but for the 16 values of the code itself.
//
// Each warp has a ring of its own in shared memory, which cp.async fills some steps ahead, across tiles, and needs no barrier for it. A CTA's
// warps share the k of a tile of 32 rows and add up through shared memory, in a fixed order.
#include "common.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800 // Turing has no mma of this shape, nor cp.async
#include "linear.cuh"

// ---- constants

static constexpr int SPAN = 64;                      // weights of a row in one step: 16 per thread of a quad
static constexpr int STEPS = GQ_LINEAR_STEP / SPAN;  // that a slot of the ring has of a row: 64 bytes
static constexpr int TOKENS = 8;                     // columns of an mma
static constexpr int ROWS = 16;                      // rows of an mma
static constexpr int TILES = GQ_LINEAR_ROWS / ROWS;  // of 16 rows, that a warp has at a time
static constexpr int ENTRY_BYTES = GQ_LINEAR_ENTRY;  // of the table: 32 copies of a pair, one per lane, and maybe a gap
static constexpr int TABLE_BYTES = 256 * ENTRY_BYTES;

// ---- instructions

static DEVICE uint2 load_shared2(u32 address) {
    uint2 r;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "r"(address));
    return r;
}

// The tokens are read by every CTA.
static DEVICE uint4 load_token(const uint4 *p) {
    uint4 r;
    asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
    return r;
}

static DEVICE float load_shared_float(u32 address) {
    float r;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(r) : "r"(address));
    return r;
}

static DEVICE void store_shared(u32 address, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory"); }

// ---- a slot of a warp's ring: 32 rows for STEPS steps along k

static constexpr int ROW_BYTES = STEPS * SPAN / 2 + 32;             // the rows that a warp reads at once lie in other banks
static constexpr int SCALES = GQ_LINEAR_ROWS * ROW_BYTES;           // behind the weights: a float32 for each row and step
static constexpr int SLOT_BYTES = SCALES + GQ_LINEAR_ROWS * STEPS * 4;

// A place in a CTA's work: its tiles, and the steps that a warp has of each.
struct Cursor {
    u32 tile, span;
    DEVICE void advance(u32 first, u32 leap, u32 spans) {
        span += leap;
        if (span >= spans) {
            span = first;
            tile += gridDim.x;
        }
    }
};

template <bool NESTED> struct Loader {
    static constexpr int VALUES_PER_LANE = GQ_LINEAR_ROWS * STEPS / 32;
    static constexpr bool IN_ORDER = STEPS == 2 || STEPS == 4; // a row's scales of a slot can be copied at once
    const gq_linear_args &a;
    const float *nested_codebook; // in shared memory
    float offset;
    u32 shift; // a block is 64 << shift weights
    // What nested statistics are while they come, for which slot; 0 when none do.
    u32 slot;
    u8 code[VALUES_PER_LANE];
    float absmax[VALUES_PER_LANE];

    DEVICE Loader(const gq_linear_args &args, const float *codebook) : a(args), nested_codebook(codebook), offset(0), shift(args.weight.log2 - 6), slot(0) {
        if (NESTED) offset = __ldg(pointer<const float>(a.weight.offset));
    }

    // Starts to fill a slot.
    DEVICE void start(u32 to, Cursor at) {
        const u32 lane = threadIdx.x % 32, first_row = at.tile * GQ_LINEAR_ROWS, last = min((u32)GQ_LINEAR_ROWS, (u32)a.n - first_row) - 1;
        const u32 row_bytes = (u32)a.k / 2, row_blocks = (u32)(a.k / SPAN) >> shift;
        // Rows behind the last are computed like it, and not stored.
        const u8 *packed = pointer<const u8>(a.weight.packed) + (int64_t)first_row * row_bytes + at.span * (SPAN / 2);
        constexpr int PIECES = STEPS * SPAN / 2 / 16; // of 16 bytes in a row
#pragma unroll
        for (int i = 0; i < GQ_LINEAR_ROWS * PIECES / 32; i++) {
            const u32 index = lane + 32 * i, row = index / PIECES, piece = index % PIECES;
            copy16(to + row * ROW_BYTES + piece * 16, packed + min(row, last) * row_bytes + piece * 16);
        }
        slot = to;
        const int64_t first_block = (int64_t)first_row * row_blocks;
        if (!NESTED && IN_ORDER && shift == 0) {
            if (GQ_LINEAR_ROWS == 32 || lane < GQ_LINEAR_ROWS)
                copy<STEPS * 4>(to + SCALES + lane * STEPS * 4, pointer<const float>(a.weight.absmax) + first_block + (min(lane, last) * row_blocks + at.span));
            return;
        }
#pragma unroll
        for (int i = 0; i < VALUES_PER_LANE; i++) {
            const u32 index = lane + 32 * i, row = index / STEPS, step = index % STEPS;
            const int64_t block = first_block + (min(row, last) * row_blocks + (at.span + step >> shift));
            if (NESTED) {
                code[i] = __ldg(pointer<const u8>(a.weight.absmax) + block);
                absmax[i] = __ldg(pointer<const float>(a.weight.nested_absmax) + (block >> 8));
            } else {
                copy<4>(to + SCALES + index * 4, pointer<const float>(a.weight.absmax) + block);
            }
        }
    }

    // Puts the nested statistics of the slot that was started last into it.
    DEVICE void finish() {
#pragma unroll
        for (int i = 0; i < (NESTED && slot ? VALUES_PER_LANE : 0); i++)
            store_shared(slot + SCALES + (threadIdx.x % 32 + 32 * i) * 4, nested_absmax(nested_codebook[code[i]], absmax[i], offset));
        slot = 0;
    }
};

// x points to the thread's 16 elements of the first step for each column; columns behind the last token read it again.
template <class T, int COLUMNS>
static DEVICE void multiply(float sum[TILES][COLUMNS][4], u32 slot, const u16 *const x[COLUMNS], u32 span, u32 table, float factor) {
    const u32 lane = threadIdx.x % 32, lane_offset = lane * 4;
    const u32 mine = slot + lane / 4 * ROW_BYTES + lane % 4 * 8, scales = slot + SCALES + lane / 4 * STEPS * 4;
    constexpr bool ALL_X = STEPS * COLUMNS <= 8; // registers for the elements of all steps, so that they come together
    uint4 all[ALL_X ? STEPS : 1][COLUMNS][2];
    const auto load_x = [&](uint4 v[COLUMNS][2], int u) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const uint4 *p = (const uint4 *)(x[c] + span * SPAN) + u * (SPAN / 8);
            v[c][0] = load_token(p);
            v[c][1] = load_token(p + 1);
        }
    };
#pragma unroll
    for (int u = 0; u < (ALL_X ? STEPS : 0); u++) load_x(all[u], u);
    // All that may change is loaded first; the rest may then be done in the order that suits the machine.
    uint2 packed[TILES][2][STEPS];
    float scale[TILES][2][STEPS];
#pragma unroll
    for (int r = 0; r < TILES; r++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int u = 0; u < STEPS; u++) {
                packed[r][h][u] = load_shared2(mine + (r * ROWS + h * 8) * ROW_BYTES + u * 32);
                scale[r][h][u] = load_shared_float(scales + ((r * ROWS + h * 8) * STEPS + u) * 4) * factor;
            }
        }
    }
#pragma unroll
    for (int u = 0; u < STEPS; u++) {
        uint4(&v)[COLUMNS][2] = all[ALL_X ? u : 0];
        if (!ALL_X) load_x(v, u);
#pragma unroll
        for (int r = 0; r < TILES; r++) {
            float d[COLUMNS][4] = {};
            const uint2 w0 = packed[r][0][u], w1 = packed[r][1][u];
#pragma unroll
            for (int half = 0; half < 2; half++) { // 8 of the 16 weights, 4 for each mma
                const u32 p0 = half ? w0.y : w0.x, p1 = half ? w1.y : w1.x;
                u32 low[4], high[4];
                operand<ENTRY_BYTES, 0>(low, table, p0, p1, lane_offset);
                operand<ENTRY_BYTES, 2>(high, table, p0, p1, lane_offset);
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) {
                    mma(T(), d[c], low, v[c][half].x, v[c][half].y);
                    mma(T(), d[c], high, v[c][half].z, v[c][half].w);
                }
            }
            const float scale0 = scale[r][0][u], scale1 = scale[r][1][u];
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                sum[r][c][0] = __fmaf_rn(scale0, d[c][0], sum[r][c][0]);
                sum[r][c][1] = __fmaf_rn(scale0, d[c][1], sum[r][c][1]);
                sum[r][c][2] = __fmaf_rn(scale1, d[c][2], sum[r][c][2]);
                sum[r][c][3] = __fmaf_rn(scale1, d[c][3], sum[r][c][3]);
            }
        }
    }
}

// ---- the kernel

template <class T, int COLUMNS, int DEPTH, bool NESTED> static DEVICE void linear_small(const gq_linear_args &a) {
    constexpr int HEIGHT = GQ_LINEAR_ROWS, WIDTH = COLUMNS * TOKENS;
    constexpr int STRIDE = HEIGHT + 4; // of a token in partial sums: the lanes of a quad write to other banks
    extern __shared__ __align__(16) u8 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
    float *const nested_codebook = (float *)(shared + TABLE_BYTES);
    float *const partial = nested_codebook + 256; // [warps][WIDTH][STRIDE]
    const u32 table = shared_address(shared), ring = shared_address(partial + warps * WIDTH * STRIDE) + warp * DEPTH * SLOT_BYTES;
    const u32 tiles = (u32)((a.n + HEIGHT - 1) / HEIGHT), spans = (u32)(a.k / SPAN);
    const u32 first = warp * STEPS, leap = warps * STEPS;
    Cursor next = {blockIdx.x, first};
#if __CUDA_ARCH__ >= 900
    let_next_kernel_start();
    // While the kernel before still runs the weights may come to L2, where they would see a late write. Rows lie one behind another.
    if (threadIdx.x == 0 && (int64_t)(next.tile + 1) * HEIGHT <= a.n)
        prefetch(pointer<const u8>(a.weight.packed) + (int64_t)next.tile * HEIGHT * (a.k / 2), (u32)(HEIGHT * a.k / 2));
#endif
    fill_table<T, ENTRY_BYTES>(shared, a.weight.format, threadIdx.x, blockDim.x);
#if __CUDA_ARCH__ >= 900
    wait_for_kernel_before();
#endif
    if (NESTED) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) nested_codebook[i] = __ldg(pointer<const float>(a.weight.nested_codebook) + i);
        __syncthreads();
    }
    const u16 *x[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) x[c] = pointer<const u16>(a.x) + min((int64_t)(c * TOKENS + g), a.m - 1) * a.k + t * 16;

    Loader<NESTED> loader(a, nested_codebook);
    const auto load = [&](int slot) { // the next slot's worth, if there is one
        if (next.tile < tiles && first < spans) {
            loader.start(ring + slot * SLOT_BYTES, next);
            next.advance(first, leap, spans);
        }
        commit_copies();
    };
#pragma unroll
    for (int d = 0; d < DEPTH - 1; d++) { // a slot stays free for the step that is being multiplied
        load(d);
        loader.finish();
    }
    __syncthreads(); // the table is there
    int slot = 0;
    const float factor = 1 / table_factor(T(), a.weight.format);
    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float sum[TILES][COLUMNS][4] = {};
        for (u32 span = first; span < spans; span += leap) {
            loader.finish();
            wait_for_copies<DEPTH - 2>();
            __syncwarp(); // of all lanes; and the slot before this one is free
            load(slot == 0 ? DEPTH - 1 : slot - 1);
            multiply<T, COLUMNS>(sum, ring + slot * SLOT_BYTES, x, span, table, factor);
            slot = slot == DEPTH - 1 ? 0 : slot + 1;
        }

        float *mine = partial + warp * WIDTH * STRIDE;
#pragma unroll
        for (int r = 0; r < TILES; r++) {
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
                for (int i = 0; i < 4; i++) mine[(c * TOKENS + t * 2 + i % 2) * STRIDE + r * ROWS + g + i / 2 * 8] = sum[r][c][i];
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < WIDTH * HEIGHT; i += blockDim.x) {
            const int token = i / HEIGHT, row = i % HEIGHT;
            const int64_t column = (int64_t)tile * HEIGHT + row;
            if (token >= a.m || column >= a.n) continue;
            const float *sums = partial + token * STRIDE + row;
            float v = sums[0];
            for (int w = 1; w < warps; w++) v += sums[w * WIDTH * STRIDE];
            if (a.bias) v += T::widen(pointer<const u16>(a.bias)[column]);
            pointer<u16>(a.y)[token * a.n + column] = T::narrow(v);
        }
        __syncthreads(); // before the next tile's partial sums
    }
}

// ---- the kernels: gq_linear_<dtype>_<columns of 8 tokens>[_nested].

#define KERNEL(name, T, columns, depth, warps, nested)                                                     \
    extern "C" __global__ void __launch_bounds__(32 * warps) name(gq_linear_args a) {                      \
        linear_small<T, columns, depth, nested>(a);                                                        \
    }
#define EACH_WIDTH(dtype, T, suffix, nested)                                                        \
    KERNEL(gq_linear_##dtype##_1##suffix, T, 1, GQ_LINEAR_DEPTH, GQ_LINEAR_WARPS, nested)           \
    KERNEL(gq_linear_##dtype##_2##suffix, T, 2, GQ_LINEAR_DEPTH, GQ_LINEAR_WARPS, nested)           \
    KERNEL(gq_linear_##dtype##_4##suffix, T, 4, GQ_LINEAR_DEPTH, GQ_LINEAR_WARPS_WIDE, nested)      \
    KERNEL(gq_linear_##dtype##_8##suffix, T, 8, GQ_LINEAR_DEPTH_WIDE, GQ_LINEAR_WARPS_WIDE, nested)

EACH_WIDTH(f16, F16, , false)
EACH_WIDTH(f16, F16, _nested, true)
EACH_WIDTH(bf16, BF16, , false)
EACH_WIDTH(bf16, BF16, _nested, true)
#endif
