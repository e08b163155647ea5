/* A defect of the library, which gq_test_panic of the test build stands for, is a status with a message; after it every call is
 * refused and nothing crashes. usage: panic MODULES */
#include "check.h"

#include <pthread.h>

gq_status gq_test_panic(void);

static gq_state *state;
static gq_model *model;
static gq_job *job;

static void refused(void) {
    float values[64] = {0}, absmax = 7;
    unsigned char packed[32];
    memset(packed, 0x5a, sizeof packed);
    gq_state *new_state = (gq_state *)8;
    gq_model *new_model = (gq_model *)8;
    gq_job *new_job = (gq_job *)8;
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    int64_t count = 7;
    int32_t finished = 7, devices = 7;
    const char *json = "x";
    size_t length = 7;
    uint64_t workspace = 7;
    STATUS(gq_quantize_nf4(GQ_ADDR(values), GQ_F32, 64, 64, GQ_ADDR(&absmax), 1, GQ_ADDR(packed), 32, NULL), GQ_ERROR_INTERNAL);
    SAYS("restart");
    CHECK(absmax == 7 && packed[0] == 0x5a, "buffers were written");
    STATUS(gq_device_count(&devices), GQ_ERROR_INTERNAL);
    STATUS(gq_device_prepare(0), GQ_ERROR_INTERNAL);
    STATUS(gq_quantize_workspace_size(GQ_FORMAT_NF4, &count, 1, NULL, 0, &workspace), GQ_ERROR_INTERNAL);
    STATUS(gq_state_create(&desc, &new_state), GQ_ERROR_INTERNAL);
    STATUS(gq_state_json(state, NULL, 0, &length), GQ_ERROR_INTERNAL);
    STATUS(gq_dequantize(state, GQ_ADDR(values), sizeof values, GQ_F32, NULL), GQ_ERROR_INTERNAL);
    STATUS(gq_linear_workspace_size(state, 1, GQ_F32, NULL, &workspace, NULL), GQ_ERROR_INTERNAL);
    STATUS(gq_linear(state, GQ_ADDR(values), 1, GQ_F32, 0, GQ_ADDR(values), NULL), GQ_ERROR_INTERNAL);
    STATUS(gq_load_model("/", NULL, &new_model), GQ_ERROR_INTERNAL);
    STATUS(gq_model_layer_count(model, &count), GQ_ERROR_INTERNAL);
    STATUS(gq_inspect("{}", &new_job), GQ_ERROR_INTERNAL);
    STATUS(gq_job_wait(job, -1, &finished), GQ_ERROR_INTERNAL);
    STATUS(gq_job_result(job, &json), GQ_ERROR_INTERNAL);
    CHECK(!new_state && !new_model && !new_job && !count && !finished && !json && !length && !devices && !workspace,
          "out-parameters are not 0: %p %p %p %d %d %p %d %d", (void *)new_state, (void *)new_model, (void *)new_job, (int)count,
          (int)finished, (const void *)json, (int)length, (int)devices);
    /* What has no status answers. */
    CHECK(gq_version()[0] && gq_build_info()[0] == '{' && strcmp(gq_status_name(GQ_ERROR_INTERNAL), "GQ_ERROR_INTERNAL") == 0, "no names");
}

static void *other_thread(void *argument) {
    CHECK(gq_last_error()[0] == 0, "another thread's error: %s", gq_last_error());
    refused();
    return argument;
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    char request[4096];
    int32_t finished = 0;
    snprintf(request, sizeof request, "{\"source\": \"%s\"}", argv[1]);
    OK(gq_load_model(argv[1], NULL, &model));
    OK(gq_model_state(model, 0, &state));
    OK(gq_inspect(request, &job));
    OK(gq_job_wait(job, -1, &finished));

    STATUS(gq_test_panic(), GQ_ERROR_INTERNAL);
    SAYS("index out of range");
    SAYS("goroutine"); /* the stack */
    refused();
    pthread_t thread;
    pthread_create(&thread, NULL, other_thread, NULL);
    pthread_join(thread, NULL);
    STATUS(gq_test_panic(), GQ_ERROR_INTERNAL);
    SAYS("restart");
    STATUS(gq_state_free(state), GQ_ERROR_INTERNAL);
    STATUS(gq_free_model(model), GQ_ERROR_INTERNAL);
    STATUS(gq_job_free(job), GQ_ERROR_INTERNAL);
    return check_result();
}
