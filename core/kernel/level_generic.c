#include "kernel.h"

const struct gq_level gq_generic = {
    gq_quantize4_generic,
    gq_dequantize4_generic,
    gq_quantize8_generic,
    gq_dequantize8_generic,
    gq_linear4_generic,
};
