package main

// #include "types.h"
import "C"

import (
	"fmt"
	"sync"
	"unsafe"
)

// registry knows what the handles of one type stand for. A handle is a number dressed as a pointer; numbers are never
// used twice, so that one that was freed stays invalid.
type registry[T any] struct {
	what string
	mu   sync.Mutex
	next uintptr
	live map[uintptr]*held[T]
}

// held is a handle's value and the calls that use it now.
type held[T any] struct {
	value T
	users sync.WaitGroup
}

// Numbers of different types start far apart and at no address that a process has.
const firstHandle = 0x6771_0000_0000_0001

func newRegistry[T any](what string, kind uintptr) *registry[T] {
	return &registry[T]{what: what, next: firstHandle + kind<<40, live: map[uintptr]*held[T]{}}
}

// add makes a handle.
func (r *registry[T]) add(value T) uintptr {
	r.mu.Lock()
	defer r.mu.Unlock()
	number := r.next
	r.next++
	r.live[number] = &held[T]{value: value}
	return number
}

// use gives the value of a handle until the returned function is called.
func (r *registry[T]) use(number uintptr) (value T, done func(), err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h, ok := r.live[number]
	if !ok {
		return value, nil, r.unknown(number)
	}
	h.users.Add(1)
	return h.value, h.users.Done, nil
}

// remove makes a handle invalid, waits for the calls that use it, and gives its value.
func (r *registry[T]) remove(number uintptr) (value T, err error) {
	r.mu.Lock()
	h, ok := r.live[number]
	delete(r.live, number)
	r.mu.Unlock()
	if !ok {
		return value, r.unknown(number)
	}
	h.users.Wait()
	return h.value, nil
}

func (r *registry[T]) unknown(number uintptr) error {
	if number == 0 {
		return invalid("%s is NULL", r.what)
	}
	return failure{C.GQ_ERROR_INVALID_HANDLE, fmt.Errorf("%s %#x was freed or never made", r.what, number)}
}

// A handle's pointer and its number. They go through memory because the number is no address; the types they point to are
// incomplete, so Go's garbage collector leaves them alone. (A type parameter cannot be incomplete.)

func stateNumber(h *C.gq_state) uintptr { return *(*uintptr)(unsafe.Pointer(&h)) }
func modelNumber(h *C.gq_model) uintptr { return *(*uintptr)(unsafe.Pointer(&h)) }
func jobNumber(h *C.gq_job) uintptr     { return *(*uintptr)(unsafe.Pointer(&h)) }

func stateHandle(n uintptr) *C.gq_state { return *(**C.gq_state)(unsafe.Pointer(&n)) }
func modelHandle(n uintptr) *C.gq_model { return *(**C.gq_model)(unsafe.Pointer(&n)) }
func jobHandle(n uintptr) *C.gq_job     { return *(**C.gq_job)(unsafe.Pointer(&n)) }
