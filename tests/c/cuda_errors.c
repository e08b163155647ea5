/* What goes wrong on a device is a status with a message, and the device can be used afterwards. Cases that need another environment, or
 * that may take the context with them, are processes of their own. */
#include "device_calls.h"

#include <sys/wait.h>
#include <unistd.h>

static struct call_memory *expected, *got;

/* All calls work, so nothing before has broken anything. */
static void all_is_well(const char *after) {
    const uint64_t base = gpu_alloc(sizeof *got);
    gq_exec exec = gpu_exec(NULL);
    struct call_states states = call_states(base, 0);
    gpu_fill(base, sizeof *got);
    GPU(cuMemcpyHtoD_v2(base, expected->weight, sizeof expected->weight));
    call_all(base, &states, &exec);
    GPU(cuMemcpyDtoH_v2(got, base, sizeof *got));
    same_calls(got, expected, after, 0);
    free_states(&states);
    gpu_free(base);
}

static void devices(void) {
    int32_t count = 0;
    gq_exec exec = gpu_exec(NULL);
    gq_device_info info = GQ_DEVICE_INFO_INIT;
    gq_load_options options = GQ_LOAD_OPTIONS_INIT;
    gq_model *model = NULL;
    OK(gq_device_count(&count));
    for (int32_t i = 0; i < count; i++) {
        OK(gq_device_get_info(i, &info));
        CHECK(info.name[0] && info.major >= 7 && info.multiprocessors > 0 && info.memory_bytes > 1u << 30 && info.driver_version >= 13000,
              "device %d: %s, %d.%d, %d multiprocessors, %llu bytes, driver %d", (int)i, info.name, (int)info.major, (int)info.minor, (int)info.multiprocessors,
              (unsigned long long)info.memory_bytes, (int)info.driver_version);
    }
    exec.device = options.device = count;
    const uint64_t memory = gpu_alloc(4096);
    STATUS(gq_device_get_info(count, &info), GQ_ERROR_NOT_FOUND);
    STATUS(gq_device_prepare(count), GQ_ERROR_NOT_FOUND);
    STATUS(gq_quantize_nf4(memory, GQ_F32, 64, 64, memory + 1024, 1, memory + 2048, 32, &exec), GQ_ERROR_NOT_FOUND);
    SAYS("device");
    CHECK(write_file(in("one.safetensors"), "{\"a\": {\"dtype\": \"U8\", \"shape\": [1], \"data_offsets\": [0, 1]}}", "x", 1), "cannot write");
    STATUS(gq_load_model(in("one.safetensors"), &options, &model), GQ_ERROR_NOT_FOUND);
    CHECK(model == NULL, "a model after a failure");
    gpu_free(memory);
}

/* A model that is larger than the device's memory: a hole in a file. */
static void out_of_memory(void) {
    gq_device_info info = GQ_DEVICE_INFO_INIT;
    gq_load_options options = GQ_LOAD_OPTIONS_INIT;
    gq_model *model = (gq_model *)8;
    char header[200];
    options.device = 0;
    OK(gq_device_get_info(0, &info));
    const unsigned long long bytes = info.memory_bytes + (1ull << 30);
    snprintf(header, sizeof header, "{\"a\": {\"dtype\": \"U8\", \"shape\": [%llu], \"data_offsets\": [0, %llu]}}", bytes, bytes);
    CHECK(write_file(in("huge.safetensors"), header, NULL, bytes), "cannot write a hole");
    STATUS(gq_load_model(in("huge.safetensors"), &options, &model), GQ_ERROR_OUT_OF_MEMORY);
    SAYS("CUDA_ERROR_OUT_OF_MEMORY");
    SAYS("device 0");
    CHECK(model == NULL, "a model after a failure");
    remove(in("huge.safetensors"));
}

static void workspace(void) {
    const uint64_t base = gpu_alloc(sizeof *got);
    gq_exec exec = gpu_exec(NULL);
    gq_quantize_options options = GQ_QUANTIZE_OPTIONS_INIT;
    options.nested = 1;
    const gq_parts parts = nested_parts(base);
    uint64_t needed = 0;
    char text[32];
    OK(gq_quantize_workspace_size(GQ_FORMAT_FP4, call_shape, 2, &options, 0, &needed));
    snprintf(text, sizeof text, "%llu", (unsigned long long)needed);
    exec.workspace = (AT(workspace) + 15) / 16 * 16;
    exec.workspace_bytes = needed - 1;
    STATUS(gq_quantize(GQ_FORMAT_FP4, AT(weight), GQ_F32, call_shape, 2, &options, &parts, &exec, NULL), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("workspace");
    SAYS(text);
    exec.workspace_bytes = needed;
    for (int k = 1; k < 16; k++) {
        exec.workspace++;
        STATUS(gq_quantize(GQ_FORMAT_FP4, AT(weight), GQ_F32, call_shape, 2, &options, &parts, &exec, NULL), GQ_ERROR_INVALID_ARGUMENT);
        SAYS("workspace");
    }
    gpu_free(base);
}

/* With GQUANT_CHECK=1 an address of the host is refused by the name of its argument; device memory and what lies inside of it is not. */
static void checked(void) {
    static float host[4096];
    const uint64_t base = gpu_alloc(sizeof *got), memory = gpu_alloc(4096);
    gq_exec exec = gpu_exec(NULL);
    STATUS(gq_quantize_nf4(GQ_ADDR(host), GQ_F32, 64, 64, memory, 1, memory + 1024, 32, &exec), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("src");
    SAYS("host");
    STATUS(gq_quantize_nf4(memory, GQ_F32, 64, 64, GQ_ADDR(host), 1, memory + 1024, 32, &exec), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("absmax");
    STATUS(gq_quantize_nf4(memory, GQ_F32, 64, 64, memory + 512, 1, GQ_ADDR(host), 32, &exec), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("packed");
    STATUS(gq_unpack_4bit(memory, 32, GQ_HIGH_NIBBLE_FIRST, GQ_ADDR(host), 64, &exec), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("codes");
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    gq_state *state = NULL;
    desc.format = GQ_FORMAT_NF4;
    desc.dtype = GQ_F32;
    desc.blocksize = 64;
    desc.shape = GQ_ADDR(call_shape);
    desc.ndim = 2;
    desc.device = 0;
    desc.parts.packed = AT(packed[0]);
    desc.parts.packed_bytes = CALL_N / 2;
    desc.parts.absmax = GQ_ADDR(host);
    desc.parts.absmax_bytes = CALL_BLOCKS * 4;
    gq_status status = gq_state_create(&desc, &state);
    if (status == GQ_OK) status = gq_dequantize(state, AT(decoded), CALL_N * 4, GQ_F32, &exec);
    CHECK(status == GQ_ERROR_INVALID_ARGUMENT, "absmax in host memory: %s", gq_status_name(status));
    SAYS("absmax");
    OK(gq_state_free(state));
    gpu_free(base);
    gpu_free(memory);
    all_is_well("checked addresses");
}

/* An address that is no memory at all, unchecked: the kernel faults, the stream's owner sees it when he waits, and from then on every call
 * says what the driver says. */
static void fault(void) {
    gq_exec exec = gpu_exec(NULL);
    const uint64_t memory = gpu_alloc(4096);
    OK(gq_device_prepare(0));
    OK(gq_quantize_nf4(16, GQ_F32, 64, 64, memory, 1, memory + 1024, 32, &exec));
    CHECK(gpu.cuStreamSynchronize(NULL) != 0, "a kernel read address 16");
    STATUS(gq_quantize_nf4(memory, GQ_F32, 64, 64, memory + 512, 1, memory + 1024, 32, &exec), GQ_ERROR_DEVICE);
    SAYS("CUDA_ERROR_");
    gq_load_options options = GQ_LOAD_OPTIONS_INIT;
    gq_model *model = NULL;
    options.device = 0;
    CHECK(write_file(in("two.safetensors"), "{\"a\": {\"dtype\": \"U8\", \"shape\": [1], \"data_offsets\": [0, 1]}}", "x", 1), "cannot write");
    STATUS(gq_load_model(in("two.safetensors"), &options, &model), GQ_ERROR_DEVICE);
    SAYS("CUDA_ERROR_");
    CHECK(model == NULL, "a model after a failure");
}

/* This program again, for one case. */
static void child(char *program, char *name) {
    const pid_t pid = fork();
    if (pid == 0) {
        alarm(100);
        execl(program, program, name, (char *)NULL);
        _exit(99);
    }
    int status = -1;
    waitpid(pid, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s: the process ended with status %#x", name, (unsigned)status);
}

int main(int argc, char **argv) {
    gpu_start();
    expected = malloc(sizeof *expected);
    got = malloc(sizeof *got);
    call_on_host(expected, 0);
    if (argc == 2) {
        if (strcmp(argv[1], "checked") == 0) checked();
        else fault();
        return check_result();
    }
    devices();
    out_of_memory();
    workspace();
    all_is_well("errors");
    child(argv[0], "fault");
    setenv("GQUANT_CHECK", "1", 1);
    child(argv[0], "checked");
    all_is_well("another process's fault");
    free(expected);
    free(got);
    return check_result();
}
