/* The golden files that bitsandbytes' CUDA backend wrote (tests/vectors/bitsandbytes), read through gq_load_model. */
#ifndef GOLDEN_H
#define GOLDEN_H

#include "check.h"

/* A tensor's bytes and what describes them; data is NULL if the file has none of this name. */
struct tensor {
    void *data;
    size_t bytes;
    gq_tensor_info info;
};

static inline struct tensor golden_read(gq_model *model, const char *name) {
    struct tensor t = {NULL, 0, GQ_TENSOR_INFO_INIT};
    int64_t index;
    if (gq_model_find_tensor(model, name, &index) != GQ_OK) return t;
    OK(gq_model_tensor(model, index, &t.info));
    t.bytes = (size_t)t.info.bytes;
    t.data = malloc(t.bytes + 1); /* never malloc(0), which may be NULL */
    OK(gq_model_read(model, index, 0, GQ_ADDR(t.data), t.bytes, NULL));
    return t;
}

static inline size_t golden_size(gq_dtype dtype) { return dtype == GQ_F32 ? 4 : 2; }

#endif
