/* Drivers of every kind, as fake_cuda.c plays them: none, a broken one, old ones, ones that lack a function or a device, and calls of
 * the driver that fail. Each case is a process of its own, as a driver is loaded once in a process.
 * usage: fake_driver LIBCUDA, the fake one */
#include "fake_cuda.h"
#include "gpu.h"
#include "weights.h"

#include <pthread.h>

enum { N = 1024, BLOCKSIZE = 64, BLOCKS = N / BLOCKSIZE };

/* Buffers for every function that runs on a device. */
static uint64_t buffer[6];

/* The functions that put work on a stream. */
enum { NF4, FP4, BLOCKWISE, ROWS, PACK, UNPACK, QUANTIZE, NESTED, DEQUANTIZE, RANGE, LINEAR, CALLS };
static const char *const call_names[CALLS] = {"gq_quantize_nf4", "gq_quantize_fp4", "gq_quantize_blockwise", "gq_quantize_rows_int8", "gq_pack_4bit",
                                              "gq_unpack_4bit",  "gq_quantize",     "gq_quantize",           "gq_dequantize",         "gq_dequantize_range",
                                              "gq_linear"};
static const int64_t shape[2] = {16, N / 16}, linear_shape[2] = {8, N / 8}; /* whose parts have the same sizes */

static gq_parts parts_of(int nested) {
    gq_quantize_options options = GQ_QUANTIZE_OPTIONS_INIT;
    options.nested = nested;
    gq_parts parts;
    OK(gq_quantized_layout(GQ_FORMAT_NF4, shape, 2, &options, &parts));
    parts.packed = buffer[1];
    parts.absmax = buffer[2];
    if (nested) {
        parts.nested_absmax = buffer[3];
        parts.nested_codebook = buffer[4];
        parts.offset = buffer[3] + 1024;
    }
    return parts;
}

static gq_status make_state(int32_t device, const int64_t *dims, int nested, gq_state **state) {
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    desc.format = GQ_FORMAT_NF4;
    desc.dtype = GQ_F32;
    desc.blocksize = BLOCKSIZE;
    desc.nested_blocksize = nested ? 256 : 0;
    desc.shape = GQ_ADDR(dims);
    desc.ndim = 2;
    desc.parts = parts_of(nested);
    desc.device = device;
    return gq_state_create(&desc, state);
}

/* Calls one of them with good arguments. */
static gq_status run(int function, const gq_exec *exec) {
    gq_quantize_options options = GQ_QUANTIZE_OPTIONS_INIT;
    gq_parts parts;
    gq_state *state = NULL;
    int64_t nonfinite = 7;
    gq_status status;
    switch (function) {
    case NF4:
        return gq_quantize_nf4(buffer[0], GQ_F32, N, BLOCKSIZE, buffer[2], BLOCKS, buffer[1], N / 2, exec);
    case FP4:
        return gq_quantize_fp4(buffer[0], GQ_F32, N, BLOCKSIZE, buffer[2], BLOCKS, buffer[1], N / 2, exec);
    case BLOCKWISE:
        return gq_quantize_blockwise(buffer[0], GQ_F32, N, BLOCKSIZE, 0, buffer[2], BLOCKS, buffer[1], N, exec);
    case ROWS:
        return gq_quantize_rows_int8(buffer[0], GQ_F32, 16, N / 16, 6, buffer[2], 16, buffer[1], N, buffer[3], N / 16, exec);
    case PACK:
        return gq_pack_4bit(buffer[0], N, GQ_HIGH_NIBBLE_FIRST, buffer[1], N / 2, exec);
    case UNPACK:
        return gq_unpack_4bit(buffer[1], N / 2, GQ_LOW_NIBBLE_FIRST, buffer[0], N, exec);
    case QUANTIZE:
    case NESTED:
        options.nested = function == NESTED;
        parts = parts_of(options.nested);
        status = gq_quantize(GQ_FORMAT_NF4, buffer[0], GQ_F32, shape, 2, &options, &parts, exec, &nonfinite);
        if (exec && exec->device >= 0 && status == GQ_OK) CHECK(nonfinite == -1, "nonfinite is %d", (int)nonfinite);
        return status;
    default:
        status = make_state(exec ? exec->device : GQ_CPU, function == LINEAR ? linear_shape : shape, 0, &state);
        if (status != GQ_OK) return status;
        status = function == DEQUANTIZE ? gq_dequantize(state, buffer[0], N * 4, GQ_F32, exec)
                 : function == RANGE    ? gq_dequantize_range(state, 3, N - 5, buffer[0], (N - 5) * 4, GQ_F32, exec)
                                        : gq_linear(state, buffer[0], 3, GQ_BF16, buffer[3], buffer[4], exec);
        char message[1000];
        snprintf(message, sizeof message, "%s", gq_last_error());
        OK(gq_state_free(state));
        CHECK(status == GQ_OK || strcmp(message, gq_last_error()) == 0, "the message was lost: %s, now %s", message, gq_last_error());
        return status;
    }
}

/* The message of a failure names the function, and all of these. */
static void says(const char *function, const char *const *texts) {
    CHECK(strncmp(gq_last_error(), function, strlen(function)) == 0, "%s: %s", function, gq_last_error());
    for (int i = 0; i < 4 && texts[i]; i++) SAYS(texts[i]);
}

/* Every function that wants a device is refused, with these texts in its message. */
static void refused(int32_t device, gq_status want, const char *const *texts) {
    gq_device_info info = GQ_DEVICE_INFO_INIT;
    gq_exec exec = GQ_EXEC_INIT;
    gq_load_options options = GQ_LOAD_OPTIONS_INIT;
    gq_model *model = (gq_model *)8;
    gq_state *state = (gq_state *)8;
    static float memory[N];
    for (int i = 0; i < 6; i++) buffer[i] = GQ_ADDR(memory);
    exec.device = device;
    options.device = device;
    STATUS(gq_device_get_info(device, &info), want);
    says("gq_device_get_info", texts);
    CHECK(info.name[0] == 0 && info.memory_bytes == 0, "something is described");
    STATUS(gq_device_prepare(device), want);
    says("gq_device_prepare", texts);
    for (int i = 0; i < DEQUANTIZE; i++) {
        const gq_status status = run(i, &exec);
        CHECK(status == want, "%s: %s, want %s; %s", call_names[i], gq_status_name(status), gq_status_name(want), gq_last_error());
        says(call_names[i], texts);
    }
    const gq_status made = make_state(device, shape, 0, &state);
    CHECK(made == want && state == NULL, "a state of a device that is not there: %s, %p", gq_status_name(made), (void *)state);
    says("gq_state_create", texts);
    char header[] = "{\"a\": {\"dtype\": \"U8\", \"shape\": [1], \"data_offsets\": [0, 1]}}";
    CHECK(write_file(in("a.safetensors"), header, "x", 1), "cannot write");
    STATUS(gq_load_model(in("a.safetensors"), &options, &model), want);
    says("gq_load_model", texts);
    CHECK(model == NULL, "a model after a failure");
}

static void count_is(int32_t want) {
    int32_t count = 7;
    OK(gq_device_count(&count));
    CHECK(count == want, "%d devices, want %d", (int)count, (int)want);
}

/* ---- cases */

static void no_driver(void) {
    static const char *const texts[] = {"libcuda.so.1", "driver", NULL};
    count_is(0);
    refused(0, GQ_ERROR_UNSUPPORTED, texts);
    count_is(0);
}

static void no_device(void) {
    static const char *const texts[] = {"device", NULL};
    count_is(0);
    refused(0, GQ_ERROR_UNSUPPORTED, texts);
    refused(3, GQ_ERROR_UNSUPPORTED, texts);
}

static void old_driver(void) {
    static const char *const texts[] = {"12.4", "13.0", "580", NULL};
    count_is(0);
    refused(0, GQ_ERROR_UNSUPPORTED, texts);
}

static void lacks(const char *function) {
    const char *const texts[] = {function, "driver", NULL};
    count_is(0);
    refused(0, GQ_ERROR_UNSUPPORTED, texts);
}

/* Initialization fails for another reason than a missing device: an error, not a machine without a device. */
static void init_fails(void) {
    int32_t count = 7;
    gq_device_info info = GQ_DEVICE_INFO_INIT;
    const gq_status status = gq_device_count(&count);
    CHECK(count == 0 && (status == GQ_OK || status == GQ_ERROR_DEVICE), "%s, %d devices", gq_status_name(status), (int)count);
    STATUS(gq_device_get_info(0, &info), GQ_ERROR_DEVICE);
    SAYS("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH");
    SAYS("system has unsupported display driver");
    STATUS(gq_device_prepare(0), GQ_ERROR_DEVICE);
    SAYS("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH");
}

static void two_devices(void) {
    static const char *const texts[] = {"2", "device", NULL};
    fake_open();
    count_is(2);
    for (int32_t device = 0; device < 2; device++) {
        gq_device_info info = GQ_DEVICE_INFO_INIT;
        char name[32];
        snprintf(name, sizeof name, "Fake Device %d", (int)device);
        OK(gq_device_get_info(device, &info));
        CHECK(info.major == 12 && info.minor == 1 && info.multiprocessors == 132 && info.driver_version == 13020 && info.memory_bytes == 8ull << 30,
              "%d.%d, %d multiprocessors, driver %d, %llu bytes", (int)info.major, (int)info.minor, (int)info.multiprocessors, (int)info.driver_version,
              (unsigned long long)info.memory_bytes);
        CHECK(strcmp(info.name, name) == 0, "device %d is %s", (int)device, info.name);
        OK(gq_device_prepare(device));
        OK(gq_device_prepare(device));
        CHECK(fake_count("cuModuleLoadData") > 0 && fake_count("modules") % (device + 1) == 0, "%d modules", (int)fake_count("modules"));
        fake_set("keep");
    }
    /* Callers with a shorter struct and with a longer one. */
    struct {
        gq_device_info known;
        unsigned char unknown[32];
    } longer;
    memset(&longer, 0xa5, sizeof longer);
    longer.known.struct_size = (uint32_t)offsetof(gq_device_info, memory_bytes);
    OK(gq_device_get_info(0, &longer.known));
    CHECK(longer.known.major == 12 && longer.known.memory_bytes == 0xa5a5a5a5a5a5a5a5, "a shorter struct is filled wrongly");
    memset(&longer, 0, sizeof longer);
    longer.known.struct_size = sizeof longer;
    OK(gq_device_get_info(1, &longer.known));
    CHECK(strcmp(longer.known.name, "Fake Device 1") == 0 && longer.known.struct_size == sizeof longer, "a longer struct is not filled");
    for (size_t i = 0; i < sizeof longer.unknown; i++) CHECK(longer.unknown[i] == 0, "byte %d behind the end was written", (int)i);
    STATUS(gq_device_get_info(0, NULL), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("info");
    refused(2, GQ_ERROR_NOT_FOUND, texts);
    refused(INT32_MAX, GQ_ERROR_NOT_FOUND, texts);
    gq_device_info info = GQ_DEVICE_INFO_INIT;
    const gq_status described = gq_device_get_info(GQ_CPU, &info);
    CHECK(described == GQ_ERROR_NOT_FOUND || described == GQ_ERROR_INVALID_ARGUMENT, "the CPU is no device: %s", gq_status_name(described));
    const gq_status prepared = gq_device_prepare(INT32_MIN);
    CHECK(prepared == GQ_ERROR_NOT_FOUND || prepared == GQ_ERROR_INVALID_ARGUMENT, "%s", gq_status_name(prepared));
    CHECK(fake_count("contexts") == 0 && fake_count("misuse") == 0, "contexts are left");
}

/* gq_device_prepare when each call of one function fails in turn, with each of these codes; then it succeeds, in the same process. */
static void prepare_fails(const char *function) {
    static const struct {
        int code;
        gq_status status;
        const char *name, *text;
    } codes[] = {
        {2, GQ_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
        {46, GQ_ERROR_DEVICE, "CUDA_ERROR_DEVICE_UNAVAILABLE", "busy or unavailable"},
        {999, GQ_ERROR_DEVICE, "CUDA_ERROR_UNKNOWN", "unknown error"},
        {12345, GQ_ERROR_DEVICE, "12345", ""}, /* the driver has no name for it */
        {209, GQ_ERROR_UNSUPPORTED, "CUDA_ERROR_NO_BINARY_FOR_GPU", "sm_90"}, /* and the message names the device's architecture */
    };
    const int loads = strcmp(function, "cuModuleLoadData") == 0; /* only this function knows 209 */
    fake_open();
    count_is(1);
    int64_t n = 1;
    for (int done = 0; !done && n < 1000; n++) {
        for (int c = 0; c < 4 + loads && !done; c++) {
            char settings[100];
            snprintf(settings, sizeof settings, "fail=%s:%d:%d", function, (int)n, codes[c].code);
            fake_set(settings);
            const gq_status status = gq_device_prepare(0);
            done = status == GQ_OK;
            CHECK(fake_count("contexts") == 0, "%s: %d contexts are left", settings, (int)fake_count("contexts"));
            if (done) break;
            CHECK(status == codes[c].status, "%s: %s, want %s; %s", settings, gq_status_name(status), gq_status_name(codes[c].status), gq_last_error());
            CHECK(strncmp(gq_last_error(), "gq_device_prepare", 17) == 0, "%s: %s", settings, gq_last_error());
            SAYS(codes[c].name);
            SAYS(codes[c].text);
            SAYS("device 0");
            CHECK(fake_count("allocations") == 0, "%s: device memory is left", settings);
        }
    }
    CHECK(n < 1000, "%s: prepare still fails", function);
    /* A function that prepare does not call, or whose failure does not matter, is done at once. */
    static const char *const needed[] = {"cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuModuleLoadData", "cuModuleGetFunction", "cuFuncLoad"};
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
        if (strcmp(function, needed[i]) == 0) CHECK(n > 2, "%s never failed", function);
    fake_set("keep");
    OK(gq_device_prepare(0));
    CHECK(fake_count("cuModuleLoadData") == 0, "loaded once more");
    CHECK(fake_count("misuse") == 0, "misuse");
}

static void *prepare(void *argument) {
    OK(gq_device_prepare(0));
    return argument;
}

/* The first calls of many threads at once load the kernels once. */
static void threads(void) {
    pthread_t ids[16];
    fake_open();
    for (int i = 0; i < 16; i++) pthread_create(&ids[i], NULL, prepare, NULL);
    for (int i = 0; i < 16; i++) pthread_join(ids[i], NULL);
    CHECK(fake_count("modules") > 0, "no modules");
    const int64_t modules = fake_count("modules");
    fake_set("keep");
    OK(gq_device_prepare(1));
    CHECK(fake_count("modules") == 2 * modules, "16 threads loaded %d modules, one loads %d", (int)modules, (int)(fake_count("modules") - modules));
    CHECK(fake_count("contexts") == 0, "contexts are left");
    fake_set("keep");
}

/* One of the functions while a call of the driver fails. */
static int call, call_code;
static gq_exec call_exec;
static int64_t call_contexts;

static gq_status run_call(void) { return run(call, &call_exec); }

static void check_call(const char *function, const char *settings, gq_status status) {
    const char *name = call_names[call];
    CHECK(fake_count("contexts") == call_contexts, "%s, %s: contexts are left", name, settings);
    if (!function) {
        CHECK(status == GQ_OK, "%s, %s: %s", name, settings, gq_last_error());
        return;
    }
    if (status == GQ_OK && fake_releases(function)) return;
    /* A look at an address needs the context too; if that fails, the call itself does. Here it fails only once. */
    if (status == GQ_OK && getenv("GQUANT_CHECK") && strncmp(function, "cuCtx", 5) == 0) return;
    CHECK(strncmp(gq_last_error(), name, strlen(name)) == 0 || strncmp(gq_last_error(), "gq_state_create", 15) == 0, "%s: %s", name, gq_last_error());
    CHECK(status == (call_code == 2 ? GQ_ERROR_OUT_OF_MEMORY : GQ_ERROR_DEVICE), "%s, %s: %s", name, settings, gq_status_name(status));
    SAYS(call_code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_ILLEGAL_ADDRESS");
    SAYS(call_code == 2 ? "out of memory" : "illegal memory access");
}

/* Functions on a stream: they only launch there, in the right context, and wait for nothing. */
static void on_a_stream(void) {
    static const char *const forbidden[] = {"cuMemAlloc_v2",     "cuMemFree_v2",     "cuMemHostAlloc",  "cuMemFreeHost",  "cuStreamSynchronize",
                                            "cuEventSynchronize", "cuCtxSynchronize", "cuModuleLoadData", "cuStreamCreate", "cuEventCreate",
                                            "cuMemcpyHtoD_v2",    "cuMemcpyDtoH_v2",  "cuStreamWaitEvent", "cuEventRecord"};
    fake_open();
    gpu_start();
    void *own = NULL, *stream = NULL, *now = NULL;
    GPU(cuCtxGetCurrent(&own));
    GPU(cuStreamCreate(&stream, 1));
    OK(gq_device_prepare(0));
    fake_set("keep");
    for (int i = 0; i < 6; i++) buffer[i] = gpu_alloc(N * 4);
    gq_exec exec = gpu_exec(stream);
    exec.workspace = buffer[5];
    exec.workspace_bytes = N * 4;
    /* With the context of the device current, with none, and with another device's. */
    for (int context = 0; context < 3; context++) {
        if (context == 1) GPU(cuCtxPopCurrent_v2(NULL));
        if (context == 2) gpu_use(1);
        void *before = NULL;
        GPU(cuCtxGetCurrent(&before));
        for (int i = 0; i < CALLS; i++) {
            const int64_t contexts = fake_count("contexts");
            fake_set("");
            const gq_status status = run(i, &exec);
            CHECK(status == GQ_OK, "%s: %s", call_names[i], gq_last_error());
            CHECK(fake_count("launches") > 0, "%s launched nothing", call_names[i]);
            CHECK((uint64_t)fake_count("last_stream") == exec.stream, "%s launched on another stream", call_names[i]);
            CHECK(fake_count("contexts") == contexts, "%s: contexts", call_names[i]);
            for (size_t k = 0; k < sizeof forbidden / sizeof *forbidden; k++)
                CHECK(fake_count(forbidden[k]) == 0, "%s called %s", call_names[i], forbidden[k]);
            GPU(cuCtxGetCurrent(&now));
            CHECK(now == before, "%s: another context is current", call_names[i]);

            call = i;
            call_exec = exec;
            call_contexts = contexts;
            call_code = 700;
            fake_failures(700, run_call, check_call);
            call_code = 2;
            fake_failures(2, run_call, check_call);
        }
        if (context == 1) GPU(cuCtxPushCurrent_v2(own));
        if (context == 2) GPU(cuCtxPopCurrent_v2(NULL));
    }

    /* Every kernel of a linear layer: one launch, with what it may have of shared memory. */
    gq_state *layers[2];
    for (int nested = 0; nested < 2; nested++) CHECK(make_state(0, linear_shape, nested, &layers[nested]) == GQ_OK, "%s", gq_last_error());
    for (int64_t m = 1; m <= 64; m++) {
        for (int kind = 0; kind < 4; kind++) {
            fake_set("");
            const gq_status status = gq_linear(layers[kind % 2], buffer[0], m, kind < 2 ? GQ_F16 : GQ_BF16, 0, buffer[4], &exec);
            CHECK(status == GQ_OK && fake_count("launches") == 1 && fake_count("cuLaunchKernelEx") == 1, "m %d, kind %d: %s, %d launches", (int)m, kind,
                  gq_status_name(status), (int)fake_count("launches"));
        }
    }

    /* Nothing to do is nothing to launch. */
    fake_set("");
    OK(gq_linear(layers[0], 0, 0, GQ_F16, 0, 0, &exec));
    OK(gq_quantize_nf4(0, GQ_F32, 0, BLOCKSIZE, 0, 0, 0, 0, &exec));
    OK(gq_quantize_rows_int8(0, GQ_F32, 0, 0, 0, 0, 0, 0, 0, 0, 0, &exec));
    OK(gq_pack_4bit(0, 0, GQ_HIGH_NIBBLE_FIRST, 0, 0, &exec));
    CHECK(fake_count("launches") == 0, "%d launches for nothing", (int)fake_count("launches"));

    /* What is refused is refused before anything is launched. */
    STATUS(gq_quantize_nf4(buffer[0], GQ_F32, N, 63, buffer[2], BLOCKS, buffer[1], N / 2, &exec), GQ_ERROR_INVALID_ARGUMENT);
    STATUS(gq_quantize_nf4(0, GQ_F32, N, BLOCKSIZE, buffer[2], BLOCKS, buffer[1], N / 2, &exec), GQ_ERROR_INVALID_ARGUMENT);
    STATUS(gq_quantize_nf4(buffer[0], GQ_F32, N, BLOCKSIZE, buffer[2] + 2, BLOCKS, buffer[1], N / 2, &exec), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("absmax");
    STATUS(gq_quantize_rows_int8(buffer[0], GQ_F32, 16, N / 16, 6, buffer[2], 16, buffer[1], N, 0, 0, &exec), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("outliers");
    STATUS(gq_linear(layers[0], buffer[0], -1, GQ_F16, 0, buffer[4], &exec), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("m is -1");
    STATUS(gq_linear(layers[0], 0, 1, GQ_F16, 0, buffer[4], &exec), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("x is NULL");
    STATUS(gq_linear(layers[0], buffer[0], 65, GQ_F16, 0, buffer[4], &exec), GQ_ERROR_UNSUPPORTED);
    SAYS("decoded first");
    SAYS("libcublasLt");
    STATUS(gq_linear(layers[0], buffer[0], 1, GQ_F32, 0, buffer[4], &exec), GQ_ERROR_UNSUPPORTED);
    SAYS("BF16");
    CHECK(fake_count("launches") == 0, "something was launched");
    for (int nested = 0; nested < 2; nested++) OK(gq_state_free(layers[nested]));

    /* The workspace of nested statistics. */
    gq_quantize_options options = GQ_QUANTIZE_OPTIONS_INIT;
    options.nested = 1;
    uint64_t needed = 0, none = 7;
    char text[32];
    OK(gq_quantize_workspace_size(GQ_FORMAT_NF4, shape, 2, &options, 0, &needed));
    CHECK(needed >= BLOCKS * 4 && needed <= BLOCKS * 4 + 65536, "%llu bytes of workspace", (unsigned long long)needed);
    snprintf(text, sizeof text, "%llu", (unsigned long long)needed);
    OK(gq_quantize_workspace_size(GQ_FORMAT_NF4, shape, 2, &options, GQ_CPU, &none));
    CHECK(none == 0, "%llu bytes of workspace on the CPU", (unsigned long long)none);
    none = 7;
    OK(gq_quantize_workspace_size(GQ_FORMAT_NF4, shape, 2, NULL, 0, &none));
    CHECK(none == 0, "%llu bytes of workspace for nothing", (unsigned long long)none);
    exec.workspace_bytes = needed - 1;
    CHECK(run(NESTED, &exec) == GQ_ERROR_INVALID_ARGUMENT, "a workspace that is too small");
    SAYS("workspace");
    SAYS(text);
    exec.workspace_bytes = 0;
    exec.workspace = 0;
    CHECK(run(NESTED, &exec) == GQ_ERROR_INVALID_ARGUMENT, "no workspace");
    SAYS(text);
    exec.workspace_bytes = needed;
    exec.workspace = buffer[5] + 8;
    CHECK(run(NESTED, &exec) == GQ_ERROR_INVALID_ARGUMENT, "a workspace at an odd address");
    SAYS("workspace");
    SAYS("16");
    exec.workspace = buffer[5];
    CHECK(run(NESTED, &exec) == GQ_OK, "exactly the workspace that is needed: %s", gq_last_error());
    CHECK(fake_count("launches") > 0, "nothing was launched");

    /* A state is used where its parts are. */
    gq_state *state = NULL;
    gq_exec other = exec;
    other.device = 1;
    float memory[N];
    fake_set("");
    CHECK(make_state(0, shape, 0, &state) == GQ_OK, "%s", gq_last_error());
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    OK(gq_state_get_desc(state, &desc));
    CHECK(desc.device == 0 && desc.parts.packed == buffer[1], "another description");
    STATUS(gq_dequantize(state, GQ_ADDR(memory), sizeof memory, GQ_F32, NULL), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("device 0");
    SAYS("CPU");
    STATUS(gq_dequantize(state, buffer[0], N * 4, GQ_F32, &other), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("device 0");
    SAYS("device 1");
    STATUS(gq_dequantize_range(state, 0, 2, buffer[0], 8, GQ_F32, &other), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("device 1");
    STATUS(gq_linear(state, GQ_ADDR(memory), 1, GQ_F32, 0, GQ_ADDR(memory), NULL), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("CPU");
    STATUS(gq_linear(state, buffer[0], 1, GQ_F16, 0, buffer[4], &other), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("device 1");
    OK(gq_state_free(state));
    size_t length = 7;
    CHECK(make_state(0, shape, 1, &state) == GQ_OK, "%s", gq_last_error());
    STATUS(gq_state_json(state, NULL, 0, &length), GQ_ERROR_UNSUPPORTED);
    SAYS("offset");
    CHECK(length == 0, "a length after a failure");
    OK(gq_state_free(state));
    for (int i = 0; i < 5; i++) buffer[i] += 1 << 20; /* never touched: only the places differ */
    CHECK(make_state(GQ_CPU, shape, 0, &state) == GQ_OK, "%s", gq_last_error());
    for (int i = 0; i < 5; i++) buffer[i] -= 1 << 20;
    STATUS(gq_dequantize(state, buffer[0], N * 4, GQ_F32, &exec), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("device 0");
    SAYS("CPU");
    OK(gq_state_free(state));
    CHECK(fake_count("launches") == 0, "something was launched");

    GPU(cuStreamSynchronize(stream));
    for (int i = 0; i < 6; i++) gpu_free(buffer[i]);
    GPU(cuStreamDestroy_v2(stream));
    GPU(cuCtxPopCurrent_v2(NULL));
    CHECK(fake_count("misuse") == 0, "misuse");
}

/* Devices before Hopper: Turing has no kernel for linear layers, and all else; the others launch it without the attribute that they do not know. */
static void older(void) {
    gq_device_info info = GQ_DEVICE_INFO_INIT;
    fake_open();
    gpu_start();
    OK(gq_device_get_info(0, &info));
    OK(gq_device_prepare(0));
    fake_set("keep");
    gq_exec exec = gpu_exec(NULL);
    for (int i = 0; i < 6; i++) buffer[i] = gpu_alloc(N * 4);
    exec.workspace = buffer[5];
    exec.workspace_bytes = N * 4;
    CHECK(run(NF4, &exec) == GQ_OK, "%s", gq_last_error());
    fake_set("");
    const gq_status status = run(LINEAR, &exec);
    CHECK(status == (info.major < 8 ? GQ_ERROR_UNSUPPORTED : GQ_OK), "%d.%d: %s", (int)info.major, (int)info.minor, gq_status_name(status));
    if (status != GQ_OK) SAYS("Ampere");
    if (status != GQ_OK) SAYS("libcublasLt");
    CHECK(fake_count("launches") == (status == GQ_OK), "%d launches", (int)fake_count("launches"));
    GPU(cuStreamSynchronize(NULL));
    for (int i = 0; i < 6; i++) gpu_free(buffer[i]);
    GPU(cuCtxPopCurrent_v2(NULL));
    CHECK(fake_count("misuse") == 0, "misuse");
}

/* GQUANT_CHECK=1: an address that is no device memory, or another device's, is refused by the name of its argument. */
static void checked(void) {
    static const struct {
        int function, buffer;
        const char *name;
    } arguments[] = {
        {NF4, 0, "src"},        {NF4, 1, "packed"},     {NF4, 2, "absmax"},       {FP4, 0, "src"},           {BLOCKWISE, 0, "src"},
        {BLOCKWISE, 1, "codes"}, {BLOCKWISE, 2, "absmax"}, {ROWS, 0, "src"},       {ROWS, 1, "codes"},        {ROWS, 2, "absmax"},
        {ROWS, 3, "outliers"},  {PACK, 0, "codes"},     {PACK, 1, "packed"},      {UNPACK, 0, "codes"},      {UNPACK, 1, "packed"},
        {QUANTIZE, 0, "src"},   {QUANTIZE, 1, "packed"}, {QUANTIZE, 2, "absmax"}, {NESTED, 3, "nested_absmax"}, {NESTED, 4, "nested_codebook"},
        {NESTED, 5, "workspace"}, {DEQUANTIZE, 0, "out"}, {DEQUANTIZE, 1, "packed"}, {DEQUANTIZE, 2, "absmax"}, {RANGE, 0, "out"},
        {LINEAR, 0, "x"},       {LINEAR, 1, "packed"},  {LINEAR, 2, "absmax"},    {LINEAR, 3, "bias"},       {LINEAR, 4, "y"},
    };
    fake_open();
    gpu_start();
    static float memory[N * 2];
    uint64_t elsewhere, good[6];
    OK(gq_device_prepare(0));
    fake_set("keep");
    gpu_use(1);
    elsewhere = gpu_alloc(N * 8);
    GPU(cuCtxPopCurrent_v2(NULL));
    for (int i = 0; i < 6; i++) good[i] = gpu_alloc(N * 4);
    gq_exec exec = gpu_exec(NULL);
    for (int i = 0; i < 6; i++) buffer[i] = good[i];
    exec.workspace = buffer[5];
    exec.workspace_bytes = N * 4;
    for (int i = 0; i < CALLS; i++) CHECK(run(i, &exec) == GQ_OK, "%s: %s", call_names[i], gq_last_error());
    fake_set("");
    for (size_t i = 0; i < sizeof arguments / sizeof *arguments; i++) {
        for (int other = 0; other < 2; other++) {
            const uint64_t wrong = other ? elsewhere : (GQ_ADDR(memory) + 15) / 16 * 16;
            buffer[arguments[i].buffer] = wrong;
            if (arguments[i].buffer == 5) exec.workspace = wrong;
            const gq_status status = run(arguments[i].function, &exec);
            CHECK(status == GQ_ERROR_INVALID_ARGUMENT, "%s, %s of %s: %s", call_names[arguments[i].function], arguments[i].name,
                  other ? "another device" : "the host", gq_status_name(status));
            if (status != GQ_OK) SAYS(arguments[i].name);
            if (status != GQ_OK) SAYS(other ? "device 1" : "host");
            buffer[arguments[i].buffer] = good[arguments[i].buffer];
            exec.workspace = good[5];
        }
    }
    CHECK(fake_count("launches") == 0, "something was launched");
    GPU(cuStreamSynchronize(NULL));
    for (int i = 0; i < 6; i++) gpu_free(good[i]);
    gpu_use(1);
    gpu_free(elsewhere);
    GPU(cuCtxPopCurrent_v2(NULL));
    GPU(cuCtxPopCurrent_v2(NULL));
    CHECK(fake_count("misuse") == 0 && fake_count("contexts") == 0, "misuse");
}

/* ---- a process for each case */

static void all_cases(const char *driver) {
    fake_open();
    CHECK(mkdir(in("broken"), 0700) == 0 && mkdir(in("empty"), 0700) == 0, "cannot make a folder");
    FILE *file = fopen(in("broken/libcuda.so.1"), "w");
    CHECK(file && fputs("no library\n", file) >= 0 && fclose(file) == 0, "cannot write");
    fake_child("no_driver", NULL, "", in("broken"));
    fake_child("no_driver_file", NULL, "", in("empty"));
    fake_child("no_device", NULL, "devices=0", NULL);
    fake_child("no_device", NULL, "fail=cuInit:0:100", NULL);
    fake_child("old_driver", NULL, "version=12040", NULL);
    fake_child("init_fails", NULL, "fail=cuInit:0:803", NULL);
    for (int i = 0; i < FAKE_FUNCTIONS; i++) fake_child("lacks", fake_functions[i], "", fake_without(driver, "libcuda.so.1", fake_functions[i]));
    fake_child("two_devices", NULL, "devices=2,arch=121,version=13020", NULL);
    for (int i = 0; i < FAKE_FUNCTIONS; i++) fake_child("prepare_fails", fake_functions[i], "", NULL);
    fake_child("prepare_fails", "cuFuncLoad", "", NULL);
    fake_child("threads", NULL, "devices=2", NULL);
    fake_child("on_a_stream", NULL, "devices=2", NULL);
    fake_child("older", NULL, "arch=75", NULL);
    fake_child("older", NULL, "arch=80", NULL);
    fake_child("older", NULL, "arch=89", NULL);
    setenv("GQUANT_CHECK", "1", 1);
    fake_child("on_a_stream", NULL, "devices=2", NULL);
    fake_child("checked", NULL, "devices=2", NULL);
}

/* No libcuda.so.1 anywhere: only on a machine without a driver. */
static void no_driver_file(void) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (driver) dlclose(driver);
    else no_driver();
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*call)(void);
    } cases[] = {
        {"no_driver", no_driver}, {"no_driver_file", no_driver_file}, {"no_device", no_device}, {"old_driver", old_driver},
        {"init_fails", init_fails}, {"two_devices", two_devices}, {"threads", threads}, {"on_a_stream", on_a_stream}, {"older", older},
        {"checked", checked},
    };
    if (argc == 2 && strcmp(argv[0], "lacks") == 0) lacks(argv[1]);
    else if (argc == 2 && strcmp(argv[0], "prepare_fails") == 0) prepare_fails(argv[1]);
    else if (argc == 2) all_cases(argv[1]);
    for (size_t i = 0; argc == 1 && i < sizeof cases / sizeof *cases; i++)
        if (strcmp(argv[0], cases[i].name) == 0) cases[i].call();
    return check_result();
}
