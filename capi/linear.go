package main

// #include "types.h"
import "C"

import (
	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/cuda"
)

//export go_gq_linear
func go_gq_linear(handle *C.gq_state, x C.gq_addr, m C.int64_t, d C.gq_dtype, bias, y C.gq_addr, exec *C.gq_const_exec) C.gq_status {
	return guarded("gq_linear", func() error {
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
		if err := count("m", m); err != nil {
			return err
		}
		shape := s.state.Shape
		if len(shape) != 2 {
			return invalid("the state has shape %v; a linear layer needs 2 dimensions", shape)
		}
		if s.state.Format == nil || s.state.Format.Bits != 4 {
			return unsupported("the state is not nf4 or fp4")
		}
		if widest := max(shape[0], shape[1]); widest > 0 && int64(m) > maxBytes/8/widest {
			return invalid("m is %d: no matrix of so many rows of %d elements", int64(m), widest)
		}
		size := uint64(t.Bits() / 8)
		xBytes, yBytes, biasBytes := uint64(m)*uint64(shape[1])*size, uint64(m)*uint64(shape[0])*size, uint64(0)
		if bias != 0 {
			biasBytes = uint64(shape[0]) * size
		}
		if where.device != nil {
			return s.linearOnDevice(&where, t, int64(m), x, bias, y, xBytes, biasBytes, yBytes)
		}
		in, err := memory("x", x, xBytes)
		if err != nil {
			return err
		}
		added, err := memory("bias", bias, biasBytes)
		if err != nil {
			return err
		}
		out, err := memory("y", y, yBytes)
		if err != nil {
			return err
		}
		view, err := s.view(&s.parts)
		if err != nil {
			return err
		}
		return asInvalid(0, view.Linear(out, in, int64(m), t, added, where.threads))
	})
}

// linearOnDevice is gq_linear on a device.
func (s *state) linearOnDevice(where *place, t dtype.DType, m int64, x, bias, y C.gq_addr, xBytes, biasBytes, yBytes uint64) (err error) {
	l := cuda.Linear{DType: t, M: m, N: s.state.Shape[0], K: s.state.Shape[1]}
	if l.X, err = where.address("x", x, xBytes); err != nil {
		return err
	}
	if l.Bias, err = where.address("bias", bias, biasBytes); err != nil {
		return err
	}
	if l.Y, err = where.address("y", y, yBytes); err != nil {
		return err
	}
	w, err := s.weight(&s.parts, where)
	if err != nil {
		return err
	}
	if err := where.device.Prepare(); err != nil {
		return err
	}
	if why := where.device.LinearRefused(&w, l); why != "" {
		return unsupported("%s: decode the weight with gq_dequantize", why)
	}
	return where.device.Linear(where.stream, &w, l)
}
