/* usage: cuda_many [ROWS]...
 *
 * gq_linear on a device with many rows, or so many: each way of tables/all.json, in a workspace with guard bands, against sums in float64 on the host.
 * The kernels round weights to the dtype, so an error is measured by that of decoded weights. */
#include "device_weight.h"

static const struct {
    gq_format format;
    gq_dtype dtype;
    int64_t n, k, blocksize;
    int nested;
} layers[] = {
    {GQ_FORMAT_NF4, GQ_BF16, 136, 512, 64, 1},
    {GQ_FORMAT_FP4, GQ_F16, 264, 256, 128, 0},
    {GQ_FORMAT_NF4, GQ_F16, 1000, 1024, 64, 0},
};
static int64_t rows[] = {
    5,   6,   7,   8,   9,   10,  14,  15,  16,  20,  24,  30,  31,  32,  40,  42,  48,  50,  52,  56,  60,  61,  62,  63,  64,  70,  80,
    88,  94,  95,  96,  100, 101, 108, 109, 112, 120, 121, 124, 126, 127, 128, 190, 191, 192, 200, 210, 220, 254, 255, 256, 300, 301, 302,
    403, 404, 405, 406, 407, 408, 409, 410, 411, 420, 500, 502, 601, 701,
};

static struct gpu_buffer x_buffer, bias_buffer, y_buffer, workspace;

/* y of m rows, twice: the second time behind a layer that left its flags and sums in the workspace, and with settled weights. */
static void *layer(const struct device_weight *weight, int64_t m, gq_dtype dtype, gq_addr bias, size_t bytes, const char *what) {
    gq_exec exec = gpu_exec(NULL);
    uint64_t size = 0;
    int32_t packed = 0;
    OK(gq_linear_workspace_size(weight->state, m, dtype, &exec, &size, &packed));
    CHECK(packed == 1, "%s: the weight would be decoded", what);
    exec.workspace = gpu_place(&workspace, size, 0);
    exec.workspace_bytes = size;
    void *first = malloc(bytes);
    for (int again = 0; again < 2; again++) {
        exec.flags = again ? GQ_EXEC_SETTLED : 0;
        gpu_place(&y_buffer, bytes, 0);
        OK(gq_linear(weight->state, x_buffer.address, m, dtype, bias, y_buffer.address, &exec));
        const void *got = gpu_get(&y_buffer, what);
        if (!again) memcpy(first, got, bytes);
        CHECK(memcmp(first, got, bytes) == 0, "%s: another result the second time", what);
    }
    gpu_get(&workspace, what);
    return first;
}

int main(int argc, char **argv) {
    size_t count = sizeof rows / sizeof *rows;
    int64_t most = rows[count - 1];
    if (argc > 1) {
        CHECK((size_t)argc - 1 <= count, "%d numbers of rows", argc - 1);
        count = most = 0;
        for (int i = 1; i < argc && count < sizeof rows / sizeof *rows; i++) {
            rows[count++] = atoi(argv[i]);
            if (rows[i - 1] > most) most = rows[i - 1];
        }
    }
    gpu_start();
    gpu_needs_ampere();
    OK(gq_device_prepare(0));
    for (size_t l = 0; l < sizeof layers / sizeof *layers; l++) {
        const int64_t n = layers[l].n, k = layers[l].k;
        const gq_dtype dtype = layers[l].dtype;
        struct linear_weight w = linear_weight(layers[l].format, n, k, layers[l].blocksize, layers[l].nested);
        struct device_weight weight;
        memset(&weight, 0, sizeof weight);
        upload(&weight, &w, 0);
        void *x = linear_random(most * k, dtype), *bias = linear_random(n, dtype);
        float *decoded = malloc((size_t)(n * k) * 4);
        for (int64_t i = 0; i < n * k; i++) decoded[i] = (float)linear_rounded(w.values[i], dtype);
        double *exact = linear_exact(x, most, dtype, w.values, n, k), *usual = linear_exact(x, most, dtype, decoded, n, k);
        gpu_put(&x_buffer, x, (size_t)(most * k) * 2, 0);
        gpu_put(&bias_buffer, bias, (size_t)n * 2, 0);
        for (size_t r = 0; r < count; r++) {
            const int64_t m = rows[r];
            const int biased = r % 2;
            char what[100];
            snprintf(what, sizeof what, "[%d, %d], dtype %d, m %d", (int)n, (int)k, (int)dtype, (int)m);
            void *y = layer(&weight, m, dtype, biased ? bias_buffer.address : 0, (size_t)(m * n) * 2, what);
            double error = 0, allowed = 0;
            for (int64_t i = 0; i < m * n; i++) {
                const double b = biased ? linear_get(bias, i % n, dtype) : 0, want = exact[i] + b;
                const double e = linear_get(y, i, dtype) - want, e_usual = linear_rounded(usual[i] + b, dtype) - want;
                error += e * e;
                allowed += e_usual * e_usual;
            }
            CHECK(linear_root(error) <= 1.25 * linear_root(allowed), "%s: the error is %g, with decoded weights %g", what, linear_root(error), linear_root(allowed));
            free(y);
        }
        drop(&weight);
        linear_free(&w);
        free(x);
        free(bias);
        free(decoded);
        free(exact);
        free(usual);
    }
    return check_result();
}
