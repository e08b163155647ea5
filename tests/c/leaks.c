/* Handles that are freed leave nothing: no memory, no file descriptor. GQUANT_LONG=1 in the environment makes ten times as many.
 * usage: leaks MODULES */
#include "golden.h"
#include "weights.h"

#include <dirent.h>
#include <unistd.h>

static size_t resident(void) {
    unsigned long size = 0, pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(file && fscanf(file, "%lu %lu", &size, &pages) == 2, "no /proc/self/statm");
    if (file) fclose(file);
    return (size_t)pages * (size_t)sysconf(_SC_PAGESIZE);
}

static int descriptors(void) {
    int count = 0;
    DIR *folder = opendir("/proc/self/fd");
    while (folder && readdir(folder)) count++;
    if (folder) closedir(folder);
    return count;
}

static const char *path;
static int64_t shape[2] = {8, 64};
static unsigned char packed[256];
static float absmax[8];

static void one_state(void) {
    OK(gq_state_free(nf4_state(shape, 2, packed, sizeof packed, absmax, sizeof absmax)));
}

/* A model, a state with memory of its own, and failures on the way: also they must free what they made. */
static void one_model(void) {
    gq_model *model = NULL, *none = NULL;
    gq_state *state = NULL;
    OK(gq_load_model(path, NULL, &model));
    OK(gq_model_state(model, 0, &state));
    OK(gq_state_free(state));
    STATUS(gq_model_state(model, 1000000, &state), GQ_ERROR_NOT_FOUND);
    STATUS(gq_load_model("/proc/self/exe", NULL, &none), GQ_ERROR_BAD_FILE);
    OK(gq_free_model(model));
}

static void one_job(void) {
    char request[4096];
    gq_job *job = NULL;
    int32_t finished = 0;
    snprintf(request, sizeof request, "{\"source\": \"%s\"}", path);
    OK(gq_inspect(request, &job));
    OK(gq_job_wait(job, -1, &finished));
    OK(gq_job_free(job));
}

/* Runs one often, after a tenth of that to warm up. */
static void often(const char *what, void (*one)(void), int count, size_t allowed) {
    for (int i = 0; i < count / 10; i++) one();
    const size_t memory_before = resident();
    const int files_before = descriptors();
    for (int i = 0; i < count; i++) one();
    const size_t memory = resident();
    CHECK(memory <= memory_before + allowed, "%d times %s: RSS went from %zu to %zu KiB", count, what, memory_before >> 10, memory >> 10);
    CHECK(descriptors() == files_before, "%d times %s: %d descriptors, before %d", count, what, descriptors(), files_before);
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    path = argv[1];
    const char *set = getenv("GQUANT_LONG");
    const int times = set && strcmp(set, "0") != 0 ? 10 : 1;
    /* Go opens two descriptors for good when it first waits for a timer or a file. */
    one_model();
    one_job();
    /* The garbage collector may keep a few MiB more at one moment than at another. A leak of one page per model, or of 64 bytes per
     * state, is more. */
    often("a state", one_state, 100000 * times, 4 << 20);
    often("a model", one_model, 1000 * times, 8 << 20);
    often("a job", one_job, 500 * times, 8 << 20);
    return check_result();
}
