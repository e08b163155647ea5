/* Work on whole files: convert, dequantize, verify, diff, inspect; waiting, progress, results, cancelling, what is wrong. */
#include "weights.h"

#include <unistd.h>

enum { ROWS = 512, COLS = 640, N = ROWS * COLS, BLOCKSIZE = 64 };

static float weight[N], decoded[N], want[N], absmax[N / BLOCKSIZE];
static unsigned char packed[N / 2];

static char request_text[20000];

/* A request of one or two paths and other fields. */
static const char *request(const char *format, const char *a, const char *b) {
    snprintf(request_text, sizeof request_text, format, a, b);
    return request_text;
}

/* Waits for a job and returns its status; its result is copied into result_text. */
static char result_text[1 << 16];

static gq_status ended(gq_job *job) {
    int32_t finished = 0;
    const char *json = NULL;
    gq_job_progress progress = GQ_JOB_PROGRESS_INIT;
    const gq_status status = gq_job_wait(job, -1, &finished);
    char message[2000];
    snprintf(message, sizeof message, "%s", gq_last_error());
    CHECK(finished == 1, "not finished after waiting for ever: %s", message);
    const gq_status again = gq_job_wait(job, 0, &finished);
    CHECK(again == status && finished == 1, "the second time it is %s, %d", gq_status_name(again), (int)finished);
    OK(gq_job_poll(job, &progress));
    CHECK(progress.finished == 1, "poll does not say that it is finished");
    OK(gq_job_result(job, &json));
    CHECK(json != NULL, "no result");
    snprintf(result_text, sizeof result_text, "%s", json ? json : "");
    if (status == GQ_OK) {
        CHECK(result_text[0] == '{' && result_text[strlen(result_text) - 1] == '}', "the result is \"%s\"", result_text);
        OK(gq_job_cancel(job)); /* too late, and no error */
    }
    OK(gq_job_free(job));
    if (status != GQ_OK) CHECK(strlen(message) > 0, "no message");
    return status;
}

#define ENDS(start, want_status)                                                                                          \
    do {                                                                                                                  \
        gq_job *job_ = NULL;                                                                                              \
        OK(start);                                                                                                        \
        const gq_status ended_ = ended(job_);                                                                             \
        CHECK(ended_ == (want_status), "%s, want %s: %s", gq_status_name(ended_), gq_status_name(want_status), gq_last_error()); \
    } while (0)

static void round_trip(void) {
    char header[400];
    snprintf(header, sizeof header,
             "{\"blocks.0.attn.q.weight\": {\"dtype\": \"F32\", \"shape\": [%d, %d], \"data_offsets\": [0, %d]}}", ROWS, COLS, N * 4);
    fill_weights(weight, N);
    CHECK(write_file(in("source.safetensors"), header, weight, sizeof weight), "cannot write");
    char source[4096], output[4096], plain[4096];
    snprintf(source, sizeof source, "%s", in("source.safetensors"));
    snprintf(output, sizeof output, "%s", in("nf4.safetensors"));
    snprintf(plain, sizeof plain, "%s", in("plain.safetensors"));

    const char *convert = "{\"source\": \"%s\", \"output\": \"%s\", \"mode\": \"nf4\", \"block_size\": 64, \"include\": [\"*.weight\"]}";
    ENDS(gq_convert(request(convert, source, output), &job_), GQ_OK);
    CHECK(strstr(result_text, "nf4.safetensors"), "%s", result_text);

    /* What was written decodes to what the flat functions give. */
    gq_model *model = NULL;
    int64_t index = -1, n = N;
    OK(gq_load_model(output, NULL, &model));
    OK(gq_model_find_layer(model, "blocks.0.attn.q.weight", &index));
    OK(gq_model_dequantize(model, index, 0, ROWS, GQ_ADDR(decoded), sizeof decoded, GQ_F32, NULL));
    OK(gq_free_model(model));
    OK(gq_quantize_nf4(GQ_ADDR(weight), GQ_F32, N, BLOCKSIZE, GQ_ADDR(absmax), N / BLOCKSIZE, GQ_ADDR(packed), sizeof packed, NULL));
    gq_state *state = nf4_state(&n, 1, packed, sizeof packed, absmax, sizeof absmax);
    OK(gq_dequantize(state, GQ_ADDR(want), sizeof want, GQ_F32, NULL));
    OK(gq_state_free(state));
    CHECK(memcmp(decoded, want, sizeof want) == 0, "gq_convert and gq_quantize_nf4 differ");

    ENDS(gq_verify(request("{\"source\": \"%s\", \"sha256\": true}", output, ""), &job_), GQ_OK);
    CHECK(strstr(result_text, "sha256"), "%s", result_text);
    ENDS(gq_diff(request("{\"a\": \"%s\", \"b\": \"%s\", \"threads\": 2}", source, output), &job_), GQ_OK);
    CHECK(strstr(result_text, "blocks.0.attn.q.weight"), "%s", result_text);
    ENDS(gq_inspect(request("{\"source\": \"%s\"}", output, ""), &job_), GQ_OK);
    CHECK(strstr(result_text, "blocks.0.attn.q.weight") && strstr(result_text, "nf4"), "%s", result_text);
    ENDS(gq_dequantize_model(request("{\"source\": \"%s\", \"output\": \"%s\", \"dtype\": \"f32\"}", output, plain), &job_), GQ_OK);
    OK(gq_load_model(plain, NULL, &model));
    OK(gq_model_find_tensor(model, "blocks.0.attn.q.weight", &index));
    OK(gq_model_read(model, index, 0, GQ_ADDR(decoded), sizeof decoded, NULL));
    OK(gq_free_model(model));
    CHECK(memcmp(decoded, want, sizeof want) == 0, "gq_dequantize_model differs");

    /* The output is there already, and stays unless force says otherwise. */
    ENDS(gq_convert(request(convert, source, output), &job_), GQ_ERROR_IO);
    ENDS(gq_convert(request("{\"source\": \"%s\", \"output\": \"%s\", \"force\": true, \"include\": [\"*.weight\"]}", source, output), &job_), GQ_OK);
}

static void wrong_requests(void) {
    char source[4096], broken[4096];
    snprintf(source, sizeof source, "%s", in("source.safetensors"));
    snprintf(broken, sizeof broken, "%s", in("broken.safetensors"));
    CHECK(write_file(broken, "{", NULL, 0), "cannot write");
    ENDS(gq_convert(request("{\"source\": \"%s\"}", in("missing.safetensors"), ""), &job_), GQ_ERROR_NOT_FOUND);
    ENDS(gq_convert(request("{\"source\": \"%s\"}", broken, ""), &job_), GQ_ERROR_BAD_FILE);
    ENDS(gq_convert(request("{\"source\": \"%s\", \"output\": \"%s\"}", source, in("missing/x.safetensors")), &job_), GQ_ERROR_NOT_FOUND);
    ENDS(gq_inspect(request("{\"source\": \"%s\"}", broken, ""), &job_), GQ_ERROR_BAD_FILE);
    ENDS(gq_diff(request("{\"a\": \"%s\", \"b\": \"%s\"}", source, in("missing.safetensors")), &job_), GQ_ERROR_NOT_FOUND);
    /* A model that verify finds wrong: the job ran, and its result says what is wrong. */
    ENDS(gq_verify(request("{\"source\": \"%s\"}", broken, ""), &job_), GQ_ERROR_FAILED);
    CHECK(strstr(result_text, "broken.safetensors"), "the result is \"%s\"", result_text);

    /* A device that is not there; the CPU always is. */
    int32_t devices = 0;
    char device[8192];
    OK(gq_device_count(&devices));
    snprintf(device, sizeof device, "{\"source\": \"%s\", \"output\": \"%s\", \"device\": \"cuda:%d\"}", source, in("device.safetensors"), (int)devices);
    gq_job *job = NULL;
    gq_status status = gq_convert(device, &job);
    if (status == GQ_OK) status = ended(job);
    CHECK(status == (devices ? GQ_ERROR_NOT_FOUND : GQ_ERROR_UNSUPPORTED), "%s: %s; %s", device, gq_status_name(status), gq_last_error());
    CHECK(access(in("device.safetensors"), F_OK) != 0, "a file was made");
    ENDS(gq_convert(request("{\"source\": \"%s\", \"output\": \"%s\", \"device\": \"cpu\"}", source, in("device.safetensors")), &job_), GQ_OK);

    /* Values that no option has are found before anything runs, or by the job. */
    static const char *const bad[] = {
        "{\"source\": \"%s\", \"mode\": \"nf5\"}", "{\"source\": \"%s\", \"block_size\": 63}", "{\"source\": \"%s\", \"threads\": -1}",
        "{\"source\": \"%s\", \"quant_storage\": \"u4\"}", "{\"source\": \"%s\", \"exclude\": [\"[\"]}", "{\"source\": \"%s\", \"max_shard_size\": -1}",
        "{\"source\": \"%s\", \"device\": \"gpu\"}", "{\"source\": \"%s\", \"device\": \"cuda:-1\"}", "{\"source\": \"%s\", \"device\": 0}",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        job = NULL;
        status = gq_convert(request(bad[i], source, ""), &job);
        if (status == GQ_OK) status = ended(job);
        CHECK(status == GQ_ERROR_INVALID_ARGUMENT, "%s: %s", bad[i], gq_status_name(status));
    }
}

/* Jobs on a file that takes a second to read, a hole of 4 GiB: waiting a little, progress, cancelling, freeing at once. */
static void cancelled(void) {
    char source[4096], output[4096];
    snprintf(source, sizeof source, "%s", in("large.safetensors"));
    snprintf(output, sizeof output, "%s", in("large_nf4.safetensors"));
    CHECK(write_file(source, "{\"a.weight\": {\"dtype\": \"BF16\", \"shape\": [32768, 65536], \"data_offsets\": [0, 4294967296]}}", NULL, 4294967296u),
          "cannot write a hole");
    static const struct {
        const char *name;
        gq_status (*start)(const char *, gq_job **);
        const char *request;
    } jobs[] = {
        {"gq_convert", gq_convert, "{\"source\": \"%s\", \"output\": \"%s\", \"include\": [\"*\"]}"},
        {"gq_verify", gq_verify, "{\"source\": \"%s\", \"sha256\": true}"},
        {"gq_diff", gq_diff, "{\"a\": \"%s\", \"b\": \"%1$s\"}"},
    };
    for (int i = 0; i < 3; i++) {
        for (int freed = 0; freed < 2; freed++) {
            gq_job *job = NULL;
            gq_job_progress progress = GQ_JOB_PROGRESS_INIT;
            const char *json = NULL;
            int32_t finished = 7;
            CHECK(jobs[i].start(request(jobs[i].request, source, output), &job) == GQ_OK, "%s", gq_last_error());
            OK(gq_job_wait(job, 20, &finished));
            CHECK(finished == 0, "%s: finished in 20 ms", jobs[i].name);
            OK(gq_job_poll(job, &progress));
            CHECK(progress.finished == 0 && progress.done_bytes <= progress.total_bytes, "%s: %d, %.0f of %.0f bytes", jobs[i].name,
                  (int)progress.finished, (double)progress.done_bytes, (double)progress.total_bytes);
            OK(gq_job_result(job, &json));
            CHECK(json && json[0] == 0, "%s has a result before its end", jobs[i].name);
            if (freed) {
                OK(gq_job_free(job));
            } else {
                OK(gq_job_cancel(job));
                const gq_status status = ended(job);
                CHECK(status == GQ_ERROR_CANCELLED, "%s: %s", jobs[i].name, gq_status_name(status));
            }
            CHECK(access(output, F_OK) != 0, "%s left %s", jobs[i].name, output);
        }
    }
}

int main(void) {
    round_trip();
    wrong_requests();
    cancelled();
    return check_result();
}
