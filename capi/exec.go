package main

// #include "types.h"
import "C"

import (
	"fmt"
	"unsafe"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/cuda"
)

// place is where a function runs: the CPU, or a device.
type place struct {
	device         *cuda.Device // nil for the CPU
	stream         cuda.Stream
	workspace      C.gq_addr
	workspaceBytes uint64
	threads        int
	settled        bool // a weight may be read before the kernel before has ended
}

// execution reads where to run.
func execution(given *C.gq_const_exec) (place, error) {
	exec := C.gq_exec{device: C.GQ_CPU}
	if err := options("exec", (*C.gq_exec)(unsafe.Pointer(given)), &exec); err != nil {
		return place{}, err
	}
	if exec.threads < 0 {
		return place{}, invalid("exec.threads is %d; want 0 (all cores) or more", int32(exec.threads))
	}
	if exec.flags&^C.GQ_EXEC_SETTLED != 0 {
		return place{}, invalid("exec.flags is %#x; this version knows GQ_EXEC_SETTLED", uint32(exec.flags))
	}
	p := place{
		settled: exec.flags&C.GQ_EXEC_SETTLED != 0,
		stream:  cuda.Stream(exec.stream), workspace: exec.workspace, workspaceBytes: uint64(exec.workspace_bytes), threads: int(exec.threads),
	}
	var err error
	p.device, err = device("exec.device", exec.device)
	return p, err
}

// executionIn reads where to run, and the dtype of weights that most functions take with it.
func executionIn(given *C.gq_const_exec, d C.gq_dtype) (place, dtype.DType, error) {
	where, err := execution(given)
	if err != nil {
		return where, 0, err
	}
	t, err := weightType("dtype", d)
	return where, t, err
}

// device is the device with an ordinal; nil for GQ_CPU.
func device(name string, ordinal C.int32_t) (*cuda.Device, error) {
	if ordinal == C.GQ_CPU {
		return nil, nil
	}
	if ordinal < 0 {
		return nil, invalid("%s is %d; want GQ_CPU or the ordinal of a CUDA device", name, int32(ordinal))
	}
	return cuda.Open(int(ordinal))
}

// deviceName is how messages call a place.
func deviceName(ordinal C.int32_t) string {
	if ordinal == C.GQ_CPU {
		return "the CPU (GQ_CPU)"
	}
	return fmt.Sprintf("CUDA device %d", int32(ordinal))
}

// ordinal is the number of a place's device, or GQ_CPU.
func (p *place) ordinal() C.int32_t {
	if p.device == nil {
		return C.GQ_CPU
	}
	return C.int32_t(p.device.Ordinal)
}

// address checks that a function may use size bytes at an address of the place's device.
func (p *place) address(name string, a C.gq_addr, size uint64) (uint64, error) {
	if _, err := memory(name, a, size); err != nil {
		return 0, err
	}
	if size > 0 && cuda.Checking() {
		return uint64(a), p.device.CheckAddress(name, uint64(a))
	}
	return uint64(a), nil
}

// sizedAddress is address with a size that the caller states and the function knows.
func (p *place) sizedAddress(name string, a C.gq_addr, size, want uint64) (uint64, error) {
	if size != want {
		return 0, invalid("%s has %d bytes; want %d", name, size, want)
	}
	return p.address(name, a, want)
}

// floatAddress is the address of count float32.
func (p *place) floatAddress(name string, a C.gq_addr, count uint64) (uint64, error) {
	if a%4 != 0 {
		return 0, invalid("%s: address %#x is not aligned to float32", name, uint64(a))
	}
	return p.address(name, a, 4*count)
}

// scratch is the place's workspace, which must have so many bytes.
func (p *place) scratch(want uint64) (uint64, error) {
	if p.workspaceBytes < want {
		return 0, invalid("exec.workspace has %d bytes; this call needs %d", p.workspaceBytes, want)
	}
	if p.workspace%16 != 0 {
		return 0, invalid("exec.workspace: address %#x is not divisible by 16", uint64(p.workspace))
	}
	return p.address("exec.workspace", p.workspace, want)
}
