// The frame of the quantizers: scales, reciprocals, blocks and what is left over. A level includes it after it has
// defined
//
//   LEVEL_INLINE, LEVEL_TARGET     GQ_INLINE and an empty attribute, with the level's instruction set
//   largest(dtype, src, n)         the bits of the largest magnitude of n elements, NaN above all; 32 divides n
//   BITS, CODER                    the size of a code, and the type of what codes32 needs to find codes
//   codes32(coder, dtype, src, r, codes)   the 4·BITS bytes of codes of 32 elements times r
//
// (The frames are named .h because the go command rebuilds for changes of headers only.)

LEVEL_INLINE int64_t quantize_blocks(CODER coder, int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *codes) {
    // Scales come first and codes second, for a few blocks at a time: a scale and its reciprocal are a long chain of
    // operations, and the chains of several blocks overlap.
    enum { BATCH = 16 };
    int64_t nonfinite = 0;
    for (int64_t start = 0; start < n; start += BATCH * blocksize) {
        const int64_t end = n - start < BATCH * blocksize ? n : start + BATCH * blocksize;
        float reciprocals[BATCH], *r = reciprocals;
        for (int64_t first = start; first < end; first += blocksize) {
            const int64_t count = end - first < blocksize ? end - first : blocksize;
            const uint8_t *block = src + first * gq_size(dtype);
            uint32_t top = largest(dtype, block, count / GQ_GROUP * GQ_GROUP);
            for (int64_t i = count / GQ_GROUP * GQ_GROUP; i < count; i++) {
                const uint32_t magnitude = gq_magnitude(dtype, block, i);
                if (magnitude > top) top = magnitude;
            }
            float scale;
            nonfinite += gq_scale(dtype, block, count, top, &scale);
            *absmax++ = scale;
            *r++ = gq_reciprocal(scale);
        }
        r = reciprocals;
        for (int64_t first = start; first < end; first += blocksize, r++) {
            const int64_t count = end - first < blocksize ? end - first : blocksize;
            const int64_t whole = count / GQ_GROUP * GQ_GROUP;
            const uint8_t *block = src + first * gq_size(dtype);
            uint8_t *out = codes + first * BITS / 8;
            if (*r == INFINITY) { // the scale is 0, as all elements are; 0·(1/0) is NaN, whose code is 0
                memset(out, 0, (size_t)((count * BITS + 7) / 8));
                continue;
            }
            for (int64_t i = 0; i < whole; i += GQ_GROUP) codes32(coder, dtype, block + i * gq_size(dtype), *r, out + i * BITS / 8);
            if (whole < count) {
                uint8_t rest[4 * GQ_GROUP] = {0}, last[GQ_GROUP * BITS / 8];
                memcpy(rest, block + whole * gq_size(dtype), (size_t)((count - whole) * gq_size(dtype)));
                codes32(coder, dtype, rest, *r, last);
                memcpy(out + whole * BITS / 8, last, (size_t)(((count - whole) * BITS + 7) / 8));
            }
        }
    }
    return nonfinite;
}

// One body per dtype.
LEVEL_INLINE int64_t quantize(CODER coder, int dtype, const uint8_t *src, int64_t n, int64_t blocksize, float *absmax, uint8_t *codes) {
    if (dtype == GQ_BF16) return quantize_blocks(coder, GQ_BF16, src, n, blocksize, absmax, codes);
    if (dtype == GQ_F16) return quantize_blocks(coder, GQ_F16, src, n, blocksize, absmax, codes);
    return quantize_blocks(coder, GQ_F32, src, n, blocksize, absmax, codes);
}
