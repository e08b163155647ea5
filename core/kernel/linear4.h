// What all levels of the linear layer share: the sizes of its pieces.
#ifndef GQUANT_LINEAR4_H
#define GQUANT_LINEAR4_H

#include "kernel.h"

enum {
    // Additions of a sum start anew after so many elements of a row, which bounds the rounding error of long rows. A
    // tile's operands, 4 rows of the weight and 6 of x, are then 40 KiB and fit a first-level cache.
    GQ_CHUNK = 1024,
    // Floats from one row of a buffer to the next: rows a power of two apart would compete for the same cache lines.
    GQ_STRIDE = GQ_CHUNK + 32,
    // Decoded rows of the weight, a multiple of the rows of all tiles: 400 KiB of a core's second-level cache.
    GQ_PANEL = 96,
    // Rows of x that use a decoded panel. Their sums are 72 KiB.
    GQ_BATCH = 192,
    // Up to so many rows of x the codes are decoded in registers, and not stored.
    GQ_DIRECT = 8,
    // Elements between a group of rows and the codes that are fetched meanwhile, beside the group itself: 16 KiB.
    GQ_AHEAD = 32 << 10,
    // Rows of x of the largest tile of all levels.
    GQ_TILE = 6,
};

// The floats of scratch memory that a call needs.
static inline int64_t gq_linear4_scratch(int64_t m, int64_t k) {
    const int64_t direct = ((k + GQ_CHUNK - 1) / GQ_CHUNK * GQ_STRIDE + GQ_PANEL) * GQ_DIRECT;
    const int64_t panel = (GQ_PANEL + GQ_TILE + 1) * GQ_STRIDE + GQ_BATCH * GQ_PANEL;
    return m <= GQ_DIRECT && direct > panel ? direct : panel;
}

#endif
