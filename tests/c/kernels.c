/* The kernels under ASan and UBSan: every level that the machine has, on random and odd sizes, in buffers of exactly the size that
 * is needed; all levels give the same bytes. Built from core/kernel with -fsanitize, without Go. */
#include "kernel.h"

#if defined(__x86_64__)
#include "cpu_amd64.h"
#endif

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t seed = 20261;

static uint32_t random_bits(void) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 32);
}

/* An element like those of weights; one in 50 has random bits, so also NaN, Inf and subnormal. */
static uint32_t element(int dtype) {
    if (random_bits() % 50 == 0) return random_bits();
    const float x = (float)(int32_t)random_bits() / 2147483648.0f;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (dtype == GQ_F32) return bits;
    if (dtype == GQ_BF16) return bits >> 16;
    return (bits >> 16 & 0x8000) | (0x3800 - (random_bits() % 6 << 10) + random_bits() % 1024);
}

static void *exactly(size_t bytes) {
    void *p = malloc(bytes);
    if (!p) exit(2);
    return p;
}

/* What one level makes of a source; buffers of exactly the size it needs. */
struct result {
    uint8_t *codes, *values;
    float *absmax;
    int64_t nonfinite;
};

static struct result run(const struct gq_level *level, int codebook, const float *table, int dtype, const uint8_t *src, int64_t n, int64_t blocksize) {
    const size_t size = dtype == GQ_F32 ? 4 : 2;
    struct result r;
    r.absmax = exactly((size_t)((n + blocksize - 1) / blocksize) * 4);
    r.values = exactly((size_t)n * size);
    if (table) {
        r.codes = exactly((size_t)n);
        r.nonfinite = level->quantize8(table, dtype, src, n, blocksize, r.absmax, r.codes);
        level->dequantize8(table, dtype, r.codes, r.absmax, n, blocksize, r.values);
    } else {
        r.codes = exactly((size_t)(n + 1) / 2);
        r.nonfinite = level->quantize4(codebook, dtype, src, n, blocksize, r.absmax, r.codes);
        level->dequantize4(codebook, dtype, r.codes, r.absmax, n, blocksize, r.values);
    }
    return r;
}

static void release(struct result r) {
    free(r.codes);
    free(r.values);
    free(r.absmax);
}

static const struct {
    const char *name;
    const struct gq_level *level;
} levels[] = {
    {"generic", &gq_generic},
#if defined(__x86_64__)
    {"avx2", &gq_avx2},
    {"avx512", &gq_avx512},
#endif
};

static int available(int level) {
#if defined(__x86_64__)
    if (level == 1) return gq_cpu_has_avx2();
    if (level == 2) return gq_cpu_has_avx512();
#endif
    return level == 0;
}

static int one(int codebook, const float *table, int dtype, int64_t n, int64_t blocksize, int shift) {
    const size_t size = dtype == GQ_F32 ? 4 : 2, bytes = (size_t)n * size;
    /* An odd address: any alignment is allowed. The end of the source is the end of its buffer. */
    uint8_t *buffer = exactly(bytes + (size_t)shift), *src = buffer + shift;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = element(dtype);
        memcpy(src + (size_t)i * size, &bits, size);
    }
    const struct result want = run(levels[0].level, codebook, table, dtype, src, n, blocksize);
    const size_t codes = table ? (size_t)n : (size_t)(n + 1) / 2, scales = (size_t)((n + blocksize - 1) / blocksize) * 4;
    int failures = 0;
    for (int i = 1; i < (int)(sizeof levels / sizeof *levels); i++) {
        if (!available(i)) continue;
        const struct result got = run(levels[i].level, codebook, table, dtype, src, n, blocksize);
        if (got.nonfinite != want.nonfinite || memcmp(got.codes, want.codes, codes) || memcmp(got.absmax, want.absmax, scales) ||
            memcmp(got.values, want.values, bytes)) {
            fprintf(stderr, "%s differs from generic: codebook %d, table %d, dtype %d, n %lld, blocksize %lld\n", levels[i].name, codebook,
                    table != NULL, dtype, (long long)n, (long long)blocksize);
            failures++;
        }
        release(got);
    }
    release(want);
    free(buffer);
    return failures;
}

int main(void) {
    static const int64_t blocksizes[] = {32, 64, 96, 128, 256, 512, 1024, 2048, 4096};
    float table[256];
    for (int i = 0; i < 256; i++) table[i] = (float)(i - 127) / 128.0f;
    int failures = 0;
    for (int dtype = GQ_F32; dtype <= GQ_BF16; dtype++) {
        for (int kind = 0; kind < 3; kind++) {
            const float *map = kind == 2 ? table : NULL;
            for (int64_t n = 0; n <= 300; n++) failures += one(kind % 2, map, dtype, n, n % 2 ? 32 : 64, (int)(n % 4));
            for (int i = 0; i < 400; i++)
                failures += one(kind % 2, map, dtype, 1 + random_bits() % 20000, blocksizes[random_bits() % 9], (int)(random_bits() % 8));
        }
    }
    return failures != 0;
}
