#include "kernel.h"

const struct gq_level gq_avx2 = {
    gq_quantize4_avx2,
    gq_dequantize4_avx2,
    gq_quantize8_avx2,
    gq_dequantize8_avx2,
    gq_linear4_avx2,
};

const struct gq_level gq_avx512 = {
    gq_quantize4_avx512,
    gq_dequantize4_avx512,
    gq_quantize8_avx512,
    gq_dequantize8_avx512,
    gq_linear4_avx512,
};
