// What must be C: the calling thread's last error, and whether this process was forked.
#ifndef GQUANT_GUARD_H
#define GQUANT_GUARD_H

// 1 in a child of fork: the Go runtime's other threads are gone there.
extern volatile int gq_guard_forked;

// What gq_version and gq_build_info return; NULL until Go has started.
extern const char *gq_guard_version, *gq_guard_build_info;

// Remembers a message for the calling thread; copies it.
void gq_guard_set_error(const char *message);

#endif
