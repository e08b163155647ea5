// 8-bit dequantization in plain C.

#include "vector_generic.h"

void gq_dequantize8_generic(const float *table, int dtype, const uint8_t *codes, const float *absmax, int64_t n, int64_t blocksize, uint8_t *dst) {
    for (int64_t first = 0; first < n; first += blocksize) {
        const int64_t end = n - first < blocksize ? n : first + blocksize;
        const float scale = *absmax++;
        for (int64_t i = first; i < end; i++) gq_store(dtype, dst, i, gq_scaled(table[codes[i]], scale));
    }
}
