/* struct_size: callers built with an older, shorter struct, and with a newer, longer one. */
#include "check.h"

enum { N = 256, BLOCKSIZE = 64 };

static float weight[N], absmax[N / 32];
static unsigned char packed[N / 2];

static gq_status quantize(const gq_exec *exec) {
    return gq_quantize_nf4(GQ_ADDR(weight), GQ_F32, N, BLOCKSIZE, GQ_ADDR(absmax), N / BLOCKSIZE, GQ_ADDR(packed), sizeof packed, exec);
}

/* The struct that a later header might have. */
struct longer_exec {
    gq_exec known;
    unsigned char unknown[24];
};

static void options_in(void) {
    /* Everything behind struct_size and device is unknown to this caller, and garbage. */
    gq_exec exec;
    memset(&exec, 0xff, sizeof exec);
    exec.struct_size = (uint32_t)offsetof(gq_exec, stream);
    exec.device = GQ_CPU;
    CHECK(quantize(&exec) == GQ_OK, "%s", gq_last_error());

    struct longer_exec longer = {GQ_EXEC_INIT, {0}};
    longer.known.struct_size = sizeof longer;
    CHECK(quantize(&longer.known) == GQ_OK, "%s", gq_last_error());
    for (size_t i = 0; i < sizeof longer.unknown; i++) {
        longer.unknown[i] = 1;
        gq_status status = quantize(&longer.known);
        CHECK(status == GQ_ERROR_INVALID_ARGUMENT, "byte %d behind the end is set: %s", (int)i, gq_status_name(status));
        SAYS("struct_size");
        longer.unknown[i] = 0;
    }
    static const uint32_t sizes[] = {0, 1, 4, UINT32_MAX, 1u << 31};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        gq_exec bad = GQ_EXEC_INIT;
        bad.struct_size = sizes[i];
        gq_status status = quantize(&bad);
        CHECK(status == GQ_ERROR_INVALID_ARGUMENT, "struct_size %u: %s", (unsigned)sizes[i], gq_status_name(status));
        SAYS("struct_size");
    }
    gq_exec flags = GQ_EXEC_INIT;
    flags.flags = GQ_EXEC_SETTLED;
    CHECK(quantize(&flags) == GQ_OK, "%s", gq_last_error());
    flags.flags |= 1u << 31;
    CHECK(quantize(&flags) == GQ_ERROR_INVALID_ARGUMENT, "a flag that there is not");
    SAYS("flags");

    /* A caller that knows nested, but not blocksize. */
    int64_t shape[1] = {N};
    gq_quantize_options options;
    memset(&options, 0xff, sizeof options);
    options.struct_size = (uint32_t)offsetof(gq_quantize_options, blocksize);
    options.nested = 0;
    gq_parts layout;
    OK(gq_quantized_layout(GQ_FORMAT_NF4, shape, 1, &options, &layout));
    CHECK(layout.absmax_bytes == N / 64 * 4, "%d bytes of absmax", (int)layout.absmax_bytes);
    options.struct_size = sizeof options;
    options.nested = 2;
    options.blocksize = 64;
    STATUS(gq_quantized_layout(GQ_FORMAT_NF4, shape, 1, &options, &layout), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("nested");
    options.nested = 0;
    options.blocksize = 65;
    STATUS(gq_quantized_layout(GQ_FORMAT_NF4, shape, 1, &options, &layout), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("blocksize");
}

/* A struct that the library fills: no byte behind the caller's struct_size is touched. */
static void info_out(void) {
    for (uint32_t size = 8; size <= sizeof(gq_format_info); size += 4) {
        gq_format_info info;
        memset(&info, 0xa5, sizeof info);
        info.struct_size = size;
        OK(gq_format_get_info(GQ_FORMAT_FP4, &info));
        CHECK(info.struct_size == size && info.format == GQ_FORMAT_FP4, "struct_size became %u", (unsigned)info.struct_size);
        for (size_t i = size; i < sizeof info; i++) CHECK(((unsigned char *)&info)[i] == 0xa5, "size %u: byte %d was written", (unsigned)size, (int)i);
    }
    struct {
        gq_format_info known;
        unsigned char unknown[24];
    } longer;
    memset(&longer, 0, sizeof longer);
    longer.known.struct_size = sizeof longer;
    OK(gq_format_get_info(GQ_FORMAT_NF4, &longer.known));
    CHECK(longer.known.bits == 4 && longer.known.struct_size == sizeof longer, "a longer struct is not filled");
    for (size_t i = 0; i < sizeof longer.unknown; i++) CHECK(longer.unknown[i] == 0, "byte %d behind the end was written", (int)i);
    static const uint32_t sizes[] = {0, 1, 4, UINT32_MAX};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        gq_format_info info = GQ_FORMAT_INFO_INIT;
        info.struct_size = sizes[i];
        STATUS(gq_format_get_info(GQ_FORMAT_NF4, &info), GQ_ERROR_INVALID_ARGUMENT);
        SAYS("struct_size");
    }
}

/* A state's description in a struct without the last members: the state is on the CPU. */
static void description(void) {
    OK(quantize(NULL));
    int64_t shape[2] = {4, 64};
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    desc.struct_size = (uint32_t)offsetof(gq_state_desc, device);
    desc.device = 77;
    desc.reserved = 77;
    desc.format = GQ_FORMAT_NF4;
    desc.dtype = GQ_F32;
    desc.blocksize = BLOCKSIZE;
    desc.shape = GQ_ADDR(shape);
    desc.ndim = 2;
    desc.parts.packed = GQ_ADDR(packed);
    desc.parts.packed_bytes = sizeof packed;
    desc.parts.absmax = GQ_ADDR(absmax);
    desc.parts.absmax_bytes = N / BLOCKSIZE * 4;
    gq_state *state = NULL;
    OK(gq_state_create(&desc, &state));
    gq_state_desc got = GQ_STATE_DESC_INIT;
    OK(gq_state_get_desc(state, &got));
    CHECK(got.device == GQ_CPU && got.reserved == 0, "device %d, reserved %u", (int)got.device, (unsigned)got.reserved);
    OK(gq_state_free(state));
    desc.struct_size = sizeof desc;
    desc.reserved = 0;
    int32_t devices = 0;
    OK(gq_device_count(&devices));
    STATUS(gq_state_create(&desc, &state), devices ? GQ_ERROR_NOT_FOUND : GQ_ERROR_UNSUPPORTED);
    desc.device = GQ_CPU;
    desc.reserved = 77;
    STATUS(gq_state_create(&desc, &state), GQ_ERROR_INVALID_ARGUMENT);
    SAYS("reserved");
}

/* struct_size of a device's description is looked at before the device is. */
static void device_info(void) {
    static const uint32_t sizes[] = {0, 1, 4, UINT32_MAX};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        gq_device_info info;
        memset(&info, 0xa5, sizeof info);
        info.struct_size = sizes[i];
        CHECK(gq_device_get_info(0, &info) != GQ_OK, "struct_size %u is accepted", (unsigned)sizes[i]);
        for (size_t k = 4; k < sizeof info; k++) CHECK(((unsigned char *)&info)[k] == 0xa5, "struct_size %u: byte %d was written", (unsigned)sizes[i], (int)k);
    }
}

int main(void) {
    options_in();
    info_out();
    description();
    device_info();
    return check_result();
}
