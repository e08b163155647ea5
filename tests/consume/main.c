/* Quantizes a matrix to NF4 and decodes it again. */
#include <gquant.h>
#include <stdio.h>
#include <stdlib.h>

static void check(gq_status status) {
    if (status == GQ_OK) return;
    fprintf(stderr, "%s: %s\n", gq_status_name(status), gq_last_error());
    exit(1);
}

int main(void) {
    enum { ROWS = 64, COLS = 128, N = ROWS * COLS };
    static float weight[N], restored[N], absmax[N / 64];
    static unsigned char packed[N / 2];
    for (int i = 0; i < N; i++) weight[i] = (float)(N - i) / (N + 1);

    const int64_t shape[] = {ROWS, COLS};
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    desc.format = GQ_FORMAT_NF4;
    desc.dtype = GQ_F32;
    desc.blocksize = 64;
    desc.shape = GQ_ADDR(shape);
    desc.ndim = 2;
    check(gq_quantized_layout(desc.format, shape, desc.ndim, NULL, &desc.parts)); /* the sizes of the buffers */
    desc.parts.packed = GQ_ADDR(packed);
    desc.parts.absmax = GQ_ADDR(absmax);
    check(gq_quantize(desc.format, GQ_ADDR(weight), GQ_F32, shape, desc.ndim, NULL, &desc.parts, NULL, NULL));

    gq_state *state;
    check(gq_state_create(&desc, &state)); /* borrows the buffers */
    check(gq_dequantize(state, GQ_ADDR(restored), sizeof restored, GQ_F32, NULL));
    check(gq_state_free(state));
    printf("gquant %s: %g became %g\n", gq_version(), weight[1], restored[1]);
    return 0;
}
