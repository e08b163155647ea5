// Which instructions the CPU has and the operating system saves the registers of.
#include <cpuid.h>

static inline int gq_cpu_has_avx2(void) {
    unsigned a, b, c, d;
    __builtin_cpu_init();
    // Not every compiler knows the name "f16c" here, so that bit is read from leaf 1.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

static inline int gq_cpu_has_avx512(void) {
    return gq_cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
