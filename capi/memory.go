package main

// #include "types.h"
import "C"

import (
	"unsafe"

	"github.com/gquant/gquant/core/dtype"
)

// maxBytes bounds the sizes that callers give: nothing real is larger, and sums of them do not overflow.
const maxBytes = 1 << 56

// pointer turns an address into a pointer. It goes through memory because the address is not one of Go's: the garbage
// collector neither knows nor moves what is there.
func pointer(a C.gq_addr) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&a)) }

// memory is size bytes of the caller at an address.
func memory(name string, a C.gq_addr, size uint64) ([]byte, error) {
	switch {
	case size == 0:
		return nil, nil
	case a == 0:
		return nil, invalid("%s is NULL; want %d bytes", name, size)
	case size > maxBytes || uint64(a) > 1<<63-size:
		return nil, invalid("%s: %d bytes at %#x are more than memory has", name, size, uint64(a))
	}
	return unsafe.Slice((*byte)(pointer(a)), size), nil
}

// sized is memory whose size the caller states and the function knows.
func sized(name string, a C.gq_addr, size, want uint64) ([]byte, error) {
	if size != want {
		return nil, invalid("%s has %d bytes; want %d", name, size, want)
	}
	return memory(name, a, size)
}

// floats is count float32 of the caller.
func floats(name string, a C.gq_addr, count uint64) ([]float32, error) {
	if a%4 != 0 {
		return nil, invalid("%s: address %#x is not aligned to float32", name, uint64(a))
	}
	raw, err := memory(name, a, 4*count)
	if err != nil || raw == nil {
		return nil, err
	}
	return unsafe.Slice((*float32)(unsafe.Pointer(unsafe.SliceData(raw))), count), nil
}

// count checks a number of elements.
func count(name string, n C.int64_t) error {
	if n < 0 || n > maxBytes/8 {
		return invalid("%s is %d; want 0 to %d", name, int64(n), int64(maxBytes/8))
	}
	return nil
}

// weightType checks the dtype of weights.
func weightType(name string, d C.gq_dtype) (dtype.DType, error) {
	switch t := dtype.DType(d); {
	case d < 0 || d > 255 || !t.Valid():
		return 0, invalid("%s is %d, which is no dtype; want GQ_F32, GQ_F16 or GQ_BF16", name, int32(d))
	case t != dtype.F32 && t != dtype.F16 && t != dtype.BF16:
		return 0, invalid("%s is %s; want GQ_F32, GQ_F16 or GQ_BF16", name, t)
	default:
		return t, nil
	}
}

// text is a string of the caller.
func text(name string, s *C.gq_const_char) (string, error) {
	if s == nil {
		return "", invalid("%s is NULL", name)
	}
	return C.GoString((*C.char)(unsafe.Pointer(s))), nil
}

// dims is a shape of the caller.
func dims(shape *C.gq_const_int64, ndim C.int32_t) ([]int64, error) {
	if ndim < 1 || ndim > 64 {
		return nil, invalid("ndim is %d; want 1 to 64", int32(ndim))
	}
	if shape == nil {
		return nil, invalid("shape is NULL; want %d dimensions", int32(ndim))
	}
	out := make([]int64, ndim)
	n := uint64(1)
	for i, d := range unsafe.Slice((*int64)(unsafe.Pointer(shape)), ndim) {
		if d < 0 || d > 0 && n > maxBytes/8/uint64(d) {
			return nil, invalid("shape[%d] is %d: no tensor has it", i, d)
		}
		if d > 0 {
			n *= uint64(d)
		}
		out[i] = d
	}
	return out, nil
}

// options reads a struct that starts with struct_size. A shorter one leaves the rest of *known, the defaults, alone;
// a longer one must have zeros there.
func options[T any](name string, given *T, known *T) error {
	if given == nil {
		return nil
	}
	size := *(*uint32)(unsafe.Pointer(given))
	full := uint32(unsafe.Sizeof(*known))
	if size < 8 || size > 1<<16 {
		return invalid("%s.struct_size is %d; set it with the INIT macro", name, size)
	}
	bytes := unsafe.Slice((*byte)(unsafe.Pointer(given)), size)
	for i := full; i < size; i++ {
		if bytes[i] != 0 {
			return invalid("%s.struct_size is %d, this library knows %d bytes of it, and byte %d behind them is set: it is too old for an option in use", name, size, full, i)
		}
	}
	copy(unsafe.Slice((*byte)(unsafe.Pointer(known)), full), bytes)
	return nil
}

// fill writes *info to a struct of the caller, as much of it as the caller knows.
func fill[T any](name string, to *T, info *T) error {
	if to == nil {
		return invalid("%s is NULL", name)
	}
	size := *(*uint32)(unsafe.Pointer(to))
	if size < 8 || size > 1<<16 {
		return invalid("%s->struct_size is %d; set it with the INIT macro", name, size)
	}
	*(*uint32)(unsafe.Pointer(info)) = size
	copy(unsafe.Slice((*byte)(unsafe.Pointer(to)), min(size, uint32(unsafe.Sizeof(*info)))), unsafe.Slice((*byte)(unsafe.Pointer(info)), unsafe.Sizeof(*info)))
	return nil
}
