// The search of a table of 256 values; ref8.go has it as bitsandbytes wrote it.
//
// Its pivots start at 127 and move by 64, 32, … 1, so the tree of pivots is always the same: a heap whose leaves are
// the even codes 0…254. A leaf's neighbours in the table are its nearest ancestors; one more comparison, with the
// middle between the leaf and one of them, gives the code.
#ifndef GQUANT_SEARCH8_H
#define GQUANT_SEARCH8_H

#include "scalar.h"

struct gq_search {
    float heap[128];   // [1…127]: the odd entries of the table as a search tree, see tables.h
    float even[128];   // the even entries
    float middle[256]; // [c]: between entries c−1 and c; [0] is not used
};

static inline struct gq_search gq_make_search(const float *table) {
    struct gq_search s = {{0}, {0}, {0}};
    for (int node = 1, level = 0; node < 128; node++) {
        if (node == 2 << level) level++;
        const int step = 128 >> level; // half the distance between pivots of this level
        s.heap[node] = gq_flush(table[(2 * (node - (1 << level)) + 1) * step - 1]);
    }
    for (int i = 0; i < 128; i++) s.even[i] = gq_flush(table[2 * i]);
    for (int c = 1; c < 256; c++) s.middle[c] = gq_flush(gq_flush(gq_flush(table[c - 1]) + gq_flush(table[c])) * 0.5f);
    return s;
}

#endif
