#include "driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>

// CUlaunchConfig and CUlaunchAttribute.
struct launch_attribute {
    int id;
    char padding[4];
    union {
        int enabled;
        unsigned size[3];
        char bytes[64];
    } value;
};
struct launch {
    unsigned grid[3], block[3], shared;
    gq_stream stream;
    struct launch_attribute *attributes;
    unsigned count;
};

// CUtensorMap.
struct tensor_map {
    _Alignas(64) char opaque[128];
};

// From the driver's documentation: the functions by the names that its library exports, and the numbers that they take.
#define FUNCTIONS(F)                                                                                                                 \
    F(Init, cuInit, (unsigned))                                                                                                      \
    F(DriverGetVersion, cuDriverGetVersion, (int *))                                                                                 \
    F(GetErrorName, cuGetErrorName, (int, const char **))                                                                            \
    F(GetErrorString, cuGetErrorString, (int, const char **))                                                                        \
    F(DeviceGetCount, cuDeviceGetCount, (int *))                                                                                     \
    F(DeviceGet, cuDeviceGet, (int *, int))                                                                                          \
    F(DeviceGetName, cuDeviceGetName, (char *, int, int))                                                                            \
    F(DeviceGetAttribute, cuDeviceGetAttribute, (int *, int, int))                                                                   \
    F(DeviceTotalMem, cuDeviceTotalMem_v2, (size_t *, int))                                                                          \
    F(DevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, (gq_context *, int))                                                         \
    F(CtxGetCurrent, cuCtxGetCurrent, (gq_context *))                                                                                \
    F(CtxPushCurrent, cuCtxPushCurrent_v2, (gq_context))                                                                             \
    F(CtxPopCurrent, cuCtxPopCurrent_v2, (gq_context *))                                                                             \
    F(ModuleLoadData, cuModuleLoadData, (void **, const void *))                                                                     \
    F(ModuleGetFunction, cuModuleGetFunction, (gq_function *, void *, const char *))                                                 \
    F(FuncSetAttribute, cuFuncSetAttribute, (gq_function, int, int))                                                                 \
    F(LaunchKernelEx, cuLaunchKernelEx, (const struct launch *, gq_function, void **, void **))                                      \
    F(OccupancyMaxActiveClusters, cuOccupancyMaxActiveClusters, (int *, gq_function, const struct launch *))                         \
    F(TensorMapEncodeTiled, cuTensorMapEncodeTiled,                                                                                  \
      (struct tensor_map *, int, unsigned, uint64_t, const uint64_t *, const uint64_t *, const unsigned *, const unsigned *, int, int, int, int)) \
    F(LaunchKernel, cuLaunchKernel,                                                                                                  \
      (gq_function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, gq_stream, void **, void **))              \
    F(MemAlloc, cuMemAlloc_v2, (uint64_t *, size_t))                                                                                 \
    F(MemFree, cuMemFree_v2, (uint64_t))                                                                                             \
    F(MemHostAlloc, cuMemHostAlloc, (void **, size_t, unsigned))                                                                     \
    F(MemFreeHost, cuMemFreeHost, (void *))                                                                                          \
    F(MemcpyHtoDAsync, cuMemcpyHtoDAsync_v2, (uint64_t, const void *, size_t, gq_stream))                                            \
    F(MemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, (void *, uint64_t, size_t, gq_stream))                                                  \
    F(MemcpyDtoDAsync, cuMemcpyDtoDAsync_v2, (uint64_t, uint64_t, size_t, gq_stream))                                                \
    F(MemsetD8Async, cuMemsetD8Async, (uint64_t, unsigned char, size_t, gq_stream))                                                  \
    F(PointerGetAttribute, cuPointerGetAttribute, (void *, int, uint64_t))                                                           \
    F(StreamCreate, cuStreamCreate, (gq_stream *, unsigned))                                                                         \
    F(StreamDestroy, cuStreamDestroy_v2, (gq_stream))                                                                                \
    F(StreamSynchronize, cuStreamSynchronize, (gq_stream))                                                                           \
    F(StreamWaitEvent, cuStreamWaitEvent, (gq_stream, gq_event, unsigned))                                                           \
    F(EventCreate, cuEventCreate, (gq_event *, unsigned))                                                                            \
    F(EventDestroy, cuEventDestroy_v2, (gq_event))                                                                                   \
    F(EventRecord, cuEventRecord, (gq_event, gq_stream))                                                                             \
    F(EventSynchronize, cuEventSynchronize, (gq_event))

enum {
    ATTRIBUTE_MULTIPROCESSORS = 16,
    ATTRIBUTE_SHARED_MEMORY_OPTIN = 97,
    FUNCTION_DYNAMIC_SHARED_MEMORY = 8,
    LAUNCH_CLUSTER = 4,
    LAUNCH_PROGRAMMATIC_SERIALIZATION = 6,
    ATTRIBUTE_MAJOR = 75,
    ATTRIBUTE_MINOR = 76,
    HOST_PORTABLE = 1,          // pinned for every context
    STREAM_NON_BLOCKING = 1,    // does not wait for the legacy default stream
    EVENT_DISABLE_TIMING = 2,
    POINTER_MEMORY_TYPE = 2,
    POINTER_DEVICE_ORDINAL = 9,
    MEMORY_DEVICE = 2,
    MAP_UINT8 = 0,
    MAP_UINT16 = 1,
    MAP_PLAIN = 0,       // not interleaved; zeros where the box is outside
    MAP_SWIZZLE_64 = 2,
    MAP_SWIZZLE_128 = 3,
    MAP_PROMOTE_256 = 3, // reads into L2 are of 256 bytes
    INVALID_VALUE = 1, // the result code for an address that the driver does not know
};

static struct {
#define F(field, name, arguments) int (*field) arguments;
    FUNCTIONS(F)
#undef F
    int (*FuncLoad)(gq_function); // newer drivers: loads what would be loaded at the first launch, which a capture forbids
} cu;

static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
static int opened;

int gq_cu_open(const char **what) {
    int result = 0;
    pthread_mutex_lock(&opening);
    if (!opened) {
        void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (!library) {
            *what = "libcuda.so.1";
            result = -1;
        }
#define F(field, name, arguments)                                      \
    if (result == 0 && !(*(void **)&cu.field = dlsym(library, #name))) { \
        *what = #name;                                                 \
        result = -2;                                                   \
    }
        FUNCTIONS(F)
#undef F
        if (result == 0) {
            *(void **)&cu.FuncLoad = dlsym(library, "cuFuncLoad");
            opened = 1;
        } else if (library) {
            dlclose(library);
        }
    }
    pthread_mutex_unlock(&opening);
    return result;
}

int gq_cu_init(int *version, int *devices) {
    // An old driver says so by its version, which it tells before it is initialized.
    int code = cu.DriverGetVersion(version);
    if (code == 0 && *version < GQ_CUDA_VERSION) return 0;
    if (code == 0) code = cu.Init(0);
    if (code == 0) code = cu.DeviceGetCount(devices);
    return code;
}

void gq_cu_error(int code, const char **name, const char **text) {
    *name = *text = NULL;
    if (cu.GetErrorName) cu.GetErrorName(code, name);
    if (cu.GetErrorString) cu.GetErrorString(code, text);
    if (!*name) *name = "CUDA error";
    if (!*text) *text = "no description";
}

int gq_cu_describe(int ordinal, struct gq_cu_device *d) {
    int device;
    size_t memory = 0;
    int code = cu.DeviceGet(&device, ordinal);
    if (code == 0) code = cu.DeviceGetName(d->name, sizeof d->name, device);
    if (code == 0) code = cu.DeviceGetAttribute(&d->major, ATTRIBUTE_MAJOR, device);
    if (code == 0) code = cu.DeviceGetAttribute(&d->minor, ATTRIBUTE_MINOR, device);
    if (code == 0) code = cu.DeviceGetAttribute(&d->multiprocessors, ATTRIBUTE_MULTIPROCESSORS, device);
    if (code == 0) code = cu.DeviceGetAttribute(&d->shared_memory, ATTRIBUTE_SHARED_MEMORY_OPTIN, device);
    if (code == 0) code = cu.DeviceTotalMem(&memory, device);
    d->memory = memory;
    return code;
}

int gq_cu_retain(int ordinal, gq_context *context) {
    int device;
    const int code = cu.DeviceGet(&device, ordinal);
    return code ? code : cu.DevicePrimaryCtxRetain(context, device);
}

int gq_cu_enter(gq_context c) {
    gq_context current = NULL;
    int code = cu.CtxGetCurrent(&current);
    if (code == 0 && current == c) return 0;
    if (code == 0) code = cu.CtxPushCurrent(c);
    return code ? -code : 1;
}

void gq_cu_leave(int entered) {
    gq_context popped;
    if (entered > 0) cu.CtxPopCurrent(&popped);
}

// IN(context, call) runs a call of the driver in a context and gives its result.
#define IN(c, call)                      \
    const int entered = gq_cu_enter(c);        \
    if (entered < 0) return -entered;    \
    const int result = cu.call;          \
    gq_cu_leave(entered);                      \
    return result

int gq_cu_load(gq_context c, const void *image, void **module) { IN(c, ModuleLoadData(module, image)); }

int gq_cu_function(gq_context c, void *module, const char *name, gq_function *function) {
    const int entered = gq_cu_enter(c);
    if (entered < 0) return -entered;
    int code = cu.ModuleGetFunction(function, module, name);
    if (code == 0 && cu.FuncLoad) code = cu.FuncLoad(*function);
    gq_cu_leave(entered);
    return code;
}

int gq_cu_launch(gq_context c, gq_function f, uint32_t x, uint32_t y, uint32_t threads, gq_stream stream, void *args) {
    void *parameters[] = {args};
    IN(c, LaunchKernel(f, x, y, 1, threads, 1, 1, 0, stream, parameters, NULL));
}

int gq_cu_allow_shared(gq_context c, gq_function f, int bytes) { IN(c, FuncSetAttribute(f, FUNCTION_DYNAMIC_SHARED_MEMORY, bytes)); }

int gq_cu_launch_shared(gq_context c, gq_function f, uint32_t x, uint32_t threads, uint32_t shared, int early, gq_stream stream, void *args) {
    void *parameters[] = {args};
    struct launch_attribute serialization = {LAUNCH_PROGRAMMATIC_SERIALIZATION, {0}, {1}};
    const struct launch launch = {{x, 1, 1}, {threads, 1, 1}, shared, stream, &serialization, early ? 1 : 0};
    IN(c, LaunchKernelEx(&launch, f, parameters, NULL));
}

static int encode(struct tensor_map *map, const struct gq_cu_map *m) {
    static const unsigned every[3] = {1, 1, 1};
    return cu.TensorMapEncodeTiled(map, m->element == 1 ? MAP_UINT8 : MAP_UINT16, (unsigned)m->dimensions, m->address, m->sizes, m->strides, m->box, every, MAP_PLAIN,
                                   m->swizzle == 64 ? MAP_SWIZZLE_64 : MAP_SWIZZLE_128, MAP_PROMOTE_256, MAP_PLAIN);
}

int gq_cu_clusters(gq_context c, gq_function f, uint32_t cluster, uint32_t threads, uint32_t shared, int *clusters) {
    struct launch_attribute attribute = {LAUNCH_CLUSTER, {0}, {.size = {cluster, 1, 1}}};
    const struct launch launch = {{cluster, 1, 1}, {threads, 1, 1}, shared, NULL, &attribute, 1};
    IN(c, OccupancyMaxActiveClusters(clusters, f, &launch));
}

int gq_cu_launch_mapped(gq_context c, gq_function f, const struct gq_cu_map maps[2], uint32_t x, uint32_t cluster, uint32_t threads, uint32_t shared, gq_stream stream,
                        void *args) {
    struct tensor_map encoded[2];
    void *parameters[] = {&encoded[0], &encoded[1], args};
    struct launch_attribute attributes[] = {{LAUNCH_PROGRAMMATIC_SERIALIZATION, {0}, {1}}, {LAUNCH_CLUSTER, {0}, {.size = {cluster, 1, 1}}}};
    const struct launch launch = {{x, 1, 1}, {threads, 1, 1}, shared, stream, attributes, cluster > 1 ? 2 : 1};
    const int entered = gq_cu_enter(c);
    if (entered < 0) return -entered;
    int code = encode(&encoded[0], &maps[0]);
    if (code == 0) code = encode(&encoded[1], &maps[1]);
    if (code == 0) code = cu.LaunchKernelEx(&launch, f, parameters, NULL);
    gq_cu_leave(entered);
    return code;
}

int gq_cu_alloc(gq_context c, uint64_t bytes, uint64_t *address) { IN(c, MemAlloc(address, bytes)); }
int gq_cu_free(gq_context c, uint64_t address) { IN(c, MemFree(address)); }
int gq_cu_alloc_pinned(gq_context c, size_t bytes, void **address) { IN(c, MemHostAlloc(address, bytes, HOST_PORTABLE)); }
int gq_cu_free_pinned(gq_context c, void *address) { IN(c, MemFreeHost(address)); }

int gq_cu_to_device(gq_context c, uint64_t to, const void *from, size_t bytes, gq_stream stream) {
    IN(c, MemcpyHtoDAsync(to, from, bytes, stream));
}
int gq_cu_to_host(gq_context c, void *to, uint64_t from, size_t bytes, gq_stream stream) {
    IN(c, MemcpyDtoHAsync(to, from, bytes, stream));
}
int gq_cu_on_device(gq_context c, uint64_t to, uint64_t from, size_t bytes, gq_stream stream) {
    IN(c, MemcpyDtoDAsync(to, from, bytes, stream));
}
int gq_cu_zero(gq_context c, uint64_t address, size_t bytes, gq_stream stream) { IN(c, MemsetD8Async(address, 0, bytes, stream)); }

int gq_cu_is_on_device(gq_context c, uint64_t address, int ordinal, const char **what, int *other) {
    int type = 0;
    const int entered = gq_cu_enter(c);
    *other = -1;
    *what = "host memory that the driver does not know";
    if (entered < 0) return entered;
    int code = cu.PointerGetAttribute(&type, POINTER_MEMORY_TYPE, address);
    if (code == 0 && type != MEMORY_DEVICE) *what = "pinned host memory";
    if (code == 0 && type == MEMORY_DEVICE) code = cu.PointerGetAttribute(other, POINTER_DEVICE_ORDINAL, address);
    gq_cu_leave(entered);
    if (code != 0 && code != INVALID_VALUE) return -code;
    if (code == 0 && type == MEMORY_DEVICE && *other != ordinal) *what = "memory of device";
    return code == 0 && type == MEMORY_DEVICE && *other == ordinal;
}

int gq_cu_new_stream(gq_context c, gq_stream *stream) { IN(c, StreamCreate(stream, STREAM_NON_BLOCKING)); }
int gq_cu_free_stream(gq_context c, gq_stream stream) { IN(c, StreamDestroy(stream)); }
int gq_cu_wait(gq_context c, gq_stream stream) { IN(c, StreamSynchronize(stream)); }
int gq_cu_new_event(gq_context c, gq_event *event) { IN(c, EventCreate(event, EVENT_DISABLE_TIMING)); }
int gq_cu_free_event(gq_context c, gq_event event) { IN(c, EventDestroy(event)); }
int gq_cu_record(gq_context c, gq_event event, gq_stream stream) { IN(c, EventRecord(event, stream)); }
int gq_cu_wait_event(gq_context c, gq_event event) { IN(c, EventSynchronize(event)); }
int gq_cu_stream_waits(gq_context c, gq_stream stream, gq_event event) { IN(c, StreamWaitEvent(stream, event, 0)); }
