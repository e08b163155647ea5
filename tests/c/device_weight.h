/* Weights of linear.h on a device. */
#ifndef DEVICE_WEIGHT_H
#define DEVICE_WEIGHT_H

#include "gpu.h"
#include "linear.h"

struct device_weight {
    struct gpu_buffer parts[5];
    gq_state *state;
};

/* Copies a weight to the device; its codes and absmax lie so many bytes behind a multiple of 256. */
static inline void upload_at(struct device_weight *to, const struct linear_weight *w, size_t codes_offset, size_t absmax_offset) {
    const size_t offsets[5] = {codes_offset, absmax_offset, 0, 0, 0};
    gq_state_desc desc = w->desc;
    gq_addr *part = &desc.parts.packed; /* address, bytes, address, bytes, … */
    for (int i = 0; i < 5; i++)
        if (part[2 * i]) part[2 * i] = gpu_put(&to->parts[i], (void *)(uintptr_t)part[2 * i], (size_t)part[2 * i + 1], offsets[i]);
    desc.device = 0;
    desc.struct_size = sizeof desc;
    OK(gq_state_create(&desc, &to->state));
}

static inline void upload(struct device_weight *to, const struct linear_weight *w, size_t codes_offset) { upload_at(to, w, codes_offset, 0); }

static inline void drop(struct device_weight *w) {
    OK(gq_state_free(w->state));
    for (int i = 0; i < 5; i++) gpu_drop(&w->parts[i]);
}

#endif
