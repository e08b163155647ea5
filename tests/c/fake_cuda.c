/* A libcuda.so.1 without a device: what libgquant and its tests use of the driver API, strict about how it is used.
 *
 * Device memory has addresses that the host cannot touch; its content is kept elsewhere. Work on a stream is not done when it is
 * put there, but when somebody waits for it (or at once, with defer=0), as on a device that is busy: who overwrites the source of
 * a copy too early, or reads its result, sees it. Kernels do nothing. Everything wrong is printed on stderr and counted: copies out of
 * bounds or to freed memory, memory freed while work on it is pending, handles that were destroyed or belong to another context,
 * contexts that are popped but were not pushed, and at the end device memory and contexts that are left.
 *
 * GQ_FAKE_CUDA in the environment, or fake_cuda_set, takes settings separated by commas:
 *   devices=1  version=13000  arch=90  memory=8589934592 (bytes per device)  defer=1
 *   fail=FUNCTION:N:CODE  the Nth call of FUNCTION returns CODE; N = 0 is every call
 *   keep                  the memory, streams and events that there are now may stay, and do not count any more
 * A call that fails does nothing, but those that free, destroy, pop or wait do their work all the same. */
#define _GNU_SOURCE
#define FAKE "libcuda"
#include "fake_calls.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ---- the driver's types and numbers */

typedef int CUresult, CUdevice;
typedef uint64_t CUdeviceptr;

enum {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500
};

static const struct {
    int code;
    const char *name, *text;
} errors[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {34, "CUDA_ERROR_STUB_LIBRARY", "CUDA driver is a stub library"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {802, "CUDA_ERROR_SYSTEM_NOT_READY", "system not yet initialized"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

/* ---- settings, counts, faults */

enum { DEVICES = 8, FAULTS = 8, PAGE = 4096, FILL = 0xcd };

static struct {
    int devices, version, arch, defer;
    uint64_t memory;
} settings = {1, 13000, 90, 1, 8ull << 30};

static struct {
    char function[48];
    int64_t n;
    int code;
} faults[FAULTS];
static int fault_count;

static struct {
    char function[48];
    int64_t n;
    void (*call)(void);
} hook;

static int initialized;
static int64_t launches, clustered, pinned_peak, pushed, retained, loaded_modules, pending;
static uint64_t last_stream;

static void keep_all(void);

static void apply(const char *text) {
    for (int i = 0; i < FUNCTIONS; i++) functions[i].calls = 0;
    launches = clustered = 0;
    fault_count = 0;
    hook.call = NULL;
    while (*text) {
        const int length = (int)strcspn(text, ",");
        char item[200], name[48];
        long long n = 0;
        int code = 0;
        snprintf(item, sizeof item, "%.*s", length, text);
        if (strcmp(item, "keep") == 0) keep_all();
        else if (sscanf(item, "devices=%d", &code) == 1) settings.devices = code;
        else if (sscanf(item, "version=%d", &code) == 1) settings.version = code;
        else if (sscanf(item, "arch=%d", &code) == 1) settings.arch = code;
        else if (sscanf(item, "defer=%d", &code) == 1) settings.defer = code;
        else if (sscanf(item, "memory=%lld", &n) == 1) settings.memory = (uint64_t)n;
        else if (sscanf(item, "fail=%47[^:]:%lld:%d", name, &n, &code) == 3 && fault_count < FAULTS) {
            strcpy(faults[fault_count].function, name);
            faults[fault_count].n = n;
            faults[fault_count++].code = code;
        } else if (length > 0) misuse("what is the setting \"%s\"?", item);
        text += length + (text[length] == ',');
    }
}

__attribute__((constructor)) static void start(void) {
    const char *set = getenv("GQ_FAKE_CUDA");
    if (set) apply(set);
}

/* Every function begins with enter, which counts the call and says how it is to fail, and ends with leave. */
static int enter(const char *function) {
    pthread_mutex_lock(&lock);
    const int64_t n = ++*calls_of(function);
    if (hook.call && strcmp(hook.function, function) == 0 && --hook.n == 0) {
        void (*call)(void) = hook.call;
        hook.call = NULL;
        pthread_mutex_unlock(&lock);
        call();
        pthread_mutex_lock(&lock);
    }
    for (int k = 0; k < fault_count; k++)
        if (strcmp(faults[k].function, function) == 0 && (faults[k].n == 0 || faults[k].n == n)) return faults[k].code;
    return 0;
}

/* The call fails if it was told to, or if the driver was not initialized. */
#define ENTER                                            \
    const CUresult fault = enter(__func__);              \
    if (fault) return leave(fault);                      \
    if (!initialized) return leave(NOT_INITIALIZED)

/* The call does its work, and fails nevertheless if it was told to. */
#define ENTER_RELEASE const CUresult fault = enter(__func__)

/* ---- contexts: one primary context per device; a stack of current ones per thread */

struct context {
    int device, retained;
};

static struct context contexts[DEVICES];

struct stack {
    int depth;
    struct context *items[32];
};

static pthread_key_t stack_key;
static pthread_once_t stack_once = PTHREAD_ONCE_INIT;

static void end_stack(void *item) {
    struct stack *stack = item;
    pthread_mutex_lock(&lock);
    if (stack->depth) misuse("a thread ended with %d contexts pushed", stack->depth);
    pthread_mutex_unlock(&lock);
    free(stack);
}

static void make_key(void) { pthread_key_create(&stack_key, end_stack); }

static struct stack *own_stack(void) {
    pthread_once(&stack_once, make_key);
    struct stack *stack = pthread_getspecific(stack_key);
    if (!stack) {
        stack = calloc(1, sizeof *stack);
        pthread_setspecific(stack_key, stack);
    }
    return stack;
}

static struct context *current(const char *function) {
    const struct stack *stack = own_stack();
    if (!stack->depth) {
        misuse("%s without a current context", function);
        return NULL;
    }
    return stack->items[stack->depth - 1];
}

/* ---- memory */

enum kind { DEVICE, PINNED, GLOBAL };

struct memory {
    struct memory *next;
    enum kind kind;
    int device, kept;
    uint64_t address;
    size_t bytes;
    unsigned char *content; /* what the address stands for */
    void *mapping;
    size_t mapping_bytes;
};

static struct memory *memories;

static struct memory *find_memory(uint64_t address, size_t bytes) {
    for (struct memory *m = memories; m; m = m->next)
        if (address >= m->address && address - m->address <= m->bytes && bytes <= m->bytes - (address - m->address)) return m;
    return NULL;
}

/* The bytes of a device's memory, or pinned for the device -1. */
static uint64_t total(enum kind kind, int device) {
    uint64_t sum = 0;
    for (const struct memory *m = memories; m; m = m->next)
        if (m->kind == kind && m->device == device) sum += m->bytes;
    return sum;
}

static struct memory *make_memory(enum kind kind, int device, size_t bytes) {
    /* Two pages round the memory are nobody's. Device memory is aligned to 256 bytes and to no more, as the driver promises. */
    const size_t offset = kind == PINNED ? PAGE : PAGE + 256;
    struct memory *m = calloc(1, sizeof *m);
    m->mapping_bytes = (offset + bytes + PAGE - 1) / PAGE * PAGE + PAGE;
    m->mapping = mmap(NULL, m->mapping_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m->mapping == MAP_FAILED) {
        free(m);
        return NULL;
    }
    m->kind = kind;
    m->device = device;
    m->bytes = bytes;
    m->address = (uint64_t)(uintptr_t)m->mapping + offset;
    if (kind == PINNED) {
        m->content = (unsigned char *)(uintptr_t)m->address;
        mprotect(m->content, m->mapping_bytes - 2 * PAGE, PROT_READ | PROT_WRITE);
    } else {
        m->content = malloc(bytes);
    }
    memset(m->content, FILL, bytes);
    m->next = memories;
    memories = m;
    return m;
}

static void free_memory(struct memory *m) {
    struct memory **link = &memories;
    while (*link != m) link = &(*link)->next;
    *link = m->next;
    if (m->kind != PINNED) free(m->content);
    munmap(m->mapping, m->mapping_bytes);
    free(m);
}

/* ---- streams: work in the order in which it was put there */

enum work_kind { COPY, SET, WAIT, MARK };

struct stream;

struct work {
    struct work *next;
    uint64_t number; /* grows from one piece of work to the next, over all streams */
    enum work_kind kind;
    uint64_t to, from; /* COPY: addresses that the registry knows, unless host is set */
    size_t bytes;
    unsigned char *host; /* COPY: the source, if it was read when the copy was put here */
    int value;           /* SET */
    struct stream *other; /* WAIT: for this stream's work up to a number */
    uint64_t other_number;
};

struct stream {
    struct stream *next;
    struct context *context;
    unsigned flags; /* 1: has nothing to do with the legacy stream */
    int destroyed, kept;
    struct work *first, *last;
};

struct event {
    struct event *next;
    struct context *context;
    int destroyed, kept;
    struct stream *stream; /* that it was recorded on, or NULL */
    uint64_t number;
};

/* Destroyed ones stay in the lists, so that their use is noticed. */
static struct stream *streams, legacy[DEVICES];
static struct event *events;
static uint64_t number;

static unsigned char *content(uint64_t address, size_t bytes, const char *what) {
    const struct memory *m = find_memory(address, bytes);
    if (!m) misuse("%s: %zu bytes at %#llx are no memory any more", what, bytes, (unsigned long long)address);
    return m ? m->content + (address - m->address) : NULL;
}

static void run_until(struct stream *stream, uint64_t last);

static void run_work(struct stream *stream, const struct work *w) {
    if (stream >= legacy && stream < legacy + DEVICES) {
        for (struct stream *s = streams; s; s = s->next)
            if (!(s->flags & 1) && s->context == stream->context) run_until(s, w->number - 1);
    } else if (!(stream->flags & 1)) {
        run_until(&legacy[stream->context->device], w->number - 1);
    }
    unsigned char *to, *from;
    switch (w->kind) {
    case COPY:
        to = content(w->to, w->bytes, "the destination of a copy");
        from = w->host ? w->host : content(w->from, w->bytes, "the source of a copy");
        if (to && from) memcpy(to, from, w->bytes);
        break;
    case SET:
        to = content(w->to, w->bytes, "a memset");
        if (to) memset(to, w->value, w->bytes);
        break;
    case WAIT:
        if (w->other) run_until(w->other, w->other_number);
        break;
    case MARK:
        break;
    }
}

static void run_until(struct stream *stream, uint64_t last) {
    while (stream->first && stream->first->number <= last) {
        struct work *w = stream->first;
        stream->first = w->next;
        if (!stream->first) stream->last = NULL;
        run_work(stream, w);
        pending--;
        free(w->host);
        free(w);
    }
}

static void run_all(void) {
    for (int i = 0; i < DEVICES; i++) run_until(&legacy[i], UINT64_MAX);
    for (struct stream *s = streams; s; s = s->next) run_until(s, UINT64_MAX);
}

static struct work *add_work(struct stream *stream, enum work_kind kind) {
    struct work *w = calloc(1, sizeof *w);
    w->kind = kind;
    w->number = ++number;
    if (stream->last) stream->last->next = w;
    else stream->first = w;
    stream->last = w;
    pending++;
    return w;
}

static CUresult added(struct stream *stream) {
    if (!settings.defer) run_until(stream, UINT64_MAX);
    return SUCCESS;
}

/* Whether work that waits on a stream reads or writes this memory. */
static int uses(const struct stream *stream, const struct memory *m) {
    for (const struct work *w = stream->first; w; w = w->next) {
        if (w->kind > SET) continue;
        if (w->to >= m->address && w->to - m->address < m->bytes) return 1;
        if (w->kind == COPY && !w->host && w->from >= m->address && w->from - m->address < m->bytes) return 1;
    }
    return 0;
}

static int in_use(const struct memory *m) {
    for (int i = 0; i < DEVICES; i++)
        if (uses(&legacy[i], m)) return 1;
    for (const struct stream *s = streams; s; s = s->next)
        if (uses(s, m)) return 1;
    return 0;
}

/* The stream that a handle means in the current context; NULL after a misuse. */
static struct stream *find_stream(void *handle, const char *function) {
    struct context *context = current(function);
    if (!context) return NULL;
    if (!handle || handle == (void *)1) {
        legacy[context->device].context = context;
        return &legacy[context->device];
    }
    for (struct stream *s = streams; s; s = s->next) {
        if (s != handle) continue;
        if (s->destroyed) misuse("%s: stream %p was destroyed", function, handle);
        else if (s->context != context) misuse("%s: stream %p is of device %d, the context of device %d", function, handle, s->context->device, context->device);
        else return s;
        return NULL;
    }
    misuse("%s: %p is no stream", function, handle);
    return NULL;
}

static struct event *find_event(void *handle, const char *function) {
    for (struct event *e = events; e; e = e->next) {
        if (e != handle) continue;
        if (e->destroyed) break;
        return e;
    }
    misuse("%s: %p is no event, or was destroyed", function, handle);
    return NULL;
}

/* Whether a range is device memory of the current context. */
static int on_device(uint64_t address, size_t bytes, const char *function) {
    const struct context *context = current(function);
    const struct memory *m = find_memory(address, bytes);
    if (!context) return 0;
    if (!m || m->kind == PINNED) misuse("%s: %zu bytes at %#llx are not in one allocation of the device", function, bytes, (unsigned long long)address);
    else if (m->device != context->device) misuse("%s: memory of device %d in the context of device %d", function, m->device, context->device);
    else return 1;
    return 0;
}

/* ---- controls */

void fake_cuda_set(const char *text);
int64_t fake_cuda_count(const char *what);
void fake_cuda_hook(const char *function, int64_t n, void (*call)(void));

void fake_cuda_set(const char *text) {
    pthread_mutex_lock(&lock);
    apply(text);
    pthread_mutex_unlock(&lock);
}

static void keep_all(void) {
    for (struct memory *m = memories; m; m = m->next) m->kept = 1;
    for (struct stream *s = streams; s; s = s->next) s->kept = 1;
    for (struct event *e = events; e; e = e->next) e->kept = 1;
}

static int64_t live_memory(enum kind kind, int bytes) {
    int64_t sum = 0;
    for (const struct memory *m = memories; m; m = m->next)
        if (m->kind == kind && !m->kept) sum += bytes ? (int64_t)m->bytes : 1;
    return sum;
}

static int64_t live_streams(void) {
    int64_t count = 0;
    for (const struct stream *s = streams; s; s = s->next) count += !s->destroyed && !s->kept;
    return count;
}

static int64_t live_events(void) {
    int64_t count = 0;
    for (const struct event *e = events; e; e = e->next) count += !e->destroyed && !e->kept;
    return count;
}

int64_t fake_cuda_count(const char *what) {
    pthread_mutex_lock(&lock);
    const int64_t result = strcmp(what, "allocations") == 0    ? live_memory(DEVICE, 0)
                           : strcmp(what, "allocated") == 0    ? live_memory(DEVICE, 1)
                           : strcmp(what, "pinned") == 0       ? live_memory(PINNED, 0)
                           : strcmp(what, "pinned_bytes") == 0 ? live_memory(PINNED, 1)
                           : strcmp(what, "pinned_peak") == 0  ? pinned_peak
                           : strcmp(what, "streams") == 0      ? live_streams()
                           : strcmp(what, "events") == 0       ? live_events()
                           : strcmp(what, "modules") == 0      ? loaded_modules
                           : strcmp(what, "contexts") == 0     ? pushed
                           : strcmp(what, "retained") == 0     ? retained
                           : strcmp(what, "launches") == 0     ? launches
                           : strcmp(what, "clustered") == 0    ? clustered
                           : strcmp(what, "last_stream") == 0  ? (int64_t)last_stream
                           : strcmp(what, "pending") == 0      ? pending
                           : strcmp(what, "misuse") == 0       ? misuses
                                                               : *calls_of(what);
    return leave(0), result;
}

void fake_cuda_hook(const char *function, int64_t n, void (*call)(void)) {
    pthread_mutex_lock(&lock);
    snprintf(hook.function, sizeof hook.function, "%s", function);
    hook.n = n;
    hook.call = call;
    pthread_mutex_unlock(&lock);
}

/* Pinned memory, streams and events may be kept for the next load; device memory and contexts may not. */
__attribute__((destructor)) static void finish(void) {
    pthread_mutex_lock(&lock);
    for (const struct memory *m = memories; m; m = m->next)
        if (m->kind == DEVICE && !m->kept) misuse("%zu bytes of device memory at %#llx were not freed", m->bytes, (unsigned long long)m->address);
    if (pushed) misuse("%lld contexts were pushed and not popped", (long long)pushed);
    pthread_mutex_unlock(&lock);
}

/* ---- the driver API */

#define API __attribute__((visibility("default"))) CUresult

/* The prototypes that -Wmissing-prototypes would want are in no header here. */
#pragma GCC diagnostic ignored "-Wmissing-prototypes"

/* Bytes of shared memory that every launch may have, and that one may be allowed. */
enum { MULTIPROCESSORS = 132, SHARED = 49152, SHARED_OPTIN = 232448 };

API cuInit(unsigned flags) {
    const CUresult fault = enter(__func__);
    if (fault || flags) return leave(fault ? fault : INVALID_VALUE);
    initialized = 1;
    for (int i = 0; i < DEVICES; i++) contexts[i].device = i;
    return leave(SUCCESS);
}

API cuDriverGetVersion(int *version) {
    const CUresult fault = enter(__func__);
    if (fault) return leave(fault);
    *version = settings.version;
    return leave(SUCCESS);
}

API cuGetErrorName(CUresult error, const char **name) {
    const CUresult fault = enter(__func__);
    *name = NULL;
    for (size_t i = 0; !fault && i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == error) *name = errors[i].name;
    return leave(fault ? fault : *name ? SUCCESS : INVALID_VALUE);
}

API cuGetErrorString(CUresult error, const char **text) {
    const CUresult fault = enter(__func__);
    *text = NULL;
    for (size_t i = 0; !fault && i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == error) *text = errors[i].text;
    return leave(fault ? fault : *text ? SUCCESS : INVALID_VALUE);
}

API cuDeviceGetCount(int *count) {
    ENTER;
    *count = settings.devices;
    return leave(SUCCESS);
}

API cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER;
    if (ordinal < 0 || ordinal >= settings.devices) return leave(INVALID_DEVICE);
    *device = ordinal;
    return leave(SUCCESS);
}

API cuDeviceGetName(char *name, int length, CUdevice device) {
    ENTER;
    if (device < 0 || device >= settings.devices) return leave(INVALID_DEVICE);
    snprintf(name, (size_t)length, "Fake Device %d", device);
    return leave(SUCCESS);
}

API cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    ENTER;
    if (device < 0 || device >= settings.devices) return leave(INVALID_DEVICE);
    static const int values[][2] = {{1, 1024}, {8, SHARED}, {10, 32}, {16, MULTIPROCESSORS}, {38, 52428800}, {41, 1}, {81, 233472}, {97, SHARED_OPTIN}};
    *value = attribute == 75 ? settings.arch / 10 : attribute == 76 ? settings.arch % 10 : 0;
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        if (values[i][0] == attribute) *value = values[i][1];
    return leave(SUCCESS);
}

API cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    ENTER;
    if (device < 0 || device >= settings.devices) return leave(INVALID_DEVICE);
    *bytes = settings.memory;
    return leave(SUCCESS);
}

API cuDevicePrimaryCtxRetain(struct context **context, CUdevice device) {
    ENTER;
    if (device < 0 || device >= settings.devices) return leave(INVALID_DEVICE);
    contexts[device].retained++;
    retained++;
    *context = &contexts[device];
    return leave(SUCCESS);
}

API cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    ENTER_RELEASE;
    if (device < 0 || device >= DEVICES || !contexts[device].retained) misuse("%s: device %d is not retained", __func__, device);
    else {
        contexts[device].retained--;
        retained--;
    }
    return leave(fault);
}

API cuCtxGetCurrent(struct context **context) {
    ENTER;
    const struct stack *stack = own_stack();
    *context = stack->depth ? stack->items[stack->depth - 1] : NULL;
    return leave(SUCCESS);
}

API cuCtxPushCurrent_v2(struct context *context) {
    ENTER;
    struct stack *stack = own_stack();
    if (context < contexts || context >= contexts + DEVICES || !context->retained) {
        misuse("%s: %p is no context that is retained", __func__, (void *)context);
        return leave(INVALID_CONTEXT);
    }
    if (stack->depth == 32) {
        misuse("%s: 32 contexts are pushed already", __func__);
        return leave(INVALID_CONTEXT);
    }
    stack->items[stack->depth++] = context;
    pushed++;
    return leave(SUCCESS);
}

API cuCtxPopCurrent_v2(struct context **context) {
    ENTER_RELEASE;
    struct stack *stack = own_stack();
    if (!stack->depth) {
        misuse("%s: this thread has pushed no context", __func__);
        return leave(INVALID_CONTEXT);
    }
    stack->depth--;
    pushed--;
    if (context) *context = stack->items[stack->depth];
    return leave(fault);
}

API cuCtxSynchronize(void) {
    ENTER_RELEASE;
    if (current(__func__)) run_all();
    return leave(fault);
}

struct function {
    struct function *next;
    struct context *context;
    char name[100];
    unsigned shared; /* dynamic shared memory that it may have */
};

struct module {
    struct module *next;
    struct context *context;
    struct function *functions;
    struct memory *global;
    char global_name[100];
};

static struct module *modules;

API cuModuleLoadData(struct module **module, const void *image) {
    ENTER;
    struct context *context = current(__func__);
    if (!context) return leave(INVALID_CONTEXT);
    if (!image) return leave(INVALID_VALUE);
    struct module *m = calloc(1, sizeof *m);
    m->context = context;
    m->next = modules;
    modules = m;
    loaded_modules++;
    *module = m;
    return leave(SUCCESS);
}

static struct module *find_module(const struct module *module, const char *function) {
    struct module *m = modules;
    while (m && m != module) m = m->next;
    if (!m) misuse("%s: %p is no module", function, (const void *)module);
    return m;
}

API cuModuleUnload(struct module *module) {
    ENTER_RELEASE;
    struct module *m = find_module(module, __func__);
    if (!m) return leave(INVALID_HANDLE);
    struct module **link = &modules;
    while (*link != m) link = &(*link)->next;
    *link = m->next;
    while (m->functions) {
        struct function *f = m->functions;
        m->functions = f->next;
        free(f);
    }
    if (m->global) free_memory(m->global);
    free(m);
    loaded_modules--;
    return leave(fault);
}

API cuModuleGetFunction(struct function **function, struct module *module, const char *name) {
    ENTER;
    struct module *m = find_module(module, __func__);
    if (!m) return leave(INVALID_HANDLE);
    if (!name || !*name) return leave(NOT_FOUND);
    struct function *f = calloc(1, sizeof *f);
    f->context = m->context;
    f->shared = SHARED;
    snprintf(f->name, sizeof f->name, "%s", name);
    f->next = m->functions;
    m->functions = f;
    *function = f;
    return leave(SUCCESS);
}

/* A module has one variable, of 64 KiB, under whatever name. */
API cuModuleGetGlobal_v2(CUdeviceptr *address, size_t *bytes, struct module *module, const char *name) {
    ENTER;
    struct module *m = find_module(module, __func__);
    if (!m) return leave(INVALID_HANDLE);
    if (m->global && strcmp(m->global_name, name) != 0) return leave(NOT_FOUND);
    if (!m->global) {
        m->global = make_memory(GLOBAL, m->context->device, 65536);
        snprintf(m->global_name, sizeof m->global_name, "%s", name);
    }
    if (address) *address = m->global->address;
    if (bytes) *bytes = m->global->bytes;
    return leave(SUCCESS);
}

static int is_function(const struct function *function, const char *caller) {
    for (const struct module *m = modules; m; m = m->next)
        for (const struct function *f = m->functions; f; f = f->next)
            if (f == function) return 1;
    misuse("%s: %p is no kernel", caller, (const void *)function);
    return 0;
}

API cuFuncSetAttribute(struct function *function, int attribute, int value) {
    ENTER;
    if (!is_function(function, __func__)) return leave(INVALID_HANDLE);
    if (attribute == 8) { /* dynamic shared memory */
        if (value < 0 || value > SHARED_OPTIN) {
            misuse("%s: %d bytes of shared memory for %s", __func__, value, function->name);
            return leave(INVALID_VALUE);
        }
        function->shared = (unsigned)value;
    }
    return leave(SUCCESS);
}

API cuFuncLoad(struct function *function) {
    ENTER;
    return leave(is_function(function, __func__) ? SUCCESS : INVALID_HANDLE);
}

/* CUlaunchConfig and CUlaunchAttribute. */
struct launch_attribute {
    int id;
    union {
        int enabled;
        unsigned size[3];
        uint64_t words[8];
    } value;
};

struct launch {
    unsigned grid[3], block[3], shared;
    void *stream;
    const struct launch_attribute *attributes;
    unsigned count;
};

static CUresult launch(struct function *function, const struct launch *l, void **parameters, void **extra, const char *caller) {
    struct stream *stream = find_stream(l->stream, caller);
    if (!stream || !is_function(function, caller)) return INVALID_HANDLE;
    if (function->context != stream->context) misuse("%s: %s is of device %d", caller, function->name, function->context->device);
    const unsigned *g = l->grid, *b = l->block;
    /* What no launch may be: empty, or larger than devices allow. */
    if (!g[0] || !g[1] || !g[2] || !b[0] || !b[1] || !b[2] || g[0] > 0x7fffffff || g[1] > 65535 || g[2] > 65535 || (uint64_t)b[0] * b[1] * b[2] > 1024) {
        misuse("%s: %s with a grid of %ux%ux%u and blocks of %ux%ux%u", caller, function->name, g[0], g[1], g[2], b[0], b[1], b[2]);
        return INVALID_VALUE;
    }
    if (l->shared > function->shared) {
        misuse("%s: %s with %u bytes of shared memory, allowed are %u", caller, function->name, l->shared, function->shared);
        return INVALID_VALUE;
    }
    if (!parameters && !extra) misuse("%s: %s without parameters", caller, function->name);
    launches++;
    last_stream = (uint64_t)(uintptr_t)l->stream;
    add_work(stream, MARK);
    return added(stream);
}

API cuLaunchKernel(struct function *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *handle, void **parameters, void **extra) {
    ENTER;
    const struct launch l = {{gx, gy, gz}, {bx, by, bz}, shared, handle, NULL, 0};
    return leave(launch(function, &l, parameters, extra, __func__));
}

/* A cluster that every device takes, and that the grid is whole clusters of. */
static int is_cluster(const unsigned size[3], const unsigned grid[3]) {
    return size[0] >= 1 && size[0] <= 8 && grid[0] % size[0] == 0 && size[1] == 1 && size[2] == 1;
}

API cuOccupancyMaxActiveClusters(int *clusters, struct function *function, const struct launch *l) {
    ENTER;
    if (!is_function(function, __func__)) return leave(INVALID_HANDLE);
    if (l->count != 1 || l->attributes[0].id != 4 || !is_cluster(l->attributes[0].value.size, l->grid) || l->shared > function->shared) {
        misuse("%s: a launch of %s that is of no clusters", __func__, function->name);
        return leave(INVALID_VALUE);
    }
    *clusters = (int)(MULTIPROCESSORS / l->attributes[0].value.size[0]);
    return leave(SUCCESS);
}

API cuLaunchKernelEx(const struct launch *l, struct function *function, void **parameters, void **extra) {
    ENTER;
    if (l->count && !l->attributes) return leave(INVALID_VALUE);
    for (unsigned i = 0; i < l->count; i++) {
        /* Known here are programmatic stream serialization and clusters, which devices have since Hopper. */
        const struct launch_attribute *a = &l->attributes[i];
        if (a->id == 6 && (a->value.enabled == 0 || a->value.enabled == 1) && settings.arch >= 90) continue;
        if (a->id == 4 && is_cluster(a->value.size, l->grid) && settings.arch >= 90) {
            clustered++;
            continue;
        }
        misuse("%s: attribute %d with the value %d on a device of architecture %d", __func__, a->id, a->value.enabled, settings.arch);
        return leave(INVALID_VALUE);
    }
    return leave(launch(function, l, parameters, extra, __func__));
}

API cuTensorMapEncodeTiled(void *map, int type, unsigned dimensions, CUdeviceptr address, const uint64_t *sizes, const uint64_t *strides, const unsigned *box,
                           const unsigned *steps, int interleave, int swizzle, int promotion, int fill) {
    ENTER;
    if (!current(__func__)) return leave(INVALID_CONTEXT);
    /* What the documentation asks of the elements that are used here, of one and two bytes, and of swizzled boxes. */
    const unsigned size = type == 0 ? 1 : type == 1 ? 2 : 0, row = size * box[0];
    int good = size && (uintptr_t)map % 64 == 0 && address % 16 == 0 && (dimensions == 2 || dimensions == 3) && !interleave && !fill && promotion == 3 &&
               ((swizzle == 2 && row <= 64) || (swizzle == 3 && row <= 128)) && row % 16 == 0;
    for (unsigned i = 0; i < dimensions; i++) {
        good = good && sizes[i] >= 1 && sizes[i] <= (uint64_t)1 << 32 && box[i] >= 1 && box[i] <= 256 && steps[i] == 1;
        if (i > 0) good = good && strides[i - 1] % 16 == 0 && strides[i - 1] < (uint64_t)1 << 40;
    }
    if (!good) {
        misuse("%s: a map that the driver would refuse", __func__);
        return leave(INVALID_VALUE);
    }
    memset(map, 0x5a, 128);
    return leave(SUCCESS);
}

API cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    ENTER;
    const struct context *context = current(__func__);
    if (!context) return leave(INVALID_CONTEXT);
    if (!bytes) return leave(INVALID_VALUE);
    const uint64_t used = total(DEVICE, context->device);
    if (bytes > settings.memory || used > settings.memory - bytes) return leave(OUT_OF_MEMORY);
    const struct memory *m = make_memory(DEVICE, context->device, bytes);
    if (!m) return leave(OUT_OF_MEMORY);
    *address = m->address;
    return leave(SUCCESS);
}

static CUresult release(uint64_t address, enum kind kind, const char *function) {
    struct memory *m = memories;
    while (m && (m->address != address || m->kind != kind)) m = m->next;
    if (!m) {
        misuse("%s: nothing was allocated at %#llx, or it was freed already", function, (unsigned long long)address);
        return INVALID_VALUE;
    }
    if (in_use(m)) {
        misuse("%s: work on these %zu bytes is pending", function, m->bytes);
        run_all();
    }
    free_memory(m);
    return SUCCESS;
}

API cuMemFree_v2(CUdeviceptr address) {
    ENTER_RELEASE;
    const struct context *context = current(__func__);
    if (!context) return leave(INVALID_CONTEXT);
    const CUresult result = release(address, DEVICE, __func__);
    return leave(fault ? fault : result);
}

API cuMemHostAlloc(void **address, size_t bytes, unsigned flags) {
    ENTER;
    (void)flags;
    if (!current(__func__)) return leave(INVALID_CONTEXT);
    if (!bytes) return leave(INVALID_VALUE);
    const struct memory *m = make_memory(PINNED, -1, bytes);
    if (!m) return leave(OUT_OF_MEMORY);
    *address = m->content;
    const int64_t pinned = (int64_t)total(PINNED, -1);
    if (pinned > pinned_peak) pinned_peak = pinned;
    return leave(SUCCESS);
}

API cuMemFreeHost(void *address) {
    ENTER_RELEASE;
    if (!current(__func__)) return leave(INVALID_CONTEXT);
    const CUresult result = release((uint64_t)(uintptr_t)address, PINNED, __func__);
    return leave(fault ? fault : result);
}

static CUresult copy_in(CUdeviceptr to, const void *from, size_t bytes, struct stream *stream, const char *function) {
    if (!bytes) return SUCCESS;
    if (!on_device(to, bytes, function)) return INVALID_VALUE;
    const struct memory *m = find_memory((uint64_t)(uintptr_t)from, bytes);
    if (m && m->kind != PINNED) {
        misuse("%s: the source %p is device memory", function, from);
        return INVALID_VALUE;
    }
    struct work *w = add_work(stream, COPY);
    w->to = to;
    w->from = (uint64_t)(uintptr_t)from;
    w->bytes = bytes;
    if (!m) { /* memory that is not pinned is read before the call returns */
        w->host = malloc(bytes);
        memcpy(w->host, from, bytes);
    }
    return added(stream);
}

static CUresult copy_out(void *to, CUdeviceptr from, size_t bytes, struct stream *stream, const char *function) {
    if (!bytes) return SUCCESS;
    if (!on_device(from, bytes, function)) return INVALID_VALUE;
    const struct memory *m = find_memory((uint64_t)(uintptr_t)to, bytes);
    if (m && m->kind != PINNED) {
        misuse("%s: the destination %p is device memory", function, to);
        return INVALID_VALUE;
    }
    if (!m) { /* memory that is not pinned is written before the call returns */
        run_until(stream, UINT64_MAX);
        memcpy(to, content(from, bytes, function), bytes);
        return SUCCESS;
    }
    struct work *w = add_work(stream, COPY);
    w->to = (uint64_t)(uintptr_t)to;
    w->from = from;
    w->bytes = bytes;
    return added(stream);
}

API cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, void *handle) {
    ENTER;
    struct stream *stream = find_stream(handle, __func__);
    return leave(stream ? copy_in(to, from, bytes, stream, __func__) : INVALID_HANDLE);
}

API cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, void *handle) {
    ENTER;
    struct stream *stream = find_stream(handle, __func__);
    return leave(stream ? copy_out(to, from, bytes, stream, __func__) : INVALID_HANDLE);
}

API cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) {
    ENTER;
    struct stream *stream = find_stream(NULL, __func__);
    if (!stream) return leave(INVALID_CONTEXT);
    const CUresult result = copy_in(to, from, bytes, stream, __func__);
    run_until(stream, UINT64_MAX);
    return leave(result);
}

API cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) {
    ENTER;
    struct stream *stream = find_stream(NULL, __func__);
    if (!stream) return leave(INVALID_CONTEXT);
    const CUresult result = copy_out(to, from, bytes, stream, __func__);
    run_until(stream, UINT64_MAX);
    return leave(result);
}

API cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, void *handle) {
    ENTER;
    struct stream *stream = find_stream(handle, __func__);
    if (!stream) return leave(INVALID_HANDLE);
    if (!bytes) return leave(SUCCESS);
    if (!on_device(to, bytes, __func__) || !on_device(from, bytes, __func__)) return leave(INVALID_VALUE);
    struct work *w = add_work(stream, COPY);
    w->to = to;
    w->from = from;
    w->bytes = bytes;
    return leave(added(stream));
}

static CUresult set(CUdeviceptr to, unsigned char value, size_t bytes, struct stream *stream, const char *function) {
    if (!bytes) return SUCCESS;
    if (!on_device(to, bytes, function)) return INVALID_VALUE;
    struct work *w = add_work(stream, SET);
    w->to = to;
    w->value = value;
    w->bytes = bytes;
    return added(stream);
}

API cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, void *handle) {
    ENTER;
    struct stream *stream = find_stream(handle, __func__);
    return leave(stream ? set(to, value, bytes, stream, __func__) : INVALID_HANDLE);
}

API cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) {
    ENTER;
    struct stream *stream = find_stream(NULL, __func__);
    return leave(stream ? set(to, value, bytes, stream, __func__) : INVALID_CONTEXT);
}

API cuMemGetInfo_v2(size_t *unused, size_t *all) {
    ENTER;
    const struct context *context = current(__func__);
    if (!context) return leave(INVALID_CONTEXT);
    *all = settings.memory;
    *unused = settings.memory - total(DEVICE, context->device);
    return leave(SUCCESS);
}

API cuStreamCreate(struct stream **stream, unsigned flags) {
    ENTER;
    struct context *context = current(__func__);
    if (!context) return leave(INVALID_CONTEXT);
    struct stream *s = calloc(1, sizeof *s);
    s->context = context;
    s->flags = flags;
    s->next = streams;
    streams = s;
    *stream = s;
    return leave(SUCCESS);
}

API cuStreamDestroy_v2(struct stream *handle) {
    ENTER_RELEASE;
    struct stream *stream = find_stream(handle, __func__);
    if (!stream || stream != handle) return leave(INVALID_HANDLE);
    run_until(stream, UINT64_MAX);
    stream->destroyed = 1;
    return leave(fault);
}

API cuStreamSynchronize(void *handle) {
    ENTER_RELEASE;
    struct stream *stream = find_stream(handle, __func__);
    if (!stream) return leave(INVALID_HANDLE);
    run_until(stream, UINT64_MAX);
    return leave(fault);
}

API cuStreamWaitEvent(void *handle, struct event *event, unsigned flags) {
    ENTER;
    (void)flags;
    struct stream *stream = find_stream(handle, __func__);
    const struct event *e = find_event(event, __func__);
    if (!stream || !e) return leave(INVALID_HANDLE);
    struct work *w = add_work(stream, WAIT);
    w->other = e->stream;
    w->other_number = e->number;
    return leave(added(stream));
}

API cuEventCreate(struct event **event, unsigned flags) {
    ENTER;
    (void)flags;
    struct context *context = current(__func__);
    if (!context) return leave(INVALID_CONTEXT);
    struct event *e = calloc(1, sizeof *e);
    e->context = context;
    e->next = events;
    events = e;
    *event = e;
    return leave(SUCCESS);
}

API cuEventRecord(struct event *event, void *handle) {
    ENTER;
    struct event *e = find_event(event, __func__);
    struct stream *stream = find_stream(handle, __func__);
    if (!stream || !e) return leave(INVALID_HANDLE);
    if (e->context != stream->context) {
        misuse("%s: an event of device %d on a stream of device %d", __func__, e->context->device, stream->context->device);
        return leave(INVALID_HANDLE);
    }
    e->number = add_work(stream, MARK)->number;
    e->stream = stream;
    return leave(added(stream));
}

API cuEventSynchronize(struct event *event) {
    ENTER_RELEASE;
    const struct event *e = find_event(event, __func__);
    if (!e) return leave(INVALID_HANDLE);
    if (e->stream) run_until(e->stream, e->number);
    return leave(fault);
}

API cuEventDestroy_v2(struct event *event) {
    ENTER_RELEASE;
    struct event *e = find_event(event, __func__);
    if (!e) return leave(INVALID_HANDLE);
    e->destroyed = 1;
    return leave(fault);
}

API cuPointerGetAttribute(void *value, int attribute, CUdeviceptr address) {
    ENTER;
    const struct memory *m = find_memory(address, 1);
    if (!m) return leave(INVALID_VALUE);
    switch (attribute) {
    case 2: /* memory type: 1 is the host's, 2 a device's */
        *(unsigned *)value = m->kind == PINNED ? 1 : 2;
        break;
    case 9: /* device ordinal */
        *(int *)value = m->kind == PINNED ? 0 : m->device;
        break;
    case 11: /* where the allocation starts */
        *(uint64_t *)value = m->address;
        break;
    case 12: /* and its size */
        *(size_t *)value = m->bytes;
        break;
    default:
        return leave(INVALID_VALUE);
    }
    return leave(SUCCESS);
}
