/* Which kernels a linear layer launches, with what workspace, and what comes of every failure, with the driver of fake_cuda.c. The table of
 * GQUANT_TUNE, tables/all.json, wants another kernel for almost every number of rows. */
#include "fake_cuda.h"
#include "gpu.h"

enum { BLOCKSIZE = 64, K = 512, MOST = 1000 };

static gq_addr packed, absmax, nested_absmax, codebook, offset, x, y, workspace;
static gq_exec exec;
static gq_state *state;
static int64_t m;

static gq_addr allocate(size_t bytes) {
    gq_addr address = 0;
    GPU(cuMemAlloc_v2(&address, bytes));
    return address;
}

static gq_state *make_state(int64_t n, int64_t k, int nested) {
    const int64_t shape[2] = {n, k}, blocks = n * k / BLOCKSIZE;
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    gq_state *made = NULL;
    desc.format = GQ_FORMAT_NF4;
    desc.dtype = GQ_BF16;
    desc.blocksize = BLOCKSIZE;
    desc.shape = GQ_ADDR(shape);
    desc.ndim = 2;
    desc.device = 0;
    desc.parts.packed = packed;
    desc.parts.packed_bytes = (uint64_t)(n * k) / 2;
    desc.parts.absmax = absmax;
    desc.parts.absmax_bytes = (uint64_t)blocks * (nested ? 1 : 4);
    if (nested) {
        desc.nested_blocksize = 256;
        desc.parts.nested_absmax = nested_absmax;
        desc.parts.nested_absmax_bytes = (uint64_t)(blocks + 255) / 256 * 4;
        desc.parts.nested_codebook = codebook;
        desc.parts.nested_codebook_bytes = 1024;
        desc.parts.offset = offset;
        desc.parts.offset_bytes = 4;
    }
    OK(gq_state_create(&desc, &made));
    return made;
}

static gq_status run(void) { return gq_linear(state, x, m, GQ_BF16, 0, y, &exec); }

static int64_t contexts;

static void check(const char *function, const char *settings, gq_status status) {
    CHECK(fake_count("contexts") == contexts, "m %d, %s: contexts", (int)m, settings);
    if (!function) {
        CHECK(status == GQ_OK, "m %d, %s: %s", (int)m, settings, gq_last_error());
        return;
    }
    if (status == GQ_OK && fake_releases(function)) return;
    CHECK(status == GQ_ERROR_DEVICE, "m %d, %s: %s", (int)m, settings, gq_status_name(status));
    SAYS("CUDA_ERROR_ILLEGAL_ADDRESS");
}

/* With all workspace, with too little, and with every call of the driver failing. */
static void layers(int64_t n, int nested) {
    static const int64_t rows[] = {1, 7, 10, 14, 15, 16, 30, 31, 50, 60, 62, 64, 95, 124, 127, 128, 190, 191, 192, 254, 255, 256, 300, 301, 302, 420, 501, 601, 700, 701, 702, 805, 900};
    state = make_state(n, K, nested);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        uint64_t wanted = 0;
        int32_t packed_too = 0;
        m = rows[i];
        OK(gq_linear_workspace_size(state, m, GQ_BF16, &exec, &wanted, &packed_too));
        CHECK(packed_too == 1 && wanted < 64 << 20, "n %d, m %d: packed %d, %llu bytes of workspace", (int)n, (int)m, (int)packed_too, (unsigned long long)wanted);
        for (int less = 0; less < (wanted ? 2 : 1); less++) {
            exec.workspace_bytes = wanted - (uint64_t)less;
            fake_set("");
            const gq_status status = run();
            const int64_t launches = fake_count("launches");
            CHECK(status == GQ_OK && (launches == 1 || launches == 2) && fake_count("cuLaunchKernelEx") == launches, "n %d, m %d, workspace %d: %s, %d launches", (int)n,
                  (int)m, (int)exec.workspace_bytes, gq_last_error(), (int)launches);
        }
        contexts = fake_count("contexts");
        if (n < 1000) fake_failures(700, run, check);
    }
    exec.workspace_bytes = 64 << 20;
    OK(gq_state_free(state));
}

int main(void) {
    fake_open();
    gpu_start();
    exec = gpu_exec(NULL);
    OK(gq_device_prepare(0));
    fake_set("keep"); /* the device's tables */
    packed = allocate(200000 * K / 2);
    absmax = allocate(200000 * K / 16);
    nested_absmax = allocate(200000);
    codebook = allocate(1024);
    offset = allocate(256);
    x = allocate(MOST * K * 2);
    y = allocate((size_t)MOST * 200000 * 2);
    exec.workspace = workspace = allocate(64 << 20);
    for (int nested = 0; nested < 2; nested++) {
        layers(264, nested);
        layers(17000, nested);
        layers(200000, nested); /* by the other kernel */
    }

    /* What Hopper's kernels leave to others: odd rows, an address of y, rows of 64 elements. */
    m = 256;
    fake_set("");
    state = make_state(263, K, 0);
    OK(run());
    CHECK(fake_count("cuTensorMapEncodeTiled") == 0 && fake_count("launches") > 0, "an odd number of rows");
    OK(gq_state_free(state));
    state = make_state(264, K, 0);
    fake_set("");
    OK(gq_linear(state, x, m, GQ_BF16, 0, y + 2, &exec));
    CHECK(fake_count("cuTensorMapEncodeTiled") == 0, "y at an odd address");
    fake_set("");
    OK(run());
    CHECK(fake_count("cuTensorMapEncodeTiled") == 2, "%d tensor maps", (int)fake_count("cuTensorMapEncodeTiled"));
    CHECK(fake_count("clustered") == 0, "%d launches in clusters", (int)fake_count("clustered"));
    fake_set("");
    m = 60;
    OK(run());
    CHECK(fake_count("clustered") == 1 && fake_count("launches") == 1, "%d of %d launches in clusters", (int)fake_count("clustered"), (int)fake_count("launches"));
    OK(gq_state_free(state));
    state = make_state(264, 320, 0);
    fake_set("");
    OK(run());
    CHECK(fake_count("cuTensorMapEncodeTiled") == 0, "rows of 320 elements");
    OK(gq_state_free(state));
    const gq_addr memory[] = {packed, absmax, nested_absmax, codebook, offset, x, y, workspace};
    GPU(cuCtxSynchronize());
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) gpu_free(memory[i]);
    GPU(cuCtxPopCurrent_v2(NULL));
    return check_result();
}
