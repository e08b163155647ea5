// The frame of dequantize4, included by each level after it has defined
//
//   struct lut, make_lut(int dtype, const float *values, float absmax): the 16 results of a block, rounded
//   void values32(int dtype, const struct lut *, const uint8_t *packed, uint8_t *dst): 16 bytes to 32 results
//
// A block has at least 32 elements and only 16 different results: they are computed first and then looked up.

LEVEL_INLINE void blocks4(const float *values, int dtype, const uint8_t *packed, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst) {
    for (int64_t first = 0; first < n; first += blocksize) {
        const int64_t count = n - first < blocksize ? n - first : blocksize;
        const int64_t whole = count / GQ_GROUP * GQ_GROUP;
        const uint8_t *block = packed + first / 2;
        uint8_t *out = dst + first * gq_size(dtype);
        const struct lut lut = make_lut(dtype, values, *absmax++);
        for (int64_t i = 0; i < whole; i += GQ_GROUP) values32(dtype, &lut, block + i / 2, out + i * gq_size(dtype));
        if (whole < count) {
            uint8_t codes[GQ_GROUP / 2] = {0}, rest[4 * GQ_GROUP];
            memcpy(codes, block + whole / 2, (size_t)((count - whole + 1) / 2));
            values32(dtype, &lut, codes, rest);
            memcpy(out + whole * gq_size(dtype), rest, (size_t)((count - whole) * gq_size(dtype)));
        }
    }
}

// One body per dtype.
LEVEL_INLINE void dequantize4(int codebook, int dtype, const uint8_t *packed, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst) {
    const float *values = gq_values4[codebook];
    if (dtype == GQ_BF16) {
        blocks4(values, GQ_BF16, packed, absmax, n, blocksize, dst);
    } else if (dtype == GQ_F16) {
        blocks4(values, GQ_F16, packed, absmax, n, blocksize, dst);
    } else {
        blocks4(values, GQ_F32, packed, absmax, n, blocksize, dst);
    }
}
