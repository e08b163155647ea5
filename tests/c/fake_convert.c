/* gq_convert with a device, with the fake driver: every call of the driver that fails ends the job with its status, and leaves no file, no
 * device memory and no pinned memory. What kernels make is not there to be looked at. */
#include "fake_cuda.h"
#include "gpu.h"
#include "weights.h"

#include <dirent.h>
#include <sys/stat.h>

enum { ROWS = 3000, COLS = 1024, N = ROWS * COLS };

static char request[10000];

/* Runs the job; the message of a failure is then the last error. */
static gq_status convert(void) {
    gq_job *job = NULL;
    int32_t finished = 0;
    gq_status status = gq_convert(request, &job);
    if (status != GQ_OK) return status;
    status = gq_job_wait(job, -1, &finished);
    const char *json = NULL;
    if (status == GQ_OK) OK(gq_job_result(job, &json));
    char message[2000];
    snprintf(message, sizeof message, "%s", gq_last_error());
    OK(gq_job_free(job));
    CHECK(status == GQ_OK || strcmp(message, gq_last_error()) == 0, "the message was lost");
    return status;
}

/* The files in a folder, hidden ones too. */
static int files(const char *folder) {
    int count = -2;
    DIR *d = opendir(folder);
    while (d && readdir(d)) count++;
    if (d) closedir(d);
    return count;
}

static char folder[4096];

static void nothing_left(const char *settings) {
    CHECK(fake_count("allocations") == 0 && fake_count("pinned") == 0 && fake_count("streams") == 0 && fake_count("pending") == 0,
          "%s: %d allocations, %d pinned, %d streams, %d pieces of work are left", settings, (int)fake_count("allocations"), (int)fake_count("pinned"),
          (int)fake_count("streams"), (int)fake_count("pending"));
    CHECK(fake_count("contexts") == 0, "%s: contexts are left", settings);
}

static void check_failure(const char *function, const char *settings, gq_status status) {
    if (!function || (status == GQ_OK && (fake_releases(function) || strncmp(function, "cuGetError", 10) == 0))) {
        CHECK(status == GQ_OK && files(folder) == 1, "%s: %s, %d files", settings, gq_last_error(), files(folder));
        char output[4200];
        snprintf(output, sizeof output, "%s/out.safetensors", folder);
        CHECK(remove(output) == 0, "%s: no output", settings);
    } else {
        CHECK(status == GQ_ERROR_DEVICE, "%s: %s; %s", settings, gq_status_name(status), gq_last_error());
        SAYS("gq_convert");
        SAYS("CUDA_ERROR_ILLEGAL_ADDRESS");
        SAYS("illegal memory access");
        CHECK(files(folder) == 0, "%s: %d files are left", settings, files(folder));
    }
    /* What cannot be freed because the context cannot be pushed is lost. */
    if (function && (strcmp(function, "cuCtxPushCurrent_v2") == 0 || strcmp(function, "cuCtxGetCurrent") == 0)) fake_set("keep");
    else nothing_left(settings);
}

/* A job that is cancelled gives everything back, too. */
static void cancelled(void) {
    for (int i = 0; i < 10; i++) {
        gq_job *job = NULL;
        int32_t finished = 0;
        OK(gq_convert(request, &job));
        OK(gq_job_wait(job, i, &finished));
        OK(gq_job_free(job));
        char output[4200];
        snprintf(output, sizeof output, "%s/out.safetensors", folder);
        remove(output); /* it may have been faster */
        CHECK(files(folder) == 0, "%d files are left", files(folder));
        nothing_left("cancelled");
    }
}

int main(void) {
    fake_open();
    OK(gq_device_prepare(0));
    fake_set("keep");
    static uint16_t weight[N];
    for (int i = 0; i < N; i++) weight[i] = (uint16_t)(0x3c00 + i % 500);
    char header[1000], source[4096];
    snprintf(header, sizeof header,
             "{\"a.weight\": {\"dtype\": \"BF16\", \"shape\": [%d, %d], \"data_offsets\": [0, %d]}, \"b.norm\": {\"dtype\": \"BF16\", \"shape\": [0], "
             "\"data_offsets\": [%d, %d]}}",
             ROWS, COLS, 2 * N, 2 * N, 2 * N);
    snprintf(source, sizeof source, "%s", in("source.safetensors"));
    snprintf(folder, sizeof folder, "%s", in("output"));
    CHECK(mkdir(folder, 0700) == 0 && write_file(source, header, weight, sizeof weight), "cannot write");
    static const char *const options[] = {"", ", \"mode\": \"fp4\", \"double_quant\": true", ", \"threads\": 1"};
    for (int i = 0; i < 3; i++) {
        snprintf(request, sizeof request, "{\"source\": \"%s\", \"output\": \"%s/out.safetensors\", \"include\": [\"*\"], \"device\": \"cuda:0\"%s}", source, folder, options[i]);
        fake_failures(700, convert, check_failure);
        cancelled();
    }
    /* A device that is not there. */
    fake_set("");
    snprintf(request, sizeof request, "{\"source\": \"%s\", \"output\": \"%s/out.safetensors\", \"device\": \"cuda:7\"}", source, folder);
    CHECK(convert() == GQ_ERROR_NOT_FOUND, "cuda:7: %s", gq_last_error());
    SAYS("7");
    static const char *const wrong[] = {"gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:0x", "0"};
    for (int i = 0; i < 6; i++) {
        snprintf(request, sizeof request, "{\"source\": \"%s\", \"output\": \"%s/out.safetensors\", \"device\": \"%s\"}", source, folder, wrong[i]);
        CHECK(convert() == GQ_ERROR_INVALID_ARGUMENT, "%s: %s", wrong[i], gq_last_error());
        SAYS(wrong[i]);
    }
    snprintf(request, sizeof request, "{\"source\": \"%s\", \"output\": \"%s/out.safetensors\", \"device\": \"cpu\", \"include\": [\"*\"]}", source, folder);
    CHECK(convert() == GQ_OK && files(folder) == 1, "cpu: %s", gq_last_error());
    CHECK(fake_count("launches") == 0, "the CPU launches kernels");
    CHECK(fake_count("misuse") == 0, "misuse of the driver");
    return check_result();
}
