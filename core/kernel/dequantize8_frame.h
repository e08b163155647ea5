// The frame of dequantize8, included by each vector level after it has defined STEP and VALUES(dtype, table, codes, absmax,
// dst), which decodes that many codes.

LEVEL_INLINE void blocks8(const float *table, int dtype, const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst) {
    for (int64_t first = 0; first < n; first += blocksize) {
        const int64_t end = n - first < blocksize ? n : first + blocksize;
        const float scale = *absmax++;
        int64_t i = first;
        for (; i + STEP <= end; i += STEP) VALUES(dtype, table, codes + i, scale, dst + i * gq_size(dtype));
        for (; i < end; i++) gq_store(dtype, dst, i, gq_scaled(table[codes[i]], scale));
    }
}

// One body per dtype. Subnormal entries of the table count as zero.
LEVEL_INLINE void dequantize8(const float *table, int dtype, const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst) {
    float flushed[256];
    for (int c = 0; c < 256; c++) flushed[c] = gq_flush(table[c]);
    if (dtype == GQ_BF16) {
        blocks8(flushed, GQ_BF16, codes, absmax, n, blocksize, dst);
    } else if (dtype == GQ_F16) {
        blocks8(flushed, GQ_F16, codes, absmax, n, blocksize, dst);
    } else {
        blocks8(flushed, GQ_F32, codes, absmax, n, blocksize, dst);
    }
}
