/* The bytes of bitsandbytes' CUDA backend once more, made on a device. usage: cuda_golden FOLDER */
#include "gpu.h"

/* golden.c works on host memory. What it gives to the library is copied to the device, what it takes is copied back, and drop forgets
 * all copies. */
static struct {
    const void *host;
    uint64_t address;
    size_t bytes;
} copies[64];
static int copy_count;

static gq_addr give(const void *data, size_t bytes) {
    if (copy_count == 64) {
        fputs("more copies than there is room for\n", stderr);
        exit(1);
    }
    const uint64_t address = gpu_alloc(bytes);
    if (bytes) GPU(cuMemcpyHtoD_v2(address, data, bytes));
    copies[copy_count].host = data;
    copies[copy_count].address = address;
    copies[copy_count++].bytes = bytes;
    return address;
}

static void take(void *data) {
    for (int i = copy_count - 1; i >= 0; i--) {
        if (copies[i].host != data) continue;
        if (copies[i].bytes) GPU(cuMemcpyDtoH_v2(data, copies[i].address, copies[i].bytes));
        return;
    }
    CHECK(0, "this was not given");
}

static void drop(void) {
    while (copy_count > 0) gpu_free(copies[--copy_count].address);
}

static const int32_t device = 0;

static const gq_exec *where(void) {
    static gq_exec exec;
    exec = gpu_exec(NULL);
    return &exec;
}

#define GOLDEN_DEVICE
#include "golden.c"
