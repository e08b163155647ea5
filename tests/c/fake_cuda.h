/* The controls of the fake driver (fake_cuda.c), for tests that run with it as their libcuda.so.1. */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include "weights.h"

#include <dlfcn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* The controls; fake_open finds them.
 *
 * The same settings as in the environment's GQ_FAKE_CUDA. Faults, hooks and the counts of calls start anew; other settings stay
 * until they are set again. */
static void (*fake_set)(const char *settings);

/* How often a function was called since fake_set, or one of
 *   allocations, allocated  live device allocations, and their bytes
 *   pinned, pinned_bytes, pinned_peak
 *   streams, events         that are live
 *   modules                 that were loaded and not unloaded
 *   contexts                pushed less popped, over all threads
 *   retained                primary contexts retained less released
 *   launches, clustered     since fake_set; clustered are those in clusters
 *   last_stream             the stream of the last launch
 *   pending                 work on streams that nobody waited for
 *   misuse                  of the driver; each was printed */
static int64_t (*fake_count)(const char *what);

/* Calls hook before the nth call of a function from now on. */
static void (*fake_hook)(const char *function, int64_t n, void (*hook)(void));

/* What libgquant needs of the driver. */
static const char *const fake_functions[] = {
    "cuInit", "cuDriverGetVersion", "cuGetErrorName", "cuGetErrorString", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName",
    "cuDeviceGetAttribute", "cuDeviceTotalMem_v2", "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent", "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2", "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuTensorMapEncodeTiled", "cuLaunchKernel",
    "cuLaunchKernelEx", "cuOccupancyMaxActiveClusters", "cuMemAlloc_v2", "cuMemFree_v2", "cuMemHostAlloc", "cuMemFreeHost", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemcpyDtoDAsync_v2",
    "cuMemsetD8Async", "cuPointerGetAttribute", "cuStreamCreate", "cuStreamDestroy_v2", "cuStreamSynchronize", "cuStreamWaitEvent",
    "cuEventCreate", "cuEventDestroy_v2", "cuEventRecord", "cuEventSynchronize",
};
enum { FAKE_FUNCTIONS = sizeof fake_functions / sizeof *fake_functions };

/* Functions that end something, and do so in the fake also when they fail. */
static inline int fake_releases(const char *function) {
    return strstr(function, "Free") || strstr(function, "Destroy") || strstr(function, "Pop");
}

/* Runs one with every call of every function of the driver failing with a code, one at a time, and has check look at what came of
 * it; after the last call of a function, one must succeed. */
static inline void fake_failures(int code, gq_status (*one)(void), void (*check)(const char *function, const char *settings, gq_status status)) {
    for (int i = 0; i < FAKE_FUNCTIONS; i++) {
        for (int n = 1;; n++) {
            char settings[100];
            /* Nothing can be waited for without a context. */
            const int context = strncmp(fake_functions[i], "cuCtx", 5) == 0;
            snprintf(settings, sizeof settings, "fail=%s:%d:%d%s", fake_functions[i], n, code, context ? ",defer=0" : "");
            fake_set(settings);
            const gq_status status = one();
            const int64_t calls = fake_count(fake_functions[i]);
            fake_set("defer=1");
            check(calls < n ? NULL : fake_functions[i], settings, status);
            if (calls < n) break;
        }
    }
}

/* Runs this program once more, as a process with another name and one argument or none, with these settings and the libcuda.so.1 of a
 * folder (NULL: the same one). What fails there is counted. */
static inline void fake_child(const char *name, const char *argument, const char *settings, const char *folder) {
    char path[4096];
    snprintf(path, sizeof path, "%s", getenv("LD_LIBRARY_PATH"));
    setenv("GQ_FAKE_CUDA", settings, 1);
    if (folder) setenv("LD_LIBRARY_PATH", folder, 1);
    fflush(NULL);
    const pid_t pid = fork();
    if (pid == 0) {
        alarm(250);
        execl("/proc/self/exe", name, argument, (char *)NULL);
        _exit(99);
    }
    int status = -1;
    waitpid(pid, &status, 0);
    setenv("LD_LIBRARY_PATH", path, 1);
    unsetenv("GQ_FAKE_CUDA");
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s %s with \"%s\": the process ended with status %#x", name, argument ? argument : "",
          settings, (unsigned)status);
}

/* A folder with a copy of a library in which one function has another name. Names are looked up by hash and then compared, so it is not
 * found. */
static inline const char *fake_without(const char *library, const char *name, const char *function) {
    static char folder[300], data[1 << 20];
    char path[400];
    snprintf(folder, sizeof folder, "%s", in(function));
    snprintf(path, sizeof path, "%s/%s", folder, name);
    CHECK(mkdir(folder, 0700) == 0, "cannot make %s", folder);
    FILE *file = fopen(library, "rb");
    const size_t bytes = file ? fread(data, 1, sizeof data, file) : 0;
    if (file) fclose(file);
    CHECK(bytes > 0 && bytes < sizeof data, "%zu bytes of %s", bytes, library);
    const size_t length = strlen(function);
    int found = 0;
    for (size_t i = 0; i + length + 2 < bytes; i++) {
        if (data[i] != 0 || memcmp(data + i + 1, function, length + 1) != 0) continue;
        data[i + 1] = 'X';
        found++;
    }
    CHECK(found, "%s is not in %s", function, library);
    file = fopen(path, "wb");
    CHECK(file && fwrite(data, 1, bytes, file) == bytes && fclose(file) == 0, "cannot write %s", path);
    return folder;
}

/* Finds the controls. The test goes on only if libcuda.so.1 is the fake one, and the library has anything to do with CUDA. */
static inline void fake_open(void) {
    if (strstr(gq_build_info(), "\"cuda\":[]")) {
        puts("skipped: the library was built without CUDA");
        exit(77);
    }
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    void *set = driver ? dlsym(driver, "fake_cuda_set") : NULL, *count = driver ? dlsym(driver, "fake_cuda_count") : NULL;
    void *hook = driver ? dlsym(driver, "fake_cuda_hook") : NULL;
    if (!set || !count || !hook) {
        fprintf(stderr, "libcuda.so.1 is not the fake driver: %s\n", dlerror());
        exit(1);
    }
    memcpy(&fake_set, &set, sizeof set);
    memcpy(&fake_count, &count, sizeof count);
    memcpy(&fake_hook, &hook, sizeof hook);
}

#endif
