/* gq_linear on a device, against sums in float64 on the host: every number of rows, many shapes, formats and blocksizes; and the order of
 * calls on a stream, where a kernel may start before the one that it needs has ended. */
#include "device_weight.h"

enum { MOST_ROWS = 64, FEW_ROWS = 32 }; /* of the two kernels that the table names */

static gq_exec exec;

/* ---- weights as the device has them */

/* The values of the codes. */
static void code_values(gq_format format, float values[16]) {
    static const unsigned char codes[8] = {0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef};
    static const float one = 1;
    static const int64_t shape = 16;
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    gq_state *state = NULL;
    desc.format = format;
    desc.dtype = GQ_F32;
    desc.blocksize = 64;
    desc.shape = GQ_ADDR(&shape);
    desc.ndim = 1;
    desc.parts.packed = GQ_ADDR(codes);
    desc.parts.packed_bytes = sizeof codes;
    desc.parts.absmax = GQ_ADDR(&one);
    desc.parts.absmax_bytes = sizeof one;
    OK(gq_state_create(&desc, &state));
    OK(gq_dequantize(state, GQ_ADDR(values), 64, GQ_F32, NULL));
    OK(gq_state_free(state));
}

/* The weight as the device has it: the values of the codes, times a factor, are rounded to the dtype, and absmax is divided by that factor. It
 * is 12 for FP4, whose values are twelfths and then need no rounding. */
static float *device_values(const struct linear_weight *w, gq_dtype dtype) {
    const gq_parts *parts = &w->desc.parts;
    const unsigned char *packed = (const unsigned char *)(uintptr_t)parts->packed, *absmax8 = (const unsigned char *)(uintptr_t)parts->absmax;
    const float *absmax = (const float *)(uintptr_t)parts->absmax, *nested_absmax = (const float *)(uintptr_t)parts->nested_absmax;
    const float *codebook = (const float *)(uintptr_t)parts->nested_codebook, *offset = (const float *)(uintptr_t)parts->offset;
    float *values = malloc((size_t)(w->n * w->k) * 4), of_code[16];
    code_values(w->desc.format, of_code);
    const float factor = w->desc.format == GQ_FORMAT_FP4 ? 12 : dtype == GQ_BF16 ? 1.436767578125f : 1.3662109375f;
    for (int i = 0; i < 16; i++) of_code[i] = (float)linear_rounded(of_code[i] * factor, dtype);
    for (int64_t block = 0; block < w->n * w->k / w->desc.blocksize; block++) {
        float scale;
        if (w->desc.nested_blocksize) {
            scale = codebook[absmax8[block]] * nested_absmax[block / 256];
            scale += *offset;
        } else {
            scale = absmax[block];
        }
        scale *= 1 / factor;
        for (int64_t i = block * w->desc.blocksize; i < (block + 1) * w->desc.blocksize; i++) values[i] = of_code[packed[i / 2] >> (i % 2 ? 0 : 4) & 15] * scale;
    }
    return values;
}

/* ---- sums */

/* Squares of errors over many calls, each relative to the size of its y: what came, and what decoded weights of the dtype give. */
static struct {
    double got, decoded;
} totals[3][GQ_BF16 + 1];

static double squares(const float *values, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)values[i] * values[i];
    return sum;
}

/* One weight with one dtype: these numbers of rows, with a bias and without. */
static void sums(const struct linear_weight *w, gq_dtype dtype, const int64_t *rows, int count) {
    static struct gpu_buffer x_buffer, bias_buffer, y_buffer;
    const int64_t n = w->n, k = w->k;
    struct device_weight weight;
    memset(&weight, 0, sizeof weight);
    upload(&weight, w, 0);
    void *x = linear_random(MOST_ROWS * k, dtype), *bias = linear_random(n, dtype);
    float *on_device = device_values(w, dtype), *decoded = malloc((size_t)(n * k) * 4);
    for (int64_t i = 0; i < n * k; i++) decoded[i] = (float)linear_rounded(w->values[i], dtype);
    double *exact = linear_exact(x, MOST_ROWS, dtype, w->values, n, k), *want = linear_exact(x, MOST_ROWS, dtype, on_device, n, k);
    double *usual = linear_exact(x, MOST_ROWS, dtype, decoded, n, k);
    const double weight_squares = squares(w->values, n * k);
    gpu_put(&x_buffer, x, (size_t)(MOST_ROWS * k) * 2, 0);
    gpu_put(&bias_buffer, bias, (size_t)n * 2, 2);
    for (int r = 0; r < count; r++) {
        for (int biased = 0; biased < 2; biased++) {
            const int64_t m = rows[r];
            const size_t bytes = (size_t)(m * n) * 2;
            void *first = malloc(bytes);
            char what[200];
            snprintf(what, sizeof what, "format %d, [%d, %d], blocksize %d, nested %d, dtype %d, m %d, bias %d", (int)w->desc.format, (int)n, (int)k,
                     (int)w->desc.blocksize, (int)w->desc.nested_blocksize, (int)dtype, (int)m, biased);
            for (int again = 0; again < 2; again++) {
                gpu_place(&y_buffer, bytes, again ? 2 : 0);
                OK(gq_linear(weight.state, x_buffer.address, m, dtype, biased ? bias_buffer.address : 0, y_buffer.address, &exec));
                const void *got = gpu_get(&y_buffer, what);
                if (!again) memcpy(first, got, bytes);
                CHECK(memcmp(first, got, bytes) == 0, "%s: another result the second time", what);
            }
            double error = 0, rounding = 0, got_error = 0, decoded_error = 0, all = 0, x_squares = 0;
            for (int64_t i = 0; i < m * n; i++) {
                const double b = biased ? linear_get(bias, i % n, dtype) : 0, got = linear_get(first, i, dtype);
                const double e = got - (want[i] + b), e_rounded = linear_rounded(want[i] + b, dtype) - (want[i] + b);
                const double e_got = got - (exact[i] + b), e_decoded = linear_rounded(usual[i] + b, dtype) - (exact[i] + b);
                error += e * e;
                rounding += e_rounded * e_rounded;
                got_error += e_got * e_got;
                decoded_error += e_decoded * e_decoded;
                all += (exact[i] + b) * (exact[i] + b);
            }
            for (int64_t i = 0; i < m * k; i++) x_squares += (double)linear_get(x, i, dtype) * linear_get(x, i, dtype);
            /* The last term is what float32 sums may lose, which counts where y is small beside its terms. */
            const double allowed = 1.02 * linear_root(rounding) + 1e-6 * linear_root(x_squares * weight_squares);
            CHECK(linear_root(error) <= allowed, "%s: the error is %g, allowed is %g", what, linear_root(error), allowed);
            if (m * n >= 1000) { /* fewer elements are a matter of luck */
                totals[w->desc.format][dtype].got += (double)(m * n) * got_error / all;
                totals[w->desc.format][dtype].decoded += (double)(m * n) * decoded_error / all;
            }
            free(first);
        }
    }
    drop(&weight);
    free(x);
    free(bias);
    free(on_device);
    free(decoded);
    free(exact);
    free(want);
    free(usual);
}

static void every_row_count(void) {
    int64_t rows[MOST_ROWS];
    for (int i = 0; i < MOST_ROWS; i++) rows[i] = i + 1;
    struct linear_weight w = linear_weight(GQ_FORMAT_NF4, 77, 384, 64, 0);
    sums(&w, GQ_BF16, rows, MOST_ROWS);
    linear_free(&w);
}

static void shapes(void) {
    static const int64_t all[][2] = {{1, 128}, {32, 128}, {33, 256}, {200, 512}, {257, 1024}, {96, 4096}, {1000, 3072}};
    static const int64_t rows[] = {1, 3, 8, 9, 16, 24, 32, 33, 64}, blocksizes[] = {64, 128, 4096};
    for (size_t s = 0; s < sizeof all / sizeof *all; s++) {
        const int64_t n = all[s][0], k = all[s][1];
        /* The host takes its time for large ones: a few cases of each kind. */
        const int step = n * k > 1000000 ? 7 : n * k > 200000 ? 3 : 1;
        for (int i = 0; i < 24; i += step) {
            const int64_t blocksize = blocksizes[i / 8];
            if (k % blocksize) continue;
            struct linear_weight w = linear_weight(i / 4 % 2 ? GQ_FORMAT_FP4 : GQ_FORMAT_NF4, n, k, blocksize, i % 2);
            sums(&w, i / 2 % 2 ? GQ_BF16 : GQ_F16, rows, sizeof rows / sizeof *rows);
            linear_free(&w);
        }
    }
    for (gq_format format = GQ_FORMAT_NF4; format <= GQ_FORMAT_FP4; format++) {
        for (gq_dtype dtype = GQ_F16; dtype <= GQ_BF16; dtype++) {
            const double got = linear_root(totals[format][dtype].got), decoded = linear_root(totals[format][dtype].decoded);
            CHECK(got <= 1.02 * decoded, "format %d, dtype %d: the error is %g, with decoded weights %g", (int)format, (int)dtype, got, decoded);
        }
    }
}

/* With rows of the identity as x, y is the transposed weight: one product in float32, rounded. */
static void identity(void) {
    enum { N = 33, K = 256 };
    static struct gpu_buffer x_buffer, y_buffer;
    static uint16_t x[K * K];
    for (int i = 0; i < 8; i++) {
        const gq_dtype dtype = i / 2 % 2 ? GQ_BF16 : GQ_F16;
        struct linear_weight w = linear_weight(i / 4 ? GQ_FORMAT_FP4 : GQ_FORMAT_NF4, N, K, 64, i % 2);
        struct device_weight weight;
        memset(&weight, 0, sizeof weight);
        upload(&weight, &w, 0);
        float *values = device_values(&w, dtype);
        memset(x, 0, sizeof x);
        for (int r = 0; r < K; r++) linear_put(x, r * K + r, 1, dtype);
        gpu_put(&x_buffer, x, sizeof x, 0);
        gpu_place(&y_buffer, K * N * 2, 0);
        for (int r = 0; r < K; r += FEW_ROWS)
            OK(gq_linear(weight.state, x_buffer.address + (uint64_t)r * K * 2, FEW_ROWS, dtype, 0, y_buffer.address + (uint64_t)r * N * 2, &exec));
        const uint16_t *got = (const uint16_t *)gpu_get(&y_buffer, "identity");
        int wrong = 0;
        for (int e = 0; e < K * N; e++) {
            uint16_t want;
            linear_put(&want, 0, values[e % N * K + e / N], dtype);
            wrong += want != got[e] && ((want | got[e]) & 0x7fff) != 0; /* a zero may have either sign */
        }
        CHECK(wrong == 0, "case %d: %d weights are not their value times absmax", i, wrong);
        free(values);
        drop(&weight);
        linear_free(&w);
    }
}

/* ---- streams */

enum { SIDE = 384, X_BYTES = SIDE * 4 * 2, WAYS = 8, TIMES = 200 };

/* Reads y of 4 rows from the device. */
static void read_back(void *to, uint64_t from, int count) {
    GPU(cuCtxSynchronize());
    GPU(cuMemcpyDtoH_v2(to, from, (size_t)count * X_BYTES));
}

static void same(const unsigned char *got, const unsigned char *want, const char *what) {
    for (int i = 0; i < TIMES; i++) {
        if (memcmp(got + i * X_BYTES, want + i * X_BYTES, X_BYTES) == 0) continue;
        CHECK(0, "%s: result %d is another one", what, i);
        break;
    }
}

/* x for all times, 4 rows each. */
static uint64_t make_x(void) {
    void *host = linear_random((int64_t)TIMES * SIDE * 4, GQ_BF16);
    const uint64_t x = gpu_alloc(TIMES * X_BYTES);
    GPU(cuMemcpyHtoD_v2(x, host, TIMES * X_BYTES));
    free(host);
    return x;
}

/* Weights are quantized again and again into the same buffer, and used by a layer whose y is the x of the next one, with nobody waiting in
 * between: each kernel must see what those before it did, and must not disturb them. The second layer finds the weight settled. */
static void order(void) {
    unsigned char *want = malloc(TIMES * X_BYTES), *got = malloc(TIMES * X_BYTES);
    struct linear_weight w = linear_weight(GQ_FORMAT_NF4, SIDE, SIDE, 64, 0);
    struct device_weight weight;
    memset(&weight, 0, sizeof weight);
    upload(&weight, &w, 0);
    float *source = linear_random((int64_t)WAYS * SIDE * SIDE, GQ_F32);
    const uint64_t sources = gpu_alloc(WAYS * SIDE * SIDE * 4), x = make_x(), middle = gpu_alloc(X_BYTES), y = gpu_alloc(TIMES * X_BYTES);
    GPU(cuMemcpyHtoD_v2(sources, source, WAYS * SIDE * SIDE * 4));
    void *stream = NULL;
    GPU(cuStreamCreate(&stream, 1));
    const gq_exec on = gpu_exec(stream);
    gq_exec settled = on;
    settled.flags = GQ_EXEC_SETTLED;
    for (int waits = 1; waits >= 0; waits--) {
        gpu_fill(y, TIMES * X_BYTES);
        gpu_fill(middle, X_BYTES);
        for (int i = 0; i < TIMES; i++) {
            const uint64_t from = sources + (uint64_t)(i * 5 % WAYS) * SIDE * SIDE * 4;
            OK(gq_quantize_nf4(from, GQ_F32, SIDE * SIDE, 64, weight.parts[1].address, SIDE * SIDE / 64, weight.parts[0].address, SIDE * SIDE / 2, &on));
            if (waits) GPU(cuStreamSynchronize(stream));
            OK(gq_linear(weight.state, x + (uint64_t)i * X_BYTES, 4, GQ_BF16, 0, middle, &on));
            if (waits) GPU(cuStreamSynchronize(stream));
            OK(gq_linear(weight.state, middle, 4, GQ_BF16, 0, y + (uint64_t)i * X_BYTES, waits ? &on : &settled));
            if (waits) GPU(cuStreamSynchronize(stream));
        }
        read_back(waits ? want : got, y, TIMES);
    }
    same(got, want, "on one stream, without waiting");
    CHECK(memcmp(want, want + WAYS * X_BYTES, X_BYTES) != 0, "another x gives the same y");
    GPU(cuStreamDestroy_v2(stream));
    gpu_free(sources);
    gpu_free(x);
    gpu_free(middle);
    gpu_free(y);
    drop(&weight);
    linear_free(&w);
    free(source);
    free(want);
    free(got);
}

/* Two streams at once, each with a weight of its own; and a graph that is replayed on other x. */
static void streams(void) {
    unsigned char *want[2], *got = malloc(TIMES * X_BYTES);
    struct linear_weight w[2];
    struct device_weight weight[2];
    void *stream[2] = {NULL, NULL};
    uint64_t y[2];
    const uint64_t x = make_x();
    memset(weight, 0, sizeof weight);
    for (int s = 0; s < 2; s++) {
        w[s] = linear_weight(s ? GQ_FORMAT_FP4 : GQ_FORMAT_NF4, SIDE, SIDE, 128, s);
        upload(&weight[s], &w[s], 0);
        y[s] = gpu_alloc(TIMES * X_BYTES);
        want[s] = malloc(TIMES * X_BYTES);
        GPU(cuStreamCreate(&stream[s], 1));
        for (int i = 0; i < TIMES; i++) OK(gq_linear(weight[s].state, x + (uint64_t)i * X_BYTES, 4, GQ_BF16, 0, y[s] + (uint64_t)i * X_BYTES, &exec));
        read_back(want[s], y[s], TIMES);
        gpu_fill(y[s], TIMES * X_BYTES);
    }
    for (int i = 0; i < TIMES; i++) {
        for (int s = 0; s < 2; s++) {
            const gq_exec on = gpu_exec(stream[s]);
            OK(gq_linear(weight[s].state, x + (uint64_t)i * X_BYTES, 4, GQ_BF16, 0, y[s] + (uint64_t)i * X_BYTES, &on));
        }
    }
    for (int s = 0; s < 2; s++) {
        read_back(got, y[s], TIMES);
        same(got, want[s], s ? "the second of two streams" : "the first of two streams");
    }

    /* Three layers in a graph, from the x that was copied to its place; the last one is the first one again. */
    const uint64_t place = gpu_alloc(X_BYTES), out = gpu_alloc(3 * X_BYTES);
    void *graph = NULL, *executable = NULL;
    const gq_exec on = gpu_exec(stream[0]);
    GPU(cuStreamBeginCapture_v2(stream[0], 0));
    for (int l = 0; l < 3; l++) OK(gq_linear(weight[l % 2].state, place, 4, GQ_BF16, 0, out + (uint64_t)l * X_BYTES, &on));
    GPU(cuStreamEndCapture(stream[0], &graph));
    GPU(cuGraphInstantiateWithFlags(&executable, graph, 0));
    unsigned char *host_x = malloc(TIMES * X_BYTES), three[3 * X_BYTES];
    read_back(host_x, x, TIMES);
    for (int i = 0; i < TIMES; i += 10) {
        gpu_fill(out, 3 * X_BYTES);
        GPU(cuMemcpyHtoDAsync_v2(place, host_x + i * X_BYTES, X_BYTES, stream[0]));
        GPU(cuGraphLaunch(executable, stream[0]));
        read_back(three, out, 3);
        for (int l = 0; l < 3; l++) CHECK(memcmp(three + l * X_BYTES, want[l % 2] + i * X_BYTES, X_BYTES) == 0, "replay %d: layer %d has another result", i, l);
    }
    GPU(cuGraphExecDestroy(executable));
    GPU(cuGraphDestroy(graph));
    for (int s = 0; s < 2; s++) {
        GPU(cuStreamDestroy_v2(stream[s]));
        gpu_free(y[s]);
        drop(&weight[s]);
        linear_free(&w[s]);
        free(want[s]);
    }
    gpu_free(x);
    gpu_free(place);
    gpu_free(out);
    free(host_x);
    free(got);
}

/* ---- what is refused */

static struct gpu_buffer refused_x, refused_y;

/* One call without a workspace: its status, texts of its message, and y, which stays. Offsets are those of x, of y, of the codes and of
 * absmax. */
static void refused(int64_t k, int64_t blocksize, int64_t m, gq_dtype dtype, const size_t offsets[4], gq_status want, const char *why, const char *wanted) {
    enum { N = 32 };
    struct linear_weight w = linear_weight(GQ_FORMAT_NF4, N, k, blocksize, 0);
    struct device_weight weight;
    memset(&weight, 0, sizeof weight);
    upload_at(&weight, &w, offsets[2], offsets[3]);
    const size_t bytes = (size_t)(m * N) * 4;
    gpu_place(&refused_x, (size_t)(m * k) * 4, offsets[0]);
    gpu_place(&refused_y, bytes, offsets[1]);
    STATUS(gq_linear(weight.state, refused_x.address, m, dtype, 0, refused_y.address, &exec), want);
    SAYS(why);
    SAYS(wanted);
    GPU(cuCtxSynchronize());
    const unsigned char *y = gpu_get(&refused_y, why);
    size_t i = 0;
    while (i < bytes && y[i] == GPU_FILL) i++;
    CHECK(i == bytes, "%s: byte %d of y was written", why, (int)i);
    /* On the CPU there is no such state. */
    STATUS(gq_linear(weight.state, refused_x.address, m, dtype, 0, refused_y.address, NULL), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("device 0");
    SAYS("CPU");
    drop(&weight);
    linear_free(&w);
}

static void refusals(void) {
    static const struct {
        int64_t k, blocksize, m;
        gq_dtype dtype;
        size_t offsets[4];
        const char *why;
    } cases[] = {
        {128, 64, 65, GQ_BF16, {0, 0, 0, 0}, "decoded first"},    {96, 64, 4, GQ_BF16, {0, 0, 0, 0}, "multiple of 64"},
        {128, 32, 4, GQ_F16, {0, 0, 0, 0}, "whole blocks"},       {128, 4096, 4, GQ_F16, {0, 0, 0, 0}, "whole blocks"},
        {128, 64, 4, GQ_F32, {0, 0, 0, 0}, "not F16 or BF16"},    {128, 64, 4, GQ_BF16, {2, 0, 0, 0}, "16 bytes"},
        {128, 64, 4, GQ_BF16, {0, 0, 8, 0}, "16 bytes"},          {128, 64, 4, GQ_BF16, {0, 0, 0, 4}, "absmax is not aligned to 16 bytes"},
    };
    static const size_t y_offset[4] = {0, 1, 0, 0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        refused(cases[i].k, cases[i].blocksize, cases[i].m, cases[i].dtype, cases[i].offsets, GQ_ERROR_INVALID_ARGUMENT, cases[i].why, "exec.workspace, which has 0 bytes");
    refused(128, 64, 4, GQ_BF16, y_offset, GQ_ERROR_UNSUPPORTED, "aligned to its elements", "gq_dequantize");
    gpu_drop(&refused_x);
    gpu_drop(&refused_y);
}

int main(void) {
    gpu_start();
    exec = gpu_exec(NULL);
    gpu_needs_ampere();
    OK(gq_device_prepare(0));
    refusals();
    order();
    streams();
    identity();
    every_row_count();
    shapes();
    return check_result();
}
