// The CUDA driver, by way of a table that dlopen and dlsym fill: nothing of NVIDIA is linked, and a machine without a driver loses nothing.
//
// The functions below return the driver's result codes (0 = success) and run in the context they are given, which they push unless
// it is current already, and pop again.
#ifndef GQUANT_DRIVER_H
#define GQUANT_DRIVER_H

#include <stddef.h>
#include <stdint.h>

typedef void *gq_context, *gq_function, *gq_stream, *gq_event;

enum { GQ_CUDA_VERSION = 13000 }; // what the kernels are built with, and the driver must support

// Loads the driver: 0, or -1 if there is none and -2 if it lacks a function; *what names it.
int gq_cu_open(const char **what);

int gq_cu_init(int *version, int *devices);
// The name ("CUDA_ERROR_…") and text of a result code. Static texts.
void gq_cu_error(int code, const char **name, const char **text);

struct gq_cu_device {
    int major, minor, multiprocessors, shared_memory; // the most that a CTA can ask for
    uint64_t memory;
    char name[256];
};
int gq_cu_describe(int ordinal, struct gq_cu_device *device);
int gq_cu_retain(int ordinal, gq_context *context); // the primary context

// Makes a context current for calls of other libraries: whether it had to be pushed, which leave takes; below 0 is a result code, negated.
int gq_cu_enter(gq_context c);
void gq_cu_leave(int entered);

int gq_cu_load(gq_context c, const void *image, void **module);
int gq_cu_function(gq_context c, void *module, const char *name, gq_function *function);
int gq_cu_launch(gq_context c, gq_function f, uint32_t x, uint32_t y, uint32_t threads, gq_stream stream, void *args);
// With shared memory, of which the function must have been allowed that much; early: it may start before the kernel before it has
// ended, and waits for that itself.
int gq_cu_allow_shared(gq_context c, gq_function f, int bytes);
int gq_cu_launch_shared(gq_context c, gq_function f, uint32_t x, uint32_t threads, uint32_t shared, int early, gq_stream stream, void *args);
// A matrix, or one split in two, of which a kernel copies boxes into shared memory: a CUtensorMap of 1- or 2-byte elements. Sizes and boxes are in
// elements, the innermost first; strides in bytes, without the innermost; swizzle is 64 or 128 bytes.
struct gq_cu_map {
    uint64_t address, sizes[3], strides[2];
    uint32_t box[3];
    int dimensions, element, swizzle;
};
// As gq_cu_launch_shared, early; the kernel takes two tensor maps before its args. x CTAs are in clusters of `cluster`.
int gq_cu_launch_mapped(gq_context c, gq_function f, const struct gq_cu_map maps[2], uint32_t x, uint32_t cluster, uint32_t threads, uint32_t shared, gq_stream stream,
                        void *args);
// How many clusters of so many CTAs can run at once.
int gq_cu_clusters(gq_context c, gq_function f, uint32_t cluster, uint32_t threads, uint32_t shared, int *clusters);

int gq_cu_alloc(gq_context c, uint64_t bytes, uint64_t *address);
int gq_cu_free(gq_context c, uint64_t address);
int gq_cu_alloc_pinned(gq_context c, size_t bytes, void **address);
int gq_cu_free_pinned(gq_context c, void *address);
int gq_cu_to_device(gq_context c, uint64_t to, const void *from, size_t bytes, gq_stream stream);
int gq_cu_to_host(gq_context c, void *to, uint64_t from, size_t bytes, gq_stream stream);
int gq_cu_on_device(gq_context c, uint64_t to, uint64_t from, size_t bytes, gq_stream stream);
int gq_cu_zero(gq_context c, uint64_t address, size_t bytes, gq_stream stream);

// Whether the address is memory of the device: 1, or 0 with *what saying what it is instead; below 0 is a result code, negated.
int gq_cu_is_on_device(gq_context c, uint64_t address, int ordinal, const char **what, int *other);

int gq_cu_new_stream(gq_context c, gq_stream *stream);
int gq_cu_free_stream(gq_context c, gq_stream stream);
int gq_cu_wait(gq_context c, gq_stream stream);
int gq_cu_new_event(gq_context c, gq_event *event);
int gq_cu_free_event(gq_context c, gq_event event);
int gq_cu_record(gq_context c, gq_event event, gq_stream stream);
int gq_cu_wait_event(gq_context c, gq_event event);
int gq_cu_stream_waits(gq_context c, gq_stream stream, gq_event event);

#endif
