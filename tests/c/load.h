/* Models for the loading tests: files with tensors of awkward sizes, and whether their bytes arrive on a device. */
#ifndef LOAD_H
#define LOAD_H

#include "gpu.h"
#include "weights.h"

#include <sys/stat.h>

enum { LOAD_ROWS = 31, LOAD_COLS = 67, LOAD_N = LOAD_ROWS * LOAD_COLS };

/* Writes bytes of noise, the same ones for the same seed. */
static inline int write_noise(FILE *file, uint64_t seed, uint64_t bytes) {
    static uint64_t block[8192];
    uint64_t random = seed * 2654435761u + 88172645463325252u;
    while (bytes > 0) {
        const size_t count = bytes < sizeof block ? (size_t)bytes : sizeof block;
        for (size_t i = 0; i < (count + 7) / 8; i++) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            block[i] = random;
        }
        if (fwrite(block, 1, count, file) != count) return 0;
        bytes -= count;
    }
    return 1;
}

/* Writes shard number k of a model: a tensor of each size, and an NF4 layer behind them, at whatever offset that is. */
static inline void write_shard(const char *path, int k, const uint64_t *sizes, int count) {
    static const char state[] = "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"bfloat16\", \"shape\": [31, 67]}";
    const uint64_t packed = (LOAD_N + 1) / 2, absmax = (LOAD_N + 63) / 64 * 4, text = sizeof state - 1;
    char header[8192];
    uint64_t at = 0;
    int length = snprintf(header, sizeof header, "{");
    for (int i = 0; i < count; i++) {
        length += snprintf(header + length, sizeof header - (size_t)length, "\"s%d.t%d\": {\"dtype\": \"U8\", \"shape\": [%llu], \"data_offsets\": [%llu, %llu]}, ",
                           k, i, (unsigned long long)sizes[i], (unsigned long long)at, (unsigned long long)(at + sizes[i]));
        at += sizes[i];
    }
    snprintf(header + length, sizeof header - (size_t)length,
             "\"s%d.w\": {\"dtype\": \"U8\", \"shape\": [%llu, 1], \"data_offsets\": [%llu, %llu]}, "
             "\"s%d.w.absmax\": {\"dtype\": \"F32\", \"shape\": [%llu], \"data_offsets\": [%llu, %llu]}, "
             "\"s%d.w.quant_state.bitsandbytes__nf4\": {\"dtype\": \"U8\", \"shape\": [%llu], \"data_offsets\": [%llu, %llu]}}",
             k, (unsigned long long)packed, (unsigned long long)at, (unsigned long long)(at + packed), k, (unsigned long long)absmax / 4,
             (unsigned long long)(at + packed), (unsigned long long)(at + packed + absmax), k, (unsigned long long)text,
             (unsigned long long)(at + packed + absmax), (unsigned long long)(at + packed + absmax + text));
    FILE *file = fopen(path, "wb");
    unsigned char prefix[8];
    for (int i = 0; i < 8; i++) prefix[i] = (unsigned char)((uint64_t)strlen(header) >> 8 * i);
    CHECK(file && fwrite(prefix, 1, 8, file) == 8 && fputs(header, file) >= 0 && write_noise(file, (uint64_t)k, at + packed + absmax) &&
              fputs(state, file) >= 0, "cannot write %s", path);
    if (file) CHECK(fclose(file) == 0, "cannot write %s", path);
}

/* The path of shard k of a model in a folder. */
static inline const char *shard(const char *folder, int k, int shards) {
    char name[300];
    snprintf(name, sizeof name, "%s/model-%05d-of-%05d.safetensors", folder, k + 1, shards);
    return in(name);
}

/* Makes a folder with a model of several shards, each of which has tensors of these sizes. */
static inline void write_model(const char *folder, int shards, const uint64_t *sizes, int count) {
    CHECK(mkdir(in(folder), 0700) == 0, "cannot make %s", folder);
    char path[300];
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", folder);
    FILE *index = fopen(in(path), "w");
    CHECK(index != NULL, "cannot write %s", path);
    if (!index) return;
    fputs("{\"metadata\": {}, \"weight_map\": {", index);
    for (int k = 0; k < shards; k++) {
        write_shard(shard(folder, k, shards), k, sizes, count);
        const char *file = strrchr(shard(folder, k, shards), '/') + 1;
        for (int i = 0; i < count; i++) fprintf(index, "%s\"s%d.t%d\": \"%s\"", k + i ? ", " : "", k, i, file);
        static const char *const parts[] = {"", ".absmax", ".quant_state.bitsandbytes__nf4"};
        for (int i = 0; i < 3; i++) fprintf(index, ", \"s%d.w%s\": \"%s\"", k, parts[i], file);
    }
    fputs("}}\n", index);
    fclose(index);
}

/* Whether device memory has these bytes. */
static inline void same_bytes(gq_addr address, const void *want, size_t bytes, const char *what) {
    if (!bytes) return;
    unsigned char *got = malloc(bytes);
    GPU(cuMemcpyDtoH_v2(got, address, bytes));
    if (memcmp(got, want, bytes) != 0) {
        size_t i = 0;
        while (got[i] == ((const unsigned char *)want)[i]) i++;
        CHECK(0, "%s: byte %zu of %zu is %02x, want %02x", what, i, bytes, got[i], ((const unsigned char *)want)[i]);
    }
    free(got);
}

/* The bytes of a tensor, from its file, past the library. */
static inline unsigned char *file_bytes(const gq_tensor_info *info) {
    unsigned char *data = malloc((size_t)info->bytes + 1);
    FILE *file = fopen(info->file, "rb");
    CHECK(file && fseek(file, (long)info->file_offset, SEEK_SET) == 0 && fread(data, 1, (size_t)info->bytes, file) == info->bytes, "cannot read %s",
          info->file);
    if (file) fclose(file);
    return data;
}

static const char *const part_names[] = {"packed", "absmax", "nested_absmax", "nested_codebook", "offset", "codebook"};

/* The address and bytes of part p. */
static inline uint64_t *part_of(gq_parts *parts, int p) { return &parts->packed + 2 * p; }

/* Whether parts on the device are those of layer i, read by the CPU. */
static inline void same_layer(gq_model *model, int64_t i, gq_parts got, const char *what) {
    gq_layer_info info = GQ_LAYER_INFO_INIT;
    OK(gq_model_layer(model, i, &info));
    gq_parts want = info.sizes;
    for (int p = 0; p < 6; p++)
        if (part_of(&want, p)[1]) *part_of(&want, p) = GQ_ADDR(malloc((size_t)part_of(&want, p)[1]));
    OK(gq_model_read_layer(model, i, &want, NULL));
    for (int p = 0; p < 6; p++) {
        char name[400];
        snprintf(name, sizeof name, "%s: %s of %s", what, part_names[p], info.name);
        const uint64_t *g = part_of(&got, p), *w = part_of(&want, p);
        CHECK(g[1] == w[1] && (g[0] != 0) == (w[1] != 0), "%s: %d bytes at %#llx, want %d", name, (int)g[1], (unsigned long long)g[0], (int)w[1]);
        if (g[1] == w[1] && g[0]) same_bytes(g[0], (void *)(uintptr_t)w[0], (size_t)w[1], name);
        free((void *)(uintptr_t)w[0]);
    }
}

/* Whether all of a model that was loaded to a device is what its files hold. */
static inline void same_model(gq_model *model, const char *path, int32_t device) {
    gq_model *host = NULL;
    int64_t tensors = 0, layers = 0, more = 0;
    OK(gq_load_model(path, NULL, &host));
    OK(gq_model_tensor_count(host, &tensors));
    OK(gq_model_tensor_count(model, &more));
    CHECK(more == tensors, "%d tensors, want %d", (int)more, (int)tensors);
    OK(gq_model_layer_count(host, &layers));
    OK(gq_model_layer_count(model, &more));
    CHECK(more == layers, "%d layers, want %d", (int)more, (int)layers);
    for (int64_t i = 0; i < tensors; i++) {
        gq_tensor_info info = GQ_TENSOR_INFO_INIT, stored = GQ_TENSOR_INFO_INIT;
        OK(gq_model_tensor(model, i, &info));
        OK(gq_model_tensor(host, i, &stored));
        CHECK(stored.address == 0, "%s has an address on the host", stored.name);
        CHECK(strcmp(info.name, stored.name) == 0 && info.bytes == stored.bytes, "tensor %d is %s", (int)i, info.name);
        CHECK(info.bytes == 0 || (info.address && info.address % 256 == 0), "%s is at %#llx", info.name, (unsigned long long)info.address);
        if (!info.bytes || !info.address) continue;
        unsigned char *want = file_bytes(&stored);
        same_bytes(info.address, want, (size_t)info.bytes, info.name);
        free(want);
    }
    for (int64_t i = 0; i < layers; i++) {
        gq_state *state = NULL;
        gq_state_desc desc = GQ_STATE_DESC_INIT;
        OK(gq_model_state(model, i, &state));
        OK(gq_state_get_desc(state, &desc));
        CHECK(desc.device == device, "the state of layer %d is on device %d", (int)i, (int)desc.device);
        same_layer(host, i, desc.parts, "state");
        OK(gq_state_free(state));
    }
    OK(gq_free_model(host));
}

/* Device buffers of the caller for all tensors and layers of a model, in one allocation with a gap after each. */
struct buffers {
    uint64_t base;
    size_t bytes;
    int64_t tensor_count, layer_count;
    gq_buffer *tensors;
    gq_parts *layers;
};

static inline uint64_t next_buffer(uint64_t *at, uint64_t bytes) {
    const uint64_t address = *at;
    /* Statistics are aligned to their elements; nothing needs more. */
    *at += (bytes + 3) / 4 * 4 + 12;
    return bytes ? address : 0;
}

static inline struct buffers make_buffers(gq_model *model) {
    struct buffers b = {0, 0, 0, 0, NULL, NULL};
    OK(gq_model_tensor_count(model, &b.tensor_count));
    OK(gq_model_layer_count(model, &b.layer_count));
    b.tensors = calloc((size_t)b.tensor_count + 1, sizeof *b.tensors);
    b.layers = calloc((size_t)b.layer_count + 1, sizeof *b.layers);
    for (int place = 0; place < 2; place++) { /* measured first, then placed */
        uint64_t at = b.base + 12;
        for (int64_t i = 0; i < b.tensor_count; i++) {
            gq_tensor_info info = GQ_TENSOR_INFO_INIT;
            OK(gq_model_tensor(model, i, &info));
            b.tensors[i].bytes = info.bytes;
            b.tensors[i].address = next_buffer(&at, info.bytes);
        }
        for (int64_t i = 0; i < b.layer_count; i++) {
            gq_layer_info info = GQ_LAYER_INFO_INIT;
            OK(gq_model_layer(model, i, &info));
            b.layers[i] = info.sizes;
            for (int p = 0; p < 6; p++) *part_of(&b.layers[i], p) = next_buffer(&at, part_of(&b.layers[i], p)[1]);
        }
        if (!place) {
            b.bytes = (size_t)at;
            b.base = gpu_alloc(b.bytes);
        }
    }
    gpu_fill(b.base, b.bytes);
    return b;
}

/* Whether the buffers hold the model, and the gaps are untouched. */
static inline void same_buffers(gq_model *model, const struct buffers *b, const char *what) {
    unsigned char *all = malloc(b->bytes);
    GPU(cuMemcpyDtoH_v2(all, b->base, b->bytes));
    for (int64_t i = 0; i < b->tensor_count; i++) {
        gq_tensor_info info = GQ_TENSOR_INFO_INIT;
        OK(gq_model_tensor(model, i, &info));
        if (!b->tensors[i].address) continue;
        unsigned char *want = file_bytes(&info);
        unsigned char *got = all + (b->tensors[i].address - b->base);
        CHECK(memcmp(got, want, (size_t)info.bytes) == 0, "%s: %s differs", what, info.name);
        memset(got, GPU_FILL, (size_t)info.bytes);
        free(want);
    }
    for (int64_t i = 0; i < b->layer_count; i++) {
        same_layer(model, i, b->layers[i], what);
        gq_parts parts = b->layers[i];
        for (int p = 0; p < 6; p++) memset(all + (*part_of(&parts, p) ? *part_of(&parts, p) - b->base : 0), GPU_FILL, (size_t)part_of(&parts, p)[1]);
    }
    for (size_t i = 0; i < b->bytes; i++) {
        if (all[i] == GPU_FILL) continue;
        CHECK(0, "%s: a gap was written, byte %zu", what, i);
        break;
    }
    free(all);
}

static inline void free_buffers(struct buffers *b) {
    gpu_free(b->base);
    free(b->tensors);
    free(b->layers);
}

/* gq_model_read_all, gq_model_read and gq_model_read_layer of a model into buffers on the device. */
static inline void read_into_buffers(const char *path, const gq_exec *exec) {
    gq_model *model = NULL;
    OK(gq_load_model(path, NULL, &model));
    struct buffers b = make_buffers(model);
    OK(gq_model_read_all(model, b.tensors, b.tensor_count, b.layers, b.layer_count, exec));
    same_buffers(model, &b, "gq_model_read_all");
    gpu_fill(b.base, b.bytes);
    for (int64_t i = 0; i < b.tensor_count; i++) {
        /* In two pieces, that meet at an odd byte. */
        const uint64_t all = b.tensors[i].bytes, first = all > 1 ? all / 3 | 1 : 0;
        OK(gq_model_read(model, i, 0, b.tensors[i].address, (size_t)first, exec));
        OK(gq_model_read(model, i, first, b.tensors[i].address + first, (size_t)(all - first), exec));
    }
    for (int64_t i = 0; i < b.layer_count; i++) OK(gq_model_read_layer(model, i, &b.layers[i], exec));
    same_buffers(model, &b, "gq_model_read and gq_model_read_layer");

    /* What has no address is skipped. */
    gpu_fill(b.base, b.bytes);
    for (int64_t i = 0; i < b.tensor_count; i += 2) b.tensors[i].address = 0;
    for (int64_t i = 0; i < b.layer_count; i++) b.layers[i] = (gq_parts)GQ_PARTS_INIT;
    OK(gq_model_read_all(model, b.tensors, b.tensor_count, b.layers, b.layer_count, exec));
    b.layer_count = 0;
    same_buffers(model, &b, "half of the tensors");
    free_buffers(&b);
    OK(gq_free_model(model));
}

#endif
