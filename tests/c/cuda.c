/* Needs a CUDA device; skipped where there is none. */
#include "check.h"

enum { SKIPPED = 77 };

int main(void) {
    int32_t devices = 0;
    OK(gq_device_count(&devices));
    if (devices == 0) {
        puts("skipped: no CUDA device");
        return check_result() ? 1 : SKIPPED;
    }
    /* No work on a stream of a device that is not there. */
    float weight[64] = {0}, absmax;
    unsigned char packed[32];
    gq_exec exec = GQ_EXEC_INIT;
    exec.device = devices;
    CHECK(gq_quantize_nf4(GQ_ADDR(weight), GQ_F32, 64, 64, GQ_ADDR(&absmax), 1, GQ_ADDR(packed), 32, &exec) != GQ_OK, "a device that is not there");
    SAYS("device");
    return check_result();
}
