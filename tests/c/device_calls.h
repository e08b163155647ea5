/* One call of each function that puts work on a stream, with the results of the CPU beside it. */
#ifndef DEVICE_CALLS_H
#define DEVICE_CALLS_H

#include "gpu.h"
#include "weights.h"

enum { CALL_ROWS = 96, CALL_COLS = 1000, CALL_N = CALL_ROWS * CALL_COLS, CALL_BLOCKS = CALL_N / 64 };

/* All parts are in one piece of memory, on the host and at the same places on the device: the weight, and behind it what becomes of
 * it. */
struct call_memory {
    float weight[CALL_N];
    float absmax[3][CALL_BLOCKS], row_absmax[CALL_ROWS], nested_absmax[CALL_BLOCKS / 256 + 1], nested_codebook[256], offset[4];
    float decoded[CALL_N], decoded_nested[CALL_N];
    unsigned char packed[3][CALL_N / 2], codes[CALL_N], row_codes[CALL_N], columns[CALL_COLS], nested_bytes[CALL_BLOCKS];
    unsigned char unpacked[CALL_N], repacked[CALL_N / 2];
    unsigned char workspace[8 * CALL_BLOCKS + 4096]; /* not compared */
};

enum { CALL_COMPARED = offsetof(struct call_memory, workspace) };

struct call_states {
    gq_state *plain, *nested;
};

static const int64_t call_shape[2] = {CALL_ROWS, CALL_COLS};

/* Where a member is: base is the address of the whole. */
#define AT(member) (base + offsetof(struct call_memory, member))

static inline gq_parts nested_parts(gq_addr base) {
    gq_quantize_options options = GQ_QUANTIZE_OPTIONS_INIT;
    options.nested = 1;
    gq_parts parts;
    OK(gq_quantized_layout(GQ_FORMAT_FP4, call_shape, 2, &options, &parts));
    parts.packed = AT(packed[2]);
    parts.absmax = AT(nested_bytes);
    parts.nested_absmax = AT(nested_absmax);
    parts.nested_codebook = AT(nested_codebook);
    parts.offset = AT(offset);
    return parts;
}

/* The states that calls decode. */
static inline struct call_states call_states(gq_addr base, int32_t device) {
    struct call_states states = {NULL, NULL};
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    desc.format = GQ_FORMAT_NF4;
    desc.dtype = GQ_F32;
    desc.blocksize = 64;
    desc.shape = GQ_ADDR(call_shape);
    desc.ndim = 2;
    desc.device = device;
    desc.parts.packed = AT(packed[0]);
    desc.parts.packed_bytes = CALL_N / 2;
    desc.parts.absmax = AT(absmax[0]);
    desc.parts.absmax_bytes = CALL_BLOCKS * 4;
    OK(gq_state_create(&desc, &states.plain));
    desc.format = GQ_FORMAT_FP4;
    desc.nested_blocksize = 256;
    desc.parts = nested_parts(base);
    OK(gq_state_create(&desc, &states.nested));
    return states;
}

static inline void free_states(struct call_states *states) {
    OK(gq_state_free(states->plain));
    OK(gq_state_free(states->nested));
}

/* All calls, on the CPU or a device. */
static inline void call_all(gq_addr base, const struct call_states *states, const gq_exec *given) {
    gq_exec exec = GQ_EXEC_INIT;
    if (given) exec = *given;
    if (exec.device != GQ_CPU) {
        exec.workspace = (AT(workspace) + 15) / 16 * 16;
        exec.workspace_bytes = sizeof ((struct call_memory *)0)->workspace - 16;
    }
    gq_quantize_options options = GQ_QUANTIZE_OPTIONS_INIT;
    options.nested = 1;
    const gq_parts parts = nested_parts(base);
    OK(gq_quantize_nf4(AT(weight), GQ_F32, CALL_N, 64, AT(absmax[0]), CALL_BLOCKS, AT(packed[0]), CALL_N / 2, &exec));
    OK(gq_quantize_fp4(AT(weight), GQ_F32, CALL_N, 64, AT(absmax[1]), CALL_BLOCKS, AT(packed[1]), CALL_N / 2, &exec));
    OK(gq_quantize_blockwise(AT(weight), GQ_F32, CALL_N, 64, 0, AT(absmax[2]), CALL_BLOCKS, AT(codes), CALL_N, &exec));
    OK(gq_quantize_rows_int8(AT(weight), GQ_F32, CALL_ROWS, CALL_COLS, 0.999f, AT(row_absmax), CALL_ROWS, AT(row_codes), CALL_N, AT(columns), CALL_COLS, &exec));
    OK(gq_quantize(GQ_FORMAT_FP4, AT(weight), GQ_F32, call_shape, 2, &options, &parts, &exec, NULL));
    OK(gq_dequantize(states->plain, AT(decoded), CALL_N * 4, GQ_F32, &exec));
    OK(gq_dequantize_range(states->nested, 17, CALL_N - 30, AT(decoded_nested) + 20, (CALL_N - 30) * 4, GQ_F32, &exec));
    OK(gq_unpack_4bit(AT(packed[1]), CALL_N / 2, GQ_HIGH_NIBBLE_FIRST, AT(unpacked), CALL_N, &exec));
    OK(gq_pack_4bit(AT(unpacked), CALL_N, GQ_LOW_NIBBLE_FIRST, AT(repacked), CALL_N / 2, &exec));
}

/* What the CPU makes of a weight that depends on number. */
static inline void call_on_host(struct call_memory *memory, int number) {
    memset(memory, GPU_FILL, sizeof *memory);
    fill_weights(memory->weight, CALL_N);
    for (int i = 0; i < CALL_N; i++) memory->weight[i] *= (float)(1 + (i * 7 + number * 13) % 29) / 29;
    struct call_states states = call_states(GQ_ADDR(memory), GQ_CPU);
    call_all(GQ_ADDR(memory), &states, NULL);
    free_states(&states);
}

/* The member that a byte of the memory belongs to. */
static inline const char *member_at(size_t byte) {
    static const struct {
        size_t first;
        const char *name;
    } members[] = {
#define MEMBER(name) {offsetof(struct call_memory, name), #name}
        MEMBER(repacked), MEMBER(unpacked), MEMBER(nested_bytes), MEMBER(columns), MEMBER(row_codes), MEMBER(codes), MEMBER(packed), MEMBER(decoded_nested),
        MEMBER(decoded), MEMBER(offset), MEMBER(nested_codebook), MEMBER(nested_absmax), MEMBER(row_absmax), MEMBER(absmax), MEMBER(weight),
#undef MEMBER
    };
    size_t i = 0;
    while (members[i].first > byte) i++;
    return members[i].name;
}

/* Whether the device's memory, as it was copied to got, is that of the CPU. */
static inline void same_calls(const struct call_memory *got, const struct call_memory *want, const char *what, int number) {
    const unsigned char *g = (const unsigned char *)got, *w = (const unsigned char *)want;
    if (memcmp(g, w, CALL_COMPARED) == 0) return;
    size_t i = 0;
    while (g[i] == w[i]) i++;
    CHECK(0, "%s %d: byte %zu, in %s, is %02x, on the CPU %02x", what, number, i, member_at(i), g[i], w[i]);
}

#endif
