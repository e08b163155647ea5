/* What the fake libraries share: each counts the calls of its functions, under one lock, and reports misuse on stderr as FAKE, its name. */
#ifndef FAKE_CALLS_H
#define FAKE_CALLS_H

#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { FUNCTIONS = 64 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    char name[48];
    int64_t calls;
} functions[FUNCTIONS];
static int64_t misuses;

__attribute__((format(printf, 1, 2))) static void misuse(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("fake " FAKE ": ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    misuses++;
}

/* The number of a function's calls, which can be changed. */
static int64_t *calls_of(const char *function) {
    int i = 0;
    while (i < FUNCTIONS - 1 && functions[i].name[0] && strcmp(functions[i].name, function) != 0) i++;
    if (!functions[i].name[0]) snprintf(functions[i].name, sizeof functions[i].name, "%s", function);
    return &functions[i].calls;
}

/* Ends a function that began by taking the lock. */
static int leave(int result) {
    pthread_mutex_unlock(&lock);
    return result;
}

#endif
