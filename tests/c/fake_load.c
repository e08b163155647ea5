/* Models that are read into device memory, with the fake driver: their bytes arrive, whatever fails is told and leaves nothing behind, and
 * pinned memory stays small. usage: fake_load MODULES */
#include "fake_cuda.h"
#include "load.h"

#include <pthread.h>

/* Sizes round those of the loader's slots; one that is larger than all of them, and larger than a batch. */
static const uint64_t sizes[] = {0, 1, 3, 255, 256, 257, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, (9 << 20) + 5, 0, 17, (40 << 20) + 13};
static const uint64_t few[] = {5, (4 << 20) + 3, 0, 1000001, (13 << 20) + 1};

static const char *modules_file;
static char few_path[4096];

/* What the library keeps for the next load: streams and events per device, pinned memory for all. */
static void nothing_left(const char *what, int devices) {
    CHECK(fake_count("allocations") == 0, "%s: %d allocations of %d bytes are left", what, (int)fake_count("allocations"), (int)fake_count("allocated"));
    CHECK(fake_count("streams") <= 16 * devices && fake_count("pinned") <= 32 && fake_count("events") <= 32 * devices,
          "%s: %d streams, %d pinned slots, %d events", what, (int)fake_count("streams"), (int)fake_count("pinned"), (int)fake_count("events"));
    CHECK(fake_count("pending") == 0, "%s: work is pending", what);
}

static gq_status load_from(const char *path, int32_t device, gq_model **model) {
    gq_load_options options = GQ_LOAD_OPTIONS_INIT;
    options.device = device;
    return gq_load_model(path, &options, model);
}

static void *load_all(void *argument) {
    const int me = (int)(intptr_t)argument;
    gq_exec exec = gpu_exec(NULL);
    gpu_use(me % 2);
    for (int round = 0; round < 3; round++) {
        gq_model *model = NULL;
        const char *path = round == 1 ? modules_file : few_path;
        CHECK(load_from(path, me % 2, &model) == GQ_OK, "%s", gq_last_error());
        same_model(model, path, me % 2);
        OK(gq_free_model(model));
        exec.device = me % 2;
        exec.threads = round;
        read_into_buffers(path, &exec);
    }
    GPU(cuCtxPopCurrent_v2(NULL));
    return NULL;
}

/* Everything arrives, with work done late and at once; several threads load to two devices at the same time. */
static void arrives(void) {
    gq_exec exec = gpu_exec(NULL);
    for (int defer = 0; defer < 2; defer++) {
        fake_set(defer ? "defer=1" : "defer=0");
        const char *const paths[] = {in("big"), modules_file};
        for (int i = 0; i < 2; i++) {
            gq_model *model = NULL;
            CHECK(load_from(paths[i], 0, &model) == GQ_OK, "%s", gq_last_error());
            CHECK(fake_count("allocations") == 1, "%d allocations", (int)fake_count("allocations"));
            same_model(model, paths[i], 0);
            OK(gq_free_model(model));
            read_into_buffers(paths[i], &exec);
            nothing_left(paths[i], 1);
        }
    }
    void *stream = NULL;
    GPU(cuStreamCreate(&stream, 1));
    exec.stream = (uint64_t)(uintptr_t)stream;
    for (exec.threads = 0; exec.threads < 12; exec.threads += 5) read_into_buffers(few_path, &exec);

    /* A part of a model, without its prefix. */
    gq_load_options options = GQ_LOAD_OPTIONS_INIT;
    options.device = 0;
    options.prefix = "s1.";
    options.include = "t1,t3";
    gq_model *model = NULL;
    int64_t count = 0;
    OK(gq_load_model(few_path, &options, &model));
    CHECK(fake_count("allocated") < (6 << 20), "%d bytes for a part", (int)fake_count("allocated"));
    OK(gq_model_tensor_count(model, &count));
    CHECK(count == 2, "%d tensors", (int)count);
    for (int64_t i = 0; i < count; i++) {
        gq_tensor_info info = GQ_TENSOR_INFO_INIT;
        OK(gq_model_tensor(model, i, &info));
        unsigned char *want = file_bytes(&info);
        same_bytes(info.address, want, (size_t)info.bytes, info.name);
        free(want);
    }
    OK(gq_free_model(model));
    options.prefix = "nothing.";
    OK(gq_load_model(few_path, &options, &model));
    OK(gq_free_model(model));

    /* Work that the stream has comes first: a memset that was put there before must not destroy what is read. */
    OK(gq_load_model(few_path, NULL, &model));
    struct buffers b = make_buffers(model);
    GPU(cuMemsetD8Async(b.base + 12, 0x77, b.bytes - 24, stream));
    OK(gq_model_read_all(model, b.tensors, b.tensor_count, b.layers, b.layer_count, &exec));
    GPU(cuStreamSynchronize(stream));
    for (int64_t i = 0; i < b.tensor_count; i++) {
        gq_tensor_info info = GQ_TENSOR_INFO_INIT;
        OK(gq_model_tensor(model, i, &info));
        unsigned char *want = file_bytes(&info);
        same_bytes(b.tensors[i].address, want, (size_t)info.bytes, "behind a memset");
        free(want);
    }
    free_buffers(&b);
    OK(gq_free_model(model));
    GPU(cuStreamDestroy_v2(stream));

    pthread_t threads[6];
    for (int i = 0; i < 6; i++) pthread_create(&threads[i], NULL, load_all, (void *)(intptr_t)i);
    for (int i = 0; i < 6; i++) pthread_join(threads[i], NULL);
    nothing_left("threads", 2);
    CHECK(fake_count("contexts") == 1, "%d contexts are pushed", (int)fake_count("contexts"));
}

/* ---- calls of the driver that fail */

static int64_t contexts;
static int32_t device;

static void check_failure(const char *function, const char *settings, gq_status status) {
    CHECK(fake_count("contexts") == contexts, "%s: contexts are left", settings);
    if (!function) {
        CHECK(status == GQ_OK, "%s: %s", settings, gq_last_error());
    } else if (status != GQ_OK) {
        CHECK(status == GQ_ERROR_OUT_OF_MEMORY, "%s: %s; %s", settings, gq_status_name(status), gq_last_error());
        SAYS("CUDA_ERROR_OUT_OF_MEMORY");
        SAYS("out of memory");
        char name[32];
        snprintf(name, sizeof name, "device %d", (int)device);
        CHECK(strstr(gq_last_error(), name) || strstr(gq_last_error(), "pinning"), "\"%s\" is not in: %s", name, gq_last_error());
    } else {
        CHECK(fake_releases(function) || strncmp(function, "cuCtx", 5) == 0, "%s: the failure was not noticed", settings);
    }
    /* A context that cannot be pushed, nothing can be freed in. */
    if (function && (strcmp(function, "cuCtxPushCurrent_v2") == 0 || strcmp(function, "cuCtxGetCurrent") == 0)) fake_set("keep");
    else nothing_left(settings, device + 1);
}

static gq_model *opened;
static struct buffers targets;

/* Loads a model and frees it. */
static gq_status load_one(void) {
    gq_model *model = (gq_model *)8;
    const gq_status status = load_from(few_path, device, &model);
    if (status != GQ_OK) {
        CHECK(model == NULL, "a model after a failure");
        return status;
    }
    return gq_free_model(model);
}

static gq_status read_one(void) {
    gq_exec exec = gpu_exec(NULL);
    return gq_model_read_all(opened, targets.tensors, targets.tensor_count, targets.layers, targets.layer_count, &exec);
}

/* Every call in turn, with the context current or not. */
static void fails_once(void) {
    OK(gq_device_prepare(0));
    fake_set("keep");
    contexts = fake_count("contexts");
    fake_failures(2, load_one, check_failure);
    GPU(cuCtxPopCurrent_v2(NULL));
    contexts = fake_count("contexts");
    fake_failures(2, load_one, check_failure);
    gpu_use(0);
    contexts = fake_count("contexts");
    OK(gq_load_model(few_path, NULL, &opened));
    targets = make_buffers(opened);
    fake_set("keep");
    fake_failures(2, read_one, check_failure);
    CHECK(read_one() == GQ_OK, "%s", gq_last_error());
    same_buffers(opened, &targets, "after failures");
    /* Any other error has the status DEVICE. */
    fake_set("fail=cuMemcpyHtoDAsync_v2:2:719");
    STATUS(gq_model_read_all(opened, targets.tensors, targets.tensor_count, targets.layers, targets.layer_count, &(gq_exec){sizeof(gq_exec), 0, 0, 0, 0, 0, 0}),
           GQ_ERROR_DEVICE);
    SAYS("CUDA_ERROR_LAUNCH_FAILED");
    free_buffers(&targets);
    OK(gq_free_model(opened));

    /* More than the device has. */
    gq_model *model = NULL;
    fake_set("memory=10000000");
    CHECK(load_from(few_path, 0, &model) == GQ_ERROR_OUT_OF_MEMORY && model == NULL, "%s", gq_last_error());
    SAYS("CUDA_ERROR_OUT_OF_MEMORY");
    fake_set("memory=8589934592");
    nothing_left("out of memory", 1);
}

/* What the loader makes when it first uses a device fails, one piece after the other; what it has, it keeps. */
static void first_use_fails(void) {
    static const char *const functions[] = {"cuMemHostAlloc", "cuStreamCreate", "cuEventCreate"};
    contexts = fake_count("contexts");
    for (device = 2; device < 5; device++) {
        OK(gq_device_prepare(device));
        fake_set("keep");
        int n = 1;
        for (int done = 0; !done; n++) {
            char settings[100];
            const char *function = functions[device - 2];
            snprintf(settings, sizeof settings, "fail=%s:%d:2", function, n);
            fake_set(settings);
            const gq_status status = load_one();
            done = fake_count(function) < n;
            fake_set("");
            check_failure(done ? NULL : function, settings, status);
        }
        CHECK(n > 2, "%s never failed", functions[device - 2]);
    }
    device = 0;
}

/* ---- files that change */

static void truncate_few(void) {
    for (int k = 0; k < 2; k++)
        if (truncate(shard("torn", k, 2), 3000) != 0) perror("truncate");
}

static void torn(void) {
    gq_model *model = NULL, *other = NULL;
    gq_exec exec = gpu_exec(NULL);
    for (int when = 1; when < 14; when += 3) {
        /* While it is being loaded; the slots hold less than the model. */
        for (int k = 0; k < 2; k++) write_shard(shard("torn", k, 2), k, sizes, (int)(sizeof sizes / sizeof *sizes));
        fake_hook("cuMemcpyHtoDAsync_v2", when, truncate_few);
        gq_status status = load_from(in("torn"), 0, &model);
        CHECK(status == GQ_ERROR_BAD_FILE || status == GQ_ERROR_IO, "%s", gq_status_name(status));
        SAYS("torn/model-0000");
        CHECK(model == NULL, "a model after a failure");
        nothing_left("a torn file", 1);
    }
    /* Between opening and reading. */
    for (int k = 0; k < 2; k++) write_shard(shard("torn", k, 2), k, sizes, (int)(sizeof sizes / sizeof *sizes));
    OK(gq_load_model(in("torn"), NULL, &other));
    struct buffers b = make_buffers(other);
    truncate_few();
    const gq_status status = gq_model_read_all(other, b.tensors, b.tensor_count, b.layers, b.layer_count, &exec);
    CHECK(status == GQ_ERROR_BAD_FILE || status == GQ_ERROR_IO, "%s", gq_status_name(status));
    SAYS("torn/model-0000");
    int64_t last = -1;
    OK(gq_model_find_tensor(other, "s1.t12", &last));
    const gq_status one = gq_model_read(other, last, 5, b.tensors[last].address, 1000, &exec);
    CHECK(one == GQ_ERROR_BAD_FILE || one == GQ_ERROR_IO, "%s", gq_status_name(one));
    free_buffers(&b);
    OK(gq_free_model(other));
    nothing_left("a torn file", 1);
    /* Before opening. */
    CHECK(load_from(in("torn"), 0, &model) == GQ_ERROR_BAD_FILE && model == NULL, "%s", gq_last_error());
    nothing_left("a torn file", 1);
}

/* ---- arguments */

static void arguments(void) {
    gq_exec exec = gpu_exec(NULL);
    gq_model *model = NULL;
    static float memory[LOAD_N];
    gq_state *state = NULL;
    int64_t layer = -1;
    OK(gq_load_model(few_path, NULL, &model));
    OK(gq_model_find_layer(model, "s1.w", &layer));
    STATUS(gq_model_dequantize(model, layer, 0, LOAD_ROWS, GQ_ADDR(memory), sizeof memory, GQ_F32, &exec), GQ_ERROR_UNSUPPORTED);
    SAYS("device");
    /* A state of a model on the host stays there. */
    OK(gq_model_state(model, layer, &state));
    STATUS(gq_dequantize(state, GQ_ADDR(memory), sizeof memory, GQ_F32, &exec), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("CPU");
    OK(gq_state_free(state));

    struct buffers b = make_buffers(model);
    const struct {
        int64_t tensors, layers;
        const char *name;
    } counts[] = {{-1, 0, "tensors"}, {1, 0, "tensors"}, {0, -1, "layers"}, {0, 1, "layers"}};
    for (int i = 0; i < 4; i++) {
        STATUS(gq_model_read_all(model, b.tensors, b.tensor_count + counts[i].tensors, b.layers, b.layer_count + counts[i].layers, &exec), GQ_ERROR_INVALID_ARGUMENT);
        SAYS(counts[i].name);
    }
    b.tensors[1].bytes++;
    STATUS(gq_model_read_all(model, b.tensors, b.tensor_count, b.layers, b.layer_count, &exec), GQ_ERROR_INVALID_ARGUMENT);
    gq_tensor_info info = GQ_TENSOR_INFO_INIT;
    OK(gq_model_tensor(model, 1, &info));
    SAYS(info.name);
    b.tensors[1].bytes--;
    b.layers[1].absmax_bytes--;
    STATUS(gq_model_read_all(model, b.tensors, b.tensor_count, b.layers, b.layer_count, &exec), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("absmax");
    b.layers[1].absmax_bytes++;
    /* What was refused was not begun. */
    memset(b.tensors, 0, (size_t)b.tensor_count * sizeof *b.tensors);
    memset(b.layers, 0, (size_t)b.layer_count * sizeof *b.layers);
    same_buffers(model, &(struct buffers){b.base, b.bytes, 0, 0, NULL, NULL}, "refused");
    /* Without a device it reads into the host's memory. */
    unsigned char one[5];
    int64_t first = -1;
    OK(gq_model_find_tensor(model, "s0.t0", &first));
    b.tensors[first] = (gq_buffer){GQ_ADDR(one), sizeof one};
    OK(gq_model_read_all(model, b.tensors, b.tensor_count, b.layers, b.layer_count, NULL));
    OK(gq_model_tensor(model, first, &info));
    unsigned char *want = file_bytes(&info);
    CHECK(memcmp(one, want, sizeof one) == 0, "other bytes on the host");
    free(want);
    free_buffers(&b);
    OK(gq_free_model(model));

    gq_load_options options = GQ_LOAD_OPTIONS_INIT;
    options.device = 5;
    STATUS(gq_load_model(few_path, &options, &model), GQ_ERROR_NOT_FOUND);
    options.device = -2;
    STATUS(gq_load_model(few_path, &options, &model), GQ_ERROR_INVALID_ARGUMENT);
    options.device = 0;
    STATUS(gq_load_model(in("missing"), &options, &model), GQ_ERROR_NOT_FOUND);
    CHECK(model == NULL, "a model after a failure");
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    modules_file = argv[1];
    snprintf(few_path, sizeof few_path, "%s", in("few"));
    write_model("few", 2, few, sizeof few / sizeof *few);
    write_model("big", 3, sizes, sizeof sizes / sizeof *sizes);
    write_model("torn", 2, sizes, sizeof sizes / sizeof *sizes);
    fake_open();
    fake_set("devices=5");
    gpu_start();
    first_use_fails(); /* before there is pinned memory */
    fails_once();
    arrives();
    torn();
    CHECK(fake_count("pinned_peak") <= 128 << 20, "%d MiB were pinned", (int)(fake_count("pinned_peak") >> 20));
    arguments();
    nothing_left("everything", 5);
    GPU(cuCtxPopCurrent_v2(NULL));
    CHECK(fake_count("misuse") == 0, "misuse of the driver");
    return check_result();
}
