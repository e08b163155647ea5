// Command capi is libgquant: the C functions of include/gquant.h over the Go packages in core. It is built with
// -buildmode=c-shared or c-archive.
//
// The exported functions are C (exports.c, guard.c): they refuse to run in a forked child, and call the Go function of
// their name, which is one call of guarded (call.go): it refuses to run after a panic, turns a panic into a status, and
// keeps the message of an error for the calling thread. What it does with its arguments:
// memory.go makes slices of addresses and structs of pointers, handles.go keeps what handles stand for.
package main

// #include <stdlib.h>
// #include "types.h"
import "C"

import "unsafe"

// version is set by the Makefile.
var version = "0.0.0"

func init() {
	C.gq_guard_version = C.CString(version)
	C.gq_guard_build_info = buildInfo()
}

//export go_gq_version
func go_gq_version() *C.gq_const_char { return (*C.gq_const_char)(unsafe.Pointer(C.gq_guard_version)) }

//export go_gq_build_info
func go_gq_build_info() *C.gq_const_char {
	return (*C.gq_const_char)(unsafe.Pointer(C.gq_guard_build_info))
}

func main() {}
