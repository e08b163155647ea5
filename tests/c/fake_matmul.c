/* Linear layers by way of cuBLASLt, as fake_cublaslt.c plays it, with the driver of fake_cuda.c: which slabs are decoded and multiplied, what it
 * is told of them, and what comes of everything that fails. Each case is a process of its own, as the library is loaded once in a process.
 * usage: fake_matmul LIBCUBLASLT, the fake one */
#include "fake_cublaslt.h"
#include "fake_cuda.h"
#include "gpu.h"

static void (*lt_set)(const char *settings);
static int64_t (*lt_count)(const char *what);
static struct fake_lt_call (*lt_call)(int n);

/* Finds the controls of the library that libgquant will load, too. */
static void lt_open(const char *name) {
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL), *symbols[3];
    static const char *const names[] = {"fake_lt_set", "fake_lt_count", "fake_lt_call"};
    for (int i = 0; i < 3; i++) {
        symbols[i] = library ? dlsym(library, names[i]) : NULL;
        if (symbols[i]) continue;
        fprintf(stderr, "%s is not the fake libcublasLt: %s\n", name, dlerror());
        exit(1);
    }
    memcpy(&lt_set, &symbols[0], sizeof lt_set);
    memcpy(&lt_count, &symbols[1], sizeof lt_count);
    memcpy(&lt_call, &symbols[2], sizeof lt_call);
}

/* ---- a layer with its memory */

enum { BLOCKSIZE = 64, MOST = 256 };

static struct {
    int64_t n, k, m;
    gq_dtype dtype;
    size_t size;
    gq_addr memory[6]; /* allocations: codes, absmax, x, bias, y, workspace */
    gq_addr absmax, x, bias, y;
    gq_state *state;
    gq_exec exec;
} layer;

static void make_state(void) {
    const int64_t shape[2] = {layer.n, layer.k}, blocks = (layer.n * layer.k + BLOCKSIZE - 1) / BLOCKSIZE;
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    desc.format = GQ_FORMAT_NF4;
    desc.dtype = GQ_F32;
    desc.blocksize = BLOCKSIZE;
    desc.shape = GQ_ADDR(shape);
    desc.ndim = 2;
    desc.device = 0;
    desc.parts.packed = layer.memory[0];
    desc.parts.packed_bytes = (uint64_t)(layer.n * layer.k + 1) / 2;
    desc.parts.absmax = layer.absmax;
    desc.parts.absmax_bytes = (uint64_t)blocks * 4;
    OK(gq_state_free(layer.state));
    layer.state = NULL;
    OK(gq_state_create(&desc, &layer.state));
}

/* A layer with so many bytes of workspace, at aligned addresses. */
static void make_layer(int64_t n, int64_t k, int64_t m, gq_dtype dtype, uint64_t workspace) {
    layer.n = n;
    layer.k = k;
    layer.m = m;
    layer.dtype = dtype;
    layer.size = dtype == GQ_F32 ? 4 : 2;
    const size_t bytes[] = {(size_t)(n * k + 1) / 2,          (size_t)(n * k / BLOCKSIZE + 1) * 4 + MOST, (size_t)(m * k) * layer.size + MOST,
                            (size_t)n * layer.size + MOST,    (size_t)(m * n) * layer.size + MOST,        (size_t)workspace};
    for (int i = 0; i < 6; i++) layer.memory[i] = bytes[i] ? gpu_alloc(bytes[i]) : 0;
    layer.absmax = layer.memory[1];
    layer.x = layer.memory[2];
    layer.bias = layer.memory[3];
    layer.y = layer.memory[4];
    layer.exec = gpu_exec(NULL);
    layer.exec.workspace = layer.memory[5];
    layer.exec.workspace_bytes = workspace;
    make_state();
}

static void drop_layer(void) {
    GPU(cuStreamSynchronize(NULL));
    OK(gq_state_free(layer.state));
    for (int i = 0; i < 6; i++)
        if (layer.memory[i]) gpu_free(layer.memory[i]);
    memset(&layer, 0, sizeof layer);
}

static gq_status run(void) { return gq_linear(layer.state, layer.x, layer.m, layer.dtype, layer.bias, layer.y, &layer.exec); }

static uint64_t recommended(void) {
    uint64_t bytes = 7;
    OK(gq_linear_workspace_size(layer.state, layer.m, layer.dtype, &layer.exec, &bytes, NULL));
    return bytes;
}

/* Runs the layer and returns the number of slabs. They cover the weight, all but the last have as many rows, and with what the library has for
 * itself lie in the workspace; every element of y is written by its slab. */
static int run_slabs(const char *what) {
    gpu_fill(layer.y, (size_t)(layer.m * layer.n) * layer.size);
    fake_set("");
    lt_set("");
    const gq_status status = run();
    CHECK(status == GQ_OK, "%s: %s", what, gq_last_error());
    const int count = (int)lt_count("cublasLtMatmul");
    if (status != GQ_OK || !count) return 0;
    unsigned char *want = malloc((size_t)layer.n);
    const uint64_t end = layer.exec.workspace + layer.exec.workspace_bytes;
    const int64_t rows = (int64_t)lt_call(0).rows;
    int64_t first = 0;
    CHECK(rows == layer.n || rows % 128 == 0, "%s: slabs of %d rows", what, (int)rows);
    for (int i = 0; i < count; i++) {
        const struct fake_lt_call call = lt_call(i);
        const int64_t those = i + 1 < count ? rows : layer.n - first;
        CHECK((int64_t)call.rows == those && those > 0 && those <= rows, "%s: slab %d of %d has %d rows, want %d", what, i, count, (int)call.rows, (int)those);
        CHECK((int64_t)call.m == layer.m && (int64_t)call.k == layer.k && call.x == layer.x, "%s: another x", what);
        CHECK(call.y == layer.y + (uint64_t)first * layer.size, "%s: slab %d goes to another place", what, i);
        CHECK(call.added ? call.bias == 0 : call.bias == (layer.bias ? layer.bias + (uint64_t)first * layer.size : 0), "%s: slab %d has another bias", what, i);
        CHECK(call.weight == layer.exec.workspace && call.weight + call.rows * (uint64_t)layer.k * layer.size <= call.workspace, "%s: slab %d is elsewhere", what, i);
        CHECK(call.workspace_bytes == 0 || call.workspace + call.workspace_bytes <= end, "%s: the library's workspace ends behind the workspace", what);
        memset(want + first, i + 1, (size_t)those);
        first += those;
    }
    CHECK(first == layer.n, "%s: %d of %d rows", what, (int)first, (int)layer.n);
    unsigned char *y = malloc((size_t)(layer.m * layer.n) * layer.size);
    GPU(cuMemcpyDtoH_v2(y, layer.y, (size_t)(layer.m * layer.n) * layer.size));
    int64_t wrong = 0;
    for (int64_t i = 0; i < layer.m * layer.n * (int64_t)layer.size; i++) wrong += y[i] != want[i / (int64_t)layer.size % layer.n];
    CHECK(wrong == 0, "%s: %d bytes of y are not from their slab", what, (int)wrong);
    CHECK(fake_count("contexts") == 1 && fake_count("misuse") == 0 && lt_count("misuse") == 0 && lt_count("live") == 0, "%s: misuse", what);
    free(want);
    free(y);
    return count;
}

/* What fails says this, and leaves y alone. */
static void refused(gq_status want, const char *const *texts) {
    const size_t bytes = (size_t)(layer.m * layer.n) * layer.size;
    gpu_fill(layer.y, bytes);
    fake_set("");
    STATUS(gq_linear(layer.state, layer.x, layer.m, layer.dtype, layer.bias, layer.y, &layer.exec), want);
    for (int i = 0; texts[i]; i++) SAYS(texts[i]);
    CHECK(fake_count("launches") == 0, "something was launched");
    unsigned char *y = malloc(bytes);
    GPU(cuMemcpyDtoH_v2(y, layer.y, bytes));
    size_t i = 0;
    while (i < bytes && y[i] == GPU_FILL) i++;
    CHECK(i == bytes, "byte %d of y was written", (int)i);
    free(y);
}

/* ---- finding the library */

/* It is not there, or lacks something: the message names it. The workspace is looked at before. */
static void absent(const char *const *texts) {
    fake_open();
    gpu_start();
    OK(gq_device_prepare(0));
    fake_set("keep");
    make_layer(8, 128, 3, GQ_F32, 8 * 128 * 4);
    refused(GQ_ERROR_UNSUPPORTED, texts);
    SAYS("BF16"); /* why it is needed */
    SAYS("gq_dequantize");
    uint64_t bytes = 7;
    STATUS(gq_linear_workspace_size(layer.state, layer.m, layer.dtype, &layer.exec, &bytes, NULL), GQ_ERROR_UNSUPPORTED);
    for (int i = 0; texts[i]; i++) SAYS(texts[i]);
    CHECK(bytes == 0, "%d bytes after a failure", (int)bytes);
    layer.exec.workspace_bytes--;
    refused(GQ_ERROR_INVALID_ARGUMENT, (const char *const[]){"4095 bytes", "4096", NULL});
    /* What the kernels do needs none. */
    OK(gq_linear(layer.state, layer.x, 1, GQ_F16, 0, layer.y, &layer.exec));
    OK(gq_linear_workspace_size(layer.state, 1, GQ_F16, &layer.exec, &bytes, NULL));
    CHECK(bytes == 0, "%d bytes for a kernel", (int)bytes);
    drop_layer();
    GPU(cuCtxPopCurrent_v2(NULL));
}

static void absent_path(void) { absent((const char *const[]){"libcublasLt", "GQUANT_CUBLASLT", "nowhere", NULL}); }
static void absent_names(void) { absent((const char *const[]){"libcublasLt.so.13", "libcublasLt.so.12", "GQUANT_CUBLASLT", NULL}); }

static void lacks(const char *function) { absent((const char *const[]){"libcublasLt", function, NULL}); }

/* It is found by its name, or because the process has it already. */
static void found(void) {
    if (getenv("LOADED")) lt_open(getenv("LOADED"));
    fake_open();
    gpu_start();
    OK(gq_device_prepare(0));
    fake_set("keep");
    make_layer(8, 128, 3, GQ_F32, 8 * 128 * 4);
    if (!getenv("LOADED")) {
        OK(run());
        lt_open("libcublasLt.so.13");
    }
    CHECK(run_slabs("found") == 1, "not one slab");
    drop_layer();
    GPU(cuCtxPopCurrent_v2(NULL));
}

static void start(void) {
    fake_open();
    lt_open(getenv("GQUANT_CUBLASLT"));
    gpu_start();
    OK(gq_device_prepare(0));
    fake_set("keep");
}

static void finish(void) {
    CHECK(fake_count("misuse") == 0 && lt_count("misuse") == 0 && lt_count("live") == 0, "misuse");
    GPU(cuCtxPopCurrent_v2(NULL));
}

/* ---- slabs */

static void shapes(void) {
    static const struct {
        int64_t n, k, m;
        gq_dtype dtype;
        const char *why;
    } cases[] = {
        {8, 128, 65, GQ_BF16, "decoded first"},   {8, 128, 1, GQ_F32, "BF16"},       {1, 1, 1, GQ_F16, "of 64"},          {300, 97, 2, GQ_F16, "of 64"},
        {129, 33, 3, GQ_F32, "BF16"},       {128, 192, 65, GQ_BF16, "decoded first"}, {1000, 32, 2, GQ_BF16, "of 64"},     {260, 129, 70, GQ_BF16, "of 64"},
    };
    start();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const int64_t n = cases[i].n, k = cases[i].k;
        char what[100], least_text[32];
        snprintf(what, sizeof what, "[%d, %d], m %d", (int)n, (int)k, (int)cases[i].m);
        make_layer(n, k, cases[i].m, cases[i].dtype, (uint64_t)(n * k) * 4 + (40 << 20));
        const uint64_t all = (uint64_t)(n * k) * layer.size, best = recommended();
        CHECK(best >= all + (32 << 20) && best <= all + (32 << 20) + 256, "%s: %llu bytes of workspace", what, (unsigned long long)best);
        layer.exec.workspace_bytes = best;
        CHECK(run_slabs(what) == 1, "%s: several slabs", what);
        CHECK(lt_call(0).workspace_bytes == 32 << 20, "%s: the library has %d bytes", what, (int)lt_call(0).workspace_bytes);
        /* The second time it need not search. */
        CHECK(run_slabs(what) == 1 && lt_count("cublasLtMatmulAlgoGetHeuristic") == 0, "%s: it searched again", what);

        /* The least workspace, and too little. */
        const uint64_t rows = n < 128 ? (uint64_t)n : 128, least = (rows * (uint64_t)k * layer.size + 255) / 256 * 256;
        layer.exec.workspace_bytes = least;
        CHECK(run_slabs(what) == (int)((n + 127) / 128), "%s: %d slabs in the least workspace", what, (int)lt_count("cublasLtMatmul"));
        layer.exec.workspace_bytes = least - 1;
        snprintf(least_text, sizeof least_text, "%llu", (unsigned long long)least);
        refused(GQ_ERROR_INVALID_ARGUMENT, (const char *const[]){"workspace", least_text, cases[i].why, NULL});
        layer.exec.workspace_bytes = 0;
        layer.exec.workspace = 0;
        refused(GQ_ERROR_INVALID_ARGUMENT, (const char *const[]){"workspace", "0 bytes", least_text, NULL});
        layer.exec.workspace_bytes = best;
        refused(GQ_ERROR_INVALID_ARGUMENT, (const char *const[]){"workspace", "NULL", NULL});
        layer.exec.workspace = layer.memory[5] + 8;
        refused(GQ_ERROR_INVALID_ARGUMENT, (const char *const[]){"workspace", "16", NULL});
        drop_layer();
    }
    finish();
}

/* A weight of 160 MiB, and five rows more: two slabs with what is recommended, one if there is room, else what fits. */
static void large(void) {
    enum { N = 40 * 1024, K = 1024, ROW = K * 4 };
    start();
    for (int more = 0; more < 6; more += 5) {
        make_layer(N + more, K, 2, GQ_F32, 256 << 20);
        const uint64_t best = recommended();
        CHECK(best >= (96 << 20) && best <= (160 << 20), "%llu bytes of workspace", (unsigned long long)best);
        layer.exec.workspace_bytes = best;
        CHECK(run_slabs("recommended") == 2, "%d slabs", (int)lt_count("cublasLtMatmul"));
        CHECK(lt_call(1).rows * ROW >= 64 << 20, "a slab of %d rows", (int)lt_call(1).rows);
        CHECK(lt_call(0).workspace_bytes == 32 << 20, "the library has %d bytes", (int)lt_call(0).workspace_bytes);
        const uint64_t sizes[] = {256 << 20, 128 * ROW, 128 * ROW + 1000, 1 << 20, 3 << 20, (10 << 20) + 16, 80 << 20, best - 1, best + 1};
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            char what[60];
            snprintf(what, sizeof what, "%llu bytes", (unsigned long long)sizes[i]);
            layer.exec.workspace_bytes = sizes[i];
            const int slabs = run_slabs(what);
            CHECK(i ? slabs > 1 : slabs == 1, "%s: %d slabs", what, slabs);
            /* At least half of it is for the weight. */
            const uint64_t half = sizes[i] / 2 / ROW / 128 * 128, rows = half ? half : 128;
            CHECK((uint64_t)slabs <= (N + (uint64_t)more + rows - 1) / rows, "%s: %d slabs", what, slabs);
        }
        drop_layer();
    }
    finish();
}

/* Addresses at other places: the library is told, and the bias goes into y first where its epilogue cannot have it. What is not aligned to its
 * elements is refused. */
static void alignments(void) {
    start();
    make_layer(8, 128, 3, GQ_F32, 1 << 20);
    const uint64_t absmax = layer.absmax, x = layer.x, bias = layer.bias, y = layer.y;
    for (uint64_t offset = 4; offset <= 64; offset *= 2) {
        layer.x = x + offset;
        CHECK(run_slabs("x") == 1, "x + %d", (int)offset);
        layer.x = x;
        layer.y = y + offset;
        CHECK(run_slabs("y") == 1, "y + %d", (int)offset);
        layer.y = y;
        layer.bias = bias + offset;
        CHECK(run_slabs("bias") == 1, "bias + %d", (int)offset);
        CHECK(lt_call(0).added == (offset < 16) && fake_count("launches") == 1 + (offset < 16), "bias + %d: added %d, %d launches", (int)offset,
              lt_call(0).added, (int)fake_count("launches"));
        layer.bias = 0;
        CHECK(run_slabs("no bias") == 1 && !lt_call(0).added && fake_count("launches") == 1, "no bias: %d launches", (int)fake_count("launches"));
        layer.bias = bias;
    }
    for (uint64_t offset = 1; offset < 4; offset++) {
        const char *const texts[] = {"aligned to its elements", "gq_dequantize", NULL};
        layer.x = x + offset;
        refused(GQ_ERROR_UNSUPPORTED, texts);
        layer.x = x;
        layer.bias = bias + offset;
        refused(GQ_ERROR_UNSUPPORTED, texts);
        layer.bias = bias;
    }
    /* What the kernel would do, if it were aligned. */
    layer.dtype = GQ_BF16;
    layer.size = 2;
    OK(run());
    CHECK(recommended() == 0, "a workspace for a kernel");
    layer.exec.workspace_bytes = 0;
    layer.x = x + 2;
    refused(GQ_ERROR_INVALID_ARGUMENT, (const char *const[]){"16 bytes", "0 bytes", "2048", NULL});
    layer.x = x;
    layer.absmax = absmax + 4;
    make_state();
    refused(GQ_ERROR_INVALID_ARGUMENT, (const char *const[]){"absmax is not aligned to 16 bytes", "0 bytes", "2048", NULL});
    layer.exec.workspace_bytes = recommended();
    CHECK(layer.exec.workspace_bytes > 32 << 20, "%d bytes", (int)layer.exec.workspace_bytes);
    layer.exec.workspace_bytes = 1 << 20;
    CHECK(run_slabs("absmax") == 1, "no slab");
    drop_layer();
    finish();
}

/* Nothing but the bias, and nothing at all: for that nobody needs a library or a workspace. */
static void empty(void) {
    start();
    make_layer(8, 0, 3, GQ_F16, 0);
    CHECK(recommended() == 0, "a workspace for nothing");
    fake_set("");
    lt_set("");
    OK(run());
    CHECK(fake_count("launches") == 1, "%d launches", (int)fake_count("launches"));
    layer.bias = 0;
    gpu_fill(layer.y, 48);
    OK(run());
    unsigned char y[48];
    GPU(cuMemcpyDtoH_v2(y, layer.y, 48));
    for (int i = 0; i < 48; i++) CHECK(y[i] == 0, "byte %d of an empty sum is %d", i, y[i]);
    drop_layer();
    make_layer(0, 128, 65, GQ_F16, 0);
    OK(run());
    drop_layer();
    make_layer(8, 97, 0, GQ_F32, 0);
    OK(gq_linear(layer.state, 0, 0, GQ_F32, 0, 0, &layer.exec));
    CHECK(recommended() == 0, "a workspace for nothing");
    drop_layer();
    CHECK(lt_count("cublasLtCreate") == 0, "the library was started for nothing");
    finish();
}

/* ---- streams, contexts, devices */

/* Whatever context is current, the library runs in the device's, with its handle, and nothing waits or allocates. */
static void devices(void) {
    static const char *const forbidden[] = {"cuMemAlloc_v2",     "cuMemFree_v2",     "cuMemHostAlloc",  "cuMemFreeHost", "cuStreamSynchronize",
                                            "cuEventSynchronize", "cuCtxSynchronize", "cuModuleLoadData", "cuStreamCreate", "cuMemcpyDtoH_v2"};
    start();
    void *stream = NULL, *now = NULL, *before = NULL;
    make_layer(300, 97, 5, GQ_F16, 1 << 20);
    GPU(cuStreamCreate(&stream, 1));
    layer.exec.stream = (uint64_t)(uintptr_t)stream;
    OK(run());
    for (int other = 0; other < 2; other++) {
        if (other) gpu_use(1);
        else GPU(cuCtxPopCurrent_v2(NULL));
        GPU(cuCtxGetCurrent(&before));
        const int64_t contexts = fake_count("contexts");
        fake_set("");
        lt_set("");
        const gq_status status = run();
        CHECK(status == GQ_OK, "%s", gq_last_error());
        CHECK(lt_count("cublasLtMatmul") == 1 && lt_count("cublasLtCreate") == 0, "%d products", (int)lt_count("cublasLtMatmul"));
        CHECK((uint64_t)fake_count("last_stream") == layer.exec.stream && fake_count("pending") > 0, "another stream");
        for (size_t k = 0; k < sizeof forbidden / sizeof *forbidden; k++) CHECK(fake_count(forbidden[k]) == 0, "it called %s", forbidden[k]);
        GPU(cuCtxGetCurrent(&now));
        CHECK(now == before && fake_count("contexts") == contexts, "another context is current");
        if (other) GPU(cuCtxPopCurrent_v2(NULL));
        else gpu_use(0);
    }
    GPU(cuStreamSynchronize(stream));
    GPU(cuStreamDestroy_v2(stream));
    drop_layer();

    /* The second device has a handle of its own. */
    gpu_use(1);
    OK(gq_device_prepare(1));
    fake_set("keep");
    lt_set("");
    make_layer(8, 128, 65, GQ_F16, 1 << 20);
    OK(gq_state_free(layer.state));
    layer.state = NULL;
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    const int64_t shape[2] = {8, 128};
    desc.format = GQ_FORMAT_NF4;
    desc.dtype = GQ_F32;
    desc.blocksize = BLOCKSIZE;
    desc.shape = GQ_ADDR(shape);
    desc.ndim = 2;
    desc.device = layer.exec.device = 1;
    desc.parts.packed = layer.memory[0];
    desc.parts.packed_bytes = 512;
    desc.parts.absmax = layer.absmax;
    desc.parts.absmax_bytes = 64;
    OK(gq_state_create(&desc, &layer.state));
    OK(run());
    CHECK(lt_count("cublasLtCreate") == 1 && lt_count("misuse") == 0, "%d handles", (int)lt_count("cublasLtCreate"));
    drop_layer();
    GPU(cuCtxPopCurrent_v2(NULL));
    finish();
}

/* ---- failures */

/* Each call of each function fails in turn; then all is well in the same process. */
static void failures(void) {
    static const char *const library[] = {
        "cublasLtCreate", "cublasLtMatmulDescCreate", "cublasLtMatmulDescSetAttribute", "cublasLtMatrixLayoutCreate", "cublasLtMatmulPreferenceCreate",
        "cublasLtMatmulPreferenceSetAttribute", "cublasLtMatmulAlgoGetHeuristic", "cublasLtMatmul",
    };
    static const struct {
        int status;
        gq_status want;
        const char *name, *text;
    } codes[] = {
        {1, GQ_ERROR_DEVICE, "CUBLAS_STATUS_NOT_INITIALIZED", "not initialized"},
        {3, GQ_ERROR_OUT_OF_MEMORY, "CUBLAS_STATUS_ALLOC_FAILED", "allocation failed"},
        {13, GQ_ERROR_DEVICE, "CUBLAS_STATUS_EXECUTION_FAILED", "failed to launch"},
    };
    start();
    for (size_t f = 0; f < sizeof library / sizeof *library; f++) {
        int64_t n = 1;
        for (int done = 0; !done && n < 1000; n++) {
            for (size_t c = 0; c < sizeof codes / sizeof *codes && !done; c++) {
                char settings[100];
                /* Another m for each, so that it searches. */
                make_layer(300, 97, (int64_t)(f * 300 + (size_t)n * 3 + c) + 1, GQ_F16, 128 * 97 * 2);
                snprintf(settings, sizeof settings, "fail=%s:%d:%d", library[f], (int)n, codes[c].status);
                fake_set("");
                lt_set(settings);
                const gq_status status = run();
                done = lt_count(library[f]) < n;
                CHECK(fake_count("contexts") == 1 && lt_count("live") == 0, "%s: %d contexts, %d descriptors", settings, (int)fake_count("contexts"),
                      (int)lt_count("live"));
                if (done) {
                    CHECK(status == GQ_OK, "%s: %s", settings, gq_last_error());
                } else {
                    CHECK(status == codes[c].want, "%s: %s; %s", settings, gq_status_name(status), gq_last_error());
                    CHECK(strncmp(gq_last_error(), "gq_linear", 9) == 0, "%s: %s", settings, gq_last_error());
                    SAYS(codes[c].name);
                    SAYS(codes[c].text);
                    SAYS("device 0");
                    if (library[f][strlen("cublasLt")] != 'M' || strstr(library[f], "Preference") || strstr(library[f], "Heuristic")) CHECK(fake_count("launches") == 0, "%s: something was launched", settings);
                }
                lt_set("");
                drop_layer();
            }
        }
        CHECK(n > 2 && n < 1000, "%s never failed", library[f]);
    }

    /* The first slabs are done when a launch or a product fails. */
    make_layer(300, 97, 7, GQ_F16, 128 * 97 * 2);
    for (int n = 1; n <= 3; n++) {
        char settings[100];
        snprintf(settings, sizeof settings, "fail=cuLaunchKernel:%d:700", n);
        fake_set(settings);
        lt_set("");
        STATUS(gq_linear(layer.state, layer.x, layer.m, layer.dtype, layer.bias, layer.y, &layer.exec), GQ_ERROR_DEVICE);
        SAYS("CUDA_ERROR_ILLEGAL_ADDRESS");
        CHECK(lt_count("cublasLtMatmul") == n - 1, "%d products before launch %d", (int)lt_count("cublasLtMatmul"), n);
    }
    fake_set("");
    CHECK(run_slabs("afterwards") == 3, "not three slabs");
    drop_layer();
    finish();
}

/* The library knows no way: with an epilogue, when the bias is added otherwise; or none at all, before anything is written. */
static void no_algorithm(void) {
    start();
    make_layer(300, 97, 5, GQ_F16, 128 * 97 * 2);
    lt_set("none");
    refused(GQ_ERROR_UNSUPPORTED, (const char *const[]){"libcublasLt", "[5, 97]", "gq_dequantize", "128", NULL});
    lt_set("fail=cublasLtMatmulAlgoGetHeuristic:0:15");
    refused(GQ_ERROR_UNSUPPORTED, (const char *const[]){"libcublasLt", "[5, 97]", "gq_dequantize", NULL});
    lt_set("fail=cublasLtMatmulAlgoGetHeuristic:0:7");
    refused(GQ_ERROR_UNSUPPORTED, (const char *const[]){"libcublasLt", "[5, 97]", "gq_dequantize", NULL});
    fake_set("");
    lt_set("epilogue");
    OK(run());
    CHECK(fake_count("launches") == 1 + 4 && lt_count("cublasLtMatmul") == 3, "%d launches", (int)fake_count("launches")); /* the tail is decoded by two */
    for (int i = 0; i < 3; i++) CHECK(lt_call(i).added && lt_call(i).bias == 0, "slab %d is not added", i);
    /* The tail alone has none. */
    lt_set("fail=cublasLtMatmulAlgoGetHeuristic:2:15");
    layer.m = 4;
    layer.bias = 0;
    refused(GQ_ERROR_UNSUPPORTED, (const char *const[]){"libcublasLt", "[44, 97]", NULL});
    lt_set("");
    CHECK(run_slabs("afterwards") == 3, "not three slabs");
    drop_layer();
    finish();
}

/* GQUANT_CHECK=1 looks at the workspace, too. */
static void checked(void) {
    static char memory[1 << 16];
    start();
    make_layer(8, 128, 3, GQ_F32, 1 << 16);
    layer.exec.workspace = (GQ_ADDR(memory) + 15) / 16 * 16;
    layer.exec.workspace_bytes = 8 * 128 * 4;
    refused(GQ_ERROR_INVALID_ARGUMENT, (const char *const[]){"exec.workspace", "host", NULL});
    drop_layer();
    finish();
}

/* ---- a process for each case */

static void all_cases(const char *library) {
    static const char *const functions[] = {
        "cublasLtGetStatusName", "cublasLtGetStatusString", "cublasLtCreate", "cublasLtMatmulDescCreate", "cublasLtMatmulDescDestroy", "cublasLtMatmulDescSetAttribute",
        "cublasLtMatrixLayoutCreate", "cublasLtMatrixLayoutDestroy", "cublasLtMatmulPreferenceCreate", "cublasLtMatmulPreferenceDestroy",
        "cublasLtMatmulPreferenceSetAttribute", "cublasLtMatmulAlgoGetHeuristic", "cublasLtMatmul",
    };
    static const char *const cases[] = {"shapes", "large", "alignments", "empty", "devices", "failures", "no_algorithm"};
    char path[4096], found_path[4096], folders[8192];
    fake_open();
    setenv("GQUANT_CUBLASLT", "/nowhere/libcublasLt.so.13", 1);
    fake_child("absent_path", NULL, "", NULL);
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        snprintf(path, sizeof path, "%s/lt", fake_without(library, "lt", functions[i]));
        setenv("GQUANT_CUBLASLT", path, 1);
        fake_child("lacks", functions[i], "", NULL);
    }
    setenv("GQUANT_CUBLASLT", library, 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) fake_child(cases[i], NULL, "devices=2", NULL);
    setenv("GQUANT_CHECK", "1", 1);
    fake_child("checked", NULL, "", NULL);
    fake_child("alignments", NULL, "", NULL);
    unsetenv("GQUANT_CHECK");

    /* Without a path. The first folder of the search has no library, or has the fake one. */
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
    CHECK(mkdir(in("broken"), 0700) == 0, "cannot make a folder");
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", in("broken"), names[i]);
        FILE *file = fopen(path, "w");
        CHECK(file && fputs("no library\n", file) >= 0 && fclose(file) == 0, "cannot write");
    }
    setenv("GQUANT_CUBLASLT", "", 1);
    snprintf(folders, sizeof folders, "%s:%s", in("broken"), getenv("LD_LIBRARY_PATH"));
    fake_child("absent_names", NULL, "", folders);
    unsetenv("GQUANT_CUBLASLT");
    fake_child("absent_names", NULL, "", folders);
    setenv("LOADED", library, 1);
    fake_child("found", NULL, "", folders);
    unsetenv("LOADED");
    snprintf(found_path, sizeof found_path, "%.*s:%s", (int)(strrchr(library, '/') - library), library, getenv("LD_LIBRARY_PATH"));
    fake_child("found", NULL, "", found_path);
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*call)(void);
    } cases[] = {
        {"absent_path", absent_path}, {"absent_names", absent_names}, {"found", found}, {"shapes", shapes}, {"large", large}, {"alignments", alignments},
        {"empty", empty}, {"devices", devices}, {"failures", failures}, {"no_algorithm", no_algorithm}, {"checked", checked},
    };
    if (argc == 2 && strcmp(argv[0], "lacks") == 0) lacks(argv[1]);
    else if (argc == 2) all_cases(argv[1]);
    for (size_t i = 0; argc == 1 && i < sizeof cases / sizeof *cases; i++)
        if (strcmp(argv[0], cases[i].name) == 0) cases[i].call();
    return check_result();
}
