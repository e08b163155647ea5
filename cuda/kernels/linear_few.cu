// y = x · Wᵀ + bias for few tokens, W packed in 4 bits and read once, as it lies in memory.
//
// The weights are the 16-row operand of mma.m16n8k16, the tokens its 8 columns. Within a dot product any order of k will do if both operands
// agree, so a thread takes 16 neighbouring weights of two rows (8 bytes each) and the same 16 elements of a token, and feeds them to
// four mma: nothing is repacked. A byte becomes two weights by a table of 256 pairs that each lane has a copy of, in its own bank. The sum
// of each 64 weights is scaled by their absmax in float32, so no weight is rounded but for the 16 values of the code itself.
//
// A CTA has all of its share of the rows at a time, as far as registers last, so that tokens, which come from L2 for each CTA, are read once. Its
// warps share k and add up through shared memory, in a fixed order. Each warp has a ring of its own there, which cp.async fills some steps
// ahead and which needs no barrier: a slot is a step along k of 32 or 24 rows.
#include "common.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800 // Turing has no mma of this shape, nor cp.async
#include "linear.cuh"

// ---- constants

static constexpr int SPAN = 64;                     // weights of a row in one step: 16 per thread of a quad
static constexpr int STEPS = GQ_LINEAR_STEP / SPAN; // that a slot of the ring has of a row: 64 bytes
static constexpr int TOKENS = 8;                    // columns of an mma
static constexpr int ROWS = 16;                     // rows of an mma
static constexpr int ENTRY_BYTES = GQ_LINEAR_ENTRY; // of the table: 32 copies of a pair, one per lane, and maybe a gap
static constexpr int TABLE_BYTES = 256 * ENTRY_BYTES;
static constexpr int ROW_BYTES = STEPS * SPAN / 2;  // of a row in a slot. In every other pair of rows its halves change places, so that rows read at once lie in other banks
static_assert(STEPS == 2 && ROW_BYTES == 64, "halves are steps, and scales are read in pairs");
static DEVICE u32 swapped(u32 row) { return (row & 2) * 16; }

// What a kernel is made for.
template <int COLUMNS_, int HEIGHT_, int DEPTH_> struct Shape {
    static constexpr int COLUMNS = COLUMNS_, HEIGHT = HEIGHT_, DEPTH = DEPTH_; // of 8 tokens; rows; slots of a ring
    static constexpr int WIDTH = COLUMNS * TOKENS;
    static constexpr bool KEEPS = COLUMNS < 4; // addresses, for which there are registers then
    static constexpr int PART = GQ_LINEAR_PART(HEIGHT), PARTS = (HEIGHT + PART - 1) / PART, TILES = (PART + ROWS - 1) / ROWS;
    static constexpr int SCALES = PART * ROW_BYTES; // in a slot, behind the weights: a float32 for each row and step
    static constexpr int SLOT_BYTES = GQ_LINEAR_SLOT(HEIGHT);
    static constexpr int STRIDE = HEIGHT + 4; // of a token in partial sums: the lanes of a quad write to other banks
    static_assert(WIDTH * STRIDE * 4 <= DEPTH * SLOT_BYTES, "partial sums take the place of the ring");
    // Whether a part has the rows of that half of an mma.
    static DEVICE constexpr bool has(int part, int tile, int half) { return tile * ROWS + half * 8 < PART && part * PART + tile * ROWS + half * 8 < HEIGHT; }
};

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

static DEVICE float2 load_shared_float2(u32 address) {
    float2 r;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(r.x), "=f"(r.y) : "r"(address));
    return r;
}

static DEVICE void store_shared(u32 address, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory"); }

// What is computed once. The compiler would rather do it again wherever it is used, which takes longer than the copy that it is for.
static DEVICE void keep(u32 &x) { asm volatile("" : "+r"(x)); }
template <class T> static DEVICE void keep(T *&x) { asm volatile("" : "+l"(x)); }

// ---- the loader

// What a warp loads next: a part of the CTA's rows, and where it is along k, in spans.
struct Cursor {
    u32 part, span;
};

template <class S, bool NESTED> struct Loader {
    static constexpr int PIECES = ROW_BYTES / 16, AT_ONCE = 32 / PIECES; // of a row in a slot, 16 bytes each; rows that a warp copies at once
    static constexpr int VALUES = S::PART * STEPS, VALUES_PER_LANE = (VALUES + 31) / 32;
    static_assert(AT_ONCE % 4 == 0, "a lane's rows are all swapped or none");
    // The nested statistics of a slot, in registers while they come; slot is 0 when none do.
    struct Statistics {
        u32 slot = 0;
        u8 code[VALUES_PER_LANE];
        float absmax[VALUES_PER_LANE];
    };
    const gq_linear_args &a;
    const float *nested_codebook; // in shared memory
    float offset;
    u32 lane, row_bytes, row_blocks, shift; // a block is 64 << shift weights
    u32 piece;                              // where in a slot the lane's piece of the first row that it copies goes
    // Of the CTA's rows: how many, that piece, the first block, and the scales of the lane's row.
    u32 rows;
    const u8 *packed;
    int64_t block;
    const float *scales;

    DEVICE Loader(const gq_linear_args &args, const float *codebook) : a(args), nested_codebook(codebook), offset(0), lane(threadIdx.x % 32) {
        shift = a.weight.log2 - 6, row_bytes = (u32)a.k / 2, row_blocks = (u32)a.k / SPAN >> shift;
        piece = lane / PIECES * ROW_BYTES + (lane % PIECES * 16 ^ swapped(lane / PIECES));
        if (S::KEEPS) keep(row_bytes), keep(piece);
        if (NESTED) offset = __ldg(pointer<const float>(a.weight.offset));
    }

    // The CTA's rows are now those from first_row on.
    DEVICE void set(u32 first_row) {
        rows = min((u32)S::HEIGHT, (u32)a.n - first_row);
        packed = pointer<const u8>(a.weight.packed) + (int64_t)(first_row + lane / PIECES) * row_bytes + lane % PIECES * 16;
        block = (int64_t)first_row * row_blocks;
        scales = pointer<const float>(a.weight.absmax) + block + lane * row_blocks;
        if (S::KEEPS) keep(rows), keep(packed);
        if (S::KEEPS && !NESTED) keep(scales);
    }

    // Starts to fill a slot with a part of the CTA's rows; nested statistics wait for finish. What is multiplied for rows that are not there is not stored.
    DEVICE void start(u32 to, Cursor at, Statistics &late) {
        const u32 begin = at.part * S::PART;
        const int left = (int)(rows - begin - lane / PIECES);
        const u8 *from = packed + (begin * row_bytes + at.span * (SPAN / 2));
#pragma unroll
        for (int i = 0; i < S::PART / AT_ONCE; i++, from += AT_ONCE * row_bytes)
            if (i * AT_ONCE < left) copy16(to + piece + i * AT_ONCE * ROW_BYTES, from);
        if (!NESTED && shift == 0) { // a row's scales of a slot are copied at once
            if (lane < S::PART && begin + lane < rows) copy<STEPS * 4>(to + S::SCALES + lane * STEPS * 4, scales + (begin * row_blocks + at.span));
            return;
        }
        if (NESTED) late.slot = to;
#pragma unroll
        for (int i = 0; i < VALUES_PER_LANE; i++) {
            const u32 index = lane + 32 * i, row = index / STEPS, step = index % STEPS;
            if (VALUES % 32 != 0 && index >= VALUES) break;
            const int64_t of = block + (min(begin + row, rows - 1) * row_blocks + (at.span + step >> shift));
            if (NESTED) {
                late.code[i] = __ldg(pointer<const u8>(a.weight.absmax) + of);
                late.absmax[i] = __ldg(pointer<const float>(a.weight.nested_absmax) + (of >> 8));
            } else {
                copy<4>(to + S::SCALES + index * 4, pointer<const float>(a.weight.absmax) + of);
            }
        }
    }

    // Puts nested statistics into their slot.
    DEVICE void finish(Statistics &late) {
        if (NESTED && late.slot != 0) {
#pragma unroll
            for (int i = 0; i < VALUES_PER_LANE; i++) {
                const u32 index = lane + 32 * i;
                if (VALUES % 32 == 0 || index < VALUES) store_shared(late.slot + S::SCALES + index * 4, nested_absmax(nested_codebook[late.code[i]], late.absmax[i], offset));
            }
        }
        late.slot = 0;
    }
};

// ---- the tokens: a thread's 16 elements of each step, for each column

template <class S> struct Elements {
    uint4 v[STEPS][S::COLUMNS][2];
    // x points to those of the first step of k; columns behind the last token read it again.
    DEVICE void load(const u16 *const x[S::COLUMNS], u32 span) {
#pragma unroll
        for (int u = 0; u < STEPS; u++) {
#pragma unroll
            for (int c = 0; c < S::COLUMNS; c++) {
                const uint4 *p = (const uint4 *)(x[c] + span * SPAN) + u * (SPAN / 8);
                v[u][c][0] = load_token(p);
                v[u][c][1] = load_token(p + 1);
            }
        }
    }
};

// Adds the products of a slot, which has that part of the CTA's rows.
template <class T, class S> static DEVICE void multiply(float sum[S::TILES][S::COLUMNS][4], int part, u32 slot, const Elements<S> &x, u32 table, float factor) {
    const u32 lane = threadIdx.x % 32, lane_offset = lane * 4;
    const u32 mine = slot + lane / 4 * ROW_BYTES + (lane % 4 * 8 ^ swapped(lane / 4)), scales = slot + S::SCALES + lane / 4 * STEPS * 4;
    // All that may change is loaded first; the rest may then be done in the order that suits the machine.
    uint2 packed[S::TILES][2][STEPS] = {};
    float2 scale[S::TILES][2] = {};
#pragma unroll
    for (int r = 0; r < S::TILES; r++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (!S::has(part, r, h)) break;
            const u32 row = mine + (r * ROWS + h * 8) * ROW_BYTES;
            packed[r][h][0] = load_shared2(row);
            packed[r][h][1] = load_shared2(row ^ 32);
            scale[r][h] = load_shared_float2(scales + (r * ROWS + h * 8) * STEPS * 4);
        }
    }
#pragma unroll
    for (int u = 0; u < STEPS; u++) {
#pragma unroll
        for (int r = 0; r < S::TILES; r++) {
            if (!S::has(part, r, 0)) break;
            float d[S::COLUMNS][4] = {};
            const uint2 w0 = packed[r][0][u], w1 = packed[r][1][u];
#pragma unroll
            for (int half = 0; half < 2; half++) { // 8 of the 16 weights, 4 for each mma
                const u32 p0 = half ? w0.y : w0.x, p1 = half ? w1.y : w1.x;
                u32 low[4], high[4];
                operand<ENTRY_BYTES, 0>(low, table, p0, p1, lane_offset, S::has(part, r, 1));
                operand<ENTRY_BYTES, 2>(high, table, p0, p1, lane_offset, S::has(part, r, 1));
#pragma unroll
                for (int c = 0; c < S::COLUMNS; c++) {
                    mma(T(), d[c], low, x.v[u][c][half].x, x.v[u][c][half].y);
                    mma(T(), d[c], high, x.v[u][c][half].z, x.v[u][c][half].w);
                }
            }
            const float scale0 = (u ? scale[r][0].y : scale[r][0].x) * factor, scale1 = (u ? scale[r][1].y : scale[r][1].x) * factor;
#pragma unroll
            for (int c = 0; c < S::COLUMNS; c++) {
                sum[r][c][0] = __fmaf_rn(scale0, d[c][0], sum[r][c][0]);
                sum[r][c][1] = __fmaf_rn(scale0, d[c][1], sum[r][c][1]);
                sum[r][c][2] = __fmaf_rn(scale1, d[c][2], sum[r][c][2]);
                sum[r][c][3] = __fmaf_rn(scale1, d[c][3], sum[r][c][3]);
            }
        }
    }
}

// Adds up what the warps have of a CTA's rows, and writes y.
template <class T, class S> static DEVICE void reduce(const gq_linear_args &a, const float sum[S::PARTS][S::TILES][S::COLUMNS][4], float *partial, u32 first_row) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    float *mine = partial + warp * S::WIDTH * S::STRIDE;
#pragma unroll
    for (int p = 0; p < S::PARTS; p++) {
#pragma unroll
        for (int r = 0; r < S::TILES; r++) {
#pragma unroll
            for (int c = 0; c < S::COLUMNS; c++) {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (S::has(p, r, i / 2)) mine[(c * TOKENS + t * 2 + i % 2) * S::STRIDE + p * S::PART + r * ROWS + g + i / 2 * 8] = sum[p][r][c][i];
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < (int)a.m * S::HEIGHT; i += blockDim.x) {
        const int token = i / S::HEIGHT, row = i % S::HEIGHT;
        const int64_t column = (int64_t)first_row + row;
        if (column >= a.n) continue;
        const float *sums = partial + token * S::STRIDE + row;
        float v = sums[0];
        for (int w = 1; w < blockDim.x / 32; w++) v += sums[w * S::WIDTH * S::STRIDE];
        if (a.bias) v += T::widen(pointer<const u16>(a.bias)[column]);
        pointer<u16>(a.y)[token * a.n + column] = T::narrow(v);
    }
}

// ---- what is brought to L2 while the kernel before ends

// Bytes of W for a CTA: about what memory delivers until that kernel has ended. Of more, what is needed first comes later, and a layer of 8192×8192
// took 17.6 instead of 15.6 µs for one token (H200; all weights of the CTA, 256 KiB).
template <bool NESTED> static constexpr u32 AHEAD = (NESTED ? 24 : 48) * 1024;

// Of each row of the CTA's the same share, from its beginning on, since that is where all warps start. A warp issues bulk instructions lane by lane.
template <bool NESTED> static DEVICE void prefetch_weights(const gq_linear_args &a, u32 first_row, u32 rows) {
    const u32 row_bytes = (u32)a.k / 2, bytes = min(row_bytes, AHEAD<NESTED> / rows & ~63);
    if (threadIdx.x % 32 == 0)
        for (u32 row = threadIdx.x / 32; row < rows; row += blockDim.x / 32)
            prefetch(pointer<const u8>(a.weight.packed) + (int64_t)(first_row + row) * row_bytes, bytes);
}

// All codes of the statistics of the CTA's rows, but for less than 16 at either end: a slot's are loaded only one slot ahead.
static DEVICE void prefetch_codes(const gq_linear_args &a, u32 first_row, u32 rows) {
    const uint64_t blocks = a.k >> a.weight.log2, from = a.weight.absmax + first_row * blocks, begin = (from + 15) & ~15ull, end = (from + rows * blocks) & ~15ull;
    if (threadIdx.x == 0 && begin < end) prefetch(pointer<const u8>(begin), (u32)(end - begin));
}

// ---- the kernel

template <class T, class S, bool NESTED> static DEVICE void linear_few(const gq_linear_args &a) {
    extern __shared__ __align__(64) u8 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
    float *const nested_codebook = (float *)(shared + TABLE_BYTES);
    float *const partial = nested_codebook + 256; // [warps][WIDTH][STRIDE], when the rings are no longer needed
    u32 table = shared_address(shared), ring = shared_address(partial) + warp * S::DEPTH * S::SLOT_BYTES;
    if (S::KEEPS) keep(table), keep(ring);
    const u32 spans = (u32)a.k / SPAN, first = warp * STEPS, leap = warps * STEPS;
    const bool settled = is_settled(a);
    const auto fill = [&] { fill_table<T, ENTRY_BYTES>(shared, a.weight.format, threadIdx.x, blockDim.x); };
    u32 first_row = blockIdx.x * S::HEIGHT;
    const u32 rows = min((u32)S::HEIGHT, (u32)a.n - first_row);
    if (NESTED) prefetch_codes(a, first_row, rows);
    if (!settled) {
        prefetch_weights<NESTED>(a, first_row, rows);
        fill();
        wait_for_kernel_before();
    }
    if (NESTED) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) copy<4>(shared_address(nested_codebook + i), pointer<const float>(a.weight.nested_codebook) + i);
        commit_copies();
    }
    Loader<S, NESTED> loader(a, nested_codebook);
    const u16 *x[S::COLUMNS];
    for (bool begun = false; first_row < a.n; first_row += gridDim.x * S::HEIGHT, begun = true) {
        loader.set(first_row);
        Cursor next = {0, first};
        using Statistics = typename Loader<S, NESTED>::Statistics;
        const auto load = [&](int slot, Statistics &late) { // the next slot's worth, if there is one
            if (next.span < spans) {
                loader.start(ring + slot * S::SLOT_BYTES, next, late);
                if (++next.part == S::PARTS) next = {0, next.span + leap};
            }
            commit_copies();
        };
        if (begun) __syncthreads(); // the partial sums before these have been added
        Statistics late[S::DEPTH - 1]; // of all slots at once: each comes from memory as late as its weights
#pragma unroll
        for (int d = 0; d < S::DEPTH - 1; d++) load(d, late[d]); // a slot stays free for the step that is being multiplied
        if (!begun) {
#pragma unroll
            for (int c = 0; c < S::COLUMNS; c++) {
                u32 token = min(c * TOKENS + g, (int)a.m - 1);
                keep(token); // and not before the copies
                x[c] = pointer<const u16>(a.x) + (int64_t)token * a.k + t * 16;
            }
            if (settled) fill(); // while the first copies are under way
            wait_for_kernel_before();
            let_next_kernel_start();
            if (NESTED) wait_for_copies<S::DEPTH - 1>(); // the nested codebook's
            __syncthreads(); // the tables are there
        }
#pragma unroll
        for (int d = 0; d < S::DEPTH - 1; d++) loader.finish(late[d]);
        const float factor = a.weight.format == GQ_FP4 ? 1 / table_factor(T(), GQ_FP4) : 1 / table_factor(T(), GQ_NF4);
        float sum[S::PARTS][S::TILES][S::COLUMNS][4] = {};
        int slot = 0;
        for (u32 span = first; span < spans; span += leap) {
            Elements<S> elements;
            elements.load(x, span);
#pragma unroll
            for (int part = 0; part < S::PARTS; part++) {
                loader.finish(late[0]);
                wait_for_copies<S::DEPTH - 2>();
                __syncwarp(); // of all lanes; and the slot before this one is free
                load(slot == 0 ? S::DEPTH - 1 : slot - 1, late[0]);
                multiply<T, S>(sum[part], part, ring + slot * S::SLOT_BYTES, elements, table, factor);
                slot = slot == S::DEPTH - 1 ? 0 : slot + 1;
            }
        }
        __syncthreads(); // the rings are free
        reduce<T, S>(a, sum, partial, first_row);
    }
}

// ---- the kernels: gq_linear_few_<dtype>_<columns of 8 tokens>_<rows>[_nested].

#define KERNEL(name, T, columns, rows, depth, warps, nested)                          \
    extern "C" __global__ void __launch_bounds__(32 * warps) name(gq_linear_args a) { \
        linear_few<T, Shape<columns, rows, depth>, nested>(a);                        \
    }
#define EACH_KERNEL(columns, rows, depth, warps)                                                       \
    KERNEL(gq_linear_few_f16_##columns##_##rows, F16, columns, rows, depth, warps, false)              \
    KERNEL(gq_linear_few_f16_##columns##_##rows##_nested, F16, columns, rows, depth, warps, true)      \
    KERNEL(gq_linear_few_bf16_##columns##_##rows, BF16, columns, rows, depth, warps, false)            \
    KERNEL(gq_linear_few_bf16_##columns##_##rows##_nested, BF16, columns, rows, depth, warps, true)
GQ_LINEAR_FEW(EACH_KERNEL)
#endif
