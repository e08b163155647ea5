/* Weights and safetensors files for the tests. */
#ifndef WEIGHTS_H
#define WEIGHTS_H

#include "check.h"

/* The path of a file in the folder that run.sh makes; valid for the next three calls. */
static inline const char *in(const char *name) {
    static char paths[4][4096];
    static int next;
    char *path = paths[next++ % 4];
    const char *folder = getenv("TEST_FOLDER");
    snprintf(path, sizeof paths[0], "%s/%s", folder ? folder : ".", name);
    return path;
}

/* Writes a file of a JSON header and size bytes of data; with data NULL, of a hole of that size. Returns 0 if that failed. */
static inline int write_file(const char *path, const char *header, const void *data, uint64_t size) {
    FILE *file = fopen(path, "wb");
    if (!file) return 0;
    const uint64_t length = strlen(header);
    unsigned char prefix[8];
    for (int i = 0; i < 8; i++) prefix[i] = (unsigned char)(length >> 8 * i);
    int ok = fwrite(prefix, 1, 8, file) == 8 && fwrite(header, 1, length, file) == length;
    if (ok && data) ok = fwrite(data, 1, size, file) == size;
    else if (ok && size) ok = fseek(file, (long)(8 + length + size - 1), SEEK_SET) == 0 && fputc(0, file) == 0;
    return fclose(file) == 0 && ok;
}

/* Values between -1 and 1, the same ones in each run. */
static inline void fill_weights(float *weight, int64_t n) {
    uint32_t random = 20261;
    for (int64_t i = 0; i < n; i++) {
        random = random * 1664525 + 1013904223;
        weight[i] = (float)(int32_t)random / 2147483648.0f;
    }
}

/* An NF4 weight in float32, in blocks of 64, over buffers of the caller. */
static inline gq_state *nf4_state(const int64_t *shape, int32_t ndim, const void *packed, size_t packed_bytes, const float *absmax, size_t absmax_bytes) {
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    desc.format = GQ_FORMAT_NF4;
    desc.dtype = GQ_F32;
    desc.blocksize = 64;
    desc.shape = GQ_ADDR(shape);
    desc.ndim = ndim;
    desc.parts.packed = GQ_ADDR(packed);
    desc.parts.packed_bytes = packed_bytes;
    desc.parts.absmax = GQ_ADDR(absmax);
    desc.parts.absmax_bytes = absmax_bytes;
    gq_state *state = NULL;
    OK(gq_state_create(&desc, &state));
    CHECK(state != NULL, "no state");
    return state;
}

#endif
