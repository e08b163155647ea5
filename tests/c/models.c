/* gq_load_model: files, a shard index, a folder, prefixes, globs, partial reads, files that are wrong, and files whose layers have
 * odd shapes. */
#include "weights.h"

#include <sys/stat.h>
#include <unistd.h>

static gq_model *load(const char *path, const char *prefix, const char *include) {
    gq_load_options options = GQ_LOAD_OPTIONS_INIT;
    options.prefix = prefix;
    options.include = include;
    gq_model *model = NULL;
    OK(gq_load_model(path, &options, &model));
    return model;
}

static void counts(gq_model *model, int64_t want_tensors, int64_t want_layers) {
    int64_t tensors = -1, layers = -1;
    OK(gq_model_tensor_count(model, &tensors));
    OK(gq_model_layer_count(model, &layers));
    CHECK(tensors == want_tensors && layers == want_layers, "%d tensors and %d layers, want %d and %d", (int)tensors, (int)layers,
          (int)want_tensors, (int)want_layers);
}

/* A layer of 3 rows of 5 in one block, whose rows start in the middle of bytes, and plain tensors, in one file. */
static const char state_text[] = "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"float32\", \"shape\": [3, 5]}";

struct data {
    float absmax[1], plain[6];
    unsigned char packed[8], state[sizeof state_text - 1];
};

static void fill_header(char *header, size_t size, const char *prefix) {
    snprintf(header, size,
             "{\"__metadata__\": {\"one\": \"1\", \"two\": \"2\"}, \"%sa.weight.absmax\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [0, 4]}, "
             "\"%snorm\": {\"dtype\": \"F32\", \"shape\": [2, 3], \"data_offsets\": [4, 28]}, "
             "\"%sa.weight\": {\"dtype\": \"U8\", \"shape\": [8, 1], \"data_offsets\": [28, 36]}, "
             "\"%sa.weight.quant_state.bitsandbytes__nf4\": {\"dtype\": \"U8\", \"shape\": [%d], \"data_offsets\": [36, %d]}}",
             prefix, prefix, prefix, prefix, (int)sizeof state_text - 1, (int)sizeof state_text - 1 + 36);
}

static struct data data = {{2}, {0, 1, 2, 3, 4, 5}, {0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xe0}, {0}};

static void one_file(void) {
    char header[4096];
    memcpy(data.state, state_text, sizeof data.state);
    const size_t size = 4 + 24 + 8 + sizeof data.state;
    fill_header(header, sizeof header, "unet.");
    CHECK(write_file(in("one.safetensors"), header, &data, size), "cannot write");

    gq_model *model = load(in("one.safetensors"), NULL, NULL);
    counts(model, 1, 1);
    int64_t index = -1, metadata = 0;
    OK(gq_model_find_tensor(model, "unet.norm", &index));
    gq_tensor_info info = GQ_TENSOR_INFO_INIT;
    OK(gq_model_tensor(model, index, &info));
    CHECK(strcmp(info.name, "unet.norm") == 0 && info.dtype == GQ_F32 && info.ndim == 2 && info.shape[0] == 2 && info.shape[1] == 3 &&
              info.bytes == 24, "another tensor");
    CHECK(strcmp(info.file, in("one.safetensors")) == 0, "file %s", info.file);
    CHECK(info.file_offset == 8 + strlen(header) + 4, "file offset %d", (int)info.file_offset);
    CHECK(info.address == 0, "an address %#llx on the host", (unsigned long long)info.address);
    /* A caller that does not know addresses yet. */
    gq_tensor_info shorter;
    memset(&shorter, 0xa5, sizeof shorter);
    shorter.struct_size = (uint32_t)offsetof(gq_tensor_info, address);
    OK(gq_model_tensor(model, index, &shorter));
    CHECK(strcmp(shorter.name, "unet.norm") == 0 && shorter.address == 0xa5a5a5a5a5a5a5a5, "the address of a shorter struct is %#llx", (unsigned long long)shorter.address);
    float values[6] = {0};
    OK(gq_model_read(model, index, 0, GQ_ADDR(values), sizeof values, NULL));
    CHECK(memcmp(values, data.plain, sizeof values) == 0, "other values");
    OK(gq_model_read(model, index, 8, GQ_ADDR(values), 4, NULL));
    CHECK(values[0] == 2, "element 2 is %g", values[0]);
    OK(gq_model_read(model, index, 24, GQ_ADDR(values), 0, NULL));
    STATUS(gq_model_read(model, index, 24, GQ_ADDR(values), 1, NULL), GQ_ERROR_INVALID_ARGUMENT);
    STATUS(gq_model_find_tensor(model, "a.weight.absmax", &index), GQ_ERROR_NOT_FOUND);

    OK(gq_model_metadata_count(model, &metadata));
    CHECK(metadata == 2, "%d metadata entries", (int)metadata);
    for (int64_t i = 0; i < metadata; i++) {
        const char *key = NULL, *value = NULL;
        OK(gq_model_metadata(model, i, &key, &value));
        CHECK((strcmp(key, "one") == 0 && strcmp(value, "1") == 0) || (strcmp(key, "two") == 0 && strcmp(value, "2") == 0), "%s = %s", key, value);
    }

    OK(gq_model_find_layer(model, "unet.a.weight", &index));
    gq_layer_info layer = GQ_LAYER_INFO_INIT;
    OK(gq_model_layer(model, index, &layer));
    CHECK(layer.format == GQ_FORMAT_NF4 && layer.ndim == 2 && layer.shape[0] == 3 && layer.shape[1] == 5 && layer.blocksize == 64 &&
              layer.nested_blocksize == 0 && layer.sizes.packed_bytes == 8 && layer.sizes.absmax_bytes == 4 && layer.sizes.packed == 0,
          "another layer");
    float whole[15], row[5];
    OK(gq_model_dequantize(model, index, 0, 3, GQ_ADDR(whole), sizeof whole, GQ_F32, NULL));
    CHECK(whole[0] == -2 && whole[7] == 0 && whole[14] > 1.4f, "values %g %g %g", whole[0], whole[7], whole[14]);
    for (int64_t i = 0; i < 3; i++) {
        OK(gq_model_dequantize(model, index, i, 1, GQ_ADDR(row), sizeof row, GQ_F32, NULL));
        CHECK(memcmp(row, whole + 5 * i, sizeof row) == 0, "row %d differs", (int)i);
    }
    OK(gq_model_dequantize(model, index, 3, 0, GQ_ADDR(row), 0, GQ_F32, NULL));
    STATUS(gq_model_dequantize(model, index, 3, 1, GQ_ADDR(row), sizeof row, GQ_F32, NULL), GQ_ERROR_INVALID_ARGUMENT);
    OK(gq_free_model(model));

    model = load(in("one.safetensors"), "unet.", NULL);
    counts(model, 1, 1);
    OK(gq_model_find_tensor(model, "norm", &index));
    OK(gq_model_find_layer(model, "a.weight", &index));
    OK(gq_free_model(model));
    model = load(in("one.safetensors"), "unet.", "n*");
    counts(model, 1, 0);
    OK(gq_free_model(model));
    model = load(in("one.safetensors"), NULL, "*.weight,*.bias");
    counts(model, 0, 1);
    OK(gq_free_model(model));
    model = load(in("one.safetensors"), "vae.", NULL);
    counts(model, 0, 0);
    OK(gq_free_model(model));
    gq_load_options options = GQ_LOAD_OPTIONS_INIT;
    options.include = "[";
    model = (gq_model *)8;
    STATUS(gq_load_model(in("one.safetensors"), &options, &model), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("include");
    CHECK(model == NULL, "a model after a failure");
}

/* Everything in one call: what the calls for one tensor and one layer give, and nothing where the address is 0. */
static void read_all(gq_model *model) {
    float plain[2][6], absmax[2][1];
    unsigned char packed[2][8];
    gq_buffer tensors[2];
    gq_parts layers[2];
    for (int skip = 0; skip < 3; skip++) {
        memset(plain, 0xa5, sizeof plain);
        memset(absmax, 0xa5, sizeof absmax);
        memset(packed, 0xa5, sizeof packed);
        for (int64_t i = 0; i < 2; i++) {
            gq_layer_info layer = GQ_LAYER_INFO_INIT;
            OK(gq_model_layer(model, i, &layer));
            tensors[i] = (gq_buffer){skip == 1 ? 0 : GQ_ADDR(plain[i]), skip == 1 ? 5 : sizeof plain[i]};
            layers[i] = layer.sizes;
            if (skip != 2) layers[i].packed = GQ_ADDR(packed[i]);
            layers[i].absmax = GQ_ADDR(absmax[i]);
        }
        OK(gq_model_read_all(model, tensors, 2, layers, 2, NULL));
        for (int i = 0; i < 2; i++) {
            CHECK((memcmp(plain[i], data.plain, sizeof data.plain) == 0) == (skip != 1), "skip %d: tensor %d", skip, i);
            CHECK((memcmp(packed[i], data.packed, sizeof data.packed) == 0) == (skip != 2), "skip %d: the codes of layer %d", skip, i);
            CHECK(absmax[i][0] == data.absmax[0], "skip %d: absmax %d is %g", skip, i, absmax[i][0]);
        }
    }
    layers[1].packed = GQ_ADDR(packed[1]);
    layers[1].packed_bytes = 7;
    STATUS(gq_model_read_all(model, tensors, 2, layers, 2, NULL), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("packed");
    layers[1].packed_bytes = 8;
    tensors[1].bytes++;
    STATUS(gq_model_read_all(model, tensors, 2, layers, 2, NULL), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("tensors[1]");
    tensors[1].bytes--;
    STATUS(gq_model_read_all(model, tensors, 1, layers, 2, NULL), GQ_ERROR_INVALID_ARGUMENT);
    STATUS(gq_model_read_all(model, tensors, 2, layers, 3, NULL), GQ_ERROR_INVALID_ARGUMENT);
}

/* Two files and an index; a folder that holds them. */
static void shards(void) {
    char header[4096];
    CHECK(mkdir(in("sharded"), 0700) == 0, "cannot make a folder");
    const size_t size = 4 + 24 + 8 + sizeof data.state;
    fill_header(header, sizeof header, "first.");
    CHECK(write_file(in("sharded/model-00001-of-00002.safetensors"), header, &data, size), "cannot write");
    fill_header(header, sizeof header, "second.");
    CHECK(write_file(in("sharded/model-00002-of-00002.safetensors"), header, &data, size), "cannot write");
    FILE *file = fopen(in("sharded/model.safetensors.index.json"), "w");
    CHECK(file != NULL, "cannot write");
    if (!file) return;
    static const char *const names[] = {"a.weight", "a.weight.absmax", "norm", "a.weight.quant_state.bitsandbytes__nf4"};
    fputs("{\"metadata\": {}, \"weight_map\": {", file);
    for (int i = 0; i < 8; i++)
        fprintf(file, "%s\"%s.%s\": \"model-0000%d-of-00002.safetensors\"", i ? ", " : "", i < 4 ? "first" : "second", names[i % 4], i / 4 + 1);
    fputs("}}\n", file);
    fclose(file);
    static const char *const ways[] = {"sharded", "sharded/model.safetensors.index.json"};
    for (int i = 0; i < 2; i++) {
        gq_model *model = load(in(ways[i]), NULL, NULL);
        counts(model, 2, 2);
        int64_t index = -1;
        float values[6] = {0}, whole[15];
        OK(gq_model_find_tensor(model, "second.norm", &index));
        gq_tensor_info info = GQ_TENSOR_INFO_INIT;
        OK(gq_model_tensor(model, index, &info));
        CHECK(strstr(info.file, "model-00002-of-00002.safetensors"), "file %s", info.file);
        OK(gq_model_read(model, index, 0, GQ_ADDR(values), sizeof values, NULL));
        CHECK(memcmp(values, data.plain, sizeof values) == 0, "other values");
        OK(gq_model_find_layer(model, "first.a.weight", &index));
        OK(gq_model_dequantize(model, index, 0, 3, GQ_ADDR(whole), sizeof whole, GQ_F32, NULL));
        read_all(model);
        OK(gq_free_model(model));
    }
}

static void wrong_files(void) {
    gq_model *model = (gq_model *)8;
    STATUS(gq_load_model(in("missing.safetensors"), NULL, &model), GQ_ERROR_NOT_FOUND);
    SAYS("missing.safetensors");
    CHECK(model == NULL, "a model after a failure");
    STATUS(gq_load_model("", NULL, &model), GQ_ERROR_NOT_FOUND);
    CHECK(mkdir(in("empty"), 0700) == 0, "cannot make a folder");
    STATUS(gq_load_model(in("empty"), NULL, &model), GQ_ERROR_BAD_FILE);

    static const char *const headers[] = {
        "", "{", "null", "[]", "{\"a\": 3}", "{\"a\": {\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [0, 4]}}",
        "{\"a\": {\"dtype\": \"F32\", \"shape\": [-1], \"data_offsets\": [0, 0]}}",
        "{\"a\": {\"dtype\": \"F33\", \"shape\": [0], \"data_offsets\": [0, 0]}}",
        "{\"a\": {\"dtype\": \"F32\", \"shape\": [4611686018427387904, 4], \"data_offsets\": [0, 0]}}",
    };
    for (size_t i = 0; i < sizeof headers / sizeof *headers; i++) {
        CHECK(write_file(in("wrong.safetensors"), headers[i], NULL, 0), "cannot write");
        STATUS(gq_load_model(in("wrong.safetensors"), NULL, &model), GQ_ERROR_BAD_FILE);
        SAYS("wrong.safetensors");
    }
    FILE *file = fopen(in("wrong.safetensors"), "wb");
    fputs("\xff\xff\xff\xff\xff\xff\xff\x7f{}", file);
    fclose(file);
    STATUS(gq_load_model(in("wrong.safetensors"), NULL, &model), GQ_ERROR_BAD_FILE);

    /* A file that becomes shorter while it is open. */
    char header[4096];
    fill_header(header, sizeof header, "");
    CHECK(write_file(in("shrinks.safetensors"), header, &data, 4 + 24 + 8 + sizeof data.state), "cannot write");
    model = load(in("shrinks.safetensors"), NULL, NULL);
    CHECK(truncate(in("shrinks.safetensors"), 100) == 0, "cannot truncate");
    float values[15];
    int64_t index = -1;
    OK(gq_model_find_tensor(model, "norm", &index));
    STATUS(gq_model_read(model, index, 0, GQ_ADDR(values), 24, NULL), GQ_ERROR_BAD_FILE);
    STATUS(gq_model_dequantize(model, 0, 0, 3, GQ_ADDR(values), sizeof values, GQ_F32, NULL), GQ_ERROR_BAD_FILE);
    gq_buffer all = {GQ_ADDR(values), 24};
    gq_parts none = GQ_PARTS_INIT;
    STATUS(gq_model_read_all(model, &all, 1, &none, 1, NULL), GQ_ERROR_BAD_FILE);
    gq_state *state = (gq_state *)8;
    STATUS(gq_model_state(model, 0, &state), GQ_ERROR_BAD_FILE);
    CHECK(state == NULL, "a state after a failure");
    OK(gq_free_model(model));
}

/* Every function on every layer and tensor of a file whatever its shapes are: a status, and never a defect. */
static void walk(const char *path) {
    gq_model *model = NULL;
    const gq_status opened = gq_load_model(path, NULL, &model);
    CHECK(opened == GQ_OK || opened == GQ_ERROR_BAD_FILE, "%s: %s", path, gq_last_error());
    if (opened != GQ_OK) return;
    int64_t layers = 0;
    static unsigned char buffer[1 << 16];
    OK(gq_model_layer_count(model, &layers));
    for (int64_t i = 0; i < layers; i++) {
        gq_layer_info layer = GQ_LAYER_INFO_INIT;
        OK(gq_model_layer(model, i, &layer));
        const int64_t rows = layer.ndim ? layer.shape[0] : 1;
        size_t bytes = 4;
        for (int32_t d = 0; d < layer.ndim; d++) bytes *= (size_t)layer.shape[d];
        if (bytes > sizeof buffer) continue;
        gq_state *state = NULL;
        gq_status status = gq_model_dequantize(model, i, 0, rows, GQ_ADDR(buffer), bytes, GQ_F32, NULL);
        CHECK(status == GQ_OK || status == GQ_ERROR_BAD_FILE, "%s: %s", path, gq_last_error());
        status = gq_model_state(model, i, &state);
        CHECK(status == GQ_OK || status == GQ_ERROR_BAD_FILE, "%s: %s", path, gq_last_error());
        if (status == GQ_OK) {
            size_t length;
            gq_state_desc desc = GQ_STATE_DESC_INIT;
            status = gq_dequantize(state, GQ_ADDR(buffer), bytes, GQ_F32, NULL);
            CHECK(status == GQ_OK || status == GQ_ERROR_BAD_FILE, "%s: %s", path, gq_last_error());
            status = gq_state_json(state, (char *)buffer, sizeof buffer, &length);
            CHECK(status == GQ_OK || status == GQ_ERROR_UNSUPPORTED, "%s: %s", path, gq_last_error());
            OK(gq_state_get_desc(state, &desc));
        }
        OK(gq_state_free(state));
    }
    OK(gq_free_model(model));
}

static void odd_shapes(void) {
    static const char *const shapes[] = {"[]", "[1]", "[0]", "[0, 5]", "[5, 0]", "[0, 140737488355328, 140737488355328]", "null", "[1, 1, 1, 1, 1, 1, 1, 1]"};
    static const int elements[] = {1, 1, 0, 0, 0, 0, 1, 1};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        char text[400], header[2000], path[100];
        unsigned char content[500] = {0};
        const int packed = (elements[i] + 1) / 2, absmax = elements[i];
        const int length = snprintf(text, sizeof text, "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"float32\", \"shape\": %s}", shapes[i]);
        snprintf(header, sizeof header,
                 "{\"w.absmax\": {\"dtype\": \"F32\", \"shape\": [%d], \"data_offsets\": [0, %d]}, \"w\": {\"dtype\": \"U8\", \"shape\": [%d, 1], "
                 "\"data_offsets\": [%d, %d]}, \"w.quant_state.bitsandbytes__nf4\": {\"dtype\": \"U8\", \"shape\": [%d], \"data_offsets\": [%d, %d]}}",
                 absmax, 4 * absmax, packed, 4 * absmax, 4 * absmax + packed, length, 4 * absmax + packed, 4 * absmax + packed + length);
        memcpy(content + 4 * absmax + packed, text, (size_t)length);
        snprintf(path, sizeof path, "odd%d.safetensors", (int)i);
        CHECK(write_file(in(path), header, content, (uint64_t)(4 * absmax + packed + length)), "cannot write");
        walk(in(path));
    }
    /* LLM.int8 without rows and without columns. */
    static const int sizes[][2] = {{0, 4}, {4, 0}, {0, 0}, {1, 1}};
    for (int i = 0; i < 4; i++) {
        for (int scales = 0; scales < 5; scales++) {
            const int bytes = sizes[i][0] * sizes[i][1];
            unsigned char content[64] = {0};
            char header[1000];
            snprintf(header, sizeof header,
                     "{\"m.SCB\": {\"dtype\": \"F32\", \"shape\": [%d], \"data_offsets\": [0, %d]}, \"m.weight\": {\"dtype\": \"I8\", \"shape\": [%d, %d], "
                     "\"data_offsets\": [%d, %d]}}",
                     scales, 4 * scales, sizes[i][0], sizes[i][1], 4 * scales, 4 * scales + bytes);
            CHECK(write_file(in("int8.safetensors"), header, content, (uint64_t)(4 * scales + bytes)), "cannot write");
            walk(in("int8.safetensors"));
        }
    }
}

int main(void) {
    one_file();
    shards();
    wrong_files();
    odd_shapes();
    return check_result();
}
