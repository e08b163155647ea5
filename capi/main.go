// Command capi is libgquant: the C functions of include/gquant.h over the Go packages in core. It is built with
// -buildmode=c-shared or c-archive.
//
// Each export is one call of guarded (call.go): it refuses to run in a forked child or after a panic, turns a panic
// into a status, and keeps the message of an error for the calling thread. What it does with its arguments:
// memory.go makes slices of addresses and structs of pointers, handles.go keeps what handles stand for.
package main

// #include <stdlib.h>
// #include "types.h"
import "C"

import "unsafe"

// version is set by the Makefile.
var version = "0.0.0"

var versionText = C.CString(version)

//export gq_version
func gq_version() *C.gq_const_char { return (*C.gq_const_char)(unsafe.Pointer(versionText)) }

func main() {}
