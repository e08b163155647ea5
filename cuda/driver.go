// Package cuda runs on NVIDIA GPUs what package quant runs on the CPU, with the same bytes, and moves files into device memory.
//
// Only the driver is used, found at run time (driver.c): without one, or without a device, Count is 0 and everything else works. Work
// runs in the device's primary context, the one that torch and the CUDA runtime use. Functions that take a Stream only put work on
// it: they neither wait nor allocate. Kernels (kernels/*.cu) are embedded under the build tag cuda.
//
// Addresses are device memory, as uint64. Sizes are the caller's to check.
package cuda

// #cgo LDFLAGS: -ldl -lpthread
// #include "driver.h"
// #include "cublaslt.h"
import "C"

import (
	"errors"
	"fmt"
	"sync"
)

// Error is what the driver answered, or cuBLASLt, whose codes are negated.
type Error struct {
	Code       int
	Name, Text string
	doing      string
}

func (e *Error) Error() string {
	return fmt.Sprintf("%s: %s (%d): %s", e.doing, e.Name, e.Code, e.Text)
}

// Result codes of the driver that mean something here.
const (
	outOfMemory = 2
	noDevice    = 100
	noBinary    = 209
)

// OutOfMemory says whether the device, or memory for it, was full.
func OutOfMemory(err error) bool {
	var e *Error
	return errors.As(err, &e) && (e.Code == outOfMemory || e.Code == allocationFailed)
}

// Unavailable is why a device cannot be used at all: no driver, one that is too old, no kernels for it.
type Unavailable struct{ error }

func (u Unavailable) Unwrap() error { return u.error }

func unavailable(format string, args ...any) error { return Unavailable{fmt.Errorf(format, args...)} }

// NoDevice is an ordinal that no device has.
type NoDevice struct{ error }

// failed makes an error of a result code of the driver, or a negated one of cuBLASLt; nil of 0.
func failed(code C.int, doing string, args ...any) error {
	if code == 0 {
		return nil
	}
	var name, text *C.char
	if code > 0 {
		C.gq_cu_error(code, &name, &text)
	} else {
		C.gq_lt_error(-code, &name, &text)
	}
	return &Error{int(code), C.GoString(name), C.GoString(text), fmt.Sprintf(doing, args...)}
}

// driver is what initializing told.
type driver struct {
	version, devices int
}

var (
	initializing sync.Mutex
	initialized  *driver // nil until it worked
)

// initialize finds the driver and its devices. What fails is tried again at the next call.
func initialize() (*driver, error) {
	initializing.Lock()
	defer initializing.Unlock()
	if initialized != nil {
		return initialized, nil
	}
	if architectures == "" {
		return nil, unavailable("this build of gquant has no CUDA kernels (it was made with CUDA=0)")
	}
	var what *C.char
	switch C.gq_cu_open(&what) {
	case -1:
		return nil, unavailable("no NVIDIA driver: %s cannot be loaded", C.GoString(what))
	case -2:
		return nil, unavailable("the NVIDIA driver is too old: it has no function %s; CUDA 13.0 (driver 580) or newer is needed", C.GoString(what))
	}
	var version, devices C.int
	if err := failed(C.gq_cu_init(&version, &devices), "initializing the NVIDIA driver"); err != nil {
		var e *Error
		if errors.As(err, &e) && e.Code == noDevice {
			return nil, unavailable("%w", err)
		}
		return nil, err
	}
	if version < C.GQ_CUDA_VERSION {
		return nil, unavailable("the NVIDIA driver supports CUDA %s; 13.0 (driver 580) or newer is needed", versionText(int(version)))
	}
	if devices == 0 {
		return nil, unavailable("the NVIDIA driver has no device")
	}
	initialized = &driver{int(version), int(devices)}
	return initialized, nil
}

// versionText writes a version of CUDA, such as 13000, as people do.
func versionText(version int) string { return fmt.Sprintf("%d.%d", version/1000, version%1000/10) }

// Count is the number of devices; 0 without a driver.
func Count() int {
	d, err := initialize()
	if err != nil {
		return 0
	}
	return d.devices
}
