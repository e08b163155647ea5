package main

// #include "types.h"
import "C"

import (
	"unsafe"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/quant"
	"github.com/gquant/gquant/cuda"
)

// layout is what a weight becomes: a state without tensors, and the sizes of its parts.
type layout struct {
	format C.gq_format
	state  quant.State // Format is nil for blockwise8
	nested bool
}

// newLayout checks what describes a weight. blocksize 0 stands for the format's usual one.
func newLayout(format C.gq_format, d dtype.DType, shape []int64, blocksize int64, nested bool) (*layout, error) {
	name, err := formatName(format)
	if err != nil {
		return nil, err
	}
	l := &layout{format: format, nested: nested, state: quant.State{Shape: shape, Blocksize: int(blocksize), DType: d}}
	if name != blockwise8 {
		if l.state.Format, err = quant.Lookup(name); err != nil {
			return nil, err
		}
	}
	switch name {
	case "int8":
		if l.state.Blocksize == 0 {
			l.state.Blocksize = int(shape[len(shape)-1])
		}
		if nested || len(shape) < 2 || int64(l.state.Blocksize) != shape[len(shape)-1] || l.state.Blocksize == 0 {
			return nil, invalid("format int8 has one absmax per row: blocksize %d, shape %v, nested %t do not fit it", blocksize, shape, nested)
		}
		return l, nil
	case blockwise8:
		if nested {
			return nil, invalid("format blockwise8 has no nested statistics")
		}
	}
	if l.state.Blocksize == 0 {
		l.state.Blocksize = quant.DefaultBlocksize
	}
	return l, checkBlocksize(C.int64_t(l.state.Blocksize))
}

// sizes are the bytes of the parts.
func (l *layout) sizes() C.gq_parts {
	n, blocks := uint64(l.state.Elements()), uint64(l.state.Blocks())
	p := C.gq_parts{packed_bytes: C.uint64_t(n), absmax_bytes: C.uint64_t(4 * blocks)}
	if f := l.state.Format; f == nil {
		p.codebook_bytes = 1024
	} else {
		p.packed_bytes, p.codebook_bytes = C.uint64_t(l.state.PackedBytes()), C.uint64_t(4*len(f.Codebook))
	}
	if l.nested {
		p.absmax_bytes = C.uint64_t(blocks)
		p.nested_absmax_bytes = C.uint64_t(4 * ((blocks + quant.NestedBlocksize - 1) / quant.NestedBlocksize))
		p.nested_codebook_bytes, p.offset_bytes = 1024, 4
	}
	return p
}

// check compares the sizes of parts with those that the layout wants. A part whose address is 0 is missing; only the codebooks may be.
func (l *layout) check(p *C.gq_parts) error {
	want := l.sizes()
	for _, part := range []struct {
		name       string
		got, want  C.uint64_t
		isOptional bool
	}{
		{"packed", p.packed_bytes, want.packed_bytes, false},
		{"codebook", p.codebook_bytes, want.codebook_bytes, p.codebook == 0},
		{"absmax", p.absmax_bytes, want.absmax_bytes, false},
		{"nested_absmax", p.nested_absmax_bytes, want.nested_absmax_bytes, !l.nested},
		{"nested_codebook", p.nested_codebook_bytes, want.nested_codebook_bytes, p.nested_codebook == 0},
		{"offset", p.offset_bytes, want.offset_bytes, !l.nested},
	} {
		if part.got != part.want && !part.isOptional {
			return invalid("parts.%s has %d bytes; want %d", part.name, uint64(part.got), uint64(part.want))
		}
	}
	return nil
}

// view makes a state of buffers of the layout's sizes.
func (l *layout) view(p *C.gq_parts) (*quant.State, error) {
	if err := l.check(p); err != nil {
		return nil, err
	}
	s := l.state
	want := l.sizes()
	var err error
	if s.Packed, err = memory("parts.packed", p.packed, uint64(want.packed_bytes)); err != nil {
		return nil, err
	}
	if s.Codebook, err = floats("parts.codebook", p.codebook, present(p.codebook, want.codebook_bytes)); err != nil {
		return nil, err
	}
	if !l.nested {
		s.Absmax, err = floats("parts.absmax", p.absmax, uint64(want.absmax_bytes)/4)
		return &s, err
	}
	n := &quant.Nested{Blocksize: quant.NestedBlocksize, DType: dtype.F32}
	if n.Codes, err = memory("parts.absmax", p.absmax, uint64(want.absmax_bytes)); err != nil {
		return nil, err
	}
	if n.Absmax, err = floats("parts.nested_absmax", p.nested_absmax, uint64(want.nested_absmax_bytes)/4); err != nil {
		return nil, err
	}
	table, err := table256("parts.nested_codebook", p.nested_codebook, uint64(p.nested_codebook_bytes))
	if err != nil {
		return nil, err
	}
	n.Codebook = table[:]
	offset, err := floats("parts.offset", p.offset, 1)
	if err != nil {
		return nil, err
	}
	n.Offset = offset[0]
	s.Nested = n
	return &s, nil
}

func present(a C.gq_addr, bytes C.uint64_t) uint64 {
	if a == 0 {
		return 0
	}
	return uint64(bytes) / 4
}

// weight is view for a device: the parts are not looked at.
func (l *layout) weight(p *C.gq_parts, where *place) (w cuda.Weight, err error) {
	if err := l.check(p); err != nil {
		return w, err
	}
	w = cuda.Weight{Format: l.state.Format, Blocksize: int64(l.state.Blocksize), Nested: l.nested}
	if w.Packed, err = where.address("parts.packed", p.packed, uint64(p.packed_bytes)); err != nil {
		return w, err
	}
	if w.Codebook, err = where.floatAddress("parts.codebook", p.codebook, present(p.codebook, p.codebook_bytes)); err != nil {
		return w, err
	}
	if !l.nested {
		w.Absmax, err = where.floatAddress("parts.absmax", p.absmax, uint64(p.absmax_bytes)/4)
		return w, err
	}
	if w.Absmax, err = where.address("parts.absmax", p.absmax, uint64(p.absmax_bytes)); err != nil {
		return w, err
	}
	if w.NestedAbsmax, err = where.floatAddress("parts.nested_absmax", p.nested_absmax, uint64(p.nested_absmax_bytes)/4); err != nil {
		return w, err
	}
	if w.NestedCodebook, err = where.tableAddress("parts.nested_codebook", p.nested_codebook); err != nil {
		return w, err
	}
	w.Offset, err = where.floatAddress("parts.offset", p.offset, 1)
	return w, err
}

// dequantize decodes elements of a viewed state.
func (l *layout) dequantize(s *quant.State, first, n int64, out []byte, d dtype.DType, threads int) error {
	if n == 0 {
		return nil
	}
	if l.state.Format != nil {
		return asInvalid(0, s.DequantizeRange(out, d, first, n, threads))
	}
	table := quant.DynamicMap()
	if s.Codebook != nil {
		table = (*[256]float32)(s.Codebook)
	}
	// Whole blocks are decoded; a range that starts inside one goes through a buffer.
	blocksize := int64(s.Blocksize)
	start := first / blocksize * blocksize
	values := out
	if start < first {
		values = make([]byte, (first+n-start)*int64(d.Bits()/8))
	}
	end := first + n
	absmax := s.Absmax[start/blocksize : (end+blocksize-1)/blocksize]
	if err := dequantizeFlat8(table, s.Packed[start:end], absmax, end-start, s.Blocksize, values, d, threads); err != nil {
		return err
	}
	if start < first {
		copy(out, values[(first-start)*int64(d.Bits()/8):])
	}
	return nil
}

// quantizeOptions reads options that may be NULL.
func quantizeOptions(given *C.gq_const_quantize_options) (blocksize int64, nested bool, err error) {
	o := C.gq_quantize_options{}
	if err := options("options", (*C.gq_quantize_options)(unsafe.Pointer(given)), &o); err != nil {
		return 0, false, err
	}
	if o.nested != 0 && o.nested != 1 {
		return 0, false, invalid("options.nested is %d; want 0 or 1", int32(o.nested))
	}
	return int64(o.blocksize), o.nested == 1, nil
}

//export go_gq_quantized_layout
func go_gq_quantized_layout(format C.gq_format, shape *C.gq_const_int64, ndim C.int32_t, opts *C.gq_const_quantize_options, sizes *C.gq_parts) C.gq_status {
	return guarded("gq_quantized_layout", func() error {
		if sizes == nil {
			return invalid("layout is NULL")
		}
		*sizes = C.gq_parts{}
		l, err := requested(format, dtype.F32, shape, ndim, opts)
		if err != nil {
			return err
		}
		*sizes = l.sizes()
		return nil
	})
}

// requested is the layout that a caller asks for.
func requested(format C.gq_format, d dtype.DType, shape *C.gq_const_int64, ndim C.int32_t, opts *C.gq_const_quantize_options) (*layout, error) {
	dimensions, err := dims(shape, ndim)
	if err != nil {
		return nil, err
	}
	blocksize, nested, err := quantizeOptions(opts)
	if err != nil {
		return nil, err
	}
	return newLayout(format, d, dimensions, blocksize, nested)
}

//export go_gq_quantize_workspace_size
func go_gq_quantize_workspace_size(format C.gq_format, shape *C.gq_const_int64, ndim C.int32_t, opts *C.gq_const_quantize_options, ordinal C.int32_t, bytes *C.uint64_t) C.gq_status {
	return guarded("gq_quantize_workspace_size", func() error {
		if bytes == nil {
			return invalid("bytes is NULL")
		}
		*bytes = 0
		l, err := requested(format, dtype.F32, shape, ndim, opts)
		if err != nil {
			return err
		}
		if ordinal < C.GQ_CPU {
			return invalid("device is %d; want GQ_CPU or the ordinal of a CUDA device", int32(ordinal))
		}
		if l.nested && ordinal != C.GQ_CPU {
			*bytes = C.uint64_t(cuda.NestedWorkspace(l.state.Blocks()))
		}
		return nil
	})
}

//export go_gq_quantize
func go_gq_quantize(format C.gq_format, src C.gq_addr, d C.gq_dtype, shape *C.gq_const_int64, ndim C.int32_t, opts *C.gq_const_quantize_options, parts *C.gq_const_parts, exec *C.gq_const_exec, nonfinite *C.int64_t) C.gq_status {
	return guarded("gq_quantize", func() error {
		if nonfinite != nil {
			*nonfinite = 0
		}
		where, t, err := executionIn(exec, d)
		if err != nil {
			return err
		}
		l, err := requested(format, t, shape, ndim, opts)
		if err != nil {
			return err
		}
		if parts == nil {
			return invalid("parts is NULL")
		}
		if where.device != nil {
			if err := l.quantizeOnDevice(&where, src, (*C.gq_parts)(unsafe.Pointer(parts))); err != nil {
				return err
			}
			if nonfinite != nil {
				*nonfinite = -1
			}
			return nil
		}
		s, err := l.view((*C.gq_parts)(unsafe.Pointer(parts)))
		if err != nil {
			return err
		}
		n := l.state.Elements()
		in, err := memory("src", src, uint64(n)*uint64(t.Bits()/8))
		if err != nil {
			return err
		}
		bad, err := l.quantize(s, in, t, where.threads, (*C.gq_parts)(unsafe.Pointer(parts)))
		if nonfinite != nil {
			*nonfinite = C.int64_t(bad)
		}
		return err
	})
}

// quantize fills the buffers of a viewed state.
func (l *layout) quantize(s *quant.State, in []byte, d dtype.DType, threads int, parts *C.gq_parts) (nonfinite int64, err error) {
	n := l.state.Elements()
	switch {
	case l.state.Format == nil:
		table := quant.DynamicMap()
		if s.Codebook != nil {
			table = (*[256]float32)(s.Codebook)
		}
		nonfinite, err = quant.QuantizeBlockwise8(table, in, d, n, s.Blocksize, s.Absmax, s.Packed, threads)
		return nonfinite, asInvalid(0, err)
	case l.state.Format.Bits == 8:
		columns := int64(s.Blocksize)
		codes, absmax, _, err := quant.QuantizeRowsInt8(in, d, n/columns, columns, 0)
		if err != nil {
			return 0, asInvalid(0, err)
		}
		copy(s.Packed, codes)
		copy(s.Absmax, absmax)
		return 0, nil
	}
	absmax := s.Absmax
	if l.nested {
		absmax = make([]float32, s.Blocks())
	}
	nonfinite, err = quant.QuantizeInto(s.Format, in, d, n, s.Blocksize, absmax, s.Packed, threads)
	if err != nil {
		return 0, asInvalid(0, err)
	}
	if s.Codebook != nil {
		copy(s.Codebook, s.Format.Codebook)
	}
	if l.nested {
		nested := quant.Nest(absmax)
		copy(s.Nested.Codes, nested.Codes)
		copy(s.Nested.Absmax, nested.Absmax)
		if parts.nested_codebook != 0 {
			copy(s.Nested.Codebook, nested.Codebook)
		}
		offset, err := floats("parts.offset", parts.offset, 1)
		if err != nil {
			return 0, err
		}
		offset[0] = nested.Offset
	}
	return nonfinite, nil
}

// quantizeOnDevice puts the quantization of a whole weight on a stream.
func (l *layout) quantizeOnDevice(where *place, src C.gq_addr, parts *C.gq_parts) error {
	w, err := l.weight(parts, where)
	if err != nil {
		return err
	}
	n, t := l.state.Elements(), l.state.DType
	in, err := where.address("src", src, uint64(n)*uint64(t.Bits()/8))
	if err != nil {
		return err
	}
	d, stream := where.device, where.stream
	blocks := cuda.Blocks{Src: in, Absmax: w.Absmax, Codes: w.Packed, DType: t, N: n, Blocksize: w.Blocksize}
	switch {
	case w.Format == nil:
		return d.Quantize8(stream, w.Codebook, blocks)
	case w.Format.Bits == 8:
		return d.QuantizeRowsInt8(stream, cuda.Rows{Src: in, Absmax: w.Absmax, Codes: w.Packed, DType: t, Rows: n / w.Blocksize, Cols: w.Blocksize})
	}
	if l.nested {
		if blocks.Absmax, err = where.scratch(uint64(cuda.NestedWorkspace(l.state.Blocks()))); err != nil {
			return err
		}
		if err := d.QuantizeNested(stream, w.Format, blocks, w.Absmax, w.NestedAbsmax, w.Offset); err != nil {
			return err
		}
		if w.NestedCodebook != 0 {
			if err := d.DynamicMap(stream, w.NestedCodebook); err != nil {
				return err
			}
		}
	} else if err := d.Quantize4(stream, w.Format, blocks); err != nil {
		return err
	}
	if w.Codebook != 0 {
		return d.Codebook(stream, w.Format, w.Codebook)
	}
	return nil
}
