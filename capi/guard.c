#include "guard.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "_cgo_export.h"

volatile int gq_guard_forked;
const char *gq_guard_version, *gq_guard_build_info;

static pthread_key_t last_error; // a malloc'ed text per thread

// A child may ask for the version, so Go must have started before.
static void before_fork(void) {
    if (!gq_guard_version) go_gq_version();
}

static void after_fork_in_child(void) { gq_guard_forked = 1; }

__attribute__((constructor)) static void start(void) {
    pthread_key_create(&last_error, free);
    pthread_atfork(before_fork, NULL, after_fork_in_child);
}

void gq_guard_set_error(const char *message) {
    char *copy = strdup(message);
    free(pthread_getspecific(last_error));
    pthread_setspecific(last_error, copy);
}

const char *gq_last_error(void) {
    const char *message = pthread_getspecific(last_error);
    return message ? message : "";
}

int32_t gq_abi_version(void) { return GQ_ABI_VERSION; }

const char *gq_status_name(gq_status status) {
    static const char *const names[] = {
        "GQ_OK", "GQ_ERROR_INVALID_ARGUMENT", "GQ_ERROR_INVALID_HANDLE", "GQ_ERROR_NOT_FOUND", "GQ_ERROR_IO",
        "GQ_ERROR_BAD_FILE", "GQ_ERROR_UNSUPPORTED", "GQ_ERROR_OUT_OF_MEMORY", "GQ_ERROR_CANCELLED", "GQ_ERROR_FAILED",
        "GQ_ERROR_DEVICE", "GQ_ERROR_FORKED", "GQ_ERROR_INTERNAL",
    };
    const int32_t count = sizeof names / sizeof *names;
    return 0 <= status && status < count ? names[status] : "GQ_ERROR_UNKNOWN";
}
