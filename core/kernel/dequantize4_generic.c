// 4-bit dequantization in plain C.

#include "vector_generic.h"
#include "tables.h"

struct lut {
    uint32_t bits[16];
};

LEVEL_INLINE struct lut make_lut(int dtype, const float *values, float absmax) {
    struct lut lut;
    for (int code = 0; code < 16; code++) lut.bits[code] = gq_narrow(dtype, gq_scaled(values[code], absmax));
    return lut;
}

LEVEL_INLINE void values32(int dtype, const struct lut *lut, const uint8_t *packed, uint8_t *dst) {
    for (int i = 0; i < GQ_GROUP; i++) {
        const uint32_t bits = lut->bits[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
        const uint16_t half = (uint16_t)bits;
        if (dtype == GQ_F32) {
            memcpy(dst + 4 * i, &bits, 4);
        } else {
            memcpy(dst + 2 * i, &half, 2);
        }
    }
}

#include "dequantize4_frame.h"

void gq_dequantize4_generic(int codebook, int dtype, const uint8_t *packed, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst) {
    dequantize4(codebook, dtype, packed, absmax, n, blocksize, dst);
}
