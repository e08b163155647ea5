// Quantizes a matrix to NF4 and decodes it again, with exceptions and handles that free themselves.
#include <gquant.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <vector>

static void check(gq_status status) {
    if (status != GQ_OK) throw std::runtime_error(gq_last_error());
}

struct Free {
    void operator()(gq_state *state) const { gq_state_free(state); }
};
using State = std::unique_ptr<gq_state, Free>;

int main() try {
    const std::int64_t shape[] = {64, 128};
    std::vector<float> weight(64 * 128), restored(weight.size());
    for (std::size_t i = 0; i < weight.size(); i++) weight[i] = float(weight.size() - i) / float(weight.size() + 1);

    gq_state_desc desc = GQ_STATE_DESC_INIT;
    desc.format = GQ_FORMAT_NF4;
    desc.dtype = GQ_F32;
    desc.blocksize = 64;
    desc.shape = GQ_ADDR(shape);
    desc.ndim = 2;
    check(gq_quantized_layout(desc.format, shape, desc.ndim, nullptr, &desc.parts)); // the sizes of the buffers
    std::vector<std::uint8_t> packed(desc.parts.packed_bytes);
    std::vector<float> absmax(desc.parts.absmax_bytes / sizeof(float));
    desc.parts.packed = GQ_ADDR(packed.data());
    desc.parts.absmax = GQ_ADDR(absmax.data());
    check(gq_quantize(desc.format, GQ_ADDR(weight.data()), GQ_F32, shape, desc.ndim, nullptr, &desc.parts, nullptr, nullptr));

    gq_state *made = nullptr;
    check(gq_state_create(&desc, &made)); // borrows the buffers
    const State state(made);
    check(gq_dequantize(state.get(), GQ_ADDR(restored.data()), restored.size() * sizeof(float), GQ_F32, nullptr));
    std::printf("gquant %s: %g became %g\n", gq_version(), weight[1], restored[1]);
} catch (const std::exception &e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
}
