/* The bytes of bitsandbytes' CUDA backend, by way of the C interface: on the CPU, or on a device (cuda_golden.c).
 * usage: golden FOLDER */
#include "golden.h"

#ifndef GOLDEN_DEVICE
/* The same functions for the CPU: memory is where it is. */
static gq_addr give(const void *data, size_t bytes) {
    (void)bytes;
    return GQ_ADDR(data);
}
static void take(void *data) { (void)data; }
static void drop(void) {}
static const gq_exec *where(void) { return NULL; }
static const int32_t device = GQ_CPU;
#endif

static gq_model *open_golden(const char *folder, const char *file) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, file);
    gq_model *model = NULL;
    OK(gq_load_model(path, NULL, &model));
    return model;
}

static void same(const char *name, const char *what, const void *got, const struct tensor *want) {
    CHECK(memcmp(got, want->data, want->bytes) == 0, "%s: %s differs", name, what);
}

/* name.packed, name.absmax and, for some, name.dequant are what NF4 or FP4 makes of the tensor called input. */
static void quantize4(gq_model *model, const char *input, const char *name, int64_t blocksize) {
    char part[300];
    const struct tensor src = golden_read(model, input);
    snprintf(part, sizeof part, "%s.packed", name);
    const struct tensor packed = golden_read(model, part);
    snprintf(part, sizeof part, "%s.absmax", name);
    const struct tensor absmax = golden_read(model, part);
    snprintf(part, sizeof part, "%s.dequant", name);
    const struct tensor values = golden_read(model, part);
    CHECK(src.data && packed.data && absmax.data, "%s: an incomplete case", name);
    if (!src.data || !packed.data || !absmax.data) return;

    const int nf4 = strstr(name, "nf4") != NULL;
    const int64_t n = (int64_t)(src.bytes / golden_size(src.info.dtype)), blocks = (int64_t)(absmax.bytes / 4);
    unsigned char *got_packed = malloc(packed.bytes + 1);
    float *got_absmax = malloc(absmax.bytes + 4);
    got_packed[packed.bytes] = 0x5a;
    got_absmax[blocks] = 1234;
    CHECK((nf4 ? gq_quantize_nf4 : gq_quantize_fp4)(give(src.data, src.bytes), src.info.dtype, n, blocksize, give(got_absmax, absmax.bytes + 4), blocks,
                                                    give(got_packed, packed.bytes + 1), packed.bytes, where()) == GQ_OK, "%s: %s", name, gq_last_error());
    take(got_packed);
    take(got_absmax);
    same(name, "packed", got_packed, &packed);
    same(name, "absmax", got_absmax, &absmax);
    CHECK(got_packed[packed.bytes] == 0x5a && got_absmax[blocks] == 1234, "%s: written behind the end", name);

    if (values.data) {
        gq_state_desc desc = GQ_STATE_DESC_INIT;
        desc.format = nf4 ? GQ_FORMAT_NF4 : GQ_FORMAT_FP4;
        desc.dtype = src.info.dtype;
        desc.blocksize = blocksize;
        desc.shape = GQ_ADDR(&n);
        desc.ndim = 1;
        desc.device = device;
        desc.parts.packed = give(packed.data, packed.bytes);
        desc.parts.packed_bytes = packed.bytes;
        desc.parts.absmax = give(absmax.data, absmax.bytes);
        desc.parts.absmax_bytes = absmax.bytes;
        gq_state *state = NULL;
        OK(gq_state_create(&desc, &state));
        void *got = malloc(values.bytes);
        OK(gq_dequantize(state, give(got, values.bytes), values.bytes, values.info.dtype, where()));
        take(got);
        same(name, "dequant", got, &values);
        OK(gq_state_free(state));
        free(got);
    }
    drop();
    free(got_packed);
    free(got_absmax);
    free(src.data);
    free(packed.data);
    free(absmax.data);
    free(values.data);
}

/* Every "<input>.<format>[.<blocksize>].packed" and "<format>.<input>.packed" of a file. */
static void files4(const char *folder, const char *file, int cases) {
    gq_model *model = open_golden(folder, file);
    int64_t count = 0;
    int seen = 0;
    OK(gq_model_tensor_count(model, &count));
    for (int64_t i = 0; i < count; i++) {
        gq_tensor_info info = GQ_TENSOR_INFO_INIT;
        OK(gq_model_tensor(model, i, &info));
        char name[200], input[220];
        snprintf(name, sizeof name, "%s", info.name);
        char *end = strstr(name, ".packed");
        if (!end) continue;
        *end = 0;
        const char *format = strstr(name, "nf4") ? strstr(name, "nf4") : strstr(name, "fp4");
        const int blocksize = format[3] == '.' ? atoi(format + 4) : 0;
        if (format == name) snprintf(input, sizeof input, "%s.input", name);
        else snprintf(input, sizeof input, "%.*sinput", (int)(format - name), name);
        quantize4(model, input, name, blocksize ? blocksize : 64);
        seen++;
    }
    CHECK(seen == cases, "%s has %d cases, want %d", file, seen, cases);
    OK(gq_free_model(model));
}

/* b8.<dtype>.<blocksize>: 8 bits with the dynamic map. */
static void blockwise8(const char *folder) {
    gq_model *model = open_golden(folder, "nested8.safetensors");
    gq_model *tables = open_golden(folder, "thresholds4.safetensors");
    const struct tensor dynamic = golden_read(tables, "dynamic.code");
    float table[256];
    OK(gq_codebook("dynamic", table, 256));
    same("dynamic", "the table", table, &dynamic);
    static const char *const dtypes[] = {"f32", "f16", "bf16"};
    static const int blocksizes[] = {64, 256, 4096};
    for (int k = 0; k < 9; k++) {
        char name[100], part[120];
        snprintf(name, sizeof name, "b8.%s.%d", dtypes[k / 3], blocksizes[k % 3]);
        snprintf(part, sizeof part, "%s.input", name);
        const struct tensor src = golden_read(model, part);
        snprintf(part, sizeof part, "%s.codes", name);
        const struct tensor codes = golden_read(model, part);
        snprintf(part, sizeof part, "%s.absmax", name);
        const struct tensor absmax = golden_read(model, part);
        snprintf(part, sizeof part, "%s.dequant", name);
        const struct tensor values = golden_read(model, part);
        unsigned char *got_codes = malloc(codes.bytes);
        float *got_absmax = malloc(absmax.bytes);
        void *got = malloc(values.bytes);
        const int64_t n = (int64_t)codes.bytes;
        /* The table is the default one, and the same one from the caller. */
        for (int given = 0; given < 2; given++) {
            memset(got_codes, 0xa5, codes.bytes);
            OK(gq_quantize_blockwise(give(src.data, src.bytes), src.info.dtype, n, blocksizes[k % 3], given ? give(table, sizeof table) : 0,
                                     give(got_absmax, absmax.bytes), (int64_t)(absmax.bytes / 4), give(got_codes, codes.bytes), codes.bytes, where()));
            take(got_codes);
            take(got_absmax);
            same(name, "codes", got_codes, &codes);
            same(name, "absmax", got_absmax, &absmax);
        }
        gq_state_desc desc = GQ_STATE_DESC_INIT;
        desc.format = GQ_FORMAT_BLOCKWISE8;
        desc.dtype = src.info.dtype;
        desc.blocksize = blocksizes[k % 3];
        desc.shape = GQ_ADDR(&n);
        desc.ndim = 1;
        desc.device = device;
        desc.parts.packed = give(codes.data, codes.bytes);
        desc.parts.packed_bytes = codes.bytes;
        desc.parts.absmax = give(absmax.data, absmax.bytes);
        desc.parts.absmax_bytes = absmax.bytes;
        desc.parts.codebook = give(table, sizeof table);
        desc.parts.codebook_bytes = sizeof table;
        gq_state *state = NULL;
        OK(gq_state_create(&desc, &state));
        OK(gq_dequantize(state, give(got, values.bytes), values.bytes, values.info.dtype, where()));
        take(got);
        same(name, "dequant", got, &values);
        OK(gq_state_free(state));
        drop();
        free(got_codes);
        free(got_absmax);
        free(got);
        free(src.data);
        free(codes.data);
        free(absmax.data);
        free(values.data);
    }
    free(dynamic.data);
    OK(gq_free_model(model));
    OK(gq_free_model(tables));
}

/* row.<threshold>.0: rows of LLM.int8; bitsandbytes lists the columns of outliers. */
static void rows8(const char *folder) {
    gq_model *model = open_golden(folder, "int8.safetensors");
    static const struct {
        const char *name;
        float threshold;
    } cases[] = {{"row.0.0", 0}, {"row.6.0", 6}};
    for (int k = 0; k < 2; k++) {
        static const char *const names[] = {"input", "codes", "stats", "outlier_cols"};
        struct tensor t[4];
        for (int i = 0; i < 4; i++) {
            char part[100];
            snprintf(part, sizeof part, "%s.%s", cases[k].name, names[i]);
            t[i] = golden_read(model, part);
            CHECK(t[i].data, "%s is missing", part);
        }
        const int64_t rows = t[0].info.shape[0], cols = t[0].info.shape[1];
        unsigned char *codes = malloc(t[1].bytes), *outliers = malloc((size_t)cols), *want = calloc(1, (size_t)cols);
        float *absmax = malloc(t[2].bytes);
        for (size_t i = 0; i < t[3].bytes / 8; i++) want[((int64_t *)t[3].data)[i]] = 1;
        OK(gq_quantize_rows_int8(give(t[0].data, t[0].bytes), GQ_F16, rows, cols, cases[k].threshold, give(absmax, t[2].bytes), rows, give(codes, t[1].bytes), t[1].bytes,
                                 give(outliers, (size_t)cols), (size_t)cols, where()));
        take(codes);
        take(absmax);
        take(outliers);
        same(cases[k].name, "codes", codes, &t[1]);
        same(cases[k].name, "absmax", absmax, &t[2]);
        CHECK(memcmp(outliers, want, (size_t)cols) == 0, "%s: other outliers", cases[k].name);
        drop();
        free(codes);
        free(outliers);
        free(want);
        free(absmax);
        for (int i = 0; i < 4; i++) free(t[i].data);
    }
    OK(gq_free_model(model));
}

/* nested.<dtype>.<format>: quantized statistics. bitsandbytes' offset is a sum in an order nobody knows, ours is near it; codes
 * and what does not depend on the offset are equal, and bitsandbytes' own statistics decode to its values. */
static void nested(const char *folder) {
    gq_model *model = open_golden(folder, "nested8.safetensors");
    static const char *const dtypes[] = {"f32", "f16", "bf16"};
    for (int k = 0; k < 6; k++) {
        char name[100], part[120];
        snprintf(name, sizeof name, "nested.%s.%s", dtypes[k / 2], k % 2 ? "fp4" : "nf4");
        const gq_format format = k % 2 ? GQ_FORMAT_FP4 : GQ_FORMAT_NF4;
        static const char *const names[] = {"input", "packed", "absmax_u8", "nested_absmax", "offset", "dequant"};
        struct tensor t[6];
        for (int i = 0; i < 6; i++) {
            snprintf(part, sizeof part, "%s.%s", name, names[i]);
            t[i] = golden_read(model, part);
            CHECK(t[i].data, "%s is missing", part);
        }
        gq_quantize_options options = GQ_QUANTIZE_OPTIONS_INIT;
        options.nested = 1;
        gq_parts parts;
        OK(gq_quantized_layout(format, t[0].info.shape, t[0].info.ndim, &options, &parts));
        CHECK(parts.packed_bytes == t[1].bytes && parts.absmax_bytes == t[2].bytes && parts.nested_absmax_bytes == t[3].bytes &&
                  parts.offset_bytes == 4 && parts.nested_codebook_bytes == 1024, "%s: a wrong layout", name);
        unsigned char *packed = malloc(t[1].bytes), *absmax = malloc(t[2].bytes);
        float *nested_absmax = malloc(t[3].bytes), codebook[256], values4[16], offset = 0;
        parts.packed = give(packed, t[1].bytes);
        parts.absmax = give(absmax, t[2].bytes);
        parts.nested_absmax = give(nested_absmax, t[3].bytes);
        parts.nested_codebook = give(codebook, sizeof codebook);
        parts.offset = give(&offset, sizeof offset);
        parts.codebook = give(values4, sizeof values4);
        int64_t nonfinite = -7;
        uint64_t workspace_bytes = 0;
        OK(gq_quantize_workspace_size(format, t[0].info.shape, t[0].info.ndim, &options, device, &workspace_bytes));
        gq_exec exec = GQ_EXEC_INIT;
        void *workspace = calloc(1, (size_t)workspace_bytes + 1);
        exec.device = device;
        exec.workspace = workspace_bytes ? give(workspace, (size_t)workspace_bytes) : 0;
        exec.workspace_bytes = workspace_bytes;
        OK(gq_quantize(format, give(t[0].data, t[0].bytes), t[0].info.dtype, t[0].info.shape, t[0].info.ndim, &options, &parts, &exec, &nonfinite));
        CHECK(nonfinite == (device == GQ_CPU ? 0 : -1), "%s: %d elements are not finite", name, (int)nonfinite);
        take(packed);
        take(absmax);
        take(nested_absmax);
        take(codebook);
        take(&offset);
        take(values4);
        float dynamic[256];
        OK(gq_codebook("dynamic", dynamic, 256));
        CHECK(memcmp(codebook, dynamic, sizeof dynamic) == 0, "%s: another nested codebook", name);
        CHECK(values4[k % 2 ? 3 : 0] == (k % 2 ? 1.0f : -1.0f), "%s: another codebook", name);
        free(workspace);
        same(name, "packed", packed, &t[1]);
        float want_offset;
        memcpy(&want_offset, t[4].data, 4);
        const float difference = offset > want_offset ? offset - want_offset : want_offset - offset;
        CHECK(difference <= 1e-6f * want_offset, "%s: offset %.9g, want %.9g", name, offset, want_offset);
        if (difference == 0) {
            same(name, "absmax", absmax, &t[2]);
            same(name, "nested_absmax", nested_absmax, &t[3]);
        }

        gq_state_desc desc = GQ_STATE_DESC_INIT;
        desc.format = format;
        desc.dtype = t[0].info.dtype;
        desc.blocksize = 64;
        desc.nested_blocksize = 256;
        desc.shape = GQ_ADDR(t[0].info.shape);
        desc.ndim = t[0].info.ndim;
        desc.parts = parts;
        desc.device = device;
        desc.parts.absmax = give(t[2].data, t[2].bytes);
        desc.parts.nested_absmax = give(t[3].data, t[3].bytes);
        desc.parts.offset = give(t[4].data, t[4].bytes);
        gq_state *state = NULL;
        OK(gq_state_create(&desc, &state));
        void *got = malloc(t[5].bytes);
        OK(gq_dequantize(state, give(got, t[5].bytes), t[5].bytes, t[5].info.dtype, where()));
        take(got);
        same(name, "dequant", got, &t[5]);
        OK(gq_state_free(state));
        drop();
        free(got);
        free(packed);
        free(absmax);
        free(nested_absmax);
        for (int i = 0; i < 6; i++) free(t[i].data);
    }
    OK(gq_free_model(model));
}

/* State dicts of bitsandbytes' modules: each "<case>.weight" decodes to "<case>.reference", straight from the file (on the CPU), through
 * a state with memory of its own or the model's, and through a state over buffers of the caller; the state's JSON is the file's. */
static void modules(const char *folder) {
    gq_model *model = open_golden(folder, "modules.safetensors"), *loaded = NULL;
    char path[4096];
    gq_load_options options = GQ_LOAD_OPTIONS_INIT;
    snprintf(path, sizeof path, "%s/modules.safetensors", folder);
    options.device = device;
    OK(gq_load_model(path, &options, &loaded));
    int64_t layers = 0;
    int seen = 0;
    OK(gq_model_layer_count(model, &layers));
    CHECK(layers == 37, "%d layers", (int)layers);
    for (int64_t i = 0; i < layers; i++) {
        gq_layer_info layer = GQ_LAYER_INFO_INIT;
        OK(gq_model_layer(model, i, &layer));
        CHECK(strcmp(layer.convention, "bitsandbytes") == 0, "%s: convention %s", layer.name, layer.convention);
        CHECK(layer.ndim == 2 && layer.shape[0] == 96 && layer.shape[1] == 128, "%s: a wrong shape", layer.name);
        int64_t found = -1;
        OK(gq_model_find_layer(model, layer.name, &found));
        CHECK(found == i, "%s is found as %d", layer.name, (int)found);
        if (layer.format == GQ_FORMAT_INT8) continue; /* the file has no reference for it */
        seen++;
        char name[300];
        snprintf(name, sizeof name, "%.*s.reference", (int)(strlen(layer.name) - strlen(".weight")), layer.name);
        const struct tensor want = golden_read(model, name);
        CHECK(want.data && want.info.dtype == layer.dtype, "%s: no reference", layer.name);
        if (!want.data) continue;
        unsigned char *got = malloc(want.bytes);

        OK(gq_model_dequantize(model, i, 0, 96, GQ_ADDR(got), want.bytes, layer.dtype, NULL));
        same(layer.name, "gq_model_dequantize", got, &want);
        memset(got, 0, want.bytes);
        for (int64_t row = 0; row < 96; row += 5) {
            const int64_t rows = row + 5 > 96 ? 96 - row : 5;
            const size_t width = want.bytes / 96;
            OK(gq_model_dequantize(model, i, row, rows, GQ_ADDR(got + (size_t)row * width), (size_t)rows * width, layer.dtype, NULL));
        }
        same(layer.name, "gq_model_dequantize in pieces", got, &want);

        gq_state *state = NULL;
        memset(got, 0, want.bytes);
        OK(gq_model_state(loaded, i, &state));
        OK(gq_dequantize(state, give(got, want.bytes), want.bytes, layer.dtype, where()));
        take(got);
        same(layer.name, "gq_model_state", got, &want);
        OK(gq_state_free(state));
        drop();

        gq_parts parts = layer.sizes;
        void *packed = malloc(parts.packed_bytes), *absmax = malloc(parts.absmax_bytes);
        parts.packed = give(packed, parts.packed_bytes);
        parts.absmax = give(absmax, parts.absmax_bytes);
        float nested_absmax[1], nested_codebook[256], offset[1];
        if (layer.nested_blocksize) {
            CHECK(parts.nested_absmax_bytes == sizeof nested_absmax && parts.nested_codebook_bytes == sizeof nested_codebook &&
                      parts.offset_bytes == sizeof offset, "%s: wrong sizes", layer.name);
            parts.nested_absmax = give(nested_absmax, sizeof nested_absmax);
            parts.nested_codebook = give(nested_codebook, sizeof nested_codebook);
            parts.offset = give(offset, sizeof offset);
        }
        OK(gq_model_read_layer(model, i, &parts, where()));
        gq_state_desc desc = GQ_STATE_DESC_INIT;
        desc.format = layer.format;
        desc.dtype = layer.dtype;
        desc.blocksize = layer.blocksize;
        desc.nested_blocksize = layer.nested_blocksize;
        desc.shape = GQ_ADDR(layer.shape);
        desc.ndim = layer.ndim;
        desc.parts = parts;
        desc.device = device;
        memset(got, 0, want.bytes);
        OK(gq_state_create(&desc, &state));
        OK(gq_dequantize(state, give(got, want.bytes), want.bytes, layer.dtype, where()));
        take(got);
        same(layer.name, "gq_model_read_layer", got, &want);

        /* The quant_state tensor belongs to the layer, so it is read from the file itself. */
        char text[400], *stored = NULL;
        size_t length = 0, stored_bytes = 0;
        if (device != GQ_CPU && layer.nested_blocksize) STATUS(gq_state_json(state, text, sizeof text, &length), GQ_ERROR_UNSUPPORTED);
        else OK(gq_state_json(state, text, sizeof text, &length));
        FILE *file = fopen(want.info.file, "rb");
        if (file) {
            fseek(file, 0, SEEK_END);
            stored_bytes = (size_t)ftell(file);
            rewind(file);
            stored = malloc(stored_bytes);
            if (fread(stored, 1, stored_bytes, file) != stored_bytes) stored_bytes = 0;
            fclose(file);
        }
        int there = 0;
        for (size_t at = 0; !there && at + length <= stored_bytes; at++) there = memcmp(stored + at, text, length) == 0;
        CHECK(there, "%s: its JSON is not in the file: %.*s", layer.name, (int)length, text);
        OK(gq_state_free(state));
        free(stored);
        drop();
        free(packed);
        free(absmax);
        free(got);
        free(want.data);
    }
    CHECK(seen == 36, "%d layers with a reference", seen);
    OK(gq_free_model(loaded));
    OK(gq_free_model(model));
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
#ifdef GOLDEN_DEVICE
    gpu_start();
#endif
    files4(argv[1], "blockwise4.safetensors", 48);
    files4(argv[1], "tails4.safetensors", 264);
    files4(argv[1], "special4.safetensors", 6);
    files4(argv[1], "thresholds4.safetensors", 2);
    blockwise8(argv[1]);
    rows8(argv[1]);
    nested(argv[1]);
    modules(argv[1]);
    return check_result();
}
