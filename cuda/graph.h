// For measuring: what is put on a stream becomes a graph, which is replayed. The functions of the driver are looked up when they are first wanted.
#ifndef GQUANT_GRAPH_H
#define GQUANT_GRAPH_H

#include "driver.h"

// Starts to capture what is put on a stream: 0, a result code, or -1 if the driver lacks a function.
int gq_cu_capture(gq_context c, gq_stream stream);
// Ends the capture and replays it, twice and then `repeat` times, each of which takes so many milliseconds. Waits.
int gq_cu_replay(gq_context c, gq_stream stream, int repeat, float *milliseconds);

#endif
