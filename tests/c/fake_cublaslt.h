/* The controls of the fake libcublasLt (fake_cublaslt.c). */
#ifndef FAKE_CUBLASLT_H
#define FAKE_CUBLASLT_H

#include <stddef.h>
#include <stdint.h>

/* A product: addresses, and [rows, k] · [m, k]ᵀ. */
struct fake_lt_call {
    uint64_t weight, x, y, bias, workspace;
    size_t workspace_bytes;
    uint64_t rows, m, k;
    int added; /* to what y holds */
};

void fake_lt_set(const char *settings);
/* How often a function was called since fake_lt_set, or misuse, or live (descriptors). */
int64_t fake_lt_count(const char *what);
/* The nth product since fake_lt_set, from 0. */
struct fake_lt_call fake_lt_call(int n);

#endif
