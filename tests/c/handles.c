/* Handles that were freed, never made, or are of another type. usage: handles MODULES */
#include "weights.h"

static int64_t shape[2] = {1, 64};
static unsigned char packed[32];
static float absmax[1] = {1}, out[64];

static gq_state *new_state(void) {
    return nf4_state(shape, 2, packed, sizeof packed, absmax, sizeof absmax);
}

/* No function accepts what is no state. */
static void no_state(gq_state *state) {
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    size_t length = 7;
    STATUS(gq_state_get_desc(state, &desc), GQ_ERROR_INVALID_HANDLE);
    STATUS(gq_state_json(state, NULL, 0, &length), GQ_ERROR_INVALID_HANDLE);
    CHECK(length == 0, "length %d after a failure", (int)length);
    STATUS(gq_dequantize(state, GQ_ADDR(out), sizeof out, GQ_F32, NULL), GQ_ERROR_INVALID_HANDLE);
    STATUS(gq_dequantize_range(state, 0, 64, GQ_ADDR(out), sizeof out, GQ_F32, NULL), GQ_ERROR_INVALID_HANDLE);
    uint64_t bytes = 7;
    STATUS(gq_linear_workspace_size(state, 1, GQ_F32, NULL, &bytes, NULL), GQ_ERROR_INVALID_HANDLE);
    CHECK(bytes == 0, "%d bytes after a failure", (int)bytes);
    STATUS(gq_linear(state, GQ_ADDR(out), 1, GQ_F32, 0, GQ_ADDR(absmax), NULL), GQ_ERROR_INVALID_HANDLE);
    STATUS(gq_state_free(state), GQ_ERROR_INVALID_HANDLE);
    SAYS("state");
}

static void no_model(gq_model *model) {
    int64_t count = 7;
    gq_layer_info layer = GQ_LAYER_INFO_INIT;
    gq_state *state = (gq_state *)8;
    STATUS(gq_model_layer_count(model, &count), GQ_ERROR_INVALID_HANDLE);
    CHECK(count == 0, "count %d after a failure", (int)count);
    STATUS(gq_model_layer(model, 0, &layer), GQ_ERROR_INVALID_HANDLE);
    STATUS(gq_model_state(model, 0, &state), GQ_ERROR_INVALID_HANDLE);
    CHECK(state == NULL, "state %p after a failure", (void *)state);
    STATUS(gq_model_read(model, 0, 0, GQ_ADDR(out), 1, NULL), GQ_ERROR_INVALID_HANDLE);
    STATUS(gq_model_read_all(model, NULL, 0, NULL, 0, NULL), GQ_ERROR_INVALID_HANDLE);
    STATUS(gq_model_dequantize(model, 0, 0, 1, GQ_ADDR(out), sizeof out, GQ_F32, NULL), GQ_ERROR_INVALID_HANDLE);
    STATUS(gq_free_model(model), GQ_ERROR_INVALID_HANDLE);
    SAYS("model");
}

static void no_job(gq_job *job) {
    gq_job_progress progress = GQ_JOB_PROGRESS_INIT;
    int32_t finished = 7;
    const char *json = "x";
    STATUS(gq_job_poll(job, &progress), GQ_ERROR_INVALID_HANDLE);
    STATUS(gq_job_cancel(job), GQ_ERROR_INVALID_HANDLE);
    STATUS(gq_job_wait(job, 0, &finished), GQ_ERROR_INVALID_HANDLE);
    CHECK(finished == 0, "finished %d after a failure", (int)finished);
    STATUS(gq_job_result(job, &json), GQ_ERROR_INVALID_HANDLE);
    CHECK(json == NULL, "json after a failure");
    STATUS(gq_job_free(job), GQ_ERROR_INVALID_HANDLE);
    SAYS("job");
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    gq_model *model = NULL;
    gq_job *job = NULL;
    char request[4096];
    snprintf(request, sizeof request, "{\"source\": \"%s\"}", argv[1]);
    gq_state *state = new_state();
    OK(gq_load_model(argv[1], NULL, &model));
    OK(gq_inspect(request, &job));

    /* Live, but of another type. */
    no_state((gq_state *)model);
    no_state((gq_state *)job);
    no_model((gq_model *)state);
    no_model((gq_model *)job);
    no_job((gq_job *)state);
    no_job((gq_job *)model);

    /* Never made: the neighbours of live handles, small numbers, addresses of the heap, of the stack and of the library. */
    const uintptr_t forged[] = {(uintptr_t)state + 1, (uintptr_t)model - 1, 1, 2, 4096, (uintptr_t)-1, (uintptr_t)&model,
                                (uintptr_t)absmax, (uintptr_t)gq_version, (uintptr_t)gq_version(), 0xc000000000};
    for (size_t i = 0; i < sizeof forged / sizeof *forged; i++) {
        no_state((gq_state *)forged[i]);
        no_model((gq_model *)forged[i]);
        no_job((gq_job *)forged[i]);
    }

    /* Freed, and freed twice. Handles that came later are not hit. */
    OK(gq_state_free(state));
    OK(gq_free_model(model));
    OK(gq_job_free(job));
    gq_state *later = new_state();
    CHECK(later != state, "a handle was used again");
    no_state(state);
    no_model(model);
    no_job(job);
    OK(gq_dequantize(later, GQ_ADDR(out), sizeof out, GQ_F32, NULL));
    OK(gq_state_free(later));

    OK(gq_state_free(NULL));
    OK(gq_free_model(NULL));
    OK(gq_job_free(NULL));
    return check_result();
}
