// The constants of the 4-bit codebooks; ref4.go says where they come from.
#ifndef GQUANT_TABLES_H
#define GQUANT_TABLES_H

// The values of the codes, by codebook.
static const float gq_values4[2][16] = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
     -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
     0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12,
     -0.0f, -0.0625f / 12, -8.0f / 12, -1.0f, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12},
};

// The thresholds are heaps, that is, binary search trees in arrays. A search starts at node 1 and goes from node i
// to node 2i, or to 2i+1 if the number is greater than the threshold there. The leaf that it arrives at, less the
// number of leaves, is the rank of the number. Element 0 is not used.

// 15 thresholds, 16 leaves: the rank is the NF4 code.
static const float gq_nf4_heap[16] = {
    0,
    0.03979014977812767f,
    -0.33967943489551544f, 0.3893125355243683f,
    -0.6106329262256622f, -0.13791173323988914f, 0.2035212516784668f, 0.6427869200706482f,
    -0.8480964004993439f, -0.4599952697753906f, -0.23460740596055984f, -0.045525018125772476f,
    0.1202552504837513f, 0.2920137718319893f, 0.5016634166240692f, 0.8614784181118011f,
};

// 7 thresholds, 8 leaves: the rank of a magnitude.
static const float gq_fp4_heap[8] = {
    0,
    0.29166667f,
    0.0859375f, 0.583333f,
    0.00260417f, 0.20833333f, 0.4166667f, 0.8333333f,
};

// The FP4 code of a positive number, by the leaf of its magnitude (8…15).
static const int gq_fp4_codes[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 6, 7, 4, 5, 2, 3};

#endif
