//go:build gqtest

package main

// #include "types.h"
import "C"

// gq_test_panic is in test builds only: it meets a defect.
//
//export gq_test_panic
func gq_test_panic() C.gq_status {
	return guarded("gq_test_panic", func() error {
		var list []int
		return invalid("element %d", list[len(list)])
	})
}
