package main

// #include <stdlib.h>
// #include "types.h"
import "C"

import (
	"unsafe"

	"github.com/gquant/gquant/core/quant"
)

// state is what a gq_state stands for: a layout, and buffers of the caller or of the state itself.
type state struct {
	*layout
	parts  C.gq_parts
	device C.int32_t      // that holds the parts, or GQ_CPU
	shape  *C.int64_t     // in C memory, for gq_state_get_desc
	owned  unsafe.Pointer // C memory that holds all parts; nil if they are borrowed
}

var states = newRegistry[*state]("state", 1)

// newState puts a layout and its buffers behind a handle.
func newState(l *layout, parts C.gq_parts, device C.int32_t, owned unsafe.Pointer) *C.gq_state {
	s := &state{layout: l, parts: parts, device: device, owned: owned}
	s.shape = (*C.int64_t)(C.malloc(C.size_t(8 * len(l.state.Shape))))
	copy(unsafe.Slice((*int64)(unsafe.Pointer(s.shape)), len(l.state.Shape)), l.state.Shape)
	return stateHandle(states.add(s))
}

//export go_gq_state_create
func go_gq_state_create(desc *C.gq_const_state_desc, handle **C.gq_state) C.gq_status {
	return guarded("gq_state_create", func() error {
		if handle == nil {
			return invalid("state is NULL")
		}
		*handle = nil
		if desc == nil {
			return invalid("desc is NULL")
		}
		d := C.gq_state_desc{device: C.GQ_CPU}
		if err := options("desc", (*C.gq_state_desc)(unsafe.Pointer(desc)), &d); err != nil {
			return err
		}
		where := place{}
		var err error
		if where.device, err = device("desc.device", d.device); err != nil {
			return err
		}
		if d.reserved != 0 {
			return invalid("desc.reserved is %d; want 0", uint32(d.reserved))
		}
		t, err := weightType("desc.dtype", d.dtype)
		if err != nil {
			return err
		}
		if d.ndim > 0 && d.shape == 0 || d.shape%8 != 0 {
			return invalid("desc.shape is %#x; want the address of %d int64", uint64(d.shape), int32(d.ndim))
		}
		shape, err := dims((*C.gq_const_int64)(pointer(d.shape)), d.ndim)
		if err != nil {
			return err
		}
		if d.nested_blocksize != 0 && d.nested_blocksize != quant.NestedBlocksize {
			return invalid("desc.nested_blocksize is %d; want 0 (not nested) or %d", int64(d.nested_blocksize), quant.NestedBlocksize)
		}
		l, err := newLayout(d.format, t, shape, int64(d.blocksize), d.nested_blocksize != 0)
		if err != nil {
			return err
		}
		if where.device != nil {
			_, err = l.weight(&d.parts, &where)
		} else {
			_, err = l.view(&d.parts)
		}
		if err != nil {
			return err
		}
		*handle = newState(l, d.parts, d.device, nil)
		return nil
	})
}

//export go_gq_state_free
func go_gq_state_free(handle *C.gq_state) C.gq_status {
	return guarded("gq_state_free", func() error {
		if handle == nil {
			return nil
		}
		s, err := states.remove(stateNumber(handle))
		if err != nil {
			return err
		}
		C.free(unsafe.Pointer(s.shape))
		C.free(s.owned)
		return nil
	})
}

//export go_gq_state_get_desc
func go_gq_state_get_desc(handle *C.gq_state, desc *C.gq_state_desc) C.gq_status {
	return guarded("gq_state_get_desc", func() error {
		s, done, err := states.use(stateNumber(handle))
		if err != nil {
			return err
		}
		defer done()
		d := C.gq_state_desc{
			format: s.format, dtype: C.gq_dtype(s.state.DType), ndim: C.int32_t(len(s.state.Shape)),
			blocksize: C.int64_t(s.state.Blocksize), parts: s.parts, device: s.device,
			shape: C.gq_addr(uintptr(unsafe.Pointer(s.shape))),
		}
		if s.nested {
			d.nested_blocksize = quant.NestedBlocksize
		}
		return fill("desc", desc, &d)
	})
}

//export go_gq_state_json
func go_gq_state_json(handle *C.gq_state, out *C.char, capacity C.size_t, length *C.size_t) C.gq_status {
	return guarded("gq_state_json", func() error {
		if length == nil {
			return invalid("length is NULL")
		}
		*length = 0
		s, done, err := states.use(stateNumber(handle))
		if err != nil {
			return err
		}
		defer done()
		if f := s.state.Format; f == nil || f.Bits != 4 {
			return unsupported("only 4-bit states have bitsandbytes' JSON")
		}
		var view *quant.State
		switch {
		case s.device == C.GQ_CPU:
			if view, err = s.view(&s.parts); err != nil {
				return err
			}
		case s.nested:
			return unsupported("the state's offset, which its JSON has, is in the memory of %s", deviceName(s.device))
		default:
			view = &s.layout.state
		}
		json := view.JSON()
		if out == nil && capacity > 0 {
			return invalid("text is NULL with a capacity of %d", uint64(capacity))
		}
		*length = C.size_t(len(json))
		if n := min(uint64(len(json)), uint64(capacity)); n > 0 {
			copy(unsafe.Slice((*byte)(unsafe.Pointer(out)), n), json)
		}
		return nil
	})
}

//export go_gq_dequantize
func go_gq_dequantize(handle *C.gq_state, out C.gq_addr, outBytes C.size_t, d C.gq_dtype, exec *C.gq_const_exec) C.gq_status {
	return guarded("gq_dequantize", func() error { return dequantizeState(handle, 0, -1, out, outBytes, d, exec) })
}

//export go_gq_dequantize_range
func go_gq_dequantize_range(handle *C.gq_state, first, n C.int64_t, out C.gq_addr, outBytes C.size_t, d C.gq_dtype, exec *C.gq_const_exec) C.gq_status {
	return guarded("gq_dequantize_range", func() error {
		if err := count("count", n); err != nil {
			return err
		}
		return dequantizeState(handle, int64(first), int64(n), out, outBytes, d, exec)
	})
}

// on checks that a function runs where the state's parts are.
func (s *state) on(where *place) error {
	if where.ordinal() != s.device {
		return invalid("the parts of the state are on %s, but exec.device is %s", deviceName(s.device), deviceName(where.ordinal()))
	}
	return nil
}

// dequantizeState decodes n elements from first on; n = -1 stands for all.
func dequantizeState(handle *C.gq_state, first, n int64, out C.gq_addr, outBytes C.size_t, d C.gq_dtype, exec *C.gq_const_exec) error {
	s, done, err := states.use(stateNumber(handle))
	if err != nil {
		return err
	}
	defer done()
	where, t, err := executionIn(exec, d)
	if err != nil {
		return err
	}
	if err := s.on(&where); err != nil {
		return err
	}
	all := s.state.Elements()
	if n < 0 {
		n = all
	}
	if first < 0 || first > all || n > all-first {
		return invalid("elements %d to %d of a weight of %d", first, first+n, all)
	}
	size := uint64(n) * uint64(t.Bits()/8)
	if where.device != nil {
		to, err := where.sizedAddress("out", out, uint64(outBytes), size)
		if err != nil {
			return err
		}
		w, err := s.weight(&s.parts, &where)
		if err != nil {
			return err
		}
		return where.device.Dequantize(where.stream, &w, t, to, first, n)
	}
	values, err := sized("out", out, uint64(outBytes), size)
	if err != nil {
		return err
	}
	view, err := s.view(&s.parts)
	if err != nil {
		return err
	}
	return s.dequantize(view, first, n, values, t, where.threads)
}
