/* A model of 300 MB in shards, and bitsandbytes' golden modules, are read into device memory as they are in the files.
 * usage: cuda_load FOLDER, that of the golden files */
#include "load.h"

#include <pthread.h>

static const uint64_t sizes[] = {0, 1, 255, 257, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, 1000003, (50 << 20) + 13, 33, (40 << 20) + 1};

static char model_path[4096], golden_path[4096];

static void load(const char *path) {
    gq_load_options options = GQ_LOAD_OPTIONS_INIT;
    gq_model *model = NULL;
    options.device = 0;
    OK(gq_load_model(path, &options, &model));
    if (!model) return;
    same_model(model, path, 0);
    OK(gq_free_model(model));
}

static void *load_both(void *argument) {
    gpu_use(0);
    for (int i = 0; i < 3; i++) {
        load(golden_path);
        gq_exec exec = gpu_exec(NULL);
        exec.threads = i * 3;
        read_into_buffers(golden_path, &exec);
    }
    load(model_path);
    GPU(cuCtxPopCurrent_v2(NULL));
    return argument;
}

static size_t unused_memory(void) {
    size_t unused = 0, all = 0;
    GPU(cuMemGetInfo_v2(&unused, &all));
    return unused;
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    gpu_start();
    write_model("model", 3, sizes, sizeof sizes / sizeof *sizes);
    snprintf(model_path, sizeof model_path, "%s", in("model"));
    snprintf(golden_path, sizeof golden_path, "%s/modules.safetensors", argv[1]);
    load(model_path);
    /* Behind work of the stream: a memset that is still under way. */
    void *stream = NULL;
    GPU(cuStreamCreate(&stream, 1));
    gq_exec exec = gpu_exec(stream);
    read_into_buffers(model_path, &exec);
    gq_model *model = NULL;
    OK(gq_load_model(model_path, NULL, &model));
    struct buffers b = make_buffers(model);
    for (int i = 0; i < 20; i++) GPU(cuMemsetD8Async(b.base, GPU_FILL, b.bytes, stream));
    OK(gq_model_read_all(model, b.tensors, b.tensor_count, b.layers, b.layer_count, &exec));
    same_buffers(model, &b, "behind memsets");
    free_buffers(&b);
    OK(gq_free_model(model));
    GPU(cuStreamDestroy_v2(stream));

    pthread_t threads[4];
    for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, load_both, NULL);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);

    /* Models that are freed leave nothing: others may use the device too, but not that much. */
    const size_t before = unused_memory();
    for (int i = 0; i < 10; i++) load(model_path);
    CHECK(unused_memory() + (256 << 20) > before, "%zu MiB are lost", (before - unused_memory()) >> 20);
    return check_result();
}
