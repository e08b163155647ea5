package main

// #include "types.h"
import "C"

import (
	"errors"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/cuda"
)

// layer checks what both functions take besides the state.
func (s *state) layer(m C.int64_t, d C.gq_dtype, exec *C.gq_const_exec) (where place, t dtype.DType, err error) {
	if where, t, err = executionIn(exec, d); err != nil {
		return where, t, err
	}
	if err := s.on(&where); err != nil {
		return where, t, err
	}
	if err := count("m", m); err != nil {
		return where, t, err
	}
	shape := s.state.Shape
	if len(shape) != 2 {
		return where, t, invalid("the state has shape %v; a linear layer needs 2 dimensions", shape)
	}
	if s.state.Format == nil || s.state.Format.Bits != 4 {
		return where, t, unsupported("the state is not nf4 or fp4")
	}
	if widest := max(shape[0], shape[1]); widest > 0 && int64(m) > maxBytes/8/widest {
		return where, t, invalid("m is %d: no matrix of so many rows of %d elements", int64(m), widest)
	}
	return where, t, nil
}

//export go_gq_linear_workspace_size
func go_gq_linear_workspace_size(handle *C.gq_state, m C.int64_t, d C.gq_dtype, exec *C.gq_const_exec, bytes *C.uint64_t, packed *C.int32_t) C.gq_status {
	return guarded("gq_linear_workspace_size", func() error {
		if bytes == nil && packed == nil {
			return invalid("bytes and packed are both NULL")
		}
		s, done, err := states.use(stateNumber(handle))
		if err != nil {
			return err
		}
		defer done()
		where, t, err := s.layer(m, d, exec)
		if err != nil {
			return err
		}
		want, reads, err := s.linearWorkspace(&where, cuda.Linear{DType: t, M: int64(m), N: s.state.Shape[0], K: s.state.Shape[1]}, bytes != nil)
		if err != nil {
			return err
		}
		if bytes != nil {
			*bytes = C.uint64_t(want)
		}
		if packed != nil && reads {
			*packed = 1
		}
		return nil
	})
}

// linearWorkspace is the workspace with which a layer is fastest, and whether it reads the packed weight. Where it does not, and exactly is
// asked for, cuBLASLt has to be there.
func (s *state) linearWorkspace(where *place, l cuda.Linear, exactly bool) (bytes uint64, packed bool, err error) {
	if where.device == nil {
		return 0, true, nil
	}
	w, err := s.weight(&s.parts, where)
	if err != nil {
		return 0, false, err
	}
	if err := where.device.Prepare(); err != nil {
		return 0, false, err
	}
	why := where.device.LinearRefused(&w, l)
	if why == "" {
		return where.device.LinearWorkspace(&w, l), true, nil
	}
	_, best := where.device.MatmulWorkspace(l)
	if best == 0 || !exactly {
		return best, false, nil
	}
	if err := where.device.PrepareMatmul(); err != nil {
		return 0, false, undone(why, err)
	}
	return best, false, nil
}

// undone is why neither a kernel nor cuBLASLt does a layer.
func undone(why string, err error) error {
	if errors.As(err, new(cuda.Unavailable)) {
		return unsupported("%s, and %w: decode the weight with gq_dequantize", why, err)
	}
	return err
}

//export go_gq_linear
func go_gq_linear(handle *C.gq_state, x C.gq_addr, m C.int64_t, d C.gq_dtype, bias, y C.gq_addr, exec *C.gq_const_exec) C.gq_status {
	return guarded("gq_linear", func() error {
		s, done, err := states.use(stateNumber(handle))
		if err != nil {
			return err
		}
		defer done()
		where, t, err := s.layer(m, d, exec)
		if err != nil {
			return err
		}
		size := uint64(t.Bits() / 8)
		xBytes, yBytes, biasBytes := uint64(m)*uint64(s.state.Shape[1])*size, uint64(m)*uint64(s.state.Shape[0])*size, uint64(0)
		if bias != 0 {
			biasBytes = uint64(s.state.Shape[0]) * size
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
	l := cuda.Linear{DType: t, M: m, N: s.state.Shape[0], K: s.state.Shape[1], Settled: where.settled}
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
	why := where.device.LinearRefused(&w, l)
	if why == "" {
		if want := where.device.LinearWorkspace(&w, l); want > 0 && where.workspaceBytes >= want {
			if l.Workspace, err = where.scratch(want); err != nil {
				return err
			}
			l.WorkspaceBytes = want
		}
		return where.device.Linear(where.stream, &w, l)
	}
	return where.multiply(&w, l, why)
}

// multiply is gq_linear with a weight that is decoded into the workspace, because of why.
func (p *place) multiply(w *cuda.Weight, l cuda.Linear, why string) error {
	if refused := cuda.MatmulRefused(l); refused != "" {
		return unsupported("%s: decode the weight with gq_dequantize", refused)
	}
	least, best := p.device.MatmulWorkspace(l)
	if p.workspaceBytes < least {
		return invalid("%s, so the weight is decoded into exec.workspace, which has %d bytes; this call needs %d, and %d to be fast", why, p.workspaceBytes, least, best)
	}
	workspace, err := p.scratch(least)
	if err != nil {
		return err
	}
	return undone(why, p.device.Matmul(p.stream, w, l, workspace, p.workspaceBytes))
}
