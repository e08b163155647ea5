/* A forked child is refused, at any time, for any number of calls, and does not hang; the parent goes on; a child that execs is
 * a new process. */
#include "weights.h"

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

enum { N = 4096, BLOCKSIZE = 64 };

static float weight[N], absmax[N / BLOCKSIZE];
static unsigned char packed[N / 2];
static volatile int stop;

static gq_status quantize(float *scales, unsigned char *codes) {
    return gq_quantize_nf4(GQ_ADDR(weight), GQ_F32, N, BLOCKSIZE, GQ_ADDR(scales), N / BLOCKSIZE, GQ_ADDR(codes), N / 2, NULL);
}

/* Keeps the library busy, so that forks hit it with locks held. */
static void *work(void *argument) {
    (void)argument;
    float scales[N / BLOCKSIZE];
    unsigned char codes[N / 2];
    while (!stop) {
        CHECK(quantize(scales, codes) == GQ_OK, "%s", gq_last_error());
        CHECK(gq_quantize_nf4(0, 0, -1, 0, 0, 0, 0, 0, NULL) != GQ_OK, "it should fail");
    }
    return NULL;
}

static int child(int calls) {
    alarm(20); /* a child that hangs dies of this */
    for (int i = 0; i < calls; i++) {
        if (quantize(absmax, packed) != GQ_ERROR_FORKED) return 1;
        if (!strstr(gq_last_error(), "spawn")) return 2;
    }
    gq_state *state = (gq_state *)8;
    gq_model *model = (gq_model *)8;
    gq_job *job = (gq_job *)8;
    gq_state_desc desc = GQ_STATE_DESC_INIT;
    int32_t count = 7;
    if (gq_state_create(&desc, &state) != GQ_ERROR_FORKED || state) return 3;
    if (gq_load_model("/", NULL, &model) != GQ_ERROR_FORKED || model) return 4;
    if (gq_inspect("{}", &job) != GQ_ERROR_FORKED || job) return 5;
    if (gq_device_count(&count) != GQ_ERROR_FORKED || count) return 6;
    if (strncmp(gq_last_error(), "gq_device_count", 15) != 0) return 7;
    if (gq_device_prepare(0) != GQ_ERROR_FORKED || gq_model_read_all(NULL, NULL, 0, NULL, 0, NULL) != GQ_ERROR_FORKED) return 11;
    if (gq_linear(NULL, GQ_ADDR(weight), 1, GQ_F32, 0, GQ_ADDR(absmax), NULL) != GQ_ERROR_FORKED) return 12;
    uint64_t bytes = 7;
    if (gq_linear_workspace_size(NULL, 1, GQ_F32, NULL, &bytes, NULL) != GQ_ERROR_FORKED || bytes) return 13;
    /* What has no status answers. */
    if (strcmp(gq_version(), GQ_TEST_VERSION) != 0 || gq_abi_version() != GQ_ABI_VERSION) return 8;
    if (strcmp(gq_status_name(GQ_ERROR_FORKED), "GQ_ERROR_FORKED") != 0) return 9;
    if (gq_build_info()[0] != '{') return 10;
    return 0;
}

static void fork_child(int calls, const char *when) {
    const pid_t pid = fork();
    if (pid == 0) _exit(child(calls));
    int status = 0;
    waitpid(pid, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s: the child ended with status %#x", when, (unsigned)status);
}

int main(int argc, char **argv) {
    fill_weights(weight, N);
    if (argc == 2) { /* the child that execs */
        CHECK(strcmp(argv[1], "again") == 0, "usage");
        CHECK(quantize(absmax, packed) == GQ_OK, "%s", gq_last_error());
        return check_result();
    }
    fork_child(1, "right after the start");
    CHECK(quantize(absmax, packed) == GQ_OK, "%s", gq_last_error());
    fork_child(300000, "many calls");

    pthread_t threads[4];
    for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, work, NULL);
    for (int i = 0; i < 200 && !check_failures; i++) fork_child(100, "with threads at work");
    stop = 1;
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);

    const pid_t pid = fork();
    if (pid == 0) {
        execl(argv[0], argv[0], "again", (char *)NULL);
        _exit(99);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "after exec: status %#x", (unsigned)status);
    CHECK(quantize(absmax, packed) == GQ_OK, "the parent: %s", gq_last_error());
    return check_result();
}
