/* Every function with every argument wrong, one at a time: NULL, 0, -1, huge, one too few, one too many. Nothing may crash, each
 * gives a status and a message that names the function (and a NULL argument), results stay untouched and out-parameters are 0.
 *
 * usage: arguments MODULES, the golden file modules.safetensors */
#include "check.h"

enum kind {
    NONE,
    FIXED,  /* not changed here */
    INPUT,  /* address, pointer or text that must not be NULL */
    RESULT, /* buffer of .bytes that is written; untouched after a failure */
    OUT,    /* out-parameter of .bytes; 0 after a failure */
    MAY,    /* the same, but it may be NULL */
    COUNT,  /* must be what it is */
    LENGTH, /* the same, but one less may do: two elements share a byte */
    NDIM,
    OFFSET, /* must not be negative or huge */
    SIZE,   /* must be what it is */
    LIMIT,  /* must not be more */
    DTYPE,  /* of weights */
    FORMAT,
    ORDER,
    INDEX, /* below .bytes */
    HANDLE,
    KINDS
};

struct argument {
    enum kind kind;
    const char *name;
    uint64_t value;
    size_t bytes;
};

struct function {
    const char *name;
    gq_status (*call)(const uint64_t *a);
    struct argument arguments[11];
};

static gq_state *new_state;
static gq_model *new_model;
static gq_job *new_job;

/* Frees what a call with good arguments made. */
static void release(void) {
    OK(gq_state_free(new_state));
    OK(gq_free_model(new_model));
    OK(gq_job_free(new_job));
    new_state = NULL;
    new_model = NULL;
    new_job = NULL;
}

#define P(type, i) ((type *)(uintptr_t)a[i])
#define I32(i) ((int32_t)a[i])
#define I64(i) ((int64_t)a[i])
#define CALL(name, ...) \
    static gq_status call_##name(const uint64_t *a) { return gq_##name(__VA_ARGS__); }

CALL(device_count, P(int32_t, 0))
CALL(format_count, P(int32_t, 0))
CALL(format_get_info, I32(0), P(gq_format_info, 1))
CALL(format_by_name, P(const char, 0), P(gq_format, 1))
CALL(quantize_nf4, a[0], I32(1), I64(2), I64(3), a[4], I64(5), a[6], (size_t)a[7], NULL)
CALL(quantize_fp4, a[0], I32(1), I64(2), I64(3), a[4], I64(5), a[6], (size_t)a[7], NULL)
CALL(quantize_blockwise, a[0], I32(1), I64(2), I64(3), 0, a[4], I64(5), a[6], (size_t)a[7], NULL)
CALL(quantize_rows_int8, a[0], I32(1), I64(2), I64(3), 6.0f, a[4], I64(5), a[6], (size_t)a[7], a[8], (size_t)a[9], NULL)
CALL(codebook, P(const char, 0), P(float, 1), I64(2))
CALL(pack_4bit, a[0], I64(1), I32(2), a[3], (size_t)a[4], NULL)
CALL(unpack_4bit, a[0], (size_t)a[1], I32(2), a[3], I64(4), NULL)
CALL(quantized_layout, I32(0), P(const int64_t, 1), I32(2), NULL, P(gq_parts, 3))
CALL(quantize_workspace_size, I32(0), P(const int64_t, 1), I32(2), NULL, GQ_CPU, P(uint64_t, 3))
CALL(quantize, I32(0), a[1], I32(2), P(const int64_t, 3), I32(4), NULL, P(const gq_parts, 5), NULL, P(int64_t, 6))
CALL(state_create, P(const gq_state_desc, 0), P(gq_state *, 1))
CALL(state_get_desc, P(gq_state, 0), P(gq_state_desc, 1))
CALL(state_json, P(gq_state, 0), P(char, 1), (size_t)a[2], P(size_t, 3))
CALL(dequantize, P(gq_state, 0), a[1], (size_t)a[2], I32(3), NULL)
CALL(dequantize_range, P(gq_state, 0), I64(1), I64(2), a[3], (size_t)a[4], I32(5), NULL)
CALL(linear_workspace_size, P(gq_state, 0), I64(1), I32(2), NULL, P(uint64_t, 3), P(int32_t, 4))
CALL(linear, P(gq_state, 0), a[1], I64(2), I32(3), a[4], a[5], NULL)
CALL(load_model, P(const char, 0), NULL, P(gq_model *, 1))
CALL(model_tensor_count, P(gq_model, 0), P(int64_t, 1))
CALL(model_tensor, P(gq_model, 0), I64(1), P(gq_tensor_info, 2))
CALL(model_find_tensor, P(gq_model, 0), P(const char, 1), P(int64_t, 2))
CALL(model_read, P(gq_model, 0), I64(1), a[2], a[3], (size_t)a[4], NULL)
CALL(model_layer_count, P(gq_model, 0), P(int64_t, 1))
CALL(model_layer, P(gq_model, 0), I64(1), P(gq_layer_info, 2))
CALL(model_find_layer, P(gq_model, 0), P(const char, 1), P(int64_t, 2))
CALL(model_read_layer, P(gq_model, 0), I64(1), P(const gq_parts, 2), NULL)
CALL(model_read_all, P(gq_model, 0), P(const gq_buffer, 1), I64(2), P(const gq_parts, 3), I64(4), NULL)
CALL(model_state, P(gq_model, 0), I64(1), P(gq_state *, 2))
CALL(model_dequantize, P(gq_model, 0), I64(1), I64(2), I64(3), a[4], (size_t)a[5], I32(6), NULL)
CALL(model_metadata_count, P(gq_model, 0), P(int64_t, 1))
CALL(model_metadata, P(gq_model, 0), I64(1), P(const char *, 2), P(const char *, 3))
CALL(convert, P(const char, 0), P(gq_job *, 1))
CALL(dequantize_model, P(const char, 0), P(gq_job *, 1))
CALL(verify, P(const char, 0), P(gq_job *, 1))
CALL(diff, P(const char, 0), P(gq_job *, 1))
CALL(inspect, P(const char, 0), P(gq_job *, 1))
CALL(job_poll, P(gq_job, 0), P(gq_job_progress, 1))
CALL(job_cancel, P(gq_job, 0))
CALL(job_wait, P(gq_job, 0), I64(1), P(int32_t, 2))
CALL(job_result, P(gq_job, 0), P(const char *, 1))

/* What each kind is replaced with; NULL is 0. A size and a count are also one off. */
static const struct {
    int count;
    uint64_t values[8];
} wrong[KINDS] = {
    [INPUT] = {1, {0}},
    [RESULT] = {1, {0}},
    [OUT] = {1, {0}},
    [COUNT] = {6, {0, (uint64_t)-1, INT64_MAX, (uint64_t)INT64_MIN, 1ull << 48, 1ull << 62}},
    [LENGTH] = {6, {0, (uint64_t)-1, INT64_MAX, (uint64_t)INT64_MIN, 1ull << 48, 1ull << 62}},
    [NDIM] = {5, {0, (uint64_t)-1, 65, INT32_MAX, (uint64_t)INT32_MIN}},
    [OFFSET] = {4, {(uint64_t)-1, INT64_MAX, (uint64_t)INT64_MIN, 1ull << 62}},
    [SIZE] = {4, {0, SIZE_MAX, SIZE_MAX / 2 + 1, 1ull << 48}},
    [LIMIT] = {3, {SIZE_MAX, SIZE_MAX / 2 + 1, 1ull << 48}},
    [DTYPE] = {6, {0, (uint64_t)-1, 23, 255, INT32_MAX, GQ_I64}},
    [FORMAT] = {4, {0, (uint64_t)-1, 5, INT32_MAX}},
    [ORDER] = {2, {(uint64_t)-1, 2}},
    [INDEX] = {3, {(uint64_t)-1, INT64_MAX, (uint64_t)INT64_MIN}},
    [HANDLE] = {4, {0, 1, (uint64_t)-1, 0x7fff00000000}},
};

enum { FILL = 0xa5 };

static int all(const unsigned char *bytes, size_t count, unsigned char value) {
    for (size_t i = 0; i < count; i++)
        if (bytes[i] != value) return 0;
    return 1;
}

/* Calls with argument k replaced by value, and checks all that holds for failures. */
static void fails(const struct function *f, int k, uint64_t value) {
    uint64_t a[11];
    for (int i = 0; f->arguments[i].kind != NONE; i++) {
        const struct argument *argument = &f->arguments[i];
        a[i] = i == k ? value : argument->value;
        if (a[i] != 0 && i != k && (argument->kind == RESULT || argument->kind == OUT || argument->kind == MAY))
            memset((void *)(uintptr_t)a[i], FILL, argument->bytes);
    }
    const struct argument *changed = &f->arguments[k];
    const gq_status status = f->call(a);
    const gq_status want = changed->kind == HANDLE && value != 0 ? GQ_ERROR_INVALID_HANDLE
                           : changed->kind == INDEX              ? GQ_ERROR_NOT_FOUND
                                                                 : GQ_ERROR_INVALID_ARGUMENT;
    const char *message = gq_last_error();
    CHECK(status == want, "%s, %s = %lld: %s, want %s; the last error is: %s", f->name, changed->name, (long long)value,
          gq_status_name(status), gq_status_name(want), message);
    if (status == GQ_OK) return;
    CHECK(strncmp(message, f->name, strlen(f->name)) == 0, "%s: %s", f->name, message);
    CHECK(value != 0 || changed->kind > OUT || strstr(message, changed->name), "%s, %s is NULL: %s", f->name, changed->name, message);
    for (int i = 0; f->arguments[i].kind != NONE; i++) {
        const struct argument *argument = &f->arguments[i];
        if (i == k) continue;
        if (argument->kind == RESULT)
            CHECK(all((void *)(uintptr_t)a[i], argument->bytes, FILL), "%s, %s = %lld: %s was written", f->name, changed->name,
                  (long long)value, argument->name);
        if (argument->kind == OUT || argument->kind == MAY)
            CHECK(all((void *)(uintptr_t)a[i], argument->bytes, 0), "%s, %s = %lld: %s is not 0", f->name, changed->name,
                  (long long)value, argument->name);
    }
}

static void try_function(const struct function *f) {
    uint64_t a[11];
    int count = 0;
    for (; f->arguments[count].kind != NONE; count++) a[count] = f->arguments[count].value;
    const gq_status status = f->call(a);
    CHECK(status == GQ_OK, "%s with good arguments: %s", f->name, gq_last_error());
    release();
    for (int k = 0; k < count; k++) {
        const struct argument *argument = &f->arguments[k];
        for (int i = 0; i < wrong[argument->kind].count; i++) fails(f, k, wrong[argument->kind].values[i]);
        if (argument->kind == COUNT || argument->kind == SIZE) fails(f, k, argument->value - 1);
        if (argument->kind == COUNT || argument->kind == SIZE || argument->kind == LENGTH || argument->kind == LIMIT)
            fails(f, k, argument->value + 1);
        if (argument->kind == INDEX) fails(f, k, argument->bytes);
    }
}

enum { ROWS = 4, COLS = 96, N = ROWS * COLS, BLOCKSIZE = 64, BLOCKS = N / BLOCKSIZE };

static float weight[N], absmax[BLOCKS], restored[N];
static unsigned char packed[N / 2], bytes[N], outliers[COLS], nibbles[N]; /* nibbles stay 0 */
static const int64_t shape[2] = {ROWS, COLS};
static const char *modules;

/* Shapes that no weight has. */
static void try_shapes(void) {
    static const int64_t shapes[][3] = {
        {-1, 4, 4}, {4, -1, 4}, {INT64_MIN, 1, 1}, {INT64_MAX, 1, 1}, {INT64_MAX, INT64_MAX, INT64_MAX}, {1ll << 32, 1ll << 32, 1},
        {1ll << 40, 1ll << 40, 0},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        gq_parts parts = GQ_PARTS_INIT, layout;
        gq_state_desc desc = GQ_STATE_DESC_INIT;
        gq_state *state = (gq_state *)8;
        int64_t nonfinite;
        desc.format = GQ_FORMAT_NF4;
        desc.dtype = GQ_F32;
        desc.blocksize = BLOCKSIZE;
        desc.shape = GQ_ADDR(shapes[i]);
        desc.ndim = 3;
        STATUS(gq_quantized_layout(GQ_FORMAT_NF4, shapes[i], 3, NULL, &layout), GQ_ERROR_INVALID_ARGUMENT);
        STATUS(gq_quantize(GQ_FORMAT_NF4, GQ_ADDR(weight), GQ_F32, shapes[i], 3, NULL, &parts, NULL, &nonfinite), GQ_ERROR_INVALID_ARGUMENT);
        STATUS(gq_state_create(&desc, &state), GQ_ERROR_INVALID_ARGUMENT);
        CHECK(state == NULL, "%p after a failure", (void *)state);
    }
}

/* Each field of a nested weight's parts: no address, a size one off. Only nested_codebook may be missing, as it has a default. */
static void try_parts(void) {
    static const char *const names[] = {"packed", "absmax", "nested_absmax", "nested_codebook", "offset"};
    gq_quantize_options options = GQ_QUANTIZE_OPTIONS_INIT;
    options.nested = 1;
    gq_parts good;
    OK(gq_quantized_layout(GQ_FORMAT_NF4, shape, 2, &options, &good));
    CHECK(good.packed_bytes == N / 2 && good.absmax_bytes == BLOCKS && good.nested_absmax_bytes == 4 &&
              good.nested_codebook_bytes == 1024 && good.offset_bytes == 4, "a wrong layout");
    static float nested_absmax[1], nested_codebook[256], offset[1];
    good.packed = GQ_ADDR(packed);
    good.absmax = GQ_ADDR(bytes);
    good.nested_absmax = GQ_ADDR(nested_absmax);
    good.nested_codebook = GQ_ADDR(nested_codebook);
    good.offset = GQ_ADDR(offset);
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    desc.format = GQ_FORMAT_NF4;
    desc.dtype = GQ_F32;
    desc.blocksize = BLOCKSIZE;
    desc.nested_blocksize = 256;
    desc.shape = GQ_ADDR(shape);
    desc.ndim = 2;
    desc.parts = good;
    gq_state *state;
    OK(gq_quantize(GQ_FORMAT_NF4, GQ_ADDR(weight), GQ_F32, shape, 2, &options, &good, NULL, NULL));
    OK(gq_state_create(&desc, &state));
    OK(gq_state_free(state));
    for (int field = 0; field < 10; field++) {
        for (int change = 0; change < (field % 2 ? 3 : 1); change++) {
            if (field == 6) continue;
            gq_parts parts = good;
            uint64_t *value = &parts.packed + field; /* address, bytes, address, bytes, … */
            *value = field % 2 == 0 ? 0 : change == 0 ? *value - 1 : change == 1 ? *value + 1 : UINT64_MAX;
            STATUS(gq_quantize(GQ_FORMAT_NF4, GQ_ADDR(weight), GQ_F32, shape, 2, &options, &parts, NULL, NULL), GQ_ERROR_INVALID_ARGUMENT);
            SAYS(names[field / 2]);
            desc.parts = parts;
            STATUS(gq_state_create(&desc, &state), GQ_ERROR_INVALID_ARGUMENT);
            SAYS(names[field / 2]);
        }
    }
}

/* Where to run: only places that exist. */
static void try_exec(void) {
    int32_t devices = 0;
    OK(gq_device_count(&devices));
    const gq_status absent = devices ? GQ_ERROR_NOT_FOUND : GQ_ERROR_UNSUPPORTED;
    gq_exec exec = GQ_EXEC_INIT;
    gq_device_info info = GQ_DEVICE_INFO_INIT;
    gq_load_options options = GQ_LOAD_OPTIONS_INIT;
    gq_model *model = (gq_model *)8;
    const int32_t missing[] = {devices, INT32_MAX}; /* one behind the last */
    for (int i = 0; i < 2; i++) {
        exec.device = options.device = missing[i];
        STATUS(gq_quantize_nf4(GQ_ADDR(weight), GQ_F32, N, BLOCKSIZE, GQ_ADDR(absmax), BLOCKS, GQ_ADDR(packed), N / 2, &exec), absent);
        STATUS(gq_quantize_rows_int8(GQ_ADDR(weight), GQ_F32, ROWS, COLS, 0, GQ_ADDR(absmax), ROWS, GQ_ADDR(bytes), N, 0, 0, &exec), absent);
        STATUS(gq_device_get_info(missing[i], &info), absent);
        CHECK(info.name[0] == 0 && info.major == 0, "a device that is not there is described");
        STATUS(gq_device_prepare(missing[i]), absent);
        STATUS(gq_load_model(modules, &options, &model), absent);
        CHECK(model == NULL, "a model after a failure");
    }
    const int32_t wrong[] = {-2, INT32_MIN};
    for (int i = 0; i < 2; i++) {
        uint64_t size = 7;
        exec.device = options.device = wrong[i];
        STATUS(gq_quantize_nf4(GQ_ADDR(weight), GQ_F32, N, BLOCKSIZE, GQ_ADDR(absmax), BLOCKS, GQ_ADDR(packed), N / 2, &exec), GQ_ERROR_INVALID_ARGUMENT);
        SAYS("exec.device");
        STATUS(gq_load_model(modules, &options, &model), GQ_ERROR_INVALID_ARGUMENT);
        SAYS("device");
        STATUS(gq_quantize_workspace_size(GQ_FORMAT_NF4, shape, 2, NULL, wrong[i], &size), GQ_ERROR_INVALID_ARGUMENT);
        SAYS("device");
        CHECK(size == 0, "%d bytes after a failure", (int)size);
        CHECK(gq_device_get_info(wrong[i], &info) == absent && gq_device_prepare(wrong[i]) == absent, "%s", gq_last_error());
    }
    STATUS(gq_device_get_info(0, NULL), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("info");
    exec.device = GQ_CPU;
    exec.threads = -1;
    STATUS(gq_quantize_nf4(GQ_ADDR(weight), GQ_F32, N, BLOCKSIZE, GQ_ADDR(absmax), BLOCKS, GQ_ADDR(packed), N / 2, &exec), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("threads");
    exec.threads = INT32_MAX;
    OK(gq_quantize_nf4(GQ_ADDR(weight), GQ_F32, N, BLOCKSIZE, GQ_ADDR(absmax), BLOCKS, GQ_ADDR(packed), N / 2, &exec));
}

/* Nothing is something: no elements need no buffers. */
static void try_nothing(gq_state *state) {
    OK(gq_quantize_nf4(0, GQ_F32, 0, BLOCKSIZE, 0, 0, 0, 0, NULL));
    OK(gq_quantize_fp4(0, GQ_F16, 0, BLOCKSIZE, 0, 0, 0, 0, NULL));
    OK(gq_quantize_blockwise(0, GQ_BF16, 0, BLOCKSIZE, 0, 0, 0, 0, 0, NULL));
    OK(gq_quantize_rows_int8(0, GQ_F32, 0, 0, 0, 0, 0, 0, 0, 0, 0, NULL));
    OK(gq_quantize_rows_int8(GQ_ADDR(weight), GQ_F32, ROWS, COLS, 6, GQ_ADDR(absmax), ROWS, GQ_ADDR(bytes), N, 0, 0, NULL));
    OK(gq_pack_4bit(0, 0, GQ_HIGH_NIBBLE_FIRST, 0, 0, NULL));
    OK(gq_unpack_4bit(0, 0, GQ_LOW_NIBBLE_FIRST, 0, 0, NULL));
    OK(gq_linear(state, 0, 0, GQ_BF16, 0, 0, NULL));
}

/* Thresholds that are none. */
static void try_thresholds(void) {
    const uint32_t bits[] = {0xbf800000, 0x7fc00000, 0xff800000, 0x80000001}; /* -1, NaN, -Inf, the smallest below 0 */
    for (int i = 0; i < 4; i++) {
        float threshold;
        memcpy(&threshold, &bits[i], 4);
        STATUS(gq_quantize_rows_int8(GQ_ADDR(weight), GQ_F32, ROWS, COLS, threshold, GQ_ADDR(absmax), ROWS, GQ_ADDR(bytes), N, 0, 0, NULL), GQ_ERROR_INVALID_ARGUMENT);
        SAYS("threshold");
    }
}

/* Texts that are no request. */
static void try_requests(void) {
    static gq_status (*const starts[])(const char *, gq_job **) = {gq_convert, gq_dequantize_model, gq_verify, gq_diff, gq_inspect};
    static const char *const requests[] = {"",      "{",     "null", "[]", "3", "\"x\"", "{\"source\": 3}", "{\"a\": []}", "{\"sauce\": \"x\"}",
                                           "{} {}", "{} }", "{}x",  "\xff"};
    for (size_t i = 0; i < sizeof starts / sizeof *starts; i++) {
        for (size_t k = 0; k < sizeof requests / sizeof *requests; k++) {
            gq_job *job = (gq_job *)8;
            const gq_status status = starts[i](requests[k], &job);
            CHECK(status == GQ_ERROR_INVALID_ARGUMENT && job == NULL, "function %d, request %s: %s, %p", (int)i, requests[k],
                  gq_status_name(status), (void *)job);
            if (status == GQ_OK) OK(gq_job_free(job));
        }
    }
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    modules = argv[1];
    for (int i = 0; i < N; i++) weight[i] = (float)(i % 37) - 18;
    gq_parts parts = GQ_PARTS_INIT;
    parts.packed = GQ_ADDR(packed);
    parts.packed_bytes = sizeof packed;
    parts.absmax = GQ_ADDR(absmax);
    parts.absmax_bytes = sizeof absmax;
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    desc.format = GQ_FORMAT_NF4;
    desc.dtype = GQ_F32;
    desc.blocksize = BLOCKSIZE;
    desc.shape = GQ_ADDR(shape);
    desc.ndim = 2;
    desc.parts = parts;

    gq_state *state = NULL;
    gq_model *model = NULL;
    gq_job *job = NULL;
    char request[4096];
    snprintf(request, sizeof request, "{\"source\": \"%s\"}", argv[1]);
    OK(gq_state_create(&desc, &state));
    OK(gq_load_model(argv[1], NULL, &model));
    OK(gq_inspect(request, &job));
    int64_t tensors = 0, layers = 0, metadata = 0, tensor = 0;
    OK(gq_model_tensor_count(model, &tensors));
    OK(gq_model_layer_count(model, &layers));
    OK(gq_model_metadata_count(model, &metadata));
    gq_tensor_info tensor_info = GQ_TENSOR_INFO_INIT;
    OK(gq_model_tensor(model, 0, &tensor_info));
    OK(gq_model_find_tensor(model, tensor_info.name, &tensor));
    gq_layer_info layer_info = GQ_LAYER_INFO_INIT;
    OK(gq_model_layer(model, 0, &layer_info));
    if (check_result()) return 1;

    const size_t tensor_bytes = (size_t)tensor_info.bytes;
    const size_t layer_bytes = (size_t)(layer_info.shape[0] * layer_info.shape[1] * 4);
    char *stored = malloc(tensor_bytes), *decoded = malloc(layer_bytes), json[1000];
    gq_parts layout, nothing = GQ_PARTS_INIT;
    gq_format_info format_info = GQ_FORMAT_INFO_INIT;
    gq_state_desc got = GQ_STATE_DESC_INIT;
    gq_job_progress progress = GQ_JOB_PROGRESS_INIT;
    int32_t i32;
    int64_t i64;
    uint64_t u64;
    /* Nothing is read where the address is 0. */
    gq_buffer *no_tensors = calloc((size_t)tensors, sizeof *no_tensors);
    gq_parts *no_layers = calloc((size_t)layers, sizeof *no_layers);
    gq_format format;
    size_t length;
    const char *key, *value;
    const char *dynamic = "dynamic", *nf4 = "nf4";
    float table[256];

#define BUFFER(kind, p, size) {kind, #p, GQ_ADDR(p), size}
#define TEXT(p) {INPUT, #p, GQ_ADDR(p), 0}
    const char *name = nf4, *path = argv[1];
    float *src = weight, *x = weight, *out = restored;
    unsigned char *codes = bytes;
    int32_t *count = &i32, *finished = &i32;
    gq_format_info *info = &format_info;
    int64_t *nonfinite = &i64, *index = &i64;

    const struct function flat[] = {
        {"gq_device_count", call_device_count, {BUFFER(OUT, count, 4)}},
        {"gq_format_count", call_format_count, {BUFFER(OUT, count, 4)}},
        {"gq_format_get_info", call_format_get_info, {{FORMAT, "format", GQ_FORMAT_NF4, 0}, BUFFER(INPUT, info, 0)}},
        {"gq_format_by_name", call_format_by_name, {TEXT(name), {OUT, "format", GQ_ADDR(&format), 4}}},
        {"gq_quantize_nf4", call_quantize_nf4,
         {BUFFER(INPUT, src, 0), {DTYPE, "dtype", GQ_F32, 0}, {LENGTH, "n", N, 0}, {COUNT, "blocksize", BLOCKSIZE, 0},
          BUFFER(RESULT, absmax, sizeof absmax), {COUNT, "absmax_count", BLOCKS, 0}, BUFFER(RESULT, packed, sizeof packed),
          {SIZE, "packed_bytes", sizeof packed, 0}}},
        {"gq_quantize_fp4", call_quantize_fp4,
         {BUFFER(INPUT, src, 0), {DTYPE, "dtype", GQ_F32, 0}, {LENGTH, "n", N, 0}, {COUNT, "blocksize", BLOCKSIZE, 0},
          BUFFER(RESULT, absmax, sizeof absmax), {COUNT, "absmax_count", BLOCKS, 0}, BUFFER(RESULT, packed, sizeof packed),
          {SIZE, "packed_bytes", sizeof packed, 0}}},
        {"gq_quantize_blockwise", call_quantize_blockwise,
         {BUFFER(INPUT, src, 0), {DTYPE, "dtype", GQ_F32, 0}, {LENGTH, "n", N, 0}, {COUNT, "blocksize", BLOCKSIZE, 0},
          BUFFER(RESULT, absmax, sizeof absmax), {COUNT, "absmax_count", BLOCKS, 0}, BUFFER(RESULT, codes, N),
          {SIZE, "codes_bytes", N, 0}}},
        {"gq_quantize_rows_int8", call_quantize_rows_int8,
         {BUFFER(INPUT, src, 0), {DTYPE, "dtype", GQ_F32, 0}, {COUNT, "rows", ROWS, 0}, {COUNT, "cols", COLS, 0},
          BUFFER(RESULT, absmax, ROWS * 4), {COUNT, "absmax_count", ROWS, 0}, BUFFER(RESULT, codes, N), {SIZE, "codes_bytes", N, 0},
          BUFFER(RESULT, outliers, COLS), {SIZE, "outliers_bytes", COLS, 0}}},
        {"gq_codebook", call_codebook, {{INPUT, "name", GQ_ADDR(dynamic), 0}, BUFFER(RESULT, table, sizeof table), {COUNT, "count", 256, 0}}},
        {"gq_pack_4bit", call_pack_4bit,
         {{INPUT, "codes", GQ_ADDR(nibbles), 0}, {LENGTH, "n", N, 0}, {ORDER, "order", GQ_HIGH_NIBBLE_FIRST, 0}, BUFFER(RESULT, packed, sizeof packed),
          {SIZE, "packed_bytes", sizeof packed, 0}}},
        {"gq_unpack_4bit", call_unpack_4bit,
         {BUFFER(INPUT, packed, 0), {SIZE, "packed_bytes", sizeof packed, 0}, {ORDER, "order", GQ_LOW_NIBBLE_FIRST, 0},
          BUFFER(RESULT, codes, N), {LENGTH, "n", N, 0}}},
        {"gq_quantized_layout", call_quantized_layout,
         {{FORMAT, "format", GQ_FORMAT_NF4, 0}, BUFFER(INPUT, shape, 0), {NDIM, "ndim", 2, 0}, {INPUT, "layout", GQ_ADDR(&layout), 0}}},
        {"gq_quantize_workspace_size", call_quantize_workspace_size,
         {{FORMAT, "format", GQ_FORMAT_NF4, 0}, BUFFER(INPUT, shape, 0), {NDIM, "ndim", 2, 0}, {OUT, "bytes", GQ_ADDR(&u64), 8}}},
        {"gq_quantize", call_quantize,
         {{FORMAT, "format", GQ_FORMAT_NF4, 0}, BUFFER(INPUT, src, 0), {DTYPE, "dtype", GQ_F32, 0}, BUFFER(INPUT, shape, 0),
          {NDIM, "ndim", 2, 0}, {INPUT, "parts", GQ_ADDR(&parts), 0}, {FIXED, "nonfinite", GQ_ADDR(nonfinite), 0}}},
    };
    const struct function states[] = {
        {"gq_state_create", call_state_create, {{INPUT, "desc", GQ_ADDR(&desc), 0}, {OUT, "state", GQ_ADDR(&new_state), sizeof(void *)}}},
        {"gq_state_get_desc", call_state_get_desc, {{HANDLE, "state", GQ_ADDR(state), 0}, {INPUT, "desc", GQ_ADDR(&got), 0}}},
        {"gq_state_json", call_state_json,
         {{HANDLE, "state", GQ_ADDR(state), 0}, {RESULT, "text", GQ_ADDR(json), sizeof json}, {FIXED, "capacity", sizeof json, 0},
          {OUT, "length", GQ_ADDR(&length), sizeof length}}},
        {"gq_dequantize", call_dequantize,
         {{HANDLE, "state", GQ_ADDR(state), 0}, BUFFER(RESULT, out, sizeof restored), {SIZE, "out_bytes", sizeof restored, 0},
          {DTYPE, "dtype", GQ_F32, 0}}},
        {"gq_dequantize_range", call_dequantize_range,
         {{HANDLE, "state", GQ_ADDR(state), 0}, {OFFSET, "first", 17, 0}, {COUNT, "count", N - 17, 0},
          BUFFER(RESULT, out, sizeof restored - 68), {SIZE, "out_bytes", sizeof restored - 68, 0}, {DTYPE, "dtype", GQ_F32, 0}}},
        {"gq_linear_workspace_size", call_linear_workspace_size,
         {{HANDLE, "state", GQ_ADDR(state), 0}, {OFFSET, "m", 2, 0}, {DTYPE, "dtype", GQ_F32, 0}, {MAY, "bytes", GQ_ADDR(&u64), 8},
          {MAY, "packed", GQ_ADDR(&i32), 4}}},
        {"gq_linear", call_linear,
         {{HANDLE, "state", GQ_ADDR(state), 0}, BUFFER(INPUT, x, 0), {OFFSET, "m", 2, 0}, {DTYPE, "dtype", GQ_F32, 0},
          {FIXED, "bias", GQ_ADDR(absmax), 0}, {RESULT, "y", GQ_ADDR(restored), 2 * ROWS * 4}}},
    };
    const struct function models[] = {
        {"gq_load_model", call_load_model, {TEXT(path), {OUT, "model", GQ_ADDR(&new_model), sizeof(void *)}}},
        {"gq_model_tensor_count", call_model_tensor_count, {BUFFER(HANDLE, model, 0), {OUT, "count", GQ_ADDR(&i64), 8}}},
        {"gq_model_tensor", call_model_tensor,
         {BUFFER(HANDLE, model, 0), {INDEX, "index", 0, (size_t)tensors}, {INPUT, "info", GQ_ADDR(&tensor_info), 0}}},
        {"gq_model_find_tensor", call_model_find_tensor,
         {BUFFER(HANDLE, model, 0), {INPUT, "name", GQ_ADDR(tensor_info.name), 0}, BUFFER(OUT, index, 8)}},
        {"gq_model_read", call_model_read,
         {BUFFER(HANDLE, model, 0), {INDEX, "index", (uint64_t)tensor, (size_t)tensors}, {OFFSET, "first", 0, 0},
          {RESULT, "out", GQ_ADDR(stored), tensor_bytes}, {LIMIT, "out_bytes", tensor_bytes, 0}}},
        {"gq_model_layer_count", call_model_layer_count, {BUFFER(HANDLE, model, 0), {OUT, "count", GQ_ADDR(&i64), 8}}},
        {"gq_model_layer", call_model_layer,
         {BUFFER(HANDLE, model, 0), {INDEX, "index", 0, (size_t)layers}, {INPUT, "info", GQ_ADDR(&layer_info), 0}}},
        {"gq_model_find_layer", call_model_find_layer,
         {BUFFER(HANDLE, model, 0), {INPUT, "name", GQ_ADDR(layer_info.name), 0}, BUFFER(OUT, index, 8)}},
        {"gq_model_read_layer", call_model_read_layer,
         {BUFFER(HANDLE, model, 0), {INDEX, "index", 0, (size_t)layers}, {INPUT, "parts", GQ_ADDR(&nothing), 0}}},
        {"gq_model_read_all", call_model_read_all,
         {BUFFER(HANDLE, model, 0), {INPUT, "tensors", GQ_ADDR(no_tensors), 0}, {COUNT, "tensor_count", (uint64_t)tensors, 0},
          {INPUT, "layers", GQ_ADDR(no_layers), 0}, {COUNT, "layer_count", (uint64_t)layers, 0}}},
        {"gq_model_state", call_model_state,
         {BUFFER(HANDLE, model, 0), {INDEX, "index", 0, (size_t)layers}, {OUT, "state", GQ_ADDR(&new_state), sizeof(void *)}}},
        {"gq_model_dequantize", call_model_dequantize,
         {BUFFER(HANDLE, model, 0), {INDEX, "index", 0, (size_t)layers}, {OFFSET, "first_row", 0, 0},
          {COUNT, "rows", (uint64_t)layer_info.shape[0], 0}, {RESULT, "out", GQ_ADDR(decoded), layer_bytes},
          {SIZE, "out_bytes", layer_bytes, 0}, {DTYPE, "dtype", GQ_F32, 0}}},
        {"gq_model_metadata_count", call_model_metadata_count, {BUFFER(HANDLE, model, 0), {OUT, "count", GQ_ADDR(&i64), 8}}},
        {"gq_model_metadata", call_model_metadata,
         {BUFFER(HANDLE, model, 0), {INDEX, "index", 0, (size_t)metadata}, {OUT, "key", GQ_ADDR(&key), sizeof key},
          {OUT, "value", GQ_ADDR(&value), sizeof value}}},
    };
    const struct function jobs[] = {
        {"gq_inspect", call_inspect, {TEXT(request), {OUT, "job", GQ_ADDR(&new_job), sizeof(void *)}}},
        {"gq_verify", call_verify, {TEXT(request), {OUT, "job", GQ_ADDR(&new_job), sizeof(void *)}}},
    };
    /* These are not called with good arguments here, as they would need more files; jobs.c does. */
    const struct function bad_jobs[] = {
        {"gq_convert", call_convert, {TEXT(request), {OUT, "job", GQ_ADDR(&new_job), sizeof(void *)}}},
        {"gq_dequantize_model", call_dequantize_model, {TEXT(request), {OUT, "job", GQ_ADDR(&new_job), sizeof(void *)}}},
        {"gq_diff", call_diff, {TEXT(request), {OUT, "job", GQ_ADDR(&new_job), sizeof(void *)}}},
    };
    const struct function job_calls[] = {
        {"gq_job_wait", call_job_wait, {BUFFER(HANDLE, job, 0), {FIXED, "timeout_ms", (uint64_t)-1, 0}, BUFFER(OUT, finished, 4)}},
        {"gq_job_poll", call_job_poll, {BUFFER(HANDLE, job, 0), {INPUT, "progress", GQ_ADDR(&progress), 0}}},
        {"gq_job_result", call_job_result, {BUFFER(HANDLE, job, 0), {OUT, "json", GQ_ADDR(&value), sizeof value}}},
        {"gq_job_cancel", call_job_cancel, {BUFFER(HANDLE, job, 0)}},
    };

    for (size_t i = 0; i < sizeof flat / sizeof *flat; i++) try_function(&flat[i]);
    OK(gq_quantize_nf4(GQ_ADDR(weight), GQ_F32, N, BLOCKSIZE, GQ_ADDR(absmax), BLOCKS, GQ_ADDR(packed), sizeof packed, NULL));
    for (size_t i = 0; i < sizeof states / sizeof *states; i++) try_function(&states[i]);
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) try_function(&models[i]);
    for (size_t i = 0; i < sizeof jobs / sizeof *jobs; i++) try_function(&jobs[i]);
    for (size_t i = 0; i < sizeof bad_jobs / sizeof *bad_jobs; i++) {
        fails(&bad_jobs[i], 0, 0);
        fails(&bad_jobs[i], 1, 0);
    }
    try_requests();
    for (size_t i = 0; i < sizeof job_calls / sizeof *job_calls; i++) try_function(&job_calls[i]);
    try_shapes();
    try_parts();
    try_exec();
    try_thresholds();
    try_nothing(state);

    OK(gq_state_free(state));
    OK(gq_free_model(model));
    OK(gq_job_free(job));
    free(no_tensors);
    free(no_layers);
    free(stored);
    free(decoded);
    return check_result();
}
