/* More than 2^31 elements: every index has 64 bits. Samples are compared with the CPU, the last elements among them. */
#include "gpu.h"

enum { PIECE = 1 << 25, SAMPLE = 1 << 16, BLOCKSIZE = 64 };

/* A length that ends in the middle of a block and of a byte. */
static const int64_t n = (1ll << 31) + 3 * 4096 + 37;

static uint16_t *piece;

/* Elements from first on; no two pieces are alike. */
static void make_piece(int64_t first, int64_t count) {
    uint32_t random = (uint32_t)(first >> 10) * 2654435761u + 1;
    for (int64_t i = 0; i < count; i++) {
        random = random * 1664525 + 1013904223;
        piece[i] = (uint16_t)(0x3c00 + (random >> 24) + (random >> 9 & 0x8000)); /* bf16, from 0.0078 to 0.5 */
    }
}

static uint64_t src, codes, absmax, out;

static void compare(const char *what, int64_t first, const void *want, uint64_t address, size_t bytes) {
    unsigned char *got = malloc(bytes);
    GPU(cuMemcpyDtoH_v2(got, address, bytes));
    CHECK(memcmp(got, want, bytes) == 0, "%s: the sample from element %lld on differs", what, (long long)first);
    free(got);
}

/* Where samples start: multiples of a block, round powers of two, and at the end. */
static int64_t sample(int i, int64_t *count) {
    static const int64_t starts[] = {0, 1 << 20, (1ll << 29) - 4096, (1ll << 30) - 4096, (1ll << 31) - 8192, (1ll << 31) - SAMPLE, 1ll << 31, 1234567 * 64ll, -1};
    const int64_t first = starts[i] < 0 ? n / BLOCKSIZE * BLOCKSIZE - SAMPLE / 2 : starts[i];
    *count = n - first < SAMPLE ? n - first : SAMPLE;
    return first;
}
enum { SAMPLES = 9 };

static void check_codes(gq_format format) {
    static unsigned char want_codes[SAMPLE];
    static float want_absmax[SAMPLE / BLOCKSIZE + 1];
    static uint16_t want[SAMPLE], source[SAMPLE];
    const int per_byte = format == GQ_FORMAT_BLOCKWISE8 ? 1 : 2;
    gq_exec exec = gpu_exec(NULL);
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    desc.format = format;
    desc.dtype = GQ_BF16;
    desc.blocksize = BLOCKSIZE;
    desc.ndim = 1;
    desc.device = 0;
    desc.shape = GQ_ADDR(&n);
    desc.parts.packed = codes;
    desc.parts.packed_bytes = (uint64_t)(n + per_byte - 1) / (uint64_t)per_byte;
    desc.parts.absmax = absmax;
    desc.parts.absmax_bytes = (uint64_t)(n + BLOCKSIZE - 1) / BLOCKSIZE * 4;
    gq_state *state = NULL, *host = NULL;
    OK(gq_state_create(&desc, &state));
    GPU(cuMemsetD8_v2(out, GPU_FILL, (size_t)n * 2 + 256));
    OK(gq_dequantize(state, out, (size_t)n * 2, GQ_BF16, &exec));
    for (int i = 0; i < SAMPLES; i++) {
        int64_t count;
        const int64_t first = sample(i, &count);
        GPU(cuMemcpyDtoH_v2(source, src + (uint64_t)first * 2, (size_t)count * 2));
        const int64_t blocks = (count + BLOCKSIZE - 1) / BLOCKSIZE;
        const size_t bytes = (size_t)(count + per_byte - 1) / (size_t)per_byte;
        if (format == GQ_FORMAT_NF4) OK(gq_quantize_nf4(GQ_ADDR(source), GQ_BF16, count, BLOCKSIZE, GQ_ADDR(want_absmax), blocks, GQ_ADDR(want_codes), bytes, NULL));
        else OK(gq_quantize_blockwise(GQ_ADDR(source), GQ_BF16, count, BLOCKSIZE, 0, GQ_ADDR(want_absmax), blocks, GQ_ADDR(want_codes), bytes, NULL));
        compare("codes", first, want_codes, codes + (uint64_t)(first / per_byte), bytes);
        compare("absmax", first, want_absmax, absmax + (uint64_t)first / BLOCKSIZE * 4, (size_t)blocks * 4);
        gq_state_desc small = desc;
        small.device = GQ_CPU;
        small.shape = GQ_ADDR(&count);
        small.parts.packed = GQ_ADDR(want_codes);
        small.parts.packed_bytes = bytes;
        small.parts.absmax = GQ_ADDR(want_absmax);
        small.parts.absmax_bytes = (uint64_t)blocks * 4;
        OK(gq_state_create(&small, &host));
        OK(gq_dequantize(host, GQ_ADDR(want), (size_t)count * 2, GQ_BF16, NULL));
        OK(gq_state_free(host));
        compare("decoded", first, want, out + (uint64_t)first * 2, (size_t)count * 2);
        /* The same range alone, from an odd element on. */
        GPU(cuMemsetD8_v2(src + (uint64_t)n * 2, GPU_FILL, (SAMPLE + 256) * 2));
        OK(gq_dequantize_range(state, first + 1, count - 1, src + (uint64_t)n * 2 + 2, (size_t)(count - 1) * 2, GQ_BF16, &exec));
        compare("decoded range", first, want + 1, src + (uint64_t)n * 2 + 2, (size_t)(count - 1) * 2);
    }
    unsigned char guard[256], filled[256];
    memset(filled, GPU_FILL, sizeof filled);
    GPU(cuMemcpyDtoH_v2(guard, out + (uint64_t)n * 2, sizeof guard));
    CHECK(memcmp(guard, filled, sizeof guard) == 0, "written behind the decoded values");
    OK(gq_state_free(state));
}

/* Rows of LLM.int8: 65537 rows of 32768, and their last row. */
static void check_rows(void) {
    enum { COLS = 32768 };
    const int64_t rows = n / COLS - 1;
    static uint16_t source[COLS];
    static unsigned char want[COLS], columns[COLS];
    gq_exec exec = gpu_exec(NULL);
    const uint64_t outliers = absmax + (uint64_t)rows * 4;
    OK(gq_quantize_rows_int8(src, GQ_BF16, rows, COLS, 0, absmax, rows, codes, (size_t)(rows * COLS), outliers, COLS, &exec));
    const int64_t some[] = {0, 1, rows / 2, rows - 2, rows - 1};
    for (int i = 0; i < 5; i++) {
        float top = 0;
        GPU(cuMemcpyDtoH_v2(source, src + (uint64_t)(some[i] * COLS) * 2, sizeof source));
        OK(gq_quantize_rows_int8(GQ_ADDR(source), GQ_BF16, 1, COLS, 0, GQ_ADDR(&top), 1, GQ_ADDR(want), COLS, GQ_ADDR(columns), COLS, NULL));
        compare("int8 codes", some[i] * COLS, want, codes + (uint64_t)(some[i] * COLS), COLS);
        compare("int8 absmax", some[i] * COLS, &top, absmax + (uint64_t)some[i] * 4, 4);
    }
}

int main(void) {
    gpu_start();
    size_t unused = 0, all = 0;
    const size_t source_bytes = (size_t)n * 2 + 4 * SAMPLE, out_bytes = (size_t)n * 2 + 256;
    const size_t needed = source_bytes + out_bytes + (size_t)n + (size_t)n / BLOCKSIZE * 4 + (1 << 20);
    GPU(cuMemGetInfo_v2(&unused, &all));
    if (unused < needed + (512 << 20)) {
        printf("skipped: %zu MiB of device memory are free, %zu are needed\n", unused >> 20, needed >> 20);
        return SKIPPED;
    }
    src = gpu_alloc(source_bytes);
    out = gpu_alloc(out_bytes);
    codes = gpu_alloc((size_t)n + 256);
    absmax = gpu_alloc((size_t)n / BLOCKSIZE * 4 + 65536);
    piece = malloc(PIECE * sizeof *piece);
    for (int64_t first = 0; first < n; first += PIECE) {
        const int64_t count = n - first < PIECE ? n - first : PIECE;
        make_piece(first, count);
        GPU(cuMemcpyHtoD_v2(src + (uint64_t)first * 2, piece, (size_t)count * 2));
    }
    gq_exec exec = gpu_exec(NULL);
    const int64_t blocks = (n + BLOCKSIZE - 1) / BLOCKSIZE;
    OK(gq_quantize_nf4(src, GQ_BF16, n, BLOCKSIZE, absmax, blocks, codes, (size_t)(n + 1) / 2, &exec));
    check_codes(GQ_FORMAT_NF4);
    OK(gq_quantize_blockwise(src, GQ_BF16, n, BLOCKSIZE, 0, absmax, blocks, codes, (size_t)n, &exec));
    check_codes(GQ_FORMAT_BLOCKWISE8);
    /* Back and forth: the codes are made of 4 bits, so they come out as they went in. */
    OK(gq_unpack_4bit(codes, (size_t)(n + 1) / 2, GQ_HIGH_NIBBLE_FIRST, out, n, &exec));
    GPU(cuMemsetD8_v2(src, GPU_FILL, (size_t)n));
    OK(gq_pack_4bit(out, n, GQ_HIGH_NIBBLE_FIRST, src, (size_t)(n + 1) / 2, &exec));
    for (int64_t at = 0; at < n / 2; at += n / 8 - 1) {
        unsigned char want[4096];
        const int64_t from = at + (int64_t)sizeof want > n / 2 ? n / 2 - (int64_t)sizeof want : at;
        GPU(cuMemcpyDtoH_v2(want, codes + (uint64_t)from, sizeof want));
        compare("nibbles", from, want, src + (uint64_t)from, sizeof want);
    }
    make_piece(0, PIECE);
    for (int64_t first = 0; first < n; first += PIECE) {
        const int64_t count = n - first < PIECE ? n - first : PIECE;
        make_piece(first, count);
        GPU(cuMemcpyHtoD_v2(src + (uint64_t)first * 2, piece, (size_t)count * 2));
    }
    check_rows();
    gpu_free(src);
    gpu_free(out);
    gpu_free(codes);
    gpu_free(absmax);
    free(piece);
    return check_result();
}
