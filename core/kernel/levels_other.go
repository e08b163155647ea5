//go:build !amd64

package kernel

// #include "kernel.h"
import "C"

func available() []level { return []level{{"generic", &C.gq_generic}} }
