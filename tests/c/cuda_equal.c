/* Each function on a device gives the bytes that it gives on the CPU: every format, dtype and blocksize, odd lengths, any alignment, all
 * kinds of numbers; and nothing beside its output is written. */
#include "gpu.h"

static uint64_t seed = 20261;

static uint32_t random_bits(void) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 32);
}

static const gq_dtype dtypes[] = {GQ_F32, GQ_F16, GQ_BF16};
static const int64_t blocksizes[] = {32, 64, 128, 256, 512, 1024, 2048, 4096};
static size_t size_of(gq_dtype dtype) { return dtype == GQ_F32 ? 4 : 2; }

/* What sources are made of. */
enum { WEIGHTS, BITS, SPECIAL, KINDS };

/* Numbers where something changes: zeros, the smallest and largest, subnormals, infinities, NaN. */
static const uint32_t special32[] = {0, 0x80000000, 1, 0x80000001, 0x007fffff, 0x00800000, 0x00800001, 0x7f7fffff, 0xff7fffff, 0x7f800000, 0xff800000,
                                     0x7fc00000, 0xffc00001, 0x7f800001, 0x3f800000, 0xbf800000, 0x33800000, 0x00400000, 0x7e800000, 0x7f000000};
static const uint16_t special16[2][12] = {{0, 0x8000, 1, 0x8001, 0x03ff, 0x0400, 0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7e00, 0x3c00},
                                          {0, 0x8000, 1, 0x807f, 0x0080, 0x7f7f, 0xff7f, 0x7f80, 0xff80, 0x7fc0, 0x3f80, 0xbf80}};

static void fill(void *data, gq_dtype dtype, int64_t n, int kind) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = random_bits();
        if (kind == WEIGHTS || (kind == SPECIAL && i / 64 % 3)) {
            /* The sum of four is near normally distributed; each run of 1000 has another scale. */
            float x = 0;
            for (int k = 0; k < 4; k++) x += (float)(int32_t)random_bits() / 2147483648.0f;
            x *= (float)(1 + i / 1000 % 7) * 0.02f;
            memcpy(&bits, &x, 4);
            if (dtype == GQ_BF16) bits >>= 16;
            if (dtype == GQ_F16) bits = (bits >> 16 & 0x8000) | (0x3000 - (random_bits() % 6 << 10) + random_bits() % 1024);
        }
        if (kind == SPECIAL && random_bits() % 8 == 0) {
            if (dtype == GQ_F32) bits = special32[random_bits() % 20];
            else bits = special16[dtype == GQ_BF16][random_bits() % 12];
        }
        if (dtype == GQ_F32) ((uint32_t *)data)[i] = bits;
        else ((uint16_t *)data)[i] = (uint16_t)bits;
    }
}

/* A mismatch is told once per case, and a few cases are enough. */
static int told;

static void same(const void *got, const void *want, size_t bytes, const char *format, const char *what, gq_dtype dtype, int64_t n, int64_t blocksize, int kind) {
    if (memcmp(got, want, bytes) == 0) return;
    size_t i = 0;
    while (((const unsigned char *)got)[i] == ((const unsigned char *)want)[i]) i++;
    if (told++ < 20)
        CHECK(0, "%s, %s of dtype %d, n %lld, blocksize %lld, kind %d: byte %zu of %zu is %02x, on the CPU %02x", format, what, (int)dtype, (long long)n,
              (long long)blocksize, kind, i, bytes, ((const unsigned char *)got)[i], ((const unsigned char *)want)[i]);
    else check_failures = 1;
}

static struct gpu_buffer src, packed, absmax, out, extra, more;
static gq_exec exec;

/* Room for the CPU's results. */
enum { MOST = 1 << 22 };
static unsigned char host_source[4 * MOST + 64], host_packed[MOST + 64], host_out[4 * MOST];
static float host_absmax[MOST / 32];

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* ---- blocks: NF4, FP4 and 8 bits */

static const char *const names[] = {"", "nf4", "fp4", "int8", "blockwise8"};

static gq_status quantize(gq_format format, gq_addr from, gq_dtype dtype, int64_t n, int64_t blocksize, gq_addr table, gq_addr scales, gq_addr codes, const gq_exec *where) {
    const int64_t blocks = ceil_div(n, blocksize);
    if (format == GQ_FORMAT_NF4) return gq_quantize_nf4(from, dtype, n, blocksize, scales, blocks, codes, (size_t)ceil_div(n, 2), where);
    if (format == GQ_FORMAT_FP4) return gq_quantize_fp4(from, dtype, n, blocksize, scales, blocks, codes, (size_t)ceil_div(n, 2), where);
    return gq_quantize_blockwise(from, dtype, n, blocksize, table, scales, blocks, codes, (size_t)n, where);
}

static size_t codes_bytes(gq_format format, int64_t n) { return (size_t)(format == GQ_FORMAT_BLOCKWISE8 ? n : ceil_div(n, 2)); }

static gq_state *make_state(gq_format format, gq_dtype dtype, const int64_t *shape, int32_t ndim, int64_t blocksize, const gq_parts *parts, int32_t device) {
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    desc.format = format;
    desc.dtype = dtype;
    desc.shape = GQ_ADDR(shape);
    desc.ndim = ndim;
    desc.blocksize = blocksize;
    desc.nested_blocksize = parts->offset_bytes ? 256 : 0;
    desc.parts = *parts;
    desc.device = device;
    gq_state *state = NULL;
    OK(gq_state_create(&desc, &state));
    return state;
}

/* Decodes a range of both states and compares. */
static void decode(gq_state *on_device, gq_state *on_host, gq_format format, int64_t first, int64_t count, gq_dtype dtype, size_t offset, int64_t n, int64_t blocksize, int kind) {
    const size_t bytes = (size_t)count * size_of(dtype);
    OK(gq_dequantize_range(on_host, first, count, GQ_ADDR(host_out), bytes, dtype, NULL));
    gpu_place(&out, bytes, offset);
    OK(gq_dequantize_range(on_device, first, count, out.address, bytes, dtype, &exec));
    same(gpu_get(&out, "decoded"), host_out, bytes, names[format], "decoded values", dtype, n, blocksize, kind);
}

/* One case: quantize, and decode whole and in two ranges. table is 0 or a table in host memory. Offsets are those of the buffers. */
static void blocks_case(gq_format format, gq_dtype dtype, int64_t n, int64_t blocksize, int kind, const float *table, size_t src_offset, size_t packed_offset, size_t out_offset) {
    const int64_t blocks = ceil_div(n, blocksize);
    const size_t bytes = codes_bytes(format, n), scale_bytes = (size_t)blocks * 4;
    fill(host_source, dtype, n, kind);
    gpu_put(&src, host_source, (size_t)n * size_of(dtype), src_offset);
    gpu_place(&packed, bytes, packed_offset);
    gpu_place(&absmax, scale_bytes, packed_offset % 4 * 4);
    const gq_addr table_address = table ? gpu_put(&extra, table, 1024, 4) : 0;
    CHECK(quantize(format, GQ_ADDR(host_source), dtype, n, blocksize, GQ_ADDR(table), GQ_ADDR(host_absmax), GQ_ADDR(host_packed), NULL) == GQ_OK, "%s", gq_last_error());
    CHECK(quantize(format, src.address, dtype, n, blocksize, table_address, absmax.address, packed.address, &exec) == GQ_OK, "%s", gq_last_error());
    same(gpu_get(&absmax, "absmax"), host_absmax, scale_bytes, names[format], "absmax", dtype, n, blocksize, kind);
    same(gpu_get(&packed, "codes"), host_packed, bytes, names[format], "codes", dtype, n, blocksize, kind);

    gq_parts parts = GQ_PARTS_INIT, host_parts;
    parts.packed_bytes = bytes;
    parts.absmax_bytes = scale_bytes;
    parts.codebook_bytes = table ? 1024 : 0;
    host_parts = parts;
    parts.packed = packed.address;
    parts.absmax = absmax.address;
    parts.codebook = table_address;
    host_parts.packed = GQ_ADDR(host_packed);
    host_parts.absmax = GQ_ADDR(host_absmax);
    host_parts.codebook = GQ_ADDR(table);
    gq_state *on_device = make_state(format, dtype, &n, 1, blocksize, &parts, 0), *on_host = make_state(format, dtype, &n, 1, blocksize, &host_parts, GQ_CPU);
    decode(on_device, on_host, format, 0, n, dtypes[random_bits() % 3], out_offset, n, blocksize, kind);
    for (int i = 0; i < 2 && n > 0; i++) {
        const int64_t first = random_bits() % n, count = random_bits() % (n - first) + 1;
        decode(on_device, on_host, format, first, count, dtypes[random_bits() % 3], random_bits() % 16, n, blocksize, kind);
    }
    OK(gq_state_free(on_device));
    OK(gq_state_free(on_host));
}

static void blocks(void) {
    static const gq_format formats[] = {GQ_FORMAT_NF4, GQ_FORMAT_FP4, GQ_FORMAT_BLOCKWISE8};
    static const int64_t lengths[] = {0, 1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 1000, 4095, 4096, 4097, 16384, 65536, 65537, 100003};
    float linear[256], dynamic[256];
    OK(gq_codebook("linear", linear, 256));
    OK(gq_codebook("dynamic_unsigned", dynamic, 256));
    for (int f = 0; f < 3; f++)
        for (int d = 0; d < 3; d++)
            for (int b = 0; b < 8; b++)
                for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
                    for (int kind = 0; kind < KINDS; kind++) {
                        const float *table = f == 2 && kind != WEIGHTS ? (b % 2 ? linear : dynamic) : NULL;
                        blocks_case(formats[f], dtypes[d], lengths[l], blocksizes[b], kind, table, 0, 0, 0);
                    }
    /* Every alignment of each buffer, and of all of them together. */
    for (int f = 0; f < 3; f++)
        for (int d = 0; d < 3; d++)
            for (size_t offset = 0; offset < 16; offset++) {
                static const int64_t odd[] = {1001, 70001};
                for (int l = 0; l < 2; l++) {
                    blocks_case(formats[f], dtypes[d], odd[l], 64, SPECIAL, NULL, offset, 0, 0);
                    blocks_case(formats[f], dtypes[d], odd[l], 64, SPECIAL, NULL, 0, offset, 0);
                    blocks_case(formats[f], dtypes[d], odd[l], 64, SPECIAL, NULL, 0, 0, offset);
                    blocks_case(formats[f], dtypes[d], odd[l], 128, WEIGHTS, NULL, offset, (offset * 7 + 3) % 16, (offset * 5 + 1) % 16);
                }
            }
    /* More than one wave of thread blocks. */
    for (int f = 0; f < 3; f++)
        for (int d = 0; d < 3; d++)
            for (int b = 0; b < 8; b += 7) blocks_case(formats[f], dtypes[d], MOST - 3 * b, blocksizes[b], d, NULL, 0, 0, 0);
}

/* Whatever codes and statistics may be in a file, they decode to the same bits. */
static void any_statistics(void) {
    enum { N = 1 << 16 };
    static const gq_format formats[] = {GQ_FORMAT_NF4, GQ_FORMAT_FP4, GQ_FORMAT_BLOCKWISE8, GQ_FORMAT_INT8};
    for (int f = 0; f < 4; f++) {
        for (int b = 0; b < 8; b++) {
            const int64_t shape[2] = {N / blocksizes[b], blocksizes[b]};
            gq_parts parts = GQ_PARTS_INIT, host_parts;
            parts.packed_bytes = f < 2 ? N / 2 : N;
            parts.absmax_bytes = (uint64_t)shape[0] * 4;
            host_parts = parts;
            for (size_t i = 0; i < parts.packed_bytes; i++) host_packed[i] = (unsigned char)random_bits();
            fill(host_absmax, GQ_F32, shape[0], BITS);
            for (int64_t i = 0; i < shape[0]; i += 3) memcpy(host_absmax + i, &special32[random_bits() % 20], 4);
            parts.packed = gpu_put(&packed, host_packed, parts.packed_bytes, 0);
            parts.absmax = gpu_put(&absmax, host_absmax, parts.absmax_bytes, 0);
            host_parts.packed = GQ_ADDR(host_packed);
            host_parts.absmax = GQ_ADDR(host_absmax);
            gq_state *on_device = make_state(formats[f], GQ_F16, shape, 2, blocksizes[b], &parts, 0);
            gq_state *on_host = make_state(formats[f], GQ_F16, shape, 2, blocksizes[b], &host_parts, GQ_CPU);
            for (int d = 0; d < 3; d++) {
                decode(on_device, on_host, formats[f], 0, N, dtypes[d], 0, N, blocksizes[b], BITS);
                for (int i = 0; i < 10; i++) {
                    const int64_t first = random_bits() % N, count = random_bits() % (N - first) + 1;
                    decode(on_device, on_host, formats[f], first, count, dtypes[d], random_bits() % 16, N, blocksizes[b], BITS);
                }
            }
            OK(gq_state_free(on_device));
            OK(gq_state_free(on_host));
        }
    }
}

/* Every float16 and bfloat16 as the largest of a block. */
static void every_absmax16(void) {
    enum { N = 32768 * 64 };
    for (int d = 1; d < 3; d++) {
        uint16_t *x = (uint16_t *)host_source;
        fill(x, dtypes[d], N, WEIGHTS);
        for (int i = 0; i < 32768; i++) {
            x[64 * i] = (uint16_t)i;
            /* Elements below it, of all magnitudes. */
            const uint32_t near = i < 3000 ? (uint32_t)i : 3000;
            for (int k = 1; k < 64; k++) {
                const uint32_t bits = k < 32 ? random_bits() % (uint32_t)(i + 1) : (uint32_t)i - random_bits() % (near + 1);
                x[64 * i + k] = (uint16_t)(bits | random_bits() << 15);
            }
        }
        gpu_put(&src, x, sizeof(uint16_t) * N, 0);
        for (gq_format format = GQ_FORMAT_NF4; format <= GQ_FORMAT_BLOCKWISE8; format++) {
            if (format == GQ_FORMAT_INT8) continue;
            gpu_place(&packed, codes_bytes(format, N), 0);
            gpu_place(&absmax, 32768 * 4, 0);
            CHECK(quantize(format, GQ_ADDR(x), dtypes[d], N, 64, 0, GQ_ADDR(host_absmax), GQ_ADDR(host_packed), NULL) == GQ_OK, "%s", gq_last_error());
            CHECK(quantize(format, src.address, dtypes[d], N, 64, 0, absmax.address, packed.address, &exec) == GQ_OK, "%s", gq_last_error());
            same(gpu_get(&packed, "codes"), host_packed, codes_bytes(format, N), names[format], "codes of every absmax", dtypes[d], N, 64, WEIGHTS);
            same(gpu_get(&absmax, "absmax"), host_absmax, 32768 * 4, names[format], "every absmax", dtypes[d], N, 64, WEIGHTS);
        }
    }
}

/* FP4 and 8 bits multiply by the device's approximate reciprocal of absmax, which the CPU computes for itself. For all 2^23 mantissas,
 * elements at the thresholds, and next to them, tell one reciprocal from the next. */
static void every_reciprocal(void) {
    enum { BLOCKS = 1 << 17, N = BLOCKS * 32 };
    static const float thresholds[] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f};
    float dynamic[256];
    float *x = (float *)host_source;
    OK(gq_codebook("dynamic", dynamic, 256));
    for (uint32_t first = 0; first < 1u << 23; first += BLOCKS) {
        for (int format = GQ_FORMAT_FP4; format <= GQ_FORMAT_BLOCKWISE8; format += 2) {
            for (uint32_t i = 0; i < BLOCKS; i++) {
                /* Exponents that leave the products normal. */
                const uint32_t mantissa = first + i, exponent = 64 + (mantissa * 2654435761u >> 16) % 128, bits = exponent << 23 | mantissa;
                float top;
                memcpy(&top, &bits, 4);
                x[32 * i] = top;
                for (int k = 1; k < 32; k++) {
                    const int code = (int)(random_bits() % 255);
                    const float at = format == GQ_FORMAT_FP4 ? thresholds[k % 7] : (dynamic[code] + dynamic[code + 1]) / 2;
                    float value = at * top;
                    uint32_t near;
                    memcpy(&near, &value, 4);
                    near += (uint32_t)(k / 7 % 4) - 2;
                    memcpy(&x[32 * i + (uint32_t)k], &near, 4);
                }
            }
            gpu_put(&src, x, sizeof(float) * N, 0);
            gpu_place(&packed, codes_bytes(format, N), 0);
            gpu_place(&absmax, BLOCKS * 4, 0);
            CHECK(quantize(format, GQ_ADDR(x), GQ_F32, N, 32, 0, GQ_ADDR(host_absmax), GQ_ADDR(host_packed), NULL) == GQ_OK, "%s", gq_last_error());
            CHECK(quantize(format, src.address, GQ_F32, N, 32, 0, absmax.address, packed.address, &exec) == GQ_OK, "%s", gq_last_error());
            same(gpu_get(&packed, "codes"), host_packed, codes_bytes(format, N), names[format], "codes of every reciprocal", GQ_F32, first, 32, WEIGHTS);
        }
    }
}

/* ---- LLM.int8 */

static void rows_case(gq_dtype dtype, int64_t rows, int64_t cols, float threshold, int kind, size_t offset) {
    const int64_t n = rows * cols;
    unsigned char *columns = host_out;
    fill(host_source, dtype, n, kind);
    for (int64_t i = 0; kind == WEIGHTS && i < n; i += 977) { /* outliers: 8 in each dtype */
        if (dtype == GQ_F32) ((uint32_t *)host_source)[i] = 0x41000000;
        else ((uint16_t *)host_source)[i] = dtype == GQ_F16 ? 0x4800 : 0x4100;
    }
    gpu_put(&src, host_source, (size_t)n * size_of(dtype), offset);
    gpu_place(&packed, (size_t)n, (offset * 7 + 3) % 16);
    gpu_place(&absmax, (size_t)rows * 4, offset % 4 * 4);
    gpu_place(&extra, (size_t)cols, offset);
    OK(gq_quantize_rows_int8(GQ_ADDR(host_source), dtype, rows, cols, threshold, GQ_ADDR(host_absmax), rows, GQ_ADDR(host_packed), (size_t)n, GQ_ADDR(columns), (size_t)cols, NULL));
    OK(gq_quantize_rows_int8(src.address, dtype, rows, cols, threshold, absmax.address, rows, packed.address, (size_t)n, extra.address, (size_t)cols, &exec));
    same(gpu_get(&absmax, "absmax"), host_absmax, (size_t)rows * 4, "rows", "absmax", dtype, rows, cols, kind);
    same(gpu_get(&packed, "codes"), host_packed, (size_t)n, "rows", "codes", dtype, rows, cols, kind);
    same(gpu_get(&extra, "outliers"), columns, (size_t)cols, "rows", "outliers", dtype, rows, cols, kind);
    if (threshold > 0) return;
    /* Without a threshold nobody needs to ask for outliers. */
    gpu_place(&packed, (size_t)n, 0);
    OK(gq_quantize_rows_int8(src.address, dtype, rows, cols, threshold, absmax.address, rows, packed.address, (size_t)n, 0, 0, &exec));
    same(gpu_get(&packed, "codes"), host_packed, (size_t)n, "rows", "codes alone", dtype, rows, cols, kind);
    const int64_t shape[2] = {rows, cols};
    gq_parts parts = GQ_PARTS_INIT, host_parts;
    parts.packed_bytes = (uint64_t)n;
    parts.absmax_bytes = (uint64_t)rows * 4;
    host_parts = parts;
    parts.packed = packed.address;
    parts.absmax = absmax.address;
    host_parts.packed = GQ_ADDR(host_packed);
    host_parts.absmax = GQ_ADDR(host_absmax);
    gq_state *on_device = make_state(GQ_FORMAT_INT8, dtype, shape, 2, cols, &parts, 0), *on_host = make_state(GQ_FORMAT_INT8, dtype, shape, 2, cols, &host_parts, GQ_CPU);
    decode(on_device, on_host, GQ_FORMAT_INT8, 0, n, dtypes[random_bits() % 3], offset, n, cols, kind);
    decode(on_device, on_host, GQ_FORMAT_INT8, n / 3, n - n / 3, dtypes[random_bits() % 3], 0, n, cols, kind);
    OK(gq_state_free(on_device));
    OK(gq_state_free(on_host));
}

static void rows(void) {
    static const int64_t shapes[][2] = {{1, 1}, {1, 3}, {2, 31}, {7, 32}, {48, 320}, {3, 1023}, {64, 4103}, {1031, 17}, {1, 100000}, {5000, 1}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int d = 0; d < 3; d++)
            for (int kind = 0; kind < KINDS; kind++)
                for (int t = 0; t < 3; t++) rows_case(dtypes[d], shapes[s][0], shapes[s][1], t == 0 ? 0 : t == 1 ? 6 : 0.05f, kind, 0);
    for (size_t offset = 1; offset < 16; offset++)
        for (int d = 0; d < 3; d++) {
            rows_case(dtypes[d], 5, 333, 6, SPECIAL, offset);
            rows_case(dtypes[d], 5, 333, 0, WEIGHTS, offset);
        }
}

/* ---- nested statistics */

static void nested_case(gq_format format, gq_dtype dtype, int64_t n, int64_t blocksize, int kind) {
    const int64_t shape[1] = {n};
    gq_quantize_options options = GQ_QUANTIZE_OPTIONS_INIT;
    gq_parts host_parts, parts;
    options.nested = 1;
    options.blocksize = blocksize;
    OK(gq_quantized_layout(format, shape, 1, &options, &host_parts));
    parts = host_parts;
    static unsigned char host_bytes[MOST / 32];
    static float nested_absmax[MOST / 32 / 256 + 1], codebook[256], offset[1];
    host_parts.packed = GQ_ADDR(host_packed);
    host_parts.absmax = GQ_ADDR(host_bytes);
    host_parts.nested_absmax = GQ_ADDR(nested_absmax);
    host_parts.nested_codebook = GQ_ADDR(codebook);
    host_parts.offset = GQ_ADDR(offset);
    fill(host_source, dtype, n, kind);
    OK(gq_quantize(format, GQ_ADDR(host_source), dtype, shape, 1, &options, &host_parts, NULL, NULL));

    /* The small parts lie in one buffer: the codebook, nested absmax, the offset. */
    gq_exec with = exec;
    int64_t nonfinite = 7;
    OK(gq_quantize_workspace_size(format, shape, 1, &options, 0, &with.workspace_bytes));
    with.workspace = gpu_place(&out, (size_t)with.workspace_bytes, 0);
    gpu_put(&src, host_source, (size_t)n * size_of(dtype), 0);
    parts.packed = gpu_place(&packed, parts.packed_bytes, 0);
    parts.absmax = gpu_place(&absmax, parts.absmax_bytes, 1);
    parts.nested_absmax = gpu_place(&extra, parts.nested_absmax_bytes, 4);
    gpu_place(&more, 1024 + 4, 8);
    parts.nested_codebook = more.address;
    parts.offset = more.address + 1024;
    OK(gq_quantize(format, src.address, dtype, shape, 1, &options, &parts, &with, &nonfinite));
    CHECK(nonfinite == -1, "nonfinite is %d on a device", (int)nonfinite);
    gpu_get(&out, "workspace");
    same(gpu_get(&packed, "codes"), host_packed, parts.packed_bytes, names[format], "codes (nested)", dtype, n, blocksize, kind);
    const unsigned char *small = gpu_get(&more, "codebook and offset");
    same(small, codebook, 1024, names[format], "nested codebook", dtype, n, blocksize, kind);
    same(small + 1024, offset, 4, names[format], "offset", dtype, n, blocksize, kind);
    same(gpu_get(&absmax, "absmax"), host_bytes, parts.absmax_bytes, names[format], "quantized absmax", dtype, n, blocksize, kind);
    same(gpu_get(&extra, "nested absmax"), nested_absmax, parts.nested_absmax_bytes, names[format], "nested absmax", dtype, n, blocksize, kind);

    for (int without = 0; without < 2; without++) {
        if (without) host_parts.nested_codebook = parts.nested_codebook = host_parts.nested_codebook_bytes = parts.nested_codebook_bytes = 0;
        gq_state *on_device = make_state(format, dtype, shape, 1, blocksize, &parts, 0), *on_host = make_state(format, dtype, shape, 1, blocksize, &host_parts, GQ_CPU);
        for (int d = 0; d < 3; d++) decode(on_device, on_host, format, 0, n, dtypes[d], 0, n, blocksize, kind);
        for (int i = 0; i < 3 && n > 0; i++) {
            const int64_t first = random_bits() % n, count = random_bits() % (n - first) + 1;
            decode(on_device, on_host, format, first, count, dtypes[i], random_bits() % 16, n, blocksize, kind);
        }
        OK(gq_state_free(on_device));
        OK(gq_state_free(on_host));
    }
}

static void nested(void) {
    static const int64_t lengths[] = {0, 1, 63, 64, 65, 64 * 255 + 1, 64 * 256, 64 * 257 + 9, 100003, 64 * 5000, 1 << 20, MOST};
    for (gq_format format = GQ_FORMAT_NF4; format <= GQ_FORMAT_FP4; format++)
        for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
            for (int d = 0; d < 3; d++)
                for (int kind = 0; kind < KINDS; kind++) nested_case(format, dtypes[d], lengths[l], l % 3 == 2 ? 32 : l % 3 ? 4096 : 64, kind);
}

/* ---- nibbles */

static void nibbles(void) {
    for (int64_t n = 1; n < 100; n += n < 40 ? 1 : 7) {
        for (int32_t order = 0; order < 2; order++) {
            const int64_t count = n < 60 ? n : n * 10007;
            const size_t bytes = (size_t)ceil_div(count, 2);
            unsigned char *codes = host_source;
            for (int64_t i = 0; i < count; i++) codes[i] = (unsigned char)(random_bits() % 16);
            OK(gq_pack_4bit(GQ_ADDR(codes), count, order, GQ_ADDR(host_packed), bytes, NULL));
            /* A device takes the lower four bits. */
            for (int64_t i = 0; i < count; i += 5) codes[i] |= 0xf0;
            gpu_put(&src, codes, (size_t)count, (size_t)n % 16);
            gpu_place(&packed, bytes, (size_t)n * 3 % 16);
            OK(gq_pack_4bit(src.address, count, order, packed.address, bytes, &exec));
            same(gpu_get(&packed, "packed"), host_packed, bytes, "nibbles", "packed", order, count, 0, 0);
            gpu_place(&out, (size_t)count, (size_t)n * 5 % 16);
            OK(gq_unpack_4bit(packed.address, bytes, order, out.address, count, &exec));
            for (int64_t i = 0; i < count; i++) codes[i] &= 15;
            same(gpu_get(&out, "unpacked"), codes, (size_t)count, "nibbles", "unpacked", order, count, 0, 0);
        }
    }
}

int main(void) {
    gpu_start();
    exec = gpu_exec(NULL);
    blocks();
    any_statistics();
    every_absmax16();
    every_reciprocal();
    rows();
    nested();
    nibbles();
    return check_result();
}
