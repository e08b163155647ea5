// The frame of linear4, included by each level after it has defined
//
//   vec, LANES: a vector of so many floats
//   ROWS(m): how many rows of the weight a tile of decoded registers has beside m rows of x
//   TILE: how many rows of x a tile of the panel has
//   vec zero(), load(const float *), fuse(vec a, vec b, vec sum)
//   void sum4(vec a, vec b, vec c, vec d, float *sums): the sum of each
//   struct lut, make_lut(const float *values, float absmax): the 16 values of a block
//   vec lookup(const struct lut *, const uint8_t *packed, int v): LANES of 16 bytes' 32 values; together, for all v, a
//       permutation of them
//   void arrange32(int dtype, const uint8_t *src, float *out): 32 elements as float32, in the order of lookup
//   int narrow_all(int dtype, const float *sums, const uint8_t *bias, uint8_t *dst, int n): stores sums + bias; how many
//       of n it did, the rest is done one by one
//   DEQUANTIZE: the level's dequantize4
//
// Every sum is made in the same way, whatever the tile it is in: LANES sums run through a chunk of the row, their total is
// added to that of the chunks before. So a row of y depends on its own row of x alone, not on how many there are.

enum {
    STEPS = GQ_GROUP / LANES, // vectors of a group
    LINE = 64,                // bytes of a cache line
};

// fetch has the cache line of an element's code read, which may lie beyond the end.
LEVEL_INLINE void fetch(const struct gq_linear4 *l, int64_t element) {
    __builtin_prefetch((const void *)((uintptr_t)l->packed + (uintptr_t)(element / 2)));
}

// arrange makes n elements float32 in the order of lookup, and zeros up to a whole group.
LEVEL_INLINE void arrange_as(int dtype, const uint8_t *src, int64_t n, float *out) {
    const int64_t whole = n / GQ_GROUP * GQ_GROUP;
    for (int64_t i = 0; i < whole; i += GQ_GROUP) arrange32(dtype, src + i * gq_size(dtype), out + i);
    if (whole < n) {
        uint8_t rest[4 * GQ_GROUP] = {0};
        memcpy(rest, src + whole * gq_size(dtype), (size_t)((n - whole) * gq_size(dtype)));
        arrange32(dtype, rest, out + whole);
    }
}

static LEVEL_TARGET __attribute__((noinline)) void arrange(int dtype, const uint8_t *src, int64_t n, float *out) {
    if (dtype == GQ_BF16) {
        arrange_as(GQ_BF16, src, n, out);
    } else if (dtype == GQ_F16) {
        arrange_as(GQ_F16, src, n, out);
    } else {
        arrange_as(GQ_F32, src, n, out);
    }
}

// finish rounds a row of y.
LEVEL_INLINE void finish_as(int dtype, const float *sums, const uint8_t *bias, uint8_t *y, int n) {
    for (int i = narrow_all(dtype, sums, bias, y, n); i < n; i++) {
        const float sum = bias ? sums[i] + gq_widen(dtype, gq_load(dtype, bias, i)) : sums[i];
        gq_store(dtype, y, i, sum == sum ? sum : gq_float(0x7fffffff));
    }
}

LEVEL_INLINE void finish(const struct gq_linear4 *l, const float *sums, int64_t m, int64_t row, int n) {
    const int size = gq_size(l->dtype);
    const uint8_t *bias = l->bias ? l->bias + row * size : NULL;
    uint8_t *y = l->y + (m * l->stride + row) * size;
    if (l->dtype == GQ_BF16) {
        finish_as(GQ_BF16, sums, bias, y, n);
    } else if (l->dtype == GQ_F16) {
        finish_as(GQ_F16, sums, bias, y, n);
    } else {
        finish_as(GQ_F32, sums, bias, y, n);
    }
}

// The sums of a tile, as vectors, to floats.
LEVEL_INLINE void sum_all(int n, const vec *acc, float *sums) {
    int i = 0;
    for (; i + 4 <= n; i += 4) sum4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3], sums + i);
    if (i < n) {
        const vec last = acc[n - 1]; // of one, two or three, repeated
        sum4(acc[i], i + 1 < n ? acc[i + 1] : last, i + 2 < n ? acc[i + 2] : last, last, sums + i);
    }
}

// ---- few rows of x: the codes are decoded in registers

// So many rows of the weight, one or more tiles, go through a chunk of x while it is in the first-level cache.
enum { GROUP_ROWS = 8 };

// How many elements of a row, from a multiple of this number on, surely lie in one block: the greatest common divisor of a
// row and a block, which is a power of two.
LEVEL_INLINE int64_t segment(const struct gq_linear4 *l) {
    const int64_t divisor = (l->k | l->blocksize) & -(l->k | l->blocksize);
    return divisor < GQ_CHUNK ? divisor : GQ_CHUNK;
}

// A tile: count elements of several rows of the weight, each from one of starts on, and m rows of x. The sums are ordered by
// row of x. Meanwhile as many codes are fetched, from element next on.
LEVEL_INLINE void direct_tile(int rows, int m, const struct gq_linear4 *l, const int64_t *starts, const float *x, int64_t count, int64_t next, float *sums) {
    const float *values = gq_values4[l->codebook];
    const int64_t step = segment(l);
    const int shift = __builtin_ctzll((unsigned long long)l->blocksize);
    const uint8_t *codes[GROUP_ROWS];
    for (int r = 0; r < rows; r++) codes[r] = l->packed + starts[r] / 2;
    vec acc[16];
    for (int i = 0; i < rows * m; i++) acc[i] = zero();
    for (int64_t first = 0; first < count; first += step) {
        struct lut luts[GROUP_ROWS];
        for (int r = 0; r < rows; r++) luts[r] = make_lut(values, l->absmax[(starts[r] + first) >> shift]);
        for (int64_t i = 0; i < rows * step; i += 2 * LINE) fetch(l, next + i);
        next += rows * step;
        for (int64_t i = first / 2; i < (first + step) / 2; i += GQ_GROUP / 2) {
            for (int v = 0; v < STEPS; v++) {
                vec xs[GQ_DIRECT];
                for (int j = 0; j < m; j++) xs[j] = load(x + j * GQ_STRIDE + 2 * i + v * LANES);
                for (int r = 0; r < rows; r++) {
                    const vec w = lookup(&luts[r], codes[r] + i, v);
                    for (int j = 0; j < m; j++) acc[j * rows + r] = fuse(w, xs[j], acc[j * rows + r]);
                }
            }
        }
    }
    sum_all(rows * m, acc, sums);
}

LEVEL_INLINE void direct_rows(int m, const struct gq_linear4 *l, const float *x, int64_t row, int n, float *sums) {
    const int rows = ROWS(m);
    for (int g = 0; g < n; g += GROUP_ROWS) {
        float group[GQ_DIRECT * GROUP_ROWS] = {0};
        // While this group is read piece by piece, a row here and a row there, codes further on are fetched in the order of
        // memory. The CPU's own prefetchers do not see through the former.
        int64_t next = l->skip + (row + g + GROUP_ROWS) * l->k + GQ_AHEAD;
        for (int64_t k = 0; k < l->k; k += GQ_CHUNK) {
            const int64_t count = l->k - k < GQ_CHUNK ? l->k - k : GQ_CHUNK;
            int64_t starts[GROUP_ROWS];
            for (int r = 0; r < GROUP_ROWS; r++) { // rows beyond the end repeat the last one
                starts[r] = l->skip + (row + (g + r < n ? g + r : n - 1)) * l->k + k;
            }
            for (int t = 0; t < GROUP_ROWS; t += rows) {
                float tile[16];
                direct_tile(rows, m, l, starts + t, x + k / GQ_CHUNK * m * GQ_STRIDE, count, next, tile);
                next += rows * count;
                for (int j = 0; j < m; j++) {
                    for (int r = 0; r < rows; r++) group[j * GROUP_ROWS + t + r] += tile[j * rows + r];
                }
            }
        }
        for (int j = 0; j < m; j++) memcpy(sums + j * GQ_PANEL + g, group + j * GROUP_ROWS, sizeof(float) * GROUP_ROWS);
    }
}

static LEVEL_TARGET __attribute__((noinline)) void direct(const struct gq_linear4 *l) {
    float *sums = l->scratch, *x = sums + GQ_DIRECT * GQ_PANEL;
    for (int64_t k = 0; k < l->k; k += GQ_CHUNK) { // all rows of a chunk are neighbours
        const int64_t count = l->k - k < GQ_CHUNK ? l->k - k : GQ_CHUNK;
        for (int64_t j = 0; j < l->m; j++) {
            arrange(l->dtype, l->x + (j * l->k + k) * gq_size(l->dtype), count, x + (k / GQ_CHUNK * l->m + j) * GQ_STRIDE);
        }
    }
    for (int64_t row = 0; row < l->rows; row += GQ_PANEL) {
        const int n = (int)(l->rows - row < GQ_PANEL ? l->rows - row : GQ_PANEL);
        switch (l->m) {
        case 1: direct_rows(1, l, x, row, n, sums); break;
        case 2: direct_rows(2, l, x, row, n, sums); break;
        case 3: direct_rows(3, l, x, row, n, sums); break;
        case 4: direct_rows(4, l, x, row, n, sums); break;
        case 5: direct_rows(5, l, x, row, n, sums); break;
        case 6: direct_rows(6, l, x, row, n, sums); break;
        case 7: direct_rows(7, l, x, row, n, sums); break;
        case 8: direct_rows(8, l, x, row, n, sums); break;
        }
        for (int64_t j = 0; j < l->m; j++) finish(l, sums + j * GQ_PANEL, j, row, n);
    }
}

// ---- many rows of x, or rows of the weight that are no whole groups: a panel of decoded rows

enum { PANEL_ROWS = 4 }; // of a tile

// decode writes count elements of the weight, from element first on, in the order of lookup. first is the start of a group.
// It fetches the codes that lie ahead by so many elements.
static LEVEL_TARGET __attribute__((noinline)) void decode(const struct gq_linear4 *l, int64_t first, int64_t count, int64_t ahead, float *out) {
    const float *values = gq_values4[l->codebook];
    const int64_t step = segment(l);
    const int shift = __builtin_ctzll((unsigned long long)l->blocksize);
    for (int64_t s = 0; s < count; s += step) {
        const struct lut lut = make_lut(values, l->absmax[(first + s) >> shift]);
        for (int64_t i = s; i < s + step; i += 2 * LINE) fetch(l, first + ahead + i);
        for (int64_t i = s; i < s + step; i += GQ_GROUP) {
            for (int v = 0; v < STEPS; v++) store(out + i + v * LANES, lookup(&lut, l->packed + (first + i) / 2, v));
        }
    }
}

// decode_any is decode from any element on. flat has room for GQ_STRIDE floats: the elements in order, from the group that
// holds the first one.
static LEVEL_TARGET __attribute__((noinline)) void decode_any(const struct gq_linear4 *l, int64_t first, int64_t count, float *flat, float *out) {
    const int64_t start = first / GQ_GROUP * GQ_GROUP, end = first + count;
    const int64_t next = (start / l->blocksize + 1) * l->blocksize; // the end of the block
    const int64_t head = (next < end ? next : end) - start;
    const float *absmax = l->absmax + start / l->blocksize;
    DEQUANTIZE(l->codebook, GQ_F32, l->packed + start / 2, absmax, head, l->blocksize, (uint8_t *)flat);
    if (next < end) DEQUANTIZE(l->codebook, GQ_F32, l->packed + next / 2, absmax + 1, end - next, l->blocksize, (uint8_t *)(flat + head));
    arrange(GQ_F32, (const uint8_t *)(flat + (first - start)), count, out);
}

// count is a multiple of LANES. The sums are ordered by row of x.
LEVEL_INLINE void panel_tile(int m, const float *w, const float *x, int64_t count, float *sums) {
    vec acc[TILE * PANEL_ROWS];
    for (int i = 0; i < m * PANEL_ROWS; i++) acc[i] = zero();
    for (int64_t i = 0; i < count; i += LANES) {
        vec ws[PANEL_ROWS];
        for (int r = 0; r < PANEL_ROWS; r++) ws[r] = load(w + r * GQ_STRIDE + i);
        for (int j = 0; j < m; j++) {
            const vec xs = load(x + j * GQ_STRIDE + i);
            for (int r = 0; r < PANEL_ROWS; r++) acc[j * PANEL_ROWS + r] = fuse(ws[r], xs, acc[j * PANEL_ROWS + r]);
        }
    }
    sum_all(m * PANEL_ROWS, acc, sums);
}

// The products of n rows of the panel with m rows of x, added to sums.
LEVEL_INLINE void panel_rows(int m, int n, const float *w, const float *x, int64_t count, float *sums) {
    for (int r = 0; r < n; r += PANEL_ROWS) {
        float tile[TILE * PANEL_ROWS];
        panel_tile(m, w + r * GQ_STRIDE, x, count, tile);
        for (int j = 0; j < m; j++) {
            for (int i = 0; i < PANEL_ROWS; i++) sums[j * GQ_PANEL + r + i] += tile[j * PANEL_ROWS + i];
        }
    }
}

static LEVEL_TARGET __attribute__((noinline)) void panel(const struct gq_linear4 *l, int64_t m, int batch, int64_t row, int n) {
    float *w = l->scratch, *x = w + GQ_PANEL * GQ_STRIDE, *flat = x + GQ_TILE * GQ_STRIDE, *sums = flat + GQ_STRIDE;
    const int padded = (n + PANEL_ROWS - 1) / PANEL_ROWS * PANEL_ROWS;
    memset(sums, 0, sizeof(float) * (size_t)(batch * GQ_PANEL));
    memset(w + n * GQ_STRIDE, 0, sizeof(float) * (size_t)((padded - n) * GQ_STRIDE));
    for (int64_t k = 0; k < l->k; k += GQ_CHUNK) {
        const int64_t count = l->k - k < GQ_CHUNK ? l->k - k : GQ_CHUNK;
        // The next chunk of the row, or the first one of the row in the next panel.
        const int64_t next = k + GQ_CHUNK < l->k ? GQ_CHUNK : GQ_PANEL * l->k - k;
        for (int r = 0; r < n; r++) {
            const int64_t first = l->skip + (row + r) * l->k + k;
            if (l->k % GQ_GROUP == 0) {
                decode(l, first, count, next, w + r * GQ_STRIDE);
            } else {
                decode_any(l, first, count, flat, w + r * GQ_STRIDE);
            }
        }
        const int64_t whole = (count + GQ_GROUP - 1) / GQ_GROUP * GQ_GROUP;
        for (int j = 0; j < batch; j += TILE) {
            const int tile = batch - j < TILE ? batch - j : TILE;
            for (int i = 0; i < tile; i++) {
                arrange(l->dtype, l->x + ((m + j + i) * l->k + k) * gq_size(l->dtype), count, x + i * GQ_STRIDE);
            }
            float *to = sums + j * GQ_PANEL;
            switch (tile) {
            case 1: panel_rows(1, padded, w, x, whole, to); break;
#if TILE > 1
            case 2: panel_rows(2, padded, w, x, whole, to); break;
#endif
#if TILE > 2
            case 3: panel_rows(3, padded, w, x, whole, to); break;
#endif
#if TILE > 3
            case 4: panel_rows(4, padded, w, x, whole, to); break;
            case 5: panel_rows(5, padded, w, x, whole, to); break;
            case 6: panel_rows(6, padded, w, x, whole, to); break;
#endif
            }
        }
    }
    for (int j = 0; j < batch; j++) finish(l, sums + j * GQ_PANEL, m + j, row, n);
}

static void linear4(const struct gq_linear4 *l) {
    if (l->m <= GQ_DIRECT && l->k % GQ_GROUP == 0) {
        direct(l);
        return;
    }
    for (int64_t m = 0; m < l->m; m += GQ_BATCH) {
        const int batch = (int)(l->m - m < GQ_BATCH ? l->m - m : GQ_BATCH);
        for (int64_t row = 0; row < l->rows; row += GQ_PANEL) {
            panel(l, m, batch, row, (int)(l->rows - row < GQ_PANEL ? l->rows - row : GQ_PANEL));
        }
    }
}
