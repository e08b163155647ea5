/* Checks for the tests in C. A check that fails is printed and counted, and the test goes on, up to 1000 of them: a loop may wait for
 * a success. A test that passes prints nothing, so that ctest (run.sh) can see whether the library prints. End main with
 * "return check_result();". */
#ifndef CHECK_H
#define CHECK_H

#include <gquant.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int check_failures;

/* CHECK(condition, "format", …) */
#define CHECK(condition, ...)                                                               \
    do {                                                                                    \
        if (!(condition)) {                                                                 \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);                 \
            fprintf(stderr, __VA_ARGS__);                                                   \
            fputc('\n', stderr);                                                            \
            if (__atomic_add_fetch(&check_failures, 1, __ATOMIC_RELAXED) >= 1000) _Exit(1); \
        }                                                                                   \
    } while (0)

/* STATUS(call, GQ_…): the call gives this status. A failure has a message that starts with the function's name. */
#define STATUS(call, want)                                                                                      \
    do {                                                                                                        \
        const gq_status got_ = (call), want_ = (want);                                                          \
        CHECK(got_ == want_, "%s, want %s; the last error is: %s", gq_status_name(got_), gq_status_name(want_), \
              gq_last_error());                                                                                 \
        if (got_ != GQ_OK)                                                                                      \
            CHECK(strncmp(gq_last_error(), #call, strcspn(#call, "(")) == 0, "message: %s", gq_last_error());   \
    } while (0)

#define OK(call) STATUS(call, GQ_OK)

/* The last error names what it is about. */
#define SAYS(text) CHECK(strstr(gq_last_error(), text) != NULL, "\"%s\" is not in: %s", text, gq_last_error())

static inline int check_result(void) { return check_failures != 0; }

#endif
