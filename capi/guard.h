// What must be C: the calling thread's last error, and whether this process was forked.
#ifndef GQUANT_GUARD_H
#define GQUANT_GUARD_H

// 1 in a child of fork: the Go runtime's other threads are gone there.
extern volatile int gq_guard_forked;

// Remembers a message for the calling thread; copies it.
void gq_guard_set_error(const char *message);

#endif
