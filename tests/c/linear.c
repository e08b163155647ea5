/* gq_linear on the CPU: near to sums in float64 over the decoded weight, the same with any number of threads, exact where sums are; nothing
 * beside y is written, and what is refused leaves y alone. */
#include "linear.h"

enum { GUARD = 64, FILL = 0xa5, ROWS = 33 };

/* y between two guard bands. */
static unsigned char *y;
static size_t y_bytes;

static void *new_y(size_t bytes) {
    y_bytes = bytes;
    y = malloc(bytes + 2 * GUARD);
    memset(y, FILL, bytes + 2 * GUARD);
    return y + GUARD;
}

/* Whether the bytes from first to end still are what new_y made them. */
static int untouched(size_t first, size_t end) {
    while (first < end && y[first] == FILL) first++;
    return first == end;
}

static void free_y(const char *what) {
    CHECK(untouched(0, GUARD) && untouched(GUARD + y_bytes, 2 * GUARD + y_bytes), "%s: bytes beside y were written", what);
    free(y);
}

/* One weight with one dtype: every number of rows, with a bias and without. */
static void sums(const struct linear_weight *w, gq_dtype dtype) {
    static const int64_t rows[] = {0, 1, 2, 5, 8, 9, 17, ROWS};
    const size_t size = linear_size(dtype);
    const double allowed = dtype == GQ_F32 ? 1e-6 : dtype == GQ_F16 ? 5e-4 : 4e-3;
    void *all = linear_random(ROWS * w->k, dtype), *bias = linear_random(w->n, dtype);
    double *exact = linear_exact(all, ROWS, dtype, w->values, w->n, w->k);
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
        for (int biased = 0; biased < 2; biased++) {
            const int64_t m = rows[r];
            const size_t bytes = (size_t)(m * w->n) * size;
            char what[200];
            snprintf(what, sizeof what, "format %d, [%d, %d], blocksize %d, nested %d, dtype %d, m %d, bias %d", (int)w->desc.format, (int)w->n, (int)w->k,
                     (int)w->desc.blocksize, (int)w->desc.nested_blocksize, (int)dtype, (int)m, biased);
            /* Memory of exactly this size, so that a sanitizer sees who reads behind it. */
            void *x = malloc((size_t)(m * w->k) * size), *first = malloc(bytes + 1);
            memcpy(x, all, (size_t)(m * w->k) * size);
            static const int32_t threads[] = {1, 2, 5};
            for (int t = 0; t < 3; t++) {
                gq_exec exec = GQ_EXEC_INIT;
                exec.threads = threads[t];
                void *got = new_y(bytes);
                OK(gq_linear(w->state, GQ_ADDR(x), m, dtype, biased ? GQ_ADDR(bias) : 0, GQ_ADDR(got), &exec));
                if (t == 0) memcpy(first, got, bytes);
                CHECK(memcmp(got, first, bytes) == 0, "%s: %d threads give another result", what, (int)threads[t]);
                free_y(what);
            }
            double error = 0, all_squares = 0;
            for (int64_t i = 0; i < m * w->n; i++) {
                const double want = exact[i] + (biased ? linear_get(bias, i % w->n, dtype) : 0), difference = linear_get(first, i, dtype) - want;
                error += difference * difference;
                all_squares += want * want;
            }
            CHECK(error <= allowed * allowed * all_squares, "%s: the error is %g", what, linear_root(error / all_squares));
            free(x);
            free(first);
        }
    }
    free(all);
    free(bias);
    free(exact);
}

/* With the identity as x, y is the transposed weight, whatever the number of rows in a call. */
static void identity(const struct linear_weight *w) {
    const int64_t n = w->n, k = w->k;
    float *x = calloc((size_t)(k * k), 4);
    for (int64_t i = 0; i < k; i++) x[i * k + i] = 1;
    for (int64_t step = 1; step <= k; step = step == 1 ? 7 : k) {
        float *got = new_y((size_t)(n * k) * 4);
        for (int64_t i = 0; i < k; i += step) {
            const int64_t m = k - i < step ? k - i : step;
            OK(gq_linear(w->state, GQ_ADDR(x + i * k), m, GQ_F32, 0, GQ_ADDR(got + i * n), NULL));
        }
        int64_t wrong = 0;
        for (int64_t i = 0; i < n * k; i++) wrong += got[i % k * n + i / k] != w->values[i];
        CHECK(wrong == 0, "[%d, %d], nested %d, %d rows: %d weights are not what gq_dequantize makes of them", (int)n, (int)k, (int)w->desc.nested_blocksize,
              (int)step, (int)wrong);
        free_y("identity");
        if (step == k) break;
    }
    free(x);
}

/* Nothing but the bias is left of rows without elements. */
static void empty(void) {
    static const float bias[3] = {1, -2, 0.5f};
    struct linear_weight no_k = linear_weight(GQ_FORMAT_NF4, 3, 0, 64, 0), no_n = linear_weight(GQ_FORMAT_NF4, 0, 3, 64, 0);
    float *got = new_y(24), x[6] = {0};
    OK(gq_linear(no_k.state, 0, 2, GQ_F32, GQ_ADDR(bias), GQ_ADDR(got), NULL));
    CHECK(memcmp(got, bias, 12) == 0 && memcmp(got + 3, bias, 12) == 0, "the bias is not what is left: %g %g %g", got[0], got[1], got[2]);
    OK(gq_linear(no_k.state, 0, 2, GQ_F32, 0, GQ_ADDR(got), NULL));
    for (int i = 0; i < 6; i++) CHECK(got[i] == 0, "element %d of an empty sum is %g", i, got[i]);
    OK(gq_linear(no_n.state, GQ_ADDR(x), 2, GQ_F32, 0, 0, NULL));
    free_y("empty");
    linear_free(&no_k);
    linear_free(&no_n);
}

/* REFUSED(call, status, text): the message has the text, and y is untouched. */
#define REFUSED(call, status, text)                                                \
    do {                                                                           \
        STATUS(call, status);                                                      \
        SAYS(text);                                                                \
        CHECK(untouched(0, y_bytes + 2 * GUARD), "y was written by what failed"); \
    } while (0)

static void refused(void) {
    static const int64_t flat[1] = {256}, cube[3] = {2, 2, 64};
    struct linear_weight w = linear_weight(GQ_FORMAT_NF4, 4, 64, 64, 0), rows = linear_weight(GQ_FORMAT_INT8, 4, 64, 0, 0);
    struct linear_weight table = linear_weight(GQ_FORMAT_BLOCKWISE8, 4, 64, 64, 0);
    gq_state *state = NULL;
    float x[128] = {0};
    const gq_addr in = GQ_ADDR(x), out = GQ_ADDR(new_y(32));
    REFUSED(gq_linear(rows.state, in, 2, GQ_F32, 0, out, NULL), GQ_ERROR_UNSUPPORTED, "not nf4 or fp4");
    REFUSED(gq_linear(table.state, in, 2, GQ_F32, 0, out, NULL), GQ_ERROR_UNSUPPORTED, "not nf4 or fp4");
    w.desc.shape = GQ_ADDR(flat);
    w.desc.ndim = 1;
    OK(gq_state_create(&w.desc, &state));
    REFUSED(gq_linear(state, in, 2, GQ_F32, 0, out, NULL), GQ_ERROR_INVALID_ARGUMENT, "2 dimensions");
    OK(gq_state_free(state));
    w.desc.shape = GQ_ADDR(cube);
    w.desc.ndim = 3;
    OK(gq_state_create(&w.desc, &state));
    REFUSED(gq_linear(state, in, 2, GQ_F32, 0, out, NULL), GQ_ERROR_INVALID_ARGUMENT, "[2 2 64]");
    OK(gq_state_free(state));

    /* A workspace is for devices. */
    uint64_t bytes = 7;
    int32_t packed = 7;
    OK(gq_linear_workspace_size(w.state, 1000, GQ_F32, NULL, &bytes, &packed));
    CHECK(bytes == 0 && packed == 1, "%d bytes of workspace on the CPU, packed %d", (int)bytes, (int)packed);
    STATUS(gq_linear_workspace_size(w.state, 1000, GQ_F32, NULL, NULL, NULL), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("bytes and packed are both NULL");
    bytes = 7;
    STATUS(gq_linear_workspace_size(rows.state, 2, GQ_F32, NULL, &bytes, NULL), GQ_ERROR_UNSUPPORTED);
    CHECK(bytes == 0, "%d bytes after a failure", (int)bytes);
    SAYS("not nf4 or fp4");
    STATUS(gq_linear_workspace_size(w.state, -1, GQ_F32, NULL, &bytes, NULL), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("m is -1");

    static const int64_t wrong_rows[] = {-1, INT64_MIN, INT64_MAX, 1ll << 62, 1ll << 53, 1ll << 50};
    for (size_t i = 0; i < sizeof wrong_rows / sizeof *wrong_rows; i++)
        REFUSED(gq_linear(w.state, in, wrong_rows[i], GQ_F32, 0, out, NULL), GQ_ERROR_INVALID_ARGUMENT, "m is ");
    REFUSED(gq_linear(w.state, 0, 2, GQ_F32, 0, out, NULL), GQ_ERROR_INVALID_ARGUMENT, "x is NULL; want 512 bytes");
    REFUSED(gq_linear(w.state, in, 2, GQ_F32, 0, 0, NULL), GQ_ERROR_INVALID_ARGUMENT, "y is NULL; want 32 bytes");
    static const gq_dtype dtypes[] = {0, -1, 23, INT32_MAX, GQ_I8, GQ_F64, GQ_F8_E4M3};
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) REFUSED(gq_linear(w.state, in, 2, dtypes[i], 0, out, NULL), GQ_ERROR_INVALID_ARGUMENT, "dtype is ");
    gq_exec exec = GQ_EXEC_INIT;
    exec.threads = -1;
    REFUSED(gq_linear(w.state, in, 2, GQ_F32, 0, out, &exec), GQ_ERROR_INVALID_ARGUMENT, "threads");
    REFUSED(gq_linear(NULL, in, 2, GQ_F32, 0, out, NULL), GQ_ERROR_INVALID_ARGUMENT, "state");
    free_y("refused");
    linear_free(&w);
    linear_free(&rows);
    linear_free(&table);
}

int main(void) {
    static const int64_t shapes[][2] = {{1, 1}, {3, 7}, {33, 64}, {40, 100}, {96, 128}, {257, 320}}, blocksizes[] = {32, 64, 128, 4096};
    static const gq_dtype dtypes[] = {GQ_F32, GQ_F16, GQ_BF16};
    for (gq_format format = GQ_FORMAT_NF4; format <= GQ_FORMAT_FP4; format++) {
        for (int b = 0; b < 4; b++) {
            for (int nested = 0; nested < 2; nested++) {
                for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
                    struct linear_weight w = linear_weight(format, shapes[s][0], shapes[s][1], blocksizes[b], nested);
                    for (int d = 0; d < 3; d++) sums(&w, dtypes[d]);
                    identity(&w);
                    linear_free(&w);
                }
            }
        }
    }
    empty();
    refused();
    return check_result();
}
