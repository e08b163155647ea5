/* States over buffers of the caller: whole, in ranges, as other dtypes, in every format; their JSON. */
#include "weights.h"

enum { ROWS = 37, COLS = 101, N = ROWS * COLS, BLOCKSIZE = 32, BLOCKS = (N + BLOCKSIZE - 1) / BLOCKSIZE };

static float weight[N], whole[N], range[N];
static const int64_t shape[2] = {ROWS, COLS};

/* The buffers of one weight in one format. */
struct buffers {
    float absmax[BLOCKS], nested_absmax[8], nested_codebook[256], offset[1], codebook[256];
    unsigned char packed[N];
};

/* Quantizes the weight and makes a state of the result. */
static gq_state *make(gq_format format, int nested, struct buffers *b) {
    gq_quantize_options options = GQ_QUANTIZE_OPTIONS_INIT;
    options.nested = nested;
    options.blocksize = format == GQ_FORMAT_INT8 ? 0 : BLOCKSIZE;
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    desc.format = format;
    desc.dtype = GQ_F32;
    desc.shape = GQ_ADDR(shape);
    desc.ndim = 2;
    desc.blocksize = format == GQ_FORMAT_INT8 ? COLS : BLOCKSIZE;
    desc.nested_blocksize = nested ? 256 : 0;
    OK(gq_quantized_layout(format, shape, 2, &options, &desc.parts));
    CHECK(desc.parts.packed_bytes == (format == GQ_FORMAT_NF4 || format == GQ_FORMAT_FP4 ? (N + 1) / 2 : N), "format %d: %d bytes of codes",
          (int)format, (int)desc.parts.packed_bytes);
    CHECK(desc.parts.packed == 0 && desc.parts.absmax == 0 && desc.parts.offset == 0, "a layout has addresses");
    desc.parts.packed = GQ_ADDR(b->packed);
    desc.parts.absmax = GQ_ADDR(b->absmax);
    if (nested) {
        desc.parts.nested_absmax = GQ_ADDR(b->nested_absmax);
        desc.parts.nested_codebook = GQ_ADDR(b->nested_codebook);
        desc.parts.offset = GQ_ADDR(b->offset);
    }
    if (format == GQ_FORMAT_BLOCKWISE8) {
        OK(gq_codebook("dynamic", b->codebook, 256));
        desc.parts.codebook = GQ_ADDR(b->codebook);
    }
    int64_t nonfinite = -1;
    OK(gq_quantize(format, GQ_ADDR(weight), GQ_F32, shape, 2, &options, &desc.parts, NULL, &nonfinite));
    CHECK(nonfinite == 0, "%d elements are not finite", (int)nonfinite);
    gq_state *state = NULL;
    OK(gq_state_create(&desc, &state));

    gq_state_desc got = GQ_STATE_DESC_INIT;
    OK(gq_state_get_desc(state, &got));
    CHECK(got.format == format && got.dtype == GQ_F32 && got.ndim == 2 && got.blocksize == desc.blocksize &&
              got.nested_blocksize == desc.nested_blocksize && got.device == GQ_CPU, "format %d: another description", (int)format);
    CHECK(memcmp(&got.parts, &desc.parts, sizeof got.parts) == 0, "format %d: other parts", (int)format);
    const int64_t *dims = (const int64_t *)(uintptr_t)got.shape;
    CHECK(dims != shape && dims[0] == ROWS && dims[1] == COLS, "format %d: another shape", (int)format);
    return state;
}

static void every_format(void) {
    static const struct {
        gq_format format;
        int nested;
        float error; /* of the largest element, 1 */
    } cases[] = {
        {GQ_FORMAT_NF4, 0, 0.16f},  {GQ_FORMAT_NF4, 1, 0.16f},         {GQ_FORMAT_FP4, 0, 0.18f},
        {GQ_FORMAT_FP4, 1, 0.18f}, {GQ_FORMAT_BLOCKWISE8, 0, 0.01f}, {GQ_FORMAT_INT8, 0, 0.005f},
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        static struct buffers b;
        gq_state *state = make(cases[c].format, cases[c].nested, &b);
        memset(whole, 0xff, sizeof whole);
        OK(gq_dequantize(state, GQ_ADDR(whole), sizeof whole, GQ_F32, NULL));
        float worst = 0;
        for (int i = 0; i < N; i++) {
            const float error = whole[i] > weight[i] ? whole[i] - weight[i] : weight[i] - whole[i];
            if (!(error <= worst)) worst = error;
        }
        CHECK(worst < cases[c].error, "format %d, nested %d: error %g", (int)cases[c].format, cases[c].nested, worst);

        /* Ranges that start and end inside of blocks and bytes; nothing is written beside them. */
        static const int64_t ranges[][2] = {{0, 0}, {0, 1}, {1, 1}, {31, 2}, {33, 95}, {N - 1, 1}, {N, 0}, {100, N - 100}};
        for (size_t r = 0; r < sizeof ranges / sizeof *ranges; r++) {
            const int64_t first = ranges[r][0], count = ranges[r][1];
            memset(range, 0xa5, sizeof range);
            OK(gq_dequantize_range(state, first, count, GQ_ADDR(range), (size_t)count * 4, GQ_F32, NULL));
            CHECK(memcmp(range, whole + first, (size_t)count * 4) == 0, "format %d, elements %d+%d differ", (int)cases[c].format, (int)first, (int)count);
            for (size_t i = (size_t)count * 4; i < sizeof range; i++)
                CHECK(((unsigned char *)range)[i] == 0xa5, "format %d: byte %d was written", (int)cases[c].format, (int)i);
        }
        static const int64_t outside[][2] = {{N, 1}, {N + 1, 0}, {1, N}, {INT64_MAX, 1}, {INT64_MAX, INT64_MAX}};
        for (size_t r = 0; r < sizeof outside / sizeof *outside; r++)
            STATUS(gq_dequantize_range(state, outside[r][0], outside[r][1], GQ_ADDR(range), (size_t)outside[r][1] * 4, GQ_F32, NULL), GQ_ERROR_INVALID_ARGUMENT);

        /* The number of threads changes nothing; bf16 is float32, rounded. */
        gq_exec exec = GQ_EXEC_INIT;
        for (exec.threads = 1; exec.threads < 4; exec.threads++) {
            OK(gq_dequantize(state, GQ_ADDR(range), sizeof range, GQ_F32, &exec));
            CHECK(memcmp(range, whole, sizeof whole) == 0, "%d threads decode something else", (int)exec.threads);
        }
        static uint16_t half[N];
        OK(gq_dequantize(state, GQ_ADDR(half), sizeof half, GQ_BF16, NULL));
        for (int i = 0; i < N; i++) {
            uint32_t bits;
            memcpy(&bits, whole + i, 4);
            CHECK(half[i] == (bits + 0x7fff + (bits >> 16 & 1)) >> 16, "element %d is %04x as bf16, %g as float32", i, half[i], whole[i]);
        }

        /* The parts are borrowed: what changes in them shows. */
        memset(b.packed, 0, sizeof b.packed);
        OK(gq_dequantize(state, GQ_ADDR(range), sizeof range, GQ_F32, NULL));
        CHECK(memcmp(range, whole, sizeof whole) != 0, "format %d: the codes were copied", (int)cases[c].format);
        OK(gq_state_free(state));
    }
}

static void json(void) {
    static struct buffers b;
    gq_state *state = make(GQ_FORMAT_NF4, 0, &b);
    static const char want[] = "{\"quant_type\": \"nf4\", \"blocksize\": 32, \"dtype\": \"float32\", \"shape\": [37, 101]}";
    const size_t full = sizeof want - 1;
    size_t length = 0;
    OK(gq_state_json(state, NULL, 0, &length));
    CHECK(length == full, "length %d", (int)length);
    char text[200];
    const size_t capacities[] = {1, full - 1, full, full + 1, sizeof text, SIZE_MAX / 2, SIZE_MAX};
    for (size_t i = 0; i < sizeof capacities / sizeof *capacities; i++) {
        memset(text, 'x', sizeof text);
        OK(gq_state_json(state, text, capacities[i], &length));
        const size_t written = capacities[i] < full ? capacities[i] : full;
        CHECK(length == full && memcmp(text, want, written) == 0, "capacity %zu: %.*s", capacities[i], (int)written, text);
        CHECK(text[written] == 'x', "capacity %zu: more was written", capacities[i]);
    }
    OK(gq_state_free(state));

    state = make(GQ_FORMAT_FP4, 1, &b);
    OK(gq_state_json(state, text, sizeof text, &length));
    text[length] = 0;
    CHECK(strstr(text, "\"nested_blocksize\": 256, \"nested_dtype\": \"float32\", \"nested_offset\": 0."), "%s", text);
    b.offset[0] = 0.25f; /* read when it is asked for */
    OK(gq_state_json(state, text, sizeof text, &length));
    text[length] = 0;
    CHECK(strstr(text, "\"nested_offset\": 0.25}"), "%s", text);
    OK(gq_state_free(state));

    state = make(GQ_FORMAT_INT8, 0, &b);
    STATUS(gq_state_json(state, text, sizeof text, &length), GQ_ERROR_UNSUPPORTED);
    CHECK(length == 0, "length %d after a failure", (int)length);
    OK(gq_state_free(state));
}

/* NaN and Inf are counted. */
static void not_finite(void) {
    static struct buffers b;
    const float kept[2] = {weight[7], weight[3000]};
    const uint32_t nan = 0x7fc00000, infinity = 0x7f800000;
    memcpy(weight + 7, &nan, 4);
    memcpy(weight + 3000, &infinity, 4);
    static const gq_format formats[] = {GQ_FORMAT_NF4, GQ_FORMAT_FP4, GQ_FORMAT_BLOCKWISE8};
    for (int i = 0; i < 3; i++) {
        gq_parts parts;
        int64_t nonfinite = -1;
        OK(gq_quantized_layout(formats[i], shape, 2, NULL, &parts));
        parts.packed = GQ_ADDR(b.packed);
        parts.absmax = GQ_ADDR(b.absmax);
        OK(gq_codebook("dynamic", b.codebook, 256));
        parts.codebook = GQ_ADDR(b.codebook);
        OK(gq_quantize(formats[i], GQ_ADDR(weight), GQ_F32, shape, 2, NULL, &parts, NULL, &nonfinite));
        CHECK(nonfinite == 2, "format %d: %d elements are not finite", (int)formats[i], (int)nonfinite);
    }
    weight[7] = kept[0];
    weight[3000] = kept[1];
}

/* Rows of LLM.int8: without a threshold they are what gq_quantize makes of a matrix; with one, outliers count for nothing. */
static void int8_rows(void) {
    static struct buffers b;
    static signed char codes[N];
    static unsigned char outliers[COLS];
    float absmax[ROWS];
    OK(gq_state_free(make(GQ_FORMAT_INT8, 0, &b)));
    OK(gq_quantize_rows_int8(GQ_ADDR(weight), GQ_F32, ROWS, COLS, 0, GQ_ADDR(absmax), ROWS, GQ_ADDR(codes), N, 0, 0, NULL));
    CHECK(memcmp(absmax, b.absmax, sizeof absmax) == 0 && memcmp(codes, b.packed, N) == 0, "gq_quantize and gq_quantize_rows_int8 differ");
    const float kept = weight[5 * COLS + 7];
    weight[5 * COLS + 7] = 100;
    memset(outliers, 0x5a, sizeof outliers);
    OK(gq_quantize_rows_int8(GQ_ADDR(weight), GQ_F32, ROWS, COLS, 6, GQ_ADDR(absmax), ROWS, GQ_ADDR(codes), N, GQ_ADDR(outliers), COLS, NULL));
    for (int c = 0; c < COLS; c++) {
        CHECK(outliers[c] == (c == 7), "column %d: outlier %d", c, outliers[c]);
        for (int r = 0; r < ROWS; r++)
            CHECK(c == 7 ? codes[r * COLS + c] == 0 : codes[r * COLS + c] == (signed char)b.packed[r * COLS + c] || r == 5, "row %d, column %d: code %d, without the outlier %d", r, c,
                  codes[r * COLS + c], (signed char)b.packed[r * COLS + c]);
    }
    CHECK(absmax[5] < 1.001f, "an outlier counts for absmax: %g", absmax[5]);
    weight[5 * COLS + 7] = kept;
}

/* Nibbles in both orders, even and odd counts, and back. */
static void nibbles(void) {
    for (int64_t n = 1; n < 40; n++) {
        unsigned char codes[40], packed[21], back[41];
        for (int64_t i = 0; i < n; i++) codes[i] = (unsigned char)((i * 7 + 3) % 16);
        const size_t bytes = (size_t)(n + 1) / 2;
        for (int32_t order = GQ_HIGH_NIBBLE_FIRST; order <= GQ_LOW_NIBBLE_FIRST; order++) {
            memset(packed, 0x5a, sizeof packed);
            memset(back, 0x5a, sizeof back);
            OK(gq_pack_4bit(GQ_ADDR(codes), n, order, GQ_ADDR(packed), bytes, NULL));
            for (size_t i = 0; i < bytes; i++) {
                const unsigned first = codes[2 * i], second = 2 * (int64_t)i + 1 < n ? codes[2 * i + 1] : 0;
                const unsigned want = order == GQ_HIGH_NIBBLE_FIRST ? first << 4 | second : second << 4 | first;
                CHECK(packed[i] == want, "n %d, order %d, byte %d: %02x, want %02x", (int)n, (int)order, (int)i, packed[i], want);
            }
            OK(gq_unpack_4bit(GQ_ADDR(packed), bytes, order, GQ_ADDR(back), n, NULL));
            CHECK(memcmp(back, codes, (size_t)n) == 0, "n %d, order %d: not what was packed", (int)n, (int)order);
            CHECK(packed[bytes] == 0x5a && back[n] == 0x5a, "n %d: written behind the end", (int)n);
        }
        codes[n - 1] = 16;
        STATUS(gq_pack_4bit(GQ_ADDR(codes), n, GQ_HIGH_NIBBLE_FIRST, GQ_ADDR(packed), bytes, NULL), GQ_ERROR_INVALID_ARGUMENT);
    }
}

int main(void) {
    fill_weights(weight, N);
    every_format();
    json();
    not_finite();
    int8_rows();
    nibbles();
    return check_result();
}
