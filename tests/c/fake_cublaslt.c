/* A libcublasLt.so.13 without arithmetic: what libgquant uses of it, strict about how it is used, beside the fake driver (fake_cuda.c).
 *
 * A product fills the columns of y that it is for with the number of the call, on the stream. An algorithm holds the problem that it
 * was found for, and cublasLtMatmul compares it with the one that it is given, and the addresses with what was said of them. All that is
 * wrong is printed on stderr and counted.
 *
 * fake_lt_set takes settings separated by commas; calls are counted anew:
 *   fail=FUNCTION:N:STATUS  the Nth call of FUNCTION returns STATUS; N = 0 is every call
 *   none                    there is no algorithm for anything; epilogue: for nothing with an epilogue */
#define _GNU_SOURCE
#define FAKE "libcublasLt"
#include "fake_calls.h"
#include "fake_cublaslt.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
#pragma GCC diagnostic ignored "-Wmissing-prototypes"

enum { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15, CALLS = 4096, MAGIC = 0x17 };
enum kind { DESC = 1, LAYOUT, PREFERENCE };

static const struct {
    int status;
    const char *name, *text;
} statuses[] = {
    {0, "CUBLAS_STATUS_SUCCESS", "success"},
    {1, "CUBLAS_STATUS_NOT_INITIALIZED", "the library was not initialized"},
    {3, "CUBLAS_STATUS_ALLOC_FAILED", "the resource allocation failed"},
    {7, "CUBLAS_STATUS_INVALID_VALUE", "an unsupported value or parameter was passed to the function"},
    {13, "CUBLAS_STATUS_EXECUTION_FAILED", "the function failed to launch on the GPU"},
    {15, "CUBLAS_STATUS_NOT_SUPPORTED", "the functionality requested is not supported"},
};

struct item { /* of any kind: a descriptor */
    enum kind kind;
    int compute, scale, transpose_a;
    unsigned epilogue;
    uint64_t bias;
    int dtype;
    uint64_t rows, cols;
    int64_t ld;
    uint64_t workspace;
    uint32_t reduction, alignments[4];
};

/* What an algorithm is for; it fits into cublasLtMatmulAlgo_t. */
struct problem {
    uint32_t magic, dtype;
    uint32_t rows, cols, k, ld;
    uint64_t workspace;
    uint16_t alignments[4];
    uint16_t epilogue, bias_alignment;
};

struct result {
    uint64_t algorithm[8];
    size_t workspace;
    int status;
    float waves;
    int reserved[4];
};

/* The fake driver. */
static struct {
    int (*cuCtxGetCurrent)(void **);
    int (*cuPointerGetAttribute)(void *, int, uint64_t);
    int (*cuMemsetD8Async)(uint64_t, unsigned char, size_t, void *);
} cu;

static struct {
    char function[48];
    int64_t n;
    int status;
} fault;
static int none, no_epilogue;
static int64_t live;
static struct fake_lt_call calls[CALLS];
static int call_count;
static void *handles[8]; /* contexts; a handle is the address of one here */

static int enter(const char *function) {
    pthread_mutex_lock(&lock);
    const int64_t n = ++*calls_of(function);
    return strcmp(fault.function, function) == 0 && (fault.n == 0 || fault.n == n) ? fault.status : 0;
}

#define ENTER                            \
    const int failed = enter(__func__);  \
    if (failed) return leave(failed)

API void fake_lt_set(const char *text) {
    pthread_mutex_lock(&lock);
    memset(functions, 0, sizeof functions);
    memset(&fault, 0, sizeof fault);
    none = no_epilogue = call_count = 0;
    while (*text) {
        const int length = (int)strcspn(text, ",");
        char item[100];
        long long n;
        snprintf(item, sizeof item, "%.*s", length, text);
        if (strcmp(item, "none") == 0) none = 1;
        else if (strcmp(item, "epilogue") == 0) no_epilogue = 1;
        else if (sscanf(item, "fail=%47[^:]:%lld:%d", fault.function, &n, &fault.status) == 3) fault.n = n;
        else misuse("what is the setting \"%s\"?", item);
        text += length + (text[length] == ',');
    }
    pthread_mutex_unlock(&lock);
}

API int64_t fake_lt_count(const char *what) {
    pthread_mutex_lock(&lock);
    const int64_t count = strcmp(what, "misuse") == 0 ? misuses : strcmp(what, "live") == 0 ? live : *calls_of(what);
    return leave(0), count;
}

API struct fake_lt_call fake_lt_call(int n) { return calls[n]; }

/* ---- what is asked of the driver */

static void *context(const char *function) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW), *current = NULL;
    *(void **)&cu.cuCtxGetCurrent = dlsym(driver, "cuCtxGetCurrent");
    *(void **)&cu.cuPointerGetAttribute = dlsym(driver, "cuPointerGetAttribute");
    *(void **)&cu.cuMemsetD8Async = dlsym(driver, "cuMemsetD8Async");
    cu.cuCtxGetCurrent(&current);
    if (!current) misuse("%s without a current context", function);
    return current;
}

/* All these bytes are memory of a device. */
static void on_device(const char *what, uint64_t address, uint64_t bytes) {
    uint64_t start = 0;
    size_t size = 0;
    if (bytes == 0) return;
    if (cu.cuPointerGetAttribute(&start, 11, address) || cu.cuPointerGetAttribute(&size, 12, address) || address - start + bytes > size)
        misuse("%s: %llu bytes at %#llx are no device memory", what, (unsigned long long)bytes, (unsigned long long)address);
}

/* ---- the library */

API const char *cublasLtGetStatusName(int status) {
    for (size_t i = 0; i < sizeof statuses / sizeof *statuses; i++)
        if (statuses[i].status == status) return statuses[i].name;
    return "unknown";
}

API const char *cublasLtGetStatusString(int status) {
    for (size_t i = 0; i < sizeof statuses / sizeof *statuses; i++)
        if (statuses[i].status == status) return statuses[i].text;
    return "unknown";
}

API int cublasLtCreate(void **handle) {
    ENTER;
    int i = 0;
    while (handles[i]) i++;
    handles[i] = context(__func__);
    *handle = &handles[i];
    return leave(SUCCESS);
}

static int create(struct item **item, enum kind kind) {
    *item = calloc(1, sizeof **item);
    (*item)->kind = kind;
    live++;
    return SUCCESS;
}

static int destroy(struct item *item, enum kind kind, const char *function) {
    if (!item || item->kind != kind) {
        misuse("%s: %p is none", function, (void *)item);
        return INVALID_VALUE;
    }
    memset(item, 0, sizeof *item);
    free(item);
    live--;
    return SUCCESS;
}

API int cublasLtMatmulDescCreate(struct item **item, int compute, int scale) {
    ENTER;
    create(item, DESC);
    (*item)->compute = compute;
    (*item)->scale = scale;
    (*item)->epilogue = 1;
    return leave(SUCCESS);
}

API int cublasLtMatmulDescDestroy(struct item *item) {
    ENTER;
    return leave(destroy(item, DESC, __func__));
}

/* One of an item's members, by its attribute. */
static int set(const char *function, void *member, size_t size, const void *value, size_t bytes) {
    if (!member || size != bytes) {
        misuse("%s: an attribute that is not known here, or has other than %zu bytes", function, bytes);
        return INVALID_VALUE;
    }
    memcpy(member, value, bytes);
    return SUCCESS;
}

API int cublasLtMatmulDescSetAttribute(struct item *item, int attribute, const void *value, size_t bytes) {
    ENTER;
    void *member = attribute == 3 ? (void *)&item->transpose_a : attribute == 7 ? (void *)&item->epilogue : attribute == 8 ? (void *)&item->bias : NULL;
    return leave(set(__func__, member, attribute == 8 ? 8 : 4, value, bytes));
}

API int cublasLtMatrixLayoutCreate(struct item **item, int dtype, uint64_t rows, uint64_t cols, int64_t ld) {
    ENTER;
    create(item, LAYOUT);
    (*item)->dtype = dtype;
    (*item)->rows = rows;
    (*item)->cols = cols;
    (*item)->ld = ld;
    if (rows == 0 || cols == 0 || ld < (int64_t)rows) misuse("a layout of %lld rows and %lld columns, %lld apart", (long long)rows, (long long)cols, (long long)ld);
    return leave(SUCCESS);
}

API int cublasLtMatrixLayoutDestroy(struct item *item) {
    ENTER;
    return leave(destroy(item, LAYOUT, __func__));
}

API int cublasLtMatmulPreferenceCreate(struct item **item) {
    ENTER;
    create(item, PREFERENCE);
    (*item)->reduction = 7;
    for (int i = 0; i < 4; i++) (*item)->alignments[i] = 256;
    return leave(SUCCESS);
}

API int cublasLtMatmulPreferenceDestroy(struct item *item) {
    ENTER;
    return leave(destroy(item, PREFERENCE, __func__));
}

API int cublasLtMatmulPreferenceSetAttribute(struct item *item, int attribute, const void *value, size_t bytes) {
    ENTER;
    void *member = attribute == 1                     ? (void *)&item->workspace
                   : attribute == 3                   ? (void *)&item->reduction
                   : attribute >= 5 && attribute <= 8 ? (void *)&item->alignments[attribute - 5]
                                                      : NULL;
    return leave(set(__func__, member, attribute == 1 ? 8 : 4, value, bytes));
}

/* The problem that descriptors describe: C = Aᵀ · B. */
static struct problem problem(const char *function, const void *handle, const struct item *desc, const struct item *a, const struct item *b,
                              const struct item *c, const struct item *d) {
    struct problem p;
    memset(&p, 0, sizeof p);
    if (handle < (void *)handles || handle >= (void *)(handles + 8) || *(void *const *)handle != context(function))
        misuse("%s: the handle is none, or of another device", function);
    if (desc->compute != 68 || desc->scale != 0 || desc->transpose_a != 1) misuse("%s: another operation than float32 sums of Aᵀ · B", function);
    if (a->rows != b->rows || a->cols != c->rows || b->cols != c->cols || c != d) misuse("%s: matrices that do not fit one another", function);
    if (a->dtype != b->dtype || a->dtype != c->dtype) misuse("%s: several dtypes", function);
    if (desc->epilogue != 1 && (desc->epilogue != 4 || !desc->bias)) misuse("%s: epilogue %u with a bias at %#llx", function, desc->epilogue, (unsigned long long)desc->bias);
    p.magic = MAGIC;
    p.dtype = (uint32_t)a->dtype;
    p.rows = (uint32_t)c->rows;
    p.cols = (uint32_t)c->cols;
    p.k = (uint32_t)a->rows;
    p.ld = (uint32_t)c->ld;
    p.epilogue = (uint16_t)desc->epilogue;
    return p;
}

API int cublasLtMatmulAlgoGetHeuristic(void *handle, struct item *desc, struct item *a, struct item *b, struct item *c, struct item *d, struct item *preference,
                                       int wanted, struct result *results, int *count) {
    ENTER;
    struct problem p = problem(__func__, handle, desc, a, b, c, d);
    if (wanted != 1) misuse("%d algorithms are wanted", wanted);
    if (preference->reduction != 2) misuse("sums may be split in ways %u", preference->reduction);
    p.workspace = preference->workspace;
    for (int i = 0; i < 4; i++) p.alignments[i] = (uint16_t)preference->alignments[i];
    p.bias_alignment = (uint16_t)(desc->epilogue == 4 ? desc->bias & -desc->bias : 1);
    *count = 0;
    if (none || (no_epilogue && desc->epilogue != 1)) return leave(no_epilogue ? NOT_SUPPORTED : SUCCESS);
    memset(results, 0, sizeof *results);
    memcpy(results->algorithm, &p, sizeof p);
    results->workspace = p.workspace;
    *count = 1;
    return leave(SUCCESS);
}

API int cublasLtMatmul(void *handle, struct item *desc, const float *alpha, uint64_t a_at, struct item *a, uint64_t b_at, struct item *b, const float *beta,
                       uint64_t c_at, struct item *c, uint64_t d_at, struct item *d, const uint64_t *algorithm, uint64_t workspace, size_t workspace_bytes,
                       void *stream) {
    ENTER;
    struct problem p = problem(__func__, handle, desc, a, b, c, d), of;
    const uint64_t size = p.dtype == 0 ? 4 : 2, at[] = {a_at, b_at, c_at, d_at};
    memcpy(&of, algorithm, sizeof of);
    for (int i = 0; i < 4; i++) {
        if (of.alignments[i] == 0 || at[i] % of.alignments[i]) misuse("matrix %d at %#llx, said to be aligned to %d", i, (unsigned long long)at[i], of.alignments[i]);
        p.alignments[i] = of.alignments[i];
    }
    if (desc->epilogue == 4 && desc->bias % of.bias_alignment) misuse("a bias at %#llx", (unsigned long long)desc->bias);
    if (workspace % 16) misuse("a workspace at %#llx", (unsigned long long)workspace);
    p.bias_alignment = of.bias_alignment;
    p.workspace = workspace_bytes;
    if (memcmp(&p, &of, sizeof p) != 0) misuse("an algorithm for another problem");
    if (c_at != d_at || *alpha != 1 || (*beta != 0 && *beta != 1)) misuse("alpha %g, beta %g", *alpha, *beta);
    on_device("A", a_at, ((a->cols - 1) * (uint64_t)a->ld + a->rows) * size);
    on_device("B", b_at, ((b->cols - 1) * (uint64_t)b->ld + b->rows) * size);
    on_device("D", d_at, ((d->cols - 1) * (uint64_t)d->ld + d->rows) * size);
    on_device("the workspace", workspace, workspace_bytes);
    if (desc->epilogue == 4) on_device("the bias", desc->bias, d->rows * size);
    if (call_count < CALLS) {
        const struct fake_lt_call call = {a_at, b_at, d_at, desc->epilogue == 4 ? desc->bias : 0, workspace, workspace_bytes, d->rows, d->cols, a->rows, *beta == 1};
        calls[call_count] = call;
    }
    call_count++;
    for (uint64_t i = 0; i < d->cols; i++) {
        const int code = cu.cuMemsetD8Async(d_at + i * (uint64_t)d->ld * size, (unsigned char)call_count, d->rows * size, stream);
        if (code) return leave(EXECUTION_FAILED);
    }
    return leave(SUCCESS);
}
