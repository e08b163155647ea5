/* 64 threads on one model and on states of their own, each with its own last error; handles are freed while others use them.
 * usage: threads MODULES */
#include "golden.h"

#include <pthread.h>

enum { THREADS = 64, ROUNDS = 40 };

static gq_model *model;
static int64_t layers;
static struct tensor references[64]; /* of each layer; without data if it has none */

static void *work(void *argument) {
    const int me = (int)(intptr_t)argument;
    char name[32];
    snprintf(name, sizeof name, "missing%d.", me);
    CHECK(gq_last_error()[0] == 0, "thread %d starts with an error: %s", me, gq_last_error());
    for (int round = 0; round < ROUNDS; round++) {
        const int64_t i = (me + round) % layers;
        const struct tensor *want = &references[i];
        if (!want->data) continue;
        unsigned char *got = malloc(want->bytes);
        gq_exec exec = GQ_EXEC_INIT;
        exec.threads = 1 + round % 2;
        if (round % 2) {
            OK(gq_model_dequantize(model, i, 0, want->info.shape[0], GQ_ADDR(got), want->bytes, want->info.dtype, &exec));
        } else {
            gq_state *state = NULL;
            OK(gq_model_state(model, i, &state));
            OK(gq_dequantize(state, GQ_ADDR(got), want->bytes, want->info.dtype, &exec));
            OK(gq_state_free(state));
        }
        CHECK(memcmp(got, want->data, want->bytes) == 0, "thread %d, layer %d differs", me, (int)i);
        free(got);

        /* The message is this thread's, also after other threads failed. */
        int64_t index;
        STATUS(gq_model_find_tensor(model, name, &index), GQ_ERROR_NOT_FOUND);
        for (int k = 0; k < 20; k++) SAYS(name);
    }
    return NULL;
}

/* One thread frees a state that 63 others use: each of their calls is done whole or refused. */
static gq_state *shared;
static int refused;

static void *use(void *argument) {
    const struct tensor *want = argument;
    unsigned char *got = malloc(want->bytes);
    for (;;) {
        memset(got, 0x5a, want->bytes);
        const gq_status status = gq_dequantize(shared, GQ_ADDR(got), want->bytes, want->info.dtype, NULL);
        if (status != GQ_OK) {
            CHECK(status == GQ_ERROR_INVALID_HANDLE, "%s", gq_last_error());
            break;
        }
        CHECK(memcmp(got, want->data, want->bytes) == 0, "a state that is being freed decodes something else");
    }
    __atomic_fetch_add(&refused, 1, __ATOMIC_RELAXED);
    free(got);
    return NULL;
}

static void *release(void *argument) {
    (void)argument;
    STATUS(gq_state_free(shared), GQ_OK);
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    pthread_t threads[THREADS];
    OK(gq_load_model(argv[1], NULL, &model));
    OK(gq_model_layer_count(model, &layers));
    CHECK(layers <= 64, "%d layers", (int)layers);
    if (check_result()) return 1;
    for (int64_t i = 0; i < layers; i++) {
        gq_layer_info layer = GQ_LAYER_INFO_INIT;
        char name[300];
        OK(gq_model_layer(model, i, &layer));
        snprintf(name, sizeof name, "%.*s.reference", (int)(strlen(layer.name) - strlen(".weight")), layer.name);
        references[i] = golden_read(model, name);
    }
    for (int i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, work, (void *)(intptr_t)i);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);

    int64_t some = 0;
    while (some < layers - 1 && !references[some].data) some++;
    OK(gq_model_state(model, some, &shared));
    for (int i = 1; i < THREADS; i++) pthread_create(&threads[i], NULL, use, &references[some]);
    pthread_create(&threads[0], NULL, release, NULL);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    CHECK(refused == THREADS - 1, "%d threads were refused", refused);

    OK(gq_free_model(model));
    for (int64_t i = 0; i < layers; i++) free(references[i].data);
    return check_result();
}
