package main

// #include <stdlib.h>
// #include "types.h"
import "C"

import (
	"cmp"
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"github.com/gquant/gquant/core/checkpoint"
	"github.com/gquant/gquant/core/quant"
	"github.com/gquant/gquant/core/safetensors"
	"github.com/gquant/gquant/cuda"
	"golang.org/x/sync/errgroup"
)

// transfer is bytes of a model and the memory that they go to.
type transfer struct {
	name  string // of the destination, for errors
	to    C.gq_addr
	bytes int64
	entry safetensors.Entry // of the file
	first int64             // byte of the entry to start at
	data  []byte            // instead of an entry: what no file holds
}

func (t *transfer) read(p []byte, offset int64) error {
	if t.data != nil {
		return cuda.Bytes(t.data)(p, offset)
	}
	return t.entry.Read(p, t.first+offset)
}

// tensorTransfer reads out's bytes of a tensor, from byte first on.
func tensorTransfer(e safetensors.Entry, first uint64, name string, out C.gq_addr, outBytes uint64) (transfer, error) {
	if size := uint64(e.Bytes()); first > size || outBytes > size-first {
		return transfer{}, invalid("bytes %d to %d of tensor %q, which has %d", first, first+outBytes, e.Name, size)
	}
	return transfer{name: name, to: out, bytes: int64(outBytes), entry: e, first: int64(first)}, nil
}

// layerTransfers reads the parts whose addresses are not 0.
func layerTransfers(l *checkpoint.Layer, name string, parts *C.gq_parts) ([]transfer, error) {
	want := layoutOf(l).sizes()
	absmax, offset, codebook := checkpoint.Absmax, []byte(nil), []float32(nil)
	if l.State.Format.Bits == 8 {
		absmax = checkpoint.RowAbsmax
	} else {
		codebook = l.State.Format.Codebook
	}
	if l.Nested {
		offset = floatBytes([]float32{l.State.Nested.Offset})
	}
	var list []transfer
	for _, part := range []struct {
		name        string
		to          C.gq_addr
		bytes, want C.uint64_t
		entry       checkpoint.Part
		otherwise   []byte // if the file has no such tensor
	}{
		{"packed", parts.packed, parts.packed_bytes, want.packed_bytes, checkpoint.Packed, nil},
		{"absmax", parts.absmax, parts.absmax_bytes, want.absmax_bytes, absmax, nil},
		{"nested_absmax", parts.nested_absmax, parts.nested_absmax_bytes, want.nested_absmax_bytes, checkpoint.NestedAbsmax, nil},
		{"nested_codebook", parts.nested_codebook, parts.nested_codebook_bytes, want.nested_codebook_bytes, checkpoint.NestedQuantMap, floatBytes(quant.DynamicMap()[:])},
		{"offset", parts.offset, parts.offset_bytes, want.offset_bytes, "", offset},
		{"codebook", parts.codebook, parts.codebook_bytes, want.codebook_bytes, checkpoint.QuantMap, floatBytes(codebook)},
	} {
		if part.to == 0 {
			continue
		}
		t := transfer{name: name + "." + part.name, to: part.to, bytes: int64(part.want)}
		if part.bytes != part.want {
			return nil, invalid("%s has %d bytes; want %d", t.name, uint64(part.bytes), uint64(part.want))
		}
		if isFloat := part.entry != checkpoint.Packed && (part.entry != checkpoint.Absmax || !l.Nested); isFloat && part.to%4 != 0 {
			return nil, invalid("%s: address %#x is not aligned to float32", t.name, uint64(part.to))
		}
		if e, ok := l.Parts[part.entry]; ok && part.name != "offset" {
			t.entry = e
		} else {
			t.data = part.otherwise
		}
		list = append(list, t)
	}
	return list, nil
}

// floatBytes is a copy of float32 in memory.
func floatBytes(values []float32) []byte {
	if values == nil {
		return nil
	}
	return slices.Clone(unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(values))), 4*len(values)))
}

// readPiece is what one thread of the CPU reads at a time.
const readPiece = 8 << 20

// move carries out transfers, in the order of the files.
func (p *place) move(list []transfer) error {
	slices.SortStableFunc(list, func(a, b transfer) int {
		if a.data != nil || b.data != nil {
			return cmp.Compare(len(a.data), len(b.data))
		}
		return cmp.Or(cmp.Compare(a.entry.File.Path(), b.entry.File.Path()), cmp.Compare(a.entry.Begin, b.entry.Begin))
	})
	if p.device != nil {
		pieces := make([]cuda.Piece, len(list))
		for i := range list {
			t := &list[i]
			to, err := p.address(t.name, t.to, uint64(t.bytes))
			if err != nil {
				return err
			}
			pieces[i] = cuda.Piece{To: to, Bytes: t.bytes, Read: t.read}
		}
		return p.device.Load(p.stream, p.threads, pieces)
	}
	outs := make([][]byte, len(list))
	for i, t := range list {
		var err error
		if outs[i], err = memory(t.name, t.to, uint64(t.bytes)); err != nil {
			return err
		}
	}
	threads := p.threads
	if threads == 0 {
		threads = runtime.GOMAXPROCS(0)
	}
	var group errgroup.Group
	group.SetLimit(threads)
	for i := range list {
		for at := int64(0); at < list[i].bytes; at += readPiece {
			group.Go(func() error { return list[i].read(outs[i][at:min(at+readPiece, list[i].bytes)], at) })
		}
	}
	return group.Wait()
}

// eachPart calls visit with the address and the size of every part.
func eachPart(parts *C.gq_parts, visit func(address *C.gq_addr, bytes C.uint64_t)) {
	visit(&parts.packed, parts.packed_bytes)
	visit(&parts.absmax, parts.absmax_bytes)
	visit(&parts.nested_absmax, parts.nested_absmax_bytes)
	visit(&parts.nested_codebook, parts.nested_codebook_bytes)
	visit(&parts.offset, parts.offset_bytes)
	visit(&parts.codebook, parts.codebook_bytes)
}

// deviceAlign is the alignment of tensors in a device's arena, that of CUDA's own allocations.
const deviceAlign = 256

// toDevice reads the whole model into one allocation of device memory.
func (m *model) toDevice(device *cuda.Device) error {
	var total C.gq_addr
	take := func(bytes C.uint64_t) C.gq_addr {
		at := total
		total += C.gq_addr((bytes + deviceAlign - 1) / deviceAlign * deviceAlign)
		return at
	}
	tensorAt := make([]C.gq_addr, len(m.tensors))
	for i := range m.tensors {
		tensorAt[i] = take(m.infos[i].bytes)
	}
	m.layerParts = make([]C.gq_parts, len(m.layers))
	for i := range m.layers {
		m.layerParts[i] = m.layerInfos[i].sizes
		eachPart(&m.layerParts[i], func(address *C.gq_addr, bytes C.uint64_t) {
			if bytes > 0 {
				*address = take(bytes)
			}
		})
	}
	base, err := device.Alloc(int64(total))
	if err != nil {
		return err
	}
	m.device, m.arena = device, base
	var list []transfer
	for i, e := range m.tensors {
		m.infos[i].address = C.gq_addr(base) + tensorAt[i]
		list = append(list, transfer{name: e.Name, to: m.infos[i].address, bytes: e.Bytes(), entry: e})
	}
	for i, l := range m.layers {
		eachPart(&m.layerParts[i], func(address *C.gq_addr, bytes C.uint64_t) {
			if bytes > 0 {
				*address += C.gq_addr(base)
			}
		})
		parts, err := layerTransfers(l, l.Name, &m.layerParts[i])
		if err != nil {
			return err
		}
		list = append(list, parts...)
	}
	return (&place{device: device}).move(list)
}

//export go_gq_model_read
func go_gq_model_read(handle *C.gq_model, index C.int64_t, first C.uint64_t, out C.gq_addr, outBytes C.size_t, exec *C.gq_const_exec) C.gq_status {
	return withModel("gq_model_read", handle, func(m *model) error {
		where, err := execution(exec)
		if err != nil {
			return err
		}
		e, err := item("tensor", m.tensors, index)
		if err != nil {
			return err
		}
		t, err := tensorTransfer(*e, uint64(first), "out", out, uint64(outBytes))
		if err != nil {
			return err
		}
		return where.move([]transfer{t})
	})
}

//export go_gq_model_read_layer
func go_gq_model_read_layer(handle *C.gq_model, index C.int64_t, parts *C.gq_const_parts, exec *C.gq_const_exec) C.gq_status {
	return withModel("gq_model_read_layer", handle, func(m *model) error {
		where, err := execution(exec)
		if err != nil {
			return err
		}
		l, err := item("layer", m.layers, index)
		if err != nil {
			return err
		}
		if parts == nil {
			return invalid("parts is NULL")
		}
		list, err := layerTransfers(*l, "parts", (*C.gq_parts)(unsafe.Pointer(parts)))
		if err != nil {
			return err
		}
		return where.move(list)
	})
}

//export go_gq_model_read_all
func go_gq_model_read_all(handle *C.gq_model, tensors *C.gq_const_buffer, tensorCount C.int64_t, layers *C.gq_const_parts, layerCount C.int64_t, exec *C.gq_const_exec) C.gq_status {
	return withModel("gq_model_read_all", handle, func(m *model) error {
		where, err := execution(exec)
		if err != nil {
			return err
		}
		if err := listed("tensors", tensors == nil, tensorCount, len(m.tensors)); err != nil {
			return err
		}
		if err := listed("layers", layers == nil, layerCount, len(m.layers)); err != nil {
			return err
		}
		var list []transfer
		for i, b := range unsafe.Slice((*C.gq_buffer)(unsafe.Pointer(tensors)), tensorCount) {
			if b.address == 0 {
				continue
			}
			e := m.tensors[i]
			if int64(b.bytes) != e.Bytes() {
				return invalid("tensors[%d] has %d bytes; tensor %q has %d", i, uint64(b.bytes), e.Name, e.Bytes())
			}
			list = append(list, transfer{name: fmt.Sprintf("tensors[%d]", i), to: b.address, bytes: e.Bytes(), entry: e})
		}
		parts := unsafe.Slice((*C.gq_parts)(unsafe.Pointer(layers)), layerCount)
		for i := range parts {
			of, err := layerTransfers(m.layers[i], fmt.Sprintf("layers[%d]", i), &parts[i])
			if err != nil {
				return err
			}
			list = append(list, of...)
		}
		return where.move(list)
	})
}

// listed checks a list that has an entry for each of the model's.
func listed(name string, isNull bool, count C.int64_t, want int) error {
	if int64(count) != int64(want) {
		return invalid("%s has %d entries; the model has %d", name, int64(count), want)
	}
	if isNull && want > 0 {
		return invalid("%s is NULL; want %d entries", name, want)
	}
	return nil
}

//export go_gq_model_state
func go_gq_model_state(handle *C.gq_model, index C.int64_t, out **C.gq_state) C.gq_status {
	return withModel("gq_model_state", handle, func(m *model) error {
		if out == nil {
			return invalid("state is NULL")
		}
		*out = nil
		l, err := item("layer", m.layers, index)
		if err != nil {
			return err
		}
		layout := layoutOf(*l)
		if m.device != nil {
			*out = newState(layout, m.layerParts[index], C.int32_t(m.device.Ordinal), nil)
			return nil
		}
		parts := layout.sizes()
		owned, err := arena(&parts)
		if err != nil {
			return err
		}
		list, err := layerTransfers(*l, "parts", &parts)
		if err == nil {
			err = (&place{}).move(list)
		}
		if err != nil {
			C.free(owned)
			return err
		}
		*out = newState(layout, parts, C.GQ_CPU, owned)
		return nil
	})
}

// arena gives every part memory in one allocation of C.
func arena(parts *C.gq_parts) (unsafe.Pointer, error) {
	const align = 64
	var total C.uint64_t
	eachPart(parts, func(_ *C.gq_addr, bytes C.uint64_t) { total += (bytes + align - 1) / align * align })
	var base unsafe.Pointer
	if C.posix_memalign(&base, align, C.size_t(max(total, align))) != 0 {
		return nil, failure{C.GQ_ERROR_OUT_OF_MEMORY, fmt.Errorf("no memory for %d bytes", uint64(total))}
	}
	at := C.gq_addr(uintptr(base))
	eachPart(parts, func(address *C.gq_addr, bytes C.uint64_t) {
		if bytes > 0 {
			*address = at
			at += C.gq_addr((bytes + align - 1) / align * align)
		}
	})
	return base, nil
}
