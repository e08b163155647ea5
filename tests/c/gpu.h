/* The CUDA driver for the tests: device memory with guard bands, streams, copies. Found by dlopen, as the library does it, so that
 * the tests compile and start without CUDA; the fake driver (fake_cuda.c) has what is needed here, too. */
#ifndef GPU_H
#define GPU_H

#include "check.h"

#include <dlfcn.h>

enum { SKIPPED = 77 };

typedef int gpu_result; /* CUresult */

/* FUNCTION(symbol, arguments) */
#define GPU_FUNCTIONS(FUNCTION)                                     \
    FUNCTION(cuInit, (unsigned))                                    \
    FUNCTION(cuDriverGetVersion, (int *))                           \
    FUNCTION(cuDeviceGetCount, (int *))                             \
    FUNCTION(cuDeviceGet, (int *, int))                             \
    FUNCTION(cuDeviceGetName, (char *, int, int))                   \
    FUNCTION(cuDevicePrimaryCtxRetain, (void **, int))              \
    FUNCTION(cuCtxGetCurrent, (void **))                            \
    FUNCTION(cuCtxPushCurrent_v2, (void *))                         \
    FUNCTION(cuCtxPopCurrent_v2, (void **))                         \
    FUNCTION(cuCtxSynchronize, (void))                              \
    FUNCTION(cuMemAlloc_v2, (uint64_t *, size_t))                   \
    FUNCTION(cuMemFree_v2, (uint64_t))                              \
    FUNCTION(cuMemGetInfo_v2, (size_t *, size_t *))                 \
    FUNCTION(cuMemcpyHtoD_v2, (uint64_t, const void *, size_t))     \
    FUNCTION(cuMemcpyDtoH_v2, (void *, uint64_t, size_t))           \
    FUNCTION(cuMemsetD8_v2, (uint64_t, unsigned char, size_t))      \
    FUNCTION(cuMemsetD8Async, (uint64_t, unsigned char, size_t, void *)) \
    FUNCTION(cuMemcpyHtoDAsync_v2, (uint64_t, const void *, size_t, void *)) \
    FUNCTION(cuMemcpyDtoHAsync_v2, (void *, uint64_t, size_t, void *)) \
    FUNCTION(cuStreamCreate, (void **, unsigned))                   \
    FUNCTION(cuStreamDestroy_v2, (void *))                          \
    FUNCTION(cuStreamSynchronize, (void *))

/* Functions that the fake driver does not have. */
#define GPU_REAL_FUNCTIONS(FUNCTION)                                \
    FUNCTION(cuLaunchHostFunc, (void *, void (*)(void *), void *))  \
    FUNCTION(cuStreamBeginCapture_v2, (void *, int))                \
    FUNCTION(cuStreamEndCapture, (void *, void **))                 \
    FUNCTION(cuGraphInstantiateWithFlags, (void **, void *, unsigned long long)) \
    FUNCTION(cuGraphLaunch, (void *, void *))                       \
    FUNCTION(cuGraphExecDestroy, (void *))                          \
    FUNCTION(cuGraphDestroy, (void *))

static struct {
#define GPU_MEMBER(symbol, arguments) gpu_result(*symbol) arguments;
    GPU_FUNCTIONS(GPU_MEMBER)
    GPU_REAL_FUNCTIONS(GPU_MEMBER)
#undef GPU_MEMBER
} gpu;

/* GPU(cuFunction(arguments)): the driver's call succeeds; the test ends if it does not. */
#define GPU(call)                                                                             \
    do {                                                                                      \
        const gpu_result result_ = gpu.call;                                                  \
        if (result_) {                                                                        \
            fprintf(stderr, "%s:%d: %s: driver error %d\n", __FILE__, __LINE__, #call, result_); \
            exit(1);                                                                          \
        }                                                                                     \
    } while (0)

static inline void gpu_find(void *driver, const char *name, void *function, int needed) {
    void *symbol = dlsym(driver, name);
    if (!symbol && needed) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    memcpy(function, &symbol, sizeof symbol);
}

/* Makes a device's primary context the current one of this thread. */
static inline void gpu_use(int ordinal) {
    int device;
    void *context;
    GPU(cuDeviceGet(&device, ordinal));
    GPU(cuDevicePrimaryCtxRetain(&context, device));
    GPU(cuCtxPushCurrent_v2(context));
}

/* Opens the driver and takes device 0. Where there is none, ends the test as skipped and says why; it is no reason if the driver
 * has a device that the library does not see. */
static inline void gpu_start(void) {
    int32_t count = 0;
    const gq_status status = gq_device_count(&count);
    if (status != GQ_OK) {
        fprintf(stderr, "%s\n", gq_last_error());
        exit(1);
    }
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!driver) {
        if (!count) printf("skipped: %s\n", dlerror());
        else fprintf(stderr, "%d devices without a driver: %s\n", (int)count, dlerror());
        exit(count ? 1 : SKIPPED);
    }
#define GPU_FIND(symbol, arguments) gpu_find(driver, #symbol, &gpu.symbol, 1);
    GPU_FUNCTIONS(GPU_FIND)
#undef GPU_FIND
#define GPU_FIND(symbol, arguments) gpu_find(driver, #symbol, &gpu.symbol, 0);
    GPU_REAL_FUNCTIONS(GPU_FIND)
#undef GPU_FIND
    int devices = 0, version = 0;
    gpu.cuDriverGetVersion(&version);
    if (gpu.cuInit(0) || gpu.cuDeviceGetCount(&devices)) devices = 0;
    if (devices && !count) {
        CHECK(gq_device_prepare(0) != GQ_OK, "no device, but it can be prepared");
        /* A library without kernels, or with newer ones than the driver. */
        if (version < 13000 || strstr(gq_last_error(), "CUDA=0")) {
            printf("skipped: %s\n", gq_last_error());
            exit(SKIPPED);
        }
        fprintf(stderr, "gq_device_count is 0, the driver has %d: %s\n", devices, gq_last_error());
        exit(1);
    }
    if (!devices) {
        puts("skipped: the driver has no device");
        exit(SKIPPED);
    }
    gpu_use(0);
}

/* Ends the test as skipped on Turing, which has no BF16 and decodes weights for linear layers. */
static inline void gpu_needs_ampere(void) {
    gq_device_info info = GQ_DEVICE_INFO_INIT;
    OK(gq_device_get_info(0, &info));
    if (info.major >= 8) return;
    puts("skipped: the device is older than Ampere");
    exit(SKIPPED);
}

/* ---- memory */

enum { GPU_GUARD = 256, GPU_FILL = 0xa5 };

static inline uint64_t gpu_alloc(size_t bytes) {
    uint64_t address = 0;
    GPU(cuMemAlloc_v2(&address, bytes ? bytes : 1));
    return address;
}

/* Sets all bytes to GPU_FILL, and waits for it: a memset is done later than the call, and streams may overtake it. */
static inline void gpu_fill(uint64_t address, size_t bytes) {
    GPU(cuMemsetD8_v2(address, GPU_FILL, bytes));
    GPU(cuCtxSynchronize());
}

static inline void gpu_free(uint64_t address) { GPU(cuMemFree_v2(address)); }

/* A buffer on the device for one case after another, with a guard band on each side. */
struct gpu_buffer {
    uint64_t base, address;
    size_t capacity, bytes;
    unsigned char *host; /* the guard bands and the content, as gpu_get read them */
};

/* Makes room for bytes at an address that is offset more than a multiple of 256, and fills everything with GPU_FILL. */
static inline gq_addr gpu_place(struct gpu_buffer *b, size_t bytes, size_t offset) {
    const size_t all = GPU_GUARD + offset + bytes + GPU_GUARD;
    if (all > b->capacity) {
        if (b->base) gpu_free(b->base);
        free(b->host);
        b->capacity = all + all / 2;
        b->base = gpu_alloc(b->capacity);
        b->host = malloc(b->capacity);
    }
    b->address = b->base + GPU_GUARD + offset;
    b->bytes = bytes;
    GPU(cuMemsetD8_v2(b->base, GPU_FILL, all));
    return b->address;
}

/* The same, and the content is data. */
static inline gq_addr gpu_put(struct gpu_buffer *b, const void *data, size_t bytes, size_t offset) {
    gpu_place(b, bytes, offset);
    if (bytes) GPU(cuMemcpyHtoD_v2(b->address, data, bytes));
    return b->address;
}

/* The content, after the guard bands were checked. */
static inline unsigned char *gpu_get(struct gpu_buffer *b, const char *what) {
    const size_t front = (size_t)(b->address - b->base), all = front + b->bytes + GPU_GUARD;
    GPU(cuMemcpyDtoH_v2(b->host, b->base, all));
    for (size_t i = 0; i < all; i++) {
        if (i == front) i += b->bytes;
        if (b->host[i] == GPU_FILL) continue;
        CHECK(0, "%s: byte %lld was written, of %zu", what, (long long)i - (long long)front, b->bytes);
        break;
    }
    return b->host + front;
}

static inline void gpu_drop(struct gpu_buffer *b) {
    if (b->base) gpu_free(b->base);
    free(b->host);
    memset(b, 0, sizeof *b);
}

/* The CUDA stream in an exec. */
static inline gq_exec gpu_exec(void *stream) {
    gq_exec exec = GQ_EXEC_INIT;
    exec.device = 0;
    exec.stream = (uint64_t)(uintptr_t)stream;
    return exec;
}

#endif
