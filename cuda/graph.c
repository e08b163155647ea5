#include "graph.h"

#include <dlfcn.h>

typedef void *graph, *executable;

#define FUNCTIONS(F)                                                                  \
    F(CtxPushCurrent, cuCtxPushCurrent_v2, (gq_context))                              \
    F(CtxPopCurrent, cuCtxPopCurrent_v2, (gq_context *))                              \
    F(StreamBeginCapture, cuStreamBeginCapture_v2, (gq_stream, int))                  \
    F(StreamEndCapture, cuStreamEndCapture, (gq_stream, graph *))                     \
    F(GraphInstantiate, cuGraphInstantiateWithFlags, (executable *, graph, uint64_t)) \
    F(GraphLaunch, cuGraphLaunch, (executable, gq_stream))                            \
    F(GraphExecDestroy, cuGraphExecDestroy, (executable))                             \
    F(GraphDestroy, cuGraphDestroy, (graph))                                          \
    F(EventCreate, cuEventCreate, (gq_event *, unsigned))                             \
    F(EventRecord, cuEventRecord, (gq_event, gq_stream))                              \
    F(EventSynchronize, cuEventSynchronize, (gq_event))                               \
    F(EventElapsedTime, cuEventElapsedTime, (float *, gq_event, gq_event))            \
    F(EventDestroy, cuEventDestroy_v2, (gq_event))

enum { CAPTURE_RELAXED = 2 }; // launches may come from any thread

static struct {
#define F(field, name, arguments) int (*field) arguments;
    FUNCTIONS(F)
#undef F
} cu;

int gq_cu_capture(gq_context c, gq_stream stream) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) return -1;
#define F(field, name, arguments) \
    if (!(*(void **)&cu.field = dlsym(library, #name))) return -1;
    FUNCTIONS(F)
#undef F
    int code = cu.CtxPushCurrent(c);
    if (code) return code;
    code = cu.StreamBeginCapture(stream, CAPTURE_RELAXED);
    cu.CtxPopCurrent(&c);
    return code;
}

static int replay(executable e, gq_stream stream, gq_event begin, gq_event end, int repeat, float *milliseconds) {
    int code = 0;
    for (int i = -2; code == 0 && i < repeat; i++) {
        code = cu.EventRecord(begin, stream);
        if (code == 0) code = cu.GraphLaunch(e, stream);
        if (code == 0) code = cu.EventRecord(end, stream);
        if (code == 0) code = cu.EventSynchronize(end);
        if (code == 0 && i >= 0) code = cu.EventElapsedTime(&milliseconds[i], begin, end);
    }
    return code;
}

int gq_cu_replay(gq_context c, gq_stream stream, int repeat, float *milliseconds) {
    graph g = NULL;
    executable e = NULL;
    gq_event begin = NULL, end = NULL;
    int code = cu.CtxPushCurrent(c);
    if (code) return code;
    code = cu.StreamEndCapture(stream, &g);
    if (code == 0) code = cu.GraphInstantiate(&e, g, 0);
    if (code == 0) code = cu.EventCreate(&begin, 0);
    if (code == 0) code = cu.EventCreate(&end, 0);
    if (code == 0) code = replay(e, stream, begin, end, repeat, milliseconds);
    if (end) cu.EventDestroy(end);
    if (begin) cu.EventDestroy(begin);
    if (e) cu.GraphExecDestroy(e);
    if (g) cu.GraphDestroy(g);
    cu.CtxPopCurrent(&c);
    return code;
}
