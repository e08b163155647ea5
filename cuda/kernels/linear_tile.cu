// y = x · Wᵀ + bias for more tokens than linear_few.cu takes, on any GPU from Ampere on. W is packed in 4 bits and read as it lies in memory.
//
// A CTA multiplies tiles of rows of W and tokens, step by step along k. Its warps share out the rows: each decodes its own straight into the
// 16-row operand of mma.m16n8k16, as in linear_few.cu, and uses it for all its tokens. Rings in shared memory, which cp.async fills some steps ahead and
// across tiles, hold the packed weights and the tokens. Operands are decoded half a step before they are multiplied, also across steps, for
// which the ring of weights is one step ahead of the tokens'.
//
// The steps of all tiles are divided evenly among CTAs. The parts of a tile that several have go to the workspace, in float32, where a
// second kernel adds them up in the order of k: so the same sizes and the same number of CTAs give the same sums.
//
// Fragments' rows g and g + 8 are chosen such that each thread has neighbouring rows of W: what it stores is contiguous.
#include "common.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800 // Turing has no mma of this shape, nor cp.async
#include "linear.cuh"

// ---- constants

static constexpr int THREADS = GQ_TILE_THREADS;
static constexpr int WARPS = THREADS / 32;
static constexpr int SPAN = 64; // elements of k whose weights share a scale: 16 for each thread of a quad
static constexpr int ENTRY = GQ_TILE_ENTRY;
static constexpr int TABLE_BYTES = 256 * ENTRY;
static constexpr int OFFSET = TABLE_BYTES + 4 * 256; // behind the table and the nested codebook: the nested offset
static constexpr int RINGS = GQ_TILE_TABLES;         // behind them all

extern __shared__ __align__(128) u8 shared[]; // slots are offsets in it

// How a tile is laid out: a warp has 32 rows and all tokens, COLUMNS of 8.
static constexpr int ROW_TILES = 2;                // of 16 rows
static constexpr int LANE_ROWS = 2 * ROW_TILES;    // neighbours
static constexpr int WARP_ROWS = 16 * ROW_TILES, ROWS = WARP_ROWS * WARPS;
static constexpr int SCALES = ROWS * SPAN / 2;     // behind the weights in a slot: a float32 for each row
static constexpr int WEIGHT_SLOT = SCALES + ROWS * 4;
static_assert(ROWS == GQ_TILE_ROWS && SPAN == GQ_TILE_STEP, "");

template <int COLUMNS_> struct Shape {
    static constexpr int COLUMNS = COLUMNS_, TOKENS = 8 * COLUMNS;
    static constexpr int TOKEN_SLOT = TOKENS * SPAN * 2;
};

// ---- instructions

// Of a line that is read to its end, soon or by a neighbour.
static DEVICE void copy16_of_line(u32 to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Waits until the group of copies that was committed depth - 1 groups ago has come.
static DEVICE void wait_for_step(int depth) {
    switch (depth) {
    case 2: return wait_for_copies<0>();
    case 3: return wait_for_copies<1>();
    case 4: return wait_for_copies<2>();
    case 5: return wait_for_copies<3>();
    default: return wait_for_copies<GQ_TILE_DEPTH - 2>();
    }
}

// ---- the work

// Steps of k, counted through all tiles. The tiles of a tile of rows follow each other.
struct Work {
    int64_t steps, ctas, grain;
    u32 per_tile, token_tiles;

    template <class S> static DEVICE Work of(const gq_linear_tile_args &args) {
        Work w;
        w.ctas = args.ctas;
        w.grain = args.grain;
        w.per_tile = (u32)(args.linear.k / SPAN);
        w.token_tiles = (u32)((args.linear.m + S::TOKENS - 1) / S::TOKENS);
        w.steps = (args.linear.n + ROWS - 1) / ROWS * w.token_tiles * w.per_tile;
        return w;
    }
    // The first step of a CTA.
    DEVICE int64_t first(int64_t cta) const { return steps / grain * cta / ctas * grain; }
    // The CTA that has a step, where the grain is 1.
    DEVICE int64_t owner(int64_t step) const { return ((step + 1) * ctas - 1) / steps; }
};

// A step of a tile.
struct Cursor {
    u32 row_tile, token_tile, step;

    DEVICE Cursor(const Work &w, int64_t first) {
        const int64_t tile = first / w.per_tile;
        row_tile = (u32)(tile / w.token_tiles);
        token_tile = (u32)(tile % w.token_tiles);
        step = (u32)(first % w.per_tile);
    }
    DEVICE void advance(const Work &w) {
        if (++step < w.per_tile) return;
        step = 0;
        if (++token_tile < w.token_tiles) return;
        token_tile = 0;
        row_tile++;
    }
};

// Where row i of a tile in shared memory is in W's tile: the 8 rows that a warp reads at once follow each other in shared memory, and a thread's in W.
static DEVICE u32 source_row(u32 i) {
    return i / WARP_ROWS * WARP_ROWS + i % 8 * LANE_ROWS + i % WARP_ROWS / 8;
}

// ---- filling the rings

template <class S, bool NESTED> struct Loader {
    static_assert(ROWS == THREADS, ""); // a thread has the scale of one row
    const gq_linear_args &a;
    const Work &work;
    Cursor next; // the weights that come next
    int left;    // that come still
    u32 token_tile, token_step; // the tokens that come next: of the weights that came last
    // What nested statistics are while they come.
    u8 code;
    float absmax;

    DEVICE Loader(const gq_linear_args &args, const Work &w, Cursor first, int steps)
        : a(args), work(w), next(first), left(steps), token_tile(0), token_step(0) {}

    // Starts to fill a slot with the tokens for the weights that came last: 8 pieces of 16 bytes for each token. Two tokens that a warp reads at once
    // have them in another order, and so in other banks.
    DEVICE void load_tokens(u32 slot) {
        if (left < 0) return;
        const int64_t first = (int64_t)token_tile * S::TOKENS;
        const u32 last = (u32)min((int64_t)S::TOKENS, a.m - first) - 1; // tokens behind it are computed like it, and not stored
        const u16 *x = pointer<const u16>(a.x) + first * a.k + (int64_t)token_step * SPAN;
        const u32 to = shared_address(shared) + slot;
#pragma unroll
        for (int i = 0; i < S::TOKENS * 8 / THREADS; i++) {
            const u32 index = threadIdx.x + THREADS * i, piece = index % 8, token = index / 8;
            copy16_of_line(to + token * (SPAN * 2) + (piece ^ token % 2) * 16, x + min(token, last) * (u32)a.k + piece * 8);
        }
    }

    // The same with the next step's weights and their scales.
    DEVICE void load_weights(u32 slot) {
        if (--left < 0) return;
        const u32 shift = a.weight.log2 - 6; // a block is 64 << shift weights
        const int64_t first_row = (int64_t)next.row_tile * ROWS;
        const u32 last = (u32)min((int64_t)ROWS, a.n - first_row) - 1, row_bytes = (u32)a.k / 2, row_blocks = (u32)(a.k / SPAN) >> shift;
        const u8 *packed = pointer<const u8>(a.weight.packed) + first_row * row_bytes + next.step * (SPAN / 2);
        const u32 to = shared_address(shared) + slot;
        constexpr int PIECES = SPAN / 2 / 16; // of 16 bytes in a row
#pragma unroll
        for (int i = 0; i < ROWS * PIECES / THREADS; i++) {
            const u32 index = threadIdx.x + THREADS * i, row = index / PIECES, piece = index % PIECES;
            copy16_of_line(to + row * (SPAN / 2) + piece * 16, packed + min(source_row(row), last) * row_bytes + piece * 16);
        }
        const int64_t block = first_row * row_blocks + (min(source_row(threadIdx.x), last) * row_blocks + (next.step >> shift));
        if (NESTED) {
            code = __ldg(pointer<const u8>(a.weight.absmax) + block);
            absmax = __ldg(pointer<const float>(a.weight.nested_absmax) + (block >> 8));
        } else {
            copy<4>(to + SCALES + threadIdx.x * 4, pointer<const float>(a.weight.absmax) + block);
        }
        token_tile = next.token_tile;
        token_step = next.step;
        next.advance(work);
    }

    // Puts the nested statistics that came last into their slot.
    DEVICE void finish(u32 slot) {
        if (!NESTED || left < 0) return;
        const float *const codebook = (const float *)(shared + TABLE_BYTES), offset = *(const float *)(shared + OFFSET);
        ((float *)(shared + slot + SCALES))[threadIdx.x] = nested_absmax(codebook[code], absmax, offset);
    }
};

// ---- storing

template <int COUNT> struct __align__(2 * COUNT) Words {
    u32 word[COUNT / 2];
};

// Rows row … row + COUNT of a token, row a multiple of COUNT.
template <class T, int COUNT> static DEVICE void store_rows(const gq_linear_args &a, int64_t token, int64_t row, const float v[COUNT]) {
    if (token >= a.m || row >= a.n) return;
    u16 *y = pointer<u16>(a.y) + token * a.n + row;
    if (a.n % COUNT == 0 && a.y % (2 * COUNT) == 0) {
        Words<COUNT> words;
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) words.word[i] = T::narrow2(v[2 * i], v[2 * i + 1]);
        *(Words<COUNT> *)y = words;
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        if (row + i < a.n) y[i] = T::narrow(v[i]);
    }
}

// A thread's first row and token of a tile.
template <class S> struct Place {
    u32 row, token;
    DEVICE Place() {
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        row = warp * WARP_ROWS + lane / 4 * LANE_ROWS;
        token = lane % 4 * 2;
    }
    DEVICE int64_t row_in(const Work &w, u32 tile) const { return (int64_t)(tile / w.token_tiles) * ROWS + row; }
    DEVICE int64_t token_in(const Work &w, u32 tile) const { return (int64_t)(tile % w.token_tiles) * S::TOKENS + token; }
};

// The thread's sums of two tokens, in the order of mma's results.
template <class T> static DEVICE void store(const gq_linear_args &a, int64_t token, int64_t row, const float bias[LANE_ROWS], const float sum[ROW_TILES][4]) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
        float v[LANE_ROWS];
#pragma unroll
        for (int j = 0; j < LANE_ROWS; j++) v[j] = sum[j / 2][j % 2 * 2 + e] + bias[j];
        store_rows<T, LANE_ROWS>(a, token + e, row, v);
    }
}

template <class T> static DEVICE void load_bias(float bias[LANE_ROWS], const gq_linear_args &a, int64_t row) {
#pragma unroll
    for (int j = 0; j < LANE_ROWS; j++) bias[j] = a.bias && row + j < a.n ? T::widen(__ldg(pointer<const u16>(a.bias) + row + j)) : 0;
}

// Where a thread's partial sums of a tile are. A CTA has two parts of the workspace: 2 · CTA + 1 for a tile whose first steps it has, and 2 · CTA
// for one whose first steps another has. Those of column c, row tile r at (c · ROW_TILES + r) · THREADS.
template <class S> static DEVICE float4 *partial(const gq_linear_tile_args &args, int64_t part) {
    return pointer<float4>(args.workspace) + part * (ROWS * S::TOKENS / 4) + threadIdx.x;
}

// ---- the kernel

// The operands of half a span: for each of the thread's row tiles those of two mma. Either they are scaled, and rounded to the dtype, or
// their sums will be.
template <class T, bool SCALED_SUMS> static DEVICE void decode(u32 a[ROW_TILES][2][4], u32 slot, int half, u32 first_row, u32 table, float factor) {
    const u32 lane = threadIdx.x % 32, lane_offset = lane * 4, row = first_row + lane / 4;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
        const u32 *const words = (const u32 *)(shared + slot + (row + r * 16) * (SPAN / 2) + lane % 4 * 8) + half;
        const u32 p0 = words[0], p1 = words[8 * SPAN / 2 / 4];
        operand<ENTRY, 0>(a[r][0], table, p0, p1, lane_offset);
        operand<ENTRY, 2>(a[r][1], table, p0, p1, lane_offset);
        if constexpr (SCALED_SUMS) continue;
        const float *const scales = (const float *)(shared + slot + SCALES) + row + r * 16;
        const Scale<T> scale0(scales[0] * factor), scale1(scales[8] * factor);
#pragma unroll
        for (int q = 0; q < 2; q++) {
#pragma unroll
            for (int i = 0; i < 4; i++) a[r][q][i] = i % 2 ? scale1.times(a[r][q][i]) : scale0.times(a[r][q][i]);
        }
    }
}

// Adds the sums of a span. scales are those of the thread's first row; its others' are 8 further each.
template <class S>
static DEVICE void add_scaled(float sum[ROW_TILES][S::COLUMNS][4], const float d[ROW_TILES][S::COLUMNS][4], const float *scales, float factor) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
        const float scale0 = scales[r * 16] * factor, scale1 = scales[r * 16 + 8] * factor;
#pragma unroll
        for (int c = 0; c < S::COLUMNS; c++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sum[r][c][i] = __fmaf_rn(i < 2 ? scale0 : scale1, d[r][c][i], sum[r][c][i]);
        }
    }
}

template <class T, class S, bool SCALED_SUMS, bool NESTED> static DEVICE void linear_tile(const gq_linear_tile_args &args) {
    constexpr int R = ROW_TILES, C = S::COLUMNS;
    const gq_linear_args &a = args.linear;
    const Work work = Work::of<S>(args);
    const int depth = args.depth;
    const u32 token_ring = RINGS, weight_ring = token_ring + depth * S::TOKEN_SLOT;
    const u32 table = shared_address(shared), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
    const u32 first_row = warp * WARP_ROWS; // of the warp, in shared memory
    const int64_t first = work.first(blockIdx.x);
    Cursor at(work, first);
    int left = (int)(work.first(blockIdx.x + 1) - first);
    Loader<S, NESTED> loader(a, work, at, left);
    if (threadIdx.x < ROWS && (int64_t)at.row_tile * ROWS + threadIdx.x < a.n) {
        const u32 bytes = min(min((u32)left, work.per_tile - at.step) * (SPAN / 2), 512u);
        prefetch(pointer<const u8>(a.weight.packed) + ((int64_t)at.row_tile * ROWS + threadIdx.x) * (a.k / 2) + at.step * (SPAN / 2), bytes);
    }
    fill_table<T, ENTRY>(shared, a.weight.format, threadIdx.x, blockDim.x);
    wait_for_kernel_before();
    let_next_kernel_start();
    if (NESTED) {
        if (threadIdx.x == 0) *(float *)(shared + OFFSET) = __ldg(pointer<const float>(a.weight.offset));
        for (int i = threadIdx.x; i < 256; i += THREADS) ((float *)(shared + TABLE_BYTES))[i] = __ldg(pointer<const float>(a.weight.nested_codebook) + i);
        __syncthreads();
    }

    // Group i of copies is the tokens of step i and the weights of step i + 1.
    loader.load_weights(weight_ring);
    loader.finish(weight_ring);
    for (int i = 0; i < depth - 1; i++) {
        const u32 slot = weight_ring + (i + 1) * WEIGHT_SLOT;
        loader.load_tokens(token_ring + i * S::TOKEN_SLOT);
        loader.load_weights(slot);
        commit_copies();
        loader.finish(slot);
    }
    wait_for_step(depth);
    __syncthreads(); // the table is there too
    const float factor = 1 / table_factor(T(), a.weight.format);
    u32 operands[2][R][2][4]; // of this half span and of the next
    decode<T, SCALED_SUMS>(operands[0], weight_ring, 0, first_row, table, factor);

    int token_slot = 0, weight_slot = 0;
    u32 tile = at.row_tile * work.token_tiles + at.token_tile, begin = at.step;
    while (left > 0) {
        float sum[R][C][4] = {};
        const int steps = min(left, (int)(work.per_tile - begin));
        for (int i = 0; i < steps; i++) {
            const int free_slot = weight_slot == 0 ? depth : weight_slot - 1;
            loader.finish(weight_ring + (free_slot == 0 ? depth : free_slot - 1) * WEIGHT_SLOT);
            wait_for_step(depth);
            __syncthreads(); // the copies of all threads have come; and the slots before these are free
            loader.load_tokens(token_ring + (token_slot == 0 ? depth - 1 : token_slot - 1) * S::TOKEN_SLOT);
            loader.load_weights(weight_ring + free_slot * WEIGHT_SLOT);
            commit_copies();
            const u32 weights = weight_ring + weight_slot * WEIGHT_SLOT;
            weight_slot = weight_slot == depth ? 0 : weight_slot + 1;
            // Behind the last step it is old weights that are decoded, and not used.
            const u32 next = weight_ring + weight_slot * WEIGHT_SLOT;
            u32 x = token_ring + token_slot * S::TOKEN_SLOT + g * (SPAN * 2) + (t * 2 ^ g % 2) * 16;
            token_slot = token_slot == depth - 1 ? 0 : token_slot + 1;

            float d[SCALED_SUMS ? R : 1][SCALED_SUMS ? C : 1][4];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                decode<T, SCALED_SUMS>(operands[1 - half], half == 0 ? weights : next, 1 - half, first_row, table, factor);
#pragma unroll
                for (int c = 0; c < C; c++) {
                    const uint4 v = *(const uint4 *)(shared + x + c * 8 * (SPAN * 2));
#pragma unroll
                    for (int r = 0; r < R; r++) {
                        float *const to = SCALED_SUMS ? d[SCALED_SUMS ? r : 0][SCALED_SUMS ? c : 0] : sum[r][c];
                        if (SCALED_SUMS && half == 0) to[0] = to[1] = to[2] = to[3] = 0;
                        mma(T(), to, operands[half][r][0], v.x, v.y);
                        mma(T(), to, operands[half][r][1], v.z, v.w);
                    }
                }
                x ^= 16; // the other half of a span
                if constexpr (SCALED_SUMS) {
                    if (half == 1) add_scaled<S>(sum, d, (const float *)(shared + weights + SCALES) + first_row + g, factor);
                }
            }
        }

        const Place<S> place;
        const int64_t row = place.row_in(work, tile), token = place.token_in(work, tile);
        if (steps == (int)work.per_tile) {
            float bias[LANE_ROWS];
            load_bias<T>(bias, a, row);
#pragma unroll
            for (int c = 0; c < C; c++) {
                float column[R][4];
#pragma unroll
                for (int i = 0; i < R * 4; i++) column[i / 4][i % 4] = sum[i / 4][c][i % 4];
                store<T>(a, token + c * 8, row, bias, column);
            }
        } else {
            float4 *const to = partial<S>(args, 2 * (int64_t)blockIdx.x + (begin == 0));
#pragma unroll
            for (int c = 0; c < C; c++) {
                if (token - t * 2 + c * 8 >= a.m) break; // no token of the column
#pragma unroll
                for (int r = 0; r < R; r++) __stcg(to + (c * R + r) * THREADS, make_float4(sum[r][c][0], sum[r][c][1], sum[r][c][2], sum[r][c][3]));
            }
        }
        left -= steps;
        begin = 0;
        tile++;
    }
}

// Adds up the tiles that several CTAs have parts of. A CTA does a column of 8 tokens (of each token warp) of a tile.
template <class T, class S> static DEVICE void linear_tile_sum(const gq_linear_tile_args &args) {
    constexpr int R = ROW_TILES;
    const gq_linear_args &a = args.linear;
    const Work work = Work::of<S>(args);
    const u32 tile = blockIdx.x / S::COLUMNS;
    const int64_t start = (int64_t)tile * work.per_tile;
    const int64_t first = work.owner(start), last = work.owner(start + work.per_tile - 1);
    wait_for_kernel_before();
    let_next_kernel_start();
    if (first == last) return;
    const u32 c = blockIdx.x % S::COLUMNS;
    const Place<S> place;
    const int64_t row = place.row_in(work, tile), token = place.token_in(work, tile) + c * 8;
    if (token >= a.m || row >= a.n) return;
    float bias[LANE_ROWS];
    load_bias<T>(bias, a, row);
    float sum[R][4] = {};
    const auto add = [&](int64_t part) {
        const float4 *const from = partial<S>(args, part) + c * R * THREADS;
#pragma unroll
        for (int r = 0; r < R; r++) {
            const float4 v = __ldcg(from + r * THREADS);
            sum[r][0] += v.x;
            sum[r][1] += v.y;
            sum[r][2] += v.z;
            sum[r][3] += v.w;
        }
    };
    add(2 * first + 1);
#pragma unroll 4
    for (int64_t cta = first + 1; cta <= last; cta++) add(2 * cta);
    store<T>(a, token, row, bias, sum);
}

// ---- the kernels: gq_linear_tile_<dtype>_<tokens>[_nested] and gq_linear_tile_sum_<dtype>_<tokens>.

typedef Shape<4> Tile32;
typedef Shape<8> Tile64;
typedef Shape<16> Tile128;

#ifndef GQ_TILE_TEMPLATES_ONLY
#define EACH_DTYPE(tokens, exact, ctas)             \
    EACH_KERNEL(f16, F16, tokens, exact, ctas)      \
    EACH_KERNEL(bf16, BF16, tokens, exact, ctas)
#define EACH_KERNEL(dtype, T, tokens, exact, ctas)                                                                                           \
    KERNEL(gq_linear_tile_##dtype##_##tokens, ctas, (linear_tile<T, Tile##tokens, exact, false>))                                          \
    KERNEL(gq_linear_tile_##dtype##_##tokens##_nested, ctas, (linear_tile<T, Tile##tokens, exact, true>))                                  \
    KERNEL(gq_linear_tile_sum_##dtype##_##tokens, 1, (linear_tile_sum<T, Tile##tokens>))
#define KERNEL(name, ctas, ...) \
    extern "C" __global__ void __launch_bounds__(THREADS, ctas) name(gq_linear_tile_args a) { __VA_ARGS__(a); }

EACH_DTYPE(32, true, 2)
EACH_DTYPE(64, true, 1)
EACH_DTYPE(128, false, 1)
#endif
#endif
