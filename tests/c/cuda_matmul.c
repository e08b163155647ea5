/* gq_linear on a device by way of cuBLASLt: what the kernels for packed weights do not take, against sums in float64 on the host, in one slab
 * and in many. Skipped without libcublasLt, which GQUANT_CUBLASLT can name. */
#include "device_weight.h"

static gq_exec exec;

static struct gpu_buffer x_buffer, bias_buffer, y_buffer, workspace;

enum { LEAST, RECOMMENDED }; /* of workspace */

static uint64_t recommended(const struct device_weight *w, int64_t m, gq_dtype dtype) {
    uint64_t bytes = 0;
    OK(gq_linear_workspace_size(w->state, m, dtype, &exec, &bytes, NULL));
    return bytes;
}

/* Room for 128 rows, as the header says. */
static uint64_t least(int64_t n, int64_t k, gq_dtype dtype) { return ((uint64_t)((n < 128 ? n : 128) * k) * linear_size(dtype) + 255) / 256 * 256; }

static gq_exec with_workspace(uint64_t bytes) {
    gq_exec with = exec;
    with.workspace = gpu_place(&workspace, (size_t)bytes, 0);
    with.workspace_bytes = bytes;
    return with;
}

/* The weight as it is decoded for a dtype. */
static float *decoded(const struct linear_weight *w, gq_dtype dtype) {
    float *values = malloc((size_t)(w->n * w->k) * 4 + 1);
    for (int64_t i = 0; i < w->n * w->k; i++) values[i] = (float)linear_rounded(w->values[i], dtype);
    return values;
}

/* ---- graphs */

/* A layer in a graph, before anything of its kind ran outside of one: the size of the workspace was asked for, and that is all. Replayed on other
 * x, it gives what calls give. */
static void captured(void) {
    enum { N = 1000, K = 512, M = 65, TIMES = 20, X_BYTES = M * K * 2, Y_BYTES = M * N * 2 };
    struct linear_weight w = linear_weight(GQ_FORMAT_NF4, N, K, 64, 1);
    struct device_weight weight;
    void *stream = NULL, *graph = NULL, *executable = NULL;
    memset(&weight, 0, sizeof weight);
    upload(&weight, &w, 0);
    gq_exec on = with_workspace(least(N, K, GQ_BF16) * 3 + 4096);
    unsigned char *host_x = linear_random((int64_t)TIMES * M * K, GQ_BF16), *got = malloc(Y_BYTES), *want = malloc(Y_BYTES);
    void *bias = linear_random(N, GQ_BF16);
    const uint64_t x = gpu_alloc(X_BYTES), y = gpu_alloc(Y_BYTES), added = gpu_put(&bias_buffer, bias, N * 2, 0);
    GPU(cuStreamCreate(&stream, 1));
    on.stream = (uint64_t)(uintptr_t)stream;
    CHECK(recommended(&weight, M, GQ_BF16) > 0, "no workspace is needed");
    GPU(cuCtxSynchronize());
    GPU(cuStreamBeginCapture_v2(stream, 0));
    OK(gq_linear(weight.state, x, M, GQ_BF16, added, y, &on));
    GPU(cuStreamEndCapture(stream, &graph));
    GPU(cuGraphInstantiateWithFlags(&executable, graph, 0));
    for (int i = 0; i < TIMES; i++) {
        gpu_fill(y, Y_BYTES);
        GPU(cuMemcpyHtoD_v2(x, host_x + i * X_BYTES, X_BYTES));
        GPU(cuCtxSynchronize());
        GPU(cuGraphLaunch(executable, stream));
        GPU(cuCtxSynchronize());
        GPU(cuMemcpyDtoH_v2(got, y, Y_BYTES));
        gpu_fill(y, Y_BYTES);
        OK(gq_linear(weight.state, x, M, GQ_BF16, added, y, &on));
        GPU(cuCtxSynchronize());
        GPU(cuMemcpyDtoH_v2(want, y, Y_BYTES));
        CHECK(memcmp(got, want, Y_BYTES) == 0, "replay %d has another result", i);
    }
    GPU(cuGraphExecDestroy(executable));
    GPU(cuGraphDestroy(graph));
    GPU(cuStreamDestroy_v2(stream));
    gpu_free(x);
    gpu_free(y);
    free(host_x);
    free(bias);
    free(got);
    free(want);
    drop(&weight);
    linear_free(&w);
}

/* ---- sums */

/* One weight and x of m rows, of which these are compared with the host's sums: with a bias and without, in the least workspace and in the
 * recommended one, each twice. bias_offset is in elements. */
static void sums(const struct linear_weight *w, gq_dtype dtype, int64_t m, const int64_t *rows, int64_t count, size_t x_offset, size_t bias_offset) {
    const int64_t n = w->n, k = w->k;
    const size_t size = linear_size(dtype), bytes = (size_t)(m * n) * size;
    struct device_weight weight;
    memset(&weight, 0, sizeof weight);
    upload_at(&weight, w, 0, 4); /* with absmax where no kernel takes it */
    unsigned char *x = linear_random(m * k, dtype), *bias = linear_random(n, dtype), *some = malloc((size_t)(count * k) * size + 1);
    float *values = decoded(w, dtype);
    for (int64_t i = 0; i < count; i++) memcpy(some + (size_t)(i * k) * size, x + (size_t)(rows[i] * k) * size, (size_t)k * size);
    double *exact = linear_exact(some, count, dtype, values, n, k), weight_squares = 0, x_squares = 0;
    for (int64_t i = 0; i < n * k; i++) weight_squares += (double)values[i] * values[i];
    for (int64_t i = 0; i < count * k; i++) x_squares += (double)linear_get(some, i, dtype) * linear_get(some, i, dtype);
    gpu_put(&x_buffer, x, (size_t)(m * k) * size, x_offset * size);
    gpu_put(&bias_buffer, bias, (size_t)n * size, bias_offset * size);
    for (int which = 0; which < 4; which++) {
        const int biased = which / 2;
        char what[200];
        snprintf(what, sizeof what, "format %d, [%d, %d], blocksize %d, nested %d, dtype %d, m %d, bias %d, %s workspace", (int)w->desc.format, (int)n, (int)k,
                 (int)w->desc.blocksize, (int)w->desc.nested_blocksize, (int)dtype, (int)m, biased, which % 2 == LEAST ? "least" : "recommended");
        const gq_exec with = with_workspace(which % 2 == LEAST ? least(n, k, dtype) : recommended(&weight, m, dtype));
        unsigned char *first = malloc(bytes + 1);
        for (int again = 0; again < 2; again++) {
            gpu_place(&y_buffer, bytes, 0);
            OK(gq_linear(weight.state, x_buffer.address, m, dtype, biased ? bias_buffer.address : 0, y_buffer.address, &with));
            const void *got = gpu_get(&y_buffer, what);
            if (!again) memcpy(first, got, bytes);
            CHECK(memcmp(first, got, bytes) == 0, "%s: another result the second time", what);
        }
        if (which % 2 == LEAST) gpu_get(&workspace, what);
        double error = 0, rounding = 0;
        for (int64_t i = 0; i < count * n; i++) {
            const double want = exact[i] + (biased ? linear_get(bias, i % n, dtype) : 0);
            const double e = linear_get(first, rows[i / n] * n + i % n, dtype) - want, e_rounded = linear_rounded(want, dtype) - want;
            error += e * e;
            rounding += e_rounded * e_rounded;
            if (biased) { /* cuBLASLt may round a sum before it adds the bias */
                const double e_sum = linear_rounded(exact[i], dtype) - exact[i];
                rounding += e_sum * e_sum;
            }
        }
        /* The last term is what float32 sums may lose; TF32 would lose a thousand times that. */
        const double allowed = 1.02 * linear_root(rounding) + 1e-6 * linear_root(x_squares * weight_squares);
        CHECK(linear_root(error) <= allowed, "%s: the error is %g, allowed is %g", what, linear_root(error), allowed);
        free(first);
    }
    drop(&weight);
    free(x);
    free(bias);
    free(some);
    free(values);
    free(exact);
}

static void shapes(void) {
    static const int64_t all[][3] = {{1, 1, 3}, {5, 1, 65}, {1, 128, 65}, {33, 101, 1}, {300, 97, 70}, {128, 192, 200}, {257, 512, 65}, {1000, 320, 200}};
    static const int64_t blocksizes[] = {32, 64, 4096};
    int64_t rows[200];
    int number = 0;
    for (int i = 0; i < 200; i++) rows[i] = i;
    for (size_t s = 0; s < sizeof all / sizeof *all; s++) {
        const int64_t n = all[s][0], k = all[s][1], m = all[s][2];
        for (int b = 0; b < 3; b++) {
            struct linear_weight w = linear_weight(number % 2 ? GQ_FORMAT_FP4 : GQ_FORMAT_NF4, n, k, blocksizes[b], number / 2 % 2);
            number++;
            sums(&w, GQ_F32, m, rows, m, 0, 0);
            sums(&w, GQ_F16, m, rows, m, (size_t)(number % 3), 0);
            sums(&w, GQ_BF16, m, rows, m, 0, (size_t)(number % 3));
            linear_free(&w);
        }
    }
}

/* Many rows of x; and a weight of 160 MiB and some, for two slabs of the recommended size and one row more. */
static void large(void) {
    static const int64_t rows[] = {0, 1, 63, 64, 2047, 4095}, few[] = {0, 31, 64};
    struct linear_weight w = linear_weight(GQ_FORMAT_NF4, 3000, 512, 64, 1);
    sums(&w, GQ_BF16, 4096, rows, 6, 0, 0);
    sums(&w, GQ_F16, 4096, rows, 6, 0, 1);
    sums(&w, GQ_F32, 4096, rows, 6, 0, 0);
    linear_free(&w);
    w = linear_weight(GQ_FORMAT_NF4, 40 * 1024 + 1, 1024, 64, 0);
    sums(&w, GQ_F32, 65, few, 3, 0, 0);
    linear_free(&w);
}

/* With the identity as x every sum has one term that is not 0, so y is exact: the decoded weight, plus the bias in float32, rounded once, by the
 * library's epilogue and, where the bias is not aligned for it, without. */
static void identity(void) {
    enum { N = 300, K = 129 };
    static const gq_dtype dtypes[] = {GQ_F32, GQ_F16, GQ_BF16};
    for (int i = 0; i < 6; i++) {
        const gq_dtype dtype = dtypes[i / 2];
        const size_t size = linear_size(dtype);
        struct linear_weight w = linear_weight(i % 2 ? GQ_FORMAT_FP4 : GQ_FORMAT_NF4, N, K, 64, i % 2);
        struct device_weight weight;
        memset(&weight, 0, sizeof weight);
        upload(&weight, &w, 0);
        float *values = decoded(&w, dtype);
        unsigned char *x = calloc(K * K, 4), *bias = linear_random(N, dtype);
        for (int r = 0; r < K; r++) linear_put(x, r * K + r, 1, dtype);
        gpu_put(&x_buffer, x, K * K * size, 0);
        for (int way = 0; way < 3; way++) { /* no bias, an aligned one, another one */
            const gq_exec with = with_workspace(least(N, K, dtype));
            gpu_put(&bias_buffer, bias, N * size, way == 2 ? size : 0);
            gpu_place(&y_buffer, K * N * size, 0);
            OK(gq_linear(weight.state, x_buffer.address, K, dtype, way ? bias_buffer.address : 0, y_buffer.address, &with));
            const void *got = gpu_get(&y_buffer, "identity");
            int wrong = 0;
            for (int e = 0; e < K * N; e++) {
                const float want = values[e % N * K + e / N] + (way ? linear_get(bias, e % N, dtype) : 0);
                unsigned char rounded[4];
                linear_put(rounded, 0, want, dtype);
                wrong += linear_get(rounded, 0, dtype) != linear_get(got, e, dtype);
            }
            CHECK(wrong == 0, "case %d, bias %d: %d elements of %d are not exact", i, way, wrong, K * N);
        }
        drop(&weight);
        linear_free(&w);
        free(values);
        free(x);
        free(bias);
    }
}

/* Rows without elements: the bias is left, or nothing. */
static void empty(void) {
    enum { N = 70001, M = 3 };
    struct linear_weight w = linear_weight(GQ_FORMAT_NF4, N, 0, 64, 0);
    struct device_weight weight;
    memset(&weight, 0, sizeof weight);
    upload(&weight, &w, 0);
    CHECK(recommended(&weight, M, GQ_F16) == 0, "a workspace for nothing");
    unsigned char *bias = linear_random(N, GQ_F16), *zeros = calloc(N, 2);
    gpu_put(&bias_buffer, bias, N * 2, 2);
    for (int biased = 0; biased < 2; biased++) {
        gpu_place(&y_buffer, M * N * 2, 2);
        OK(gq_linear(weight.state, 0, M, GQ_F16, biased ? bias_buffer.address : 0, y_buffer.address, &exec));
        const unsigned char *got = gpu_get(&y_buffer, "empty");
        for (int i = 0; i < M; i++) CHECK(memcmp(got + i * N * 2, biased ? bias : zeros, N * 2) == 0, "row %d of empty sums, bias %d", i, biased);
    }
    free(bias);
    free(zeros);
    drop(&weight);
    linear_free(&w);
}

/* ---- streams */

/* Two streams with a workspace each, and on each two layers that take turns in it, with nobody waiting. */
static void streams(void) {
    enum { SIDE = 700, M = 65, TIMES = 40, WAYS = 2, BYTES = M * SIDE * 2 };
    struct linear_weight w[2];
    struct device_weight weight[2];
    void *stream[WAYS] = {NULL, NULL};
    uint64_t y[WAYS], place[WAYS];
    unsigned char *want = malloc(TIMES * BYTES), *got = malloc(TIMES * BYTES), *host_x = linear_random(M * SIDE, GQ_BF16);
    const uint64_t x = gpu_alloc(BYTES), bytes = least(SIDE, SIDE, GQ_BF16) * 2 + 512;
    GPU(cuMemcpyHtoD_v2(x, host_x, BYTES));
    memset(weight, 0, sizeof weight);
    for (int i = 0; i < 2; i++) {
        w[i] = linear_weight(i ? GQ_FORMAT_FP4 : GQ_FORMAT_NF4, SIDE, SIDE, 64, 0);
        upload(&weight[i], &w[i], 0);
    }
    for (int s = 0; s < WAYS; s++) {
        y[s] = gpu_alloc(TIMES * BYTES);
        place[s] = gpu_alloc(bytes);
        gpu_fill(y[s], TIMES * BYTES);
        GPU(cuStreamCreate(&stream[s], 1));
    }
    for (int waits = 1; waits >= 0; waits--) {
        for (int i = 0; i < TIMES; i++) {
            for (int s = 0; s < WAYS; s++) {
                gq_exec on = gpu_exec(stream[s]);
                on.workspace = place[s];
                on.workspace_bytes = bytes;
                OK(gq_linear(weight[i % 2].state, x, M, GQ_BF16, 0, y[s] + (uint64_t)i * BYTES, &on));
                if (waits) GPU(cuStreamSynchronize(stream[s]));
            }
        }
        for (int s = 0; s < WAYS; s++) {
            GPU(cuStreamSynchronize(stream[s]));
            GPU(cuMemcpyDtoH_v2(got, y[s], TIMES * BYTES));
            if (waits && s == 0) memcpy(want, got, TIMES * BYTES);
            for (int i = 0; i < TIMES; i++)
                CHECK(memcmp(got + i * BYTES, want + i % 2 * BYTES, BYTES) == 0, "stream %d, waits %d: result %d is another one", s, waits, i);
            gpu_fill(y[s], TIMES * BYTES);
        }
    }
    for (int s = 0; s < WAYS; s++) {
        GPU(cuStreamDestroy_v2(stream[s]));
        gpu_free(y[s]);
        gpu_free(place[s]);
        drop(&weight[s]);
        linear_free(&w[s]);
    }
    gpu_free(x);
    free(want);
    free(got);
    free(host_x);
}

int main(void) {
    gpu_start();
    exec = gpu_exec(NULL);
    gpu_needs_ampere();
    struct linear_weight w = linear_weight(GQ_FORMAT_NF4, 8, 64, 64, 0);
    struct device_weight weight;
    memset(&weight, 0, sizeof weight);
    upload(&weight, &w, 0);
    uint64_t bytes;
    const gq_status status = gq_linear_workspace_size(weight.state, 1, GQ_F32, &exec, &bytes, NULL);
    drop(&weight);
    linear_free(&w);
    if (status == GQ_ERROR_UNSUPPORTED) {
        printf("skipped: %s\n", gq_last_error());
        return SKIPPED;
    }
    CHECK(status == GQ_OK, "%s", gq_last_error());
    captured();
    empty();
    identity();
    streams();
    shapes();
    large();
    gpu_drop(&x_buffer);
    gpu_drop(&bias_buffer);
    gpu_drop(&y_buffer);
    gpu_drop(&workspace);
    return check_result();
}
