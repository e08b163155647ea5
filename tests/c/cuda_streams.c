/* Streams: work is put on the caller's stream and on no other, without waiting; threads with streams of their own; graphs that are
 * captured once and replayed on other data. */
#include "device_calls.h"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 8, ROUNDS = 40, VARIANTS = 4 };

static struct call_memory *expected[VARIANTS];

/* Copies the weight of a variant to the device, all else there being GPU_FILL. */
static void upload(uint64_t base, int variant, void *stream) {
    GPU(cuMemsetD8Async(base, GPU_FILL, sizeof(struct call_memory), stream));
    GPU(cuMemcpyHtoDAsync_v2(base, expected[variant]->weight, sizeof expected[variant]->weight, stream));
}

static void *work(void *argument) {
    const int me = (int)(intptr_t)argument;
    gpu_use(0);
    void *stream = NULL;
    struct call_memory *got = malloc(sizeof *got);
    const uint64_t base = gpu_alloc(sizeof *got);
    GPU(cuStreamCreate(&stream, me % 2)); /* every other one is bound to the legacy stream */
    gq_exec exec = gpu_exec(stream);
    struct call_states states = call_states(base, 0);
    for (int round = 0; round < ROUNDS; round++) {
        const int variant = (me + round) % VARIANTS;
        upload(base, variant, stream);
        call_all(base, &states, &exec);
        GPU(cuMemcpyDtoHAsync_v2(got, base, sizeof *got, stream));
        GPU(cuStreamSynchronize(stream));
        same_calls(got, expected[variant], "thread", me);
    }
    free_states(&states);
    GPU(cuStreamDestroy_v2(stream));
    gpu_free(base);
    GPU(cuCtxPopCurrent_v2(NULL));
    free(got);
    return NULL;
}

/* A stream stands still until released is set. */
static volatile int released;

static void stand(void *unused) {
    const struct timespec pause = {0, 1000000};
    (void)unused;
    while (!released) nanosleep(&pause, NULL);
}

/* While the legacy stream and another one stand still, work on our stream gets done; while ours does, calls return at once and their work is
 * not done: it uses what is in memory later. */
static void order(void) {
    void *ours = NULL, *other = NULL, *copies = NULL;
    struct call_memory *got = malloc(sizeof *got);
    const uint64_t base = gpu_alloc(sizeof *got);
    GPU(cuStreamCreate(&ours, 1));
    GPU(cuStreamCreate(&other, 1));
    GPU(cuStreamCreate(&copies, 1));
    gq_exec exec = gpu_exec(ours);
    struct call_states states = call_states(base, 0);

    upload(base, 0, ours);
    GPU(cuStreamSynchronize(ours));
    released = 0;
    GPU(cuLaunchHostFunc(NULL, stand, NULL));
    GPU(cuLaunchHostFunc(other, stand, NULL));
    call_all(base, &states, &exec);
    GPU(cuMemcpyDtoHAsync_v2(got, base, sizeof *got, ours));
    GPU(cuStreamSynchronize(ours));
    same_calls(got, expected[0], "beside streams that stand still", 0);
    released = 1;
    GPU(cuCtxSynchronize());

    /* The weight is exchanged while the calls wait. */
    upload(base, 1, copies);
    GPU(cuStreamSynchronize(copies));
    released = 0;
    GPU(cuLaunchHostFunc(ours, stand, NULL));
    call_all(base, &states, &exec);
    GPU(cuMemcpyDtoHAsync_v2(got, base, sizeof *got, copies));
    GPU(cuStreamSynchronize(copies));
    unsigned char *bytes = (unsigned char *)got;
    for (size_t i = sizeof got->weight; i < sizeof *got; i++) {
        if (bytes[i] == GPU_FILL) continue;
        CHECK(0, "byte %zu, in %s, was written before the stream came to it", i, member_at(i));
        break;
    }
    upload(base, 2, copies);
    GPU(cuStreamSynchronize(copies));
    released = 1;
    GPU(cuStreamSynchronize(ours));
    GPU(cuMemcpyDtoHAsync_v2(got, base, sizeof *got, copies));
    GPU(cuStreamSynchronize(copies));
    same_calls(got, expected[2], "behind a stream that stood still", 2);

    free_states(&states);
    GPU(cuStreamDestroy_v2(ours));
    GPU(cuStreamDestroy_v2(other));
    GPU(cuStreamDestroy_v2(copies));
    gpu_free(base);
    free(got);
}

/* All calls in one graph, captured in each mode, the strict one first; the graph is replayed on other weights. */
static void graphs(void) {
    for (int mode = 0; mode < 3; mode++) {
        void *stream = NULL, *graph = NULL, *executable = NULL;
        struct call_memory *got = malloc(sizeof *got);
        const uint64_t base = gpu_alloc(sizeof *got);
        GPU(cuStreamCreate(&stream, 1));
        gq_exec exec = gpu_exec(stream);
        struct call_states states = call_states(base, 0);
        GPU(cuStreamBeginCapture_v2(stream, mode));
        call_all(base, &states, &exec);
        GPU(cuStreamEndCapture(stream, &graph));
        GPU(cuGraphInstantiateWithFlags(&executable, graph, 0));
        for (int round = 0; round < 2 * VARIANTS; round++) {
            upload(base, round % VARIANTS, stream);
            GPU(cuGraphLaunch(executable, stream));
            GPU(cuMemcpyDtoHAsync_v2(got, base, sizeof *got, stream));
            GPU(cuStreamSynchronize(stream));
            same_calls(got, expected[round % VARIANTS], "replay", round);
        }
        GPU(cuGraphExecDestroy(executable));
        GPU(cuGraphDestroy(graph));
        free_states(&states);
        GPU(cuStreamDestroy_v2(stream));
        gpu_free(base);
        free(got);
    }
}

int main(void) {
    alarm(250); /* who waits for a stream that stands still dies of this */
    gpu_start();
    for (int i = 0; i < VARIANTS; i++) {
        expected[i] = malloc(sizeof *expected[i]);
        call_on_host(expected[i], i);
    }
    OK(gq_device_prepare(0));
    graphs(); /* first: nothing but the preparation must be needed */
    order();
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, work, (void *)(intptr_t)i);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < VARIANTS; i++) free(expected[i]);
    return check_result();
}
