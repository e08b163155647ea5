package main

// #include <stdlib.h>
// #include "types.h"
import "C"

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/gquant/gquant/core/convert"
	"github.com/gquant/gquant/core/safetensors"
	"github.com/gquant/gquant/cuda"
)

// failure is an error whose status is known.
type failure struct {
	status C.gq_status
	error
}

func (f failure) Unwrap() error { return f.error }

// invalid is GQ_ERROR_INVALID_ARGUMENT.
func invalid(format string, args ...any) error {
	return failure{C.GQ_ERROR_INVALID_ARGUMENT, fmt.Errorf(format, args...)}
}

func unsupported(format string, args ...any) error {
	return failure{C.GQ_ERROR_UNSUPPORTED, fmt.Errorf(format, args...)}
}

func notFound(format string, args ...any) error {
	return failure{C.GQ_ERROR_NOT_FOUND, fmt.Errorf(format, args...)}
}

// statusOf finds the status of an error of core or of the system; other is that of an error without a type.
func statusOf(err error, other C.gq_status) C.gq_status {
	var known failure
	var option convert.OptionError
	var format *safetensors.FormatError
	var number syscall.Errno
	var driver *cuda.Error
	switch {
	case errors.As(err, &known):
		return known.status
	case errors.As(err, &option):
		return C.GQ_ERROR_INVALID_ARGUMENT
	case errors.As(err, new(cuda.Unavailable)):
		return C.GQ_ERROR_UNSUPPORTED
	case errors.As(err, new(cuda.BadAddress)):
		return C.GQ_ERROR_INVALID_ARGUMENT
	case errors.As(err, new(cuda.NoDevice)):
		return C.GQ_ERROR_NOT_FOUND
	case cuda.OutOfMemory(err):
		return C.GQ_ERROR_OUT_OF_MEMORY
	case errors.As(err, &driver):
		return C.GQ_ERROR_DEVICE
	case errors.Is(err, context.Canceled):
		return C.GQ_ERROR_CANCELLED
	case errors.As(err, &format), errors.Is(err, io.ErrUnexpectedEOF):
		return C.GQ_ERROR_BAD_FILE
	case errors.Is(err, fs.ErrNotExist):
		return C.GQ_ERROR_NOT_FOUND
	case errors.Is(err, fs.ErrExist), errors.Is(err, fs.ErrPermission), errors.As(err, &number):
		return C.GQ_ERROR_IO
	}
	return other
}

// poisoned is set by a panic: what it interrupted may be half done, so nothing runs any more.
var poisoned atomic.Bool

// guarded runs an export: what fails becomes a status, with its message for the calling thread.
func guarded(function string, run func() error) (status C.gq_status) {
	if poisoned.Load() {
		return fail(C.GQ_ERROR_INTERNAL, function+": an earlier call met a defect of the library; restart the process")
	}
	defer func() {
		if p := recover(); p != nil {
			poisoned.Store(true)
			status = fail(C.GQ_ERROR_INTERNAL, fmt.Sprintf("%s: defect of the library, please report it: %v\n%s", function, p, debug.Stack()))
		}
	}()
	if err := run(); err != nil {
		return fail(statusOf(err, C.GQ_ERROR_BAD_FILE), function+": "+err.Error()) // arguments are checked; the rest is what core finds in a model
	}
	return C.GQ_OK
}

// fail keeps the message for gq_last_error. The goroutine of an export runs on its caller's thread.
func fail(status C.gq_status, message string) C.gq_status {
	text := C.CString(message)
	C.gq_guard_set_error(text)
	C.free(unsafe.Pointer(text))
	return status
}
