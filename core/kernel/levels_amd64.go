package kernel

// #include "kernel.h"
// #include "cpu_amd64.h"
import "C"

// available lists the levels that the CPU and the operating system support.
func available() []level {
	found := []level{{"generic", &C.gq_generic}}
	if C.gq_cpu_has_avx2() != 0 {
		found = append(found, level{"avx2", &C.gq_avx2})
	}
	if C.gq_cpu_has_avx512() != 0 {
		found = append(found, level{"avx512", &C.gq_avx512})
	}
	return found
}
