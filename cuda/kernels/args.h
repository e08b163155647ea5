// What the kernels take: one struct each, by value. C, Go (through cgo) and CUDA share this file. Addresses are device memory.
#ifndef GQUANT_ARGS_H
#define GQUANT_ARGS_H

#include <stdint.h>

// Elements src[0…n) in blocks, the first of which is block 0 of absmax and codes.
struct gq_quantize_args {
    uint64_t src, absmax, codes;
    uint64_t table;  // 256 float32, for 8-bit codes
    uint64_t offset; // one float32 that is subtracted from each element, or 0
    int64_t n;
    int32_t blocksize, log2; // 32 … 4096, and its logarithm
};

// The fast kernels take n = CTAs · CHUNKS · threads · LANE elements, with as many threads that threads · LANE is a multiple of blocksize.
enum { GQ_QUANTIZE_LANE = 8, GQ_QUANTIZE_CHUNKS = 4 };

// A quantized weight. Which fields a kernel reads depends on the format; nested_absmax is 0 unless nested.
struct gq_weight {
    uint64_t packed;
    uint64_t absmax; // float32, or uint8 when nested
    uint64_t nested_absmax, nested_codebook, offset;
    uint64_t codebook;  // 256 float32, for blockwise 8-bit codes
    int64_t blocksize;  // elements per absmax, in flat order
    int32_t log2;       // of the blocksize, where it is a power of two
    int32_t format;     // GQ_NF4, GQ_FP4
};

enum { GQ_NF4 = 1, GQ_FP4 = 2 }; // the numbers of gquant.h

// The fast kernels make GQ_DEQUANTIZE_CHUNKS · 16 bytes per thread, of 256 threads.
enum { GQ_DEQUANTIZE_CHUNKS = 4 };

// Elements first … first+n of the weight become out[0…n).
struct gq_dequantize_args {
    struct gq_weight weight;
    uint64_t out;
    int64_t first, n;
};

// y = x · Wᵀ + bias for few tokens: x is [m, k], W [n, k], bias [n] or 0, y [m, n], all but W of one dtype. k is a multiple of
// GQ_LINEAR_STEP and of the blocksize, which is at least 64.
enum {
    GQ_LINEAR_STEP = 128,  // elements of k in a slot of a warp's ring
    GQ_LINEAR_ENTRY = 256, // bytes of an entry of the table of pairs: 128 or 256
};
// The kernels: columns of 8 tokens, and rows of W that a CTA has at a time, in parts of GQ_LINEAR_PART rows; slots of a warp's ring, each for a step
// of a part; and the most warps.
#define GQ_LINEAR_FEW(FEW)                                                                                                                   \
    FEW(1, 112, 4, 16) FEW(1, 96, 4, 16) FEW(1, 72, 4, 16) FEW(1, 64, 4, 16) FEW(1, 48, 4, 16) FEW(1, 32, 4, 16) FEW(1, 24, 4, 12)           \
    FEW(2, 112, 4, 12) FEW(2, 96, 4, 12) FEW(2, 72, 4, 12) FEW(2, 64, 4, 12) FEW(2, 48, 4, 12) FEW(2, 32, 4, 12) FEW(2, 24, 4, 12)           \
    FEW(4, 32, 3, 12) FEW(4, 24, 3, 12)
#define GQ_LINEAR_PART(rows) ((rows) % 32 != 0 && (rows) % 24 == 0 ? 24 : 32)
#define GQ_LINEAR_SLOT(rows) (GQ_LINEAR_PART(rows) * (GQ_LINEAR_STEP / 2 + GQ_LINEAR_STEP / 64 * 4)) // bytes: weights, and a float32 for 64 of them
struct gq_linear_args {
    struct gq_weight weight;
    uint64_t x, bias, y;
    int64_t m, n, k;
    int64_t settled; // 1: the kernel before does not write the weight, which may be read before that ends
};

// The same for more tokens; k is a multiple of GQ_TILE_STEP. A tile is GQ_TILE_ROWS of W and 32, 64 or 128 tokens; it takes k / GQ_TILE_STEP
// steps. The steps of all tiles, one behind another, are divided among CTAs.
enum {
    GQ_TILE_ROWS = 256,
    GQ_TILE_THREADS = 256,
    GQ_TILE_STEP = 64,
    GQ_TILE_ENTRY = 128, // bytes of an entry of the table of pairs
    GQ_TILE_TABLES = 256 * GQ_TILE_ENTRY + 4 * 256 + 128, // bytes of shared memory before the rings: also the nested codebook and offset
    GQ_TILE_DEPTH = 6, // slots of the ring of tokens at most, 2 at least; the ring of weights has one more
};
struct gq_linear_tile_args {
    struct gq_linear_args linear;
    uint64_t workspace; // for partial sums in float32: two tiles for each CTA
    int64_t ctas;       // no more than there are grains
    int64_t grain;      // steps that are not divided: 1, or all steps of a tile, which needs no workspace
    int32_t depth;
};

// The same for many tokens on Hopper, in tiles of some rows of W and some tokens: tile i has rows from i / tiles_of_tokens · rows on and tokens from
// i % tiles_of_tokens · tokens on, and `steps` steps along k. k is a multiple of GQ_HOPPER_STEP and the blocksize.
enum { GQ_HOPPER_STEP = 128 };
struct gq_share { // of steps: number i has those from i · each + min(i, more) on
    uint32_t each, more;
};
struct gq_hopper_args {
    struct gq_linear_args linear;
    uint64_t partial, flags; // for tiles that are dealt out: per CTA 3 bytes of each sum of a tile, and a uint64
    uint64_t launch;         // a number that no launch before had, and memory is unlikely to have
    uint32_t tiles, tiles_of_tokens, steps;
    uint32_t dealt;           // tiles that CTAs share by k, the first
    struct gq_share of_dealt; // a CTA's share of their steps
    uint32_t cluster;         // CTAs of a cluster; if there are more than one, they share a tile, and none is dealt out
    struct gq_share of_tile;  // the share of the steps of a tile that a CTA of a cluster has
};
// The kernels: rows of W in a tile, each 64 for a warpgroup; tokens of it; slots of x (64 elements of k) and of W (a step); tokens of y that are staged at a
// time; bytes of an entry of the table. A CTA has 128 threads more than two for each row.
#define GQ_HOPPER_TILES(TILE)     \
    TILE(128, 32, 8, 8, 32, 256)  \
    TILE(128, 64, 8, 7, 64, 256)  \
    TILE(128, 96, 6, 6, 96, 256)  \
    TILE(128, 128, 5, 5, 64, 256) \
    TILE(128, 192, 4, 4, 64, 256) \
    TILE(128, 256, 4, 4, 64, 128) \
    TILE(192, 32, 8, 6, 32, 256)  \
    TILE(192, 64, 8, 4, 64, 256)  \
    TILE(192, 96, 6, 4, 32, 256)
#define GQ_HOPPER_THREADS(rows) (2 * (rows) + 128)
#define GQ_HOPPER_SHARED(rows, tokens, x, w, staged, entry)                                                                               \
    ((x) * (tokens) * 128 + (w) * (rows) * (GQ_HOPPER_STEP / 2 + GQ_HOPPER_STEP / 8) + (staged) * ((rows) * 2 + 16) + 256 * (entry) + \
     ((x) + (w) + 1) * 16)

// Every row of y [m, n] becomes bias [n].
struct gq_bias_args {
    uint64_t bias, y;
    int64_t m, n;
};

// out[i] is the sum of in[i·GQ_SUM_SPAN … (i+1)·GQ_SUM_SPAN), added pairwise; divided by count if that is not 0.
enum { GQ_SUM_SPAN = 4096 };
struct gq_sum_args {
    uint64_t in, out;
    int64_t n, count;
};

struct gq_rows_args {
    uint64_t src, absmax, codes;
    uint64_t outliers; // a byte per column
    int64_t rows, cols;
    float threshold;
};

struct gq_pack_args {
    uint64_t codes, packed;
    int64_t n;
    int32_t low_first;
};

// The number of NaN and infinite elements is added to *count, a uint64.
struct gq_nonfinite_args {
    uint64_t src, count;
    int64_t n;
};

#endif
