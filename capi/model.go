package main

// #include <stdlib.h>
// #include "types.h"
import "C"

import (
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"github.com/gquant/gquant/core/checkpoint"
	"github.com/gquant/gquant/core/globs"
	"github.com/gquant/gquant/core/quant"
	"github.com/gquant/gquant/core/safetensors"
	"golang.org/x/sync/errgroup"
)

// model is what a gq_model stands for: an opened checkpoint, less what the caller filtered out.
type model struct {
	*checkpoint.Model
	tensors []safetensors.Entry
	layers  []*checkpoint.Layer

	tensorIndex, layerIndex map[string]int64 // by name, without the prefix
	infos                   []C.gq_tensor_info
	layerInfos              []C.gq_layer_info
	metadataTexts           [][2]*C.char
	memory                  []unsafe.Pointer // C memory of the texts and shapes above
}

var models = newRegistry[*model]("model", 2)

//export go_gq_load_model
func go_gq_load_model(path *C.gq_const_char, opts *C.gq_const_load_options, handle **C.gq_model) C.gq_status {
	return guarded("gq_load_model", func() error {
		if handle == nil {
			return invalid("model is NULL")
		}
		*handle = nil
		file, err := text("path", path)
		if err != nil {
			return err
		}
		o := C.gq_load_options{device: C.GQ_CPU}
		if err := options("options", (*C.gq_load_options)(unsafe.Pointer(opts)), &o); err != nil {
			return err
		}
		if o.device != C.GQ_CPU {
			return unsupported("options.device is %d, but this build computes on the CPU only (GQ_CPU)", int32(o.device))
		}
		var include []string
		if o.include != nil {
			include = append(include, C.GoString(o.include))
		}
		wanted, err := globs.New(include)
		if err != nil {
			return invalid("options.include: %v", err)
		}
		prefix := ""
		if o.prefix != nil {
			prefix = C.GoString(o.prefix)
		}
		opened, err := checkpoint.Open(file)
		if err != nil {
			return err
		}
		*handle = modelHandle(models.add(newModel(opened, prefix, wanted)))
		return nil
	})
}

// newModel keeps what the prefix and the globs let through, and writes down in C memory what callers may ask.
func newModel(opened *checkpoint.Model, prefix string, wanted *globs.Set) *model {
	m := &model{Model: opened, tensorIndex: map[string]int64{}, layerIndex: map[string]int64{}}
	keep := func(name string) (short string, ok bool) {
		short, ok = strings.CutPrefix(name, prefix)
		return short, ok && (wanted.Empty() || wanted.Match(short) != "")
	}
	for _, e := range opened.Plain {
		if name, ok := keep(e.Name); ok {
			m.tensorIndex[name] = int64(len(m.tensors))
			m.tensors = append(m.tensors, e)
			m.infos = append(m.infos, C.gq_tensor_info{
				dtype: C.gq_dtype(e.DType), name: m.text(name), shape: m.shape(e.Shape), ndim: C.int32_t(len(e.Shape)),
				bytes: C.uint64_t(e.Bytes()), file: m.text(e.File.Path()), file_offset: C.uint64_t(e.File.DataStart() + e.Begin),
			})
		}
	}
	for _, l := range opened.Layers {
		if name, ok := keep(l.Name); ok {
			m.layerIndex[name] = int64(len(m.layers))
			m.layers = append(m.layers, l)
			s := &l.State
			info := C.gq_layer_info{
				format: formatNumber(s.Format), name: m.text(name), convention: m.text(l.Convention), shape: m.shape(s.Shape),
				ndim: C.int32_t(len(s.Shape)), dtype: C.gq_dtype(s.DType), blocksize: C.int64_t(s.Blocksize), sizes: layoutOf(l).sizes(),
			}
			if l.Nested {
				info.nested_blocksize = quant.NestedBlocksize
			}
			m.layerInfos = append(m.layerInfos, info)
		}
	}
	all := opened.Metadata()
	for _, key := range slices.Sorted(maps.Keys(all)) {
		m.metadataTexts = append(m.metadataTexts, [2]*C.char{m.text(key), m.text(all[key])})
	}
	return m
}

// layoutOf describes a layer as gq_parts do.
func layoutOf(l *checkpoint.Layer) *layout {
	return &layout{format: formatNumber(l.State.Format), nested: l.Nested, state: quant.State{
		Format: l.State.Format, Shape: l.State.Shape, Blocksize: l.State.Blocksize, DType: l.State.DType,
	}}
}

// text is a copy in C memory that lives as long as the model.
func (m *model) text(s string) *C.char {
	c := C.CString(s)
	m.memory = append(m.memory, unsafe.Pointer(c))
	return c
}

func (m *model) shape(dims []int64) *C.int64_t {
	c := (*C.int64_t)(C.malloc(C.size_t(8 * max(1, len(dims)))))
	m.memory = append(m.memory, unsafe.Pointer(c))
	copy(unsafe.Slice((*int64)(unsafe.Pointer(c)), len(dims)), dims)
	return c
}

//export go_gq_free_model
func go_gq_free_model(handle *C.gq_model) C.gq_status {
	return guarded("gq_free_model", func() error {
		if handle == nil {
			return nil
		}
		m, err := models.remove(modelNumber(handle))
		if err != nil {
			return err
		}
		for _, p := range m.memory {
			C.free(p)
		}
		return m.Close()
	})
}

// withModel runs an export on a model.
func withModel(function string, handle *C.gq_model, run func(m *model) error) C.gq_status {
	return guarded(function, func() error {
		m, done, err := models.use(modelNumber(handle))
		if err != nil {
			return err
		}
		defer done()
		return run(m)
	})
}

// counted stores a length.
func counted(out *C.int64_t, n int) error {
	if out == nil {
		return invalid("count is NULL")
	}
	*out = C.int64_t(n)
	return nil
}

// item is an element of a list by the caller's number.
func item[T any](what string, list []T, index C.int64_t) (*T, error) {
	if index < 0 || int64(index) >= int64(len(list)) {
		return nil, notFound("there is no %s %d; the model has %d", what, int64(index), len(list))
	}
	return &list[index], nil
}

// find stores the number of a name.
func find(what string, names map[string]int64, name *C.gq_const_char, index *C.int64_t) error {
	if index == nil {
		return invalid("index is NULL")
	}
	*index = 0
	wanted, err := text("name", name)
	if err != nil {
		return err
	}
	i, ok := names[wanted]
	if !ok {
		return notFound("the model has no %s %q", what, wanted)
	}
	*index = C.int64_t(i)
	return nil
}

//export go_gq_model_tensor_count
func go_gq_model_tensor_count(handle *C.gq_model, out *C.int64_t) C.gq_status {
	return withModel("gq_model_tensor_count", handle, func(m *model) error { return counted(out, len(m.tensors)) })
}

//export go_gq_model_layer_count
func go_gq_model_layer_count(handle *C.gq_model, out *C.int64_t) C.gq_status {
	return withModel("gq_model_layer_count", handle, func(m *model) error { return counted(out, len(m.layers)) })
}

//export go_gq_model_metadata_count
func go_gq_model_metadata_count(handle *C.gq_model, out *C.int64_t) C.gq_status {
	return withModel("gq_model_metadata_count", handle, func(m *model) error { return counted(out, len(m.metadataTexts)) })
}

//export go_gq_model_tensor
func go_gq_model_tensor(handle *C.gq_model, index C.int64_t, info *C.gq_tensor_info) C.gq_status {
	return withModel("gq_model_tensor", handle, func(m *model) error {
		found, err := item("tensor", m.infos, index)
		if err != nil {
			return err
		}
		copied := *found
		return fill("info", info, &copied)
	})
}

//export go_gq_model_layer
func go_gq_model_layer(handle *C.gq_model, index C.int64_t, info *C.gq_layer_info) C.gq_status {
	return withModel("gq_model_layer", handle, func(m *model) error {
		found, err := item("layer", m.layerInfos, index)
		if err != nil {
			return err
		}
		copied := *found
		return fill("info", info, &copied)
	})
}

//export go_gq_model_metadata
func go_gq_model_metadata(handle *C.gq_model, index C.int64_t, key, value **C.gq_const_char) C.gq_status {
	return withModel("gq_model_metadata", handle, func(m *model) error {
		if key == nil || value == nil {
			return invalid("key or value is NULL")
		}
		*key, *value = nil, nil
		found, err := item("metadata entry", m.metadataTexts, index)
		if err != nil {
			return err
		}
		*key, *value = (*C.gq_const_char)(unsafe.Pointer(found[0])), (*C.gq_const_char)(unsafe.Pointer(found[1]))
		return nil
	})
}

//export go_gq_model_find_tensor
func go_gq_model_find_tensor(handle *C.gq_model, name *C.gq_const_char, index *C.int64_t) C.gq_status {
	return withModel("gq_model_find_tensor", handle, func(m *model) error { return find("tensor", m.tensorIndex, name, index) })
}

//export go_gq_model_find_layer
func go_gq_model_find_layer(handle *C.gq_model, name *C.gq_const_char, index *C.int64_t) C.gq_status {
	return withModel("gq_model_find_layer", handle, func(m *model) error { return find("layer", m.layerIndex, name, index) })
}

// readPiece is what one thread reads at a time.
const readPiece = 8 << 20

// pieces runs work on consecutive pieces of n on several threads.
func pieces(n, size int64, threads int, work func(first, count int64) error) error {
	if threads <= 0 {
		threads = runtime.GOMAXPROCS(0)
	}
	var group errgroup.Group
	group.SetLimit(threads)
	for first := int64(0); first < n; first += size {
		group.Go(func() error { return work(first, min(size, n-first)) })
	}
	return group.Wait()
}

// readAll fills out with the bytes of a tensor from first on.
func readAll(e safetensors.Entry, out []byte, first int64, threads int) error {
	return pieces(int64(len(out)), readPiece, threads, func(at, n int64) error { return e.Read(out[at:at+n], first+at) })
}

//export go_gq_model_read
func go_gq_model_read(handle *C.gq_model, index C.int64_t, first C.uint64_t, out C.gq_addr, outBytes C.size_t, exec *C.gq_const_exec) C.gq_status {
	return withModel("gq_model_read", handle, func(m *model) error {
		threads, err := execution(exec)
		if err != nil {
			return err
		}
		e, err := item("tensor", m.tensors, index)
		if err != nil {
			return err
		}
		if size := uint64(e.Bytes()); uint64(first) > size || uint64(outBytes) > size-uint64(first) {
			return invalid("bytes %d to %d of tensor %q, which has %d", uint64(first), uint64(first)+uint64(outBytes), e.Name, size)
		}
		buffer, err := memory("out", out, uint64(outBytes))
		if err != nil {
			return err
		}
		return readAll(*e, buffer, int64(first), threads)
	})
}

// readParts fills the buffers that are there with the layer's statistics and codes.
func readParts(l *checkpoint.Layer, parts *C.gq_parts, threads int) error {
	want := layoutOf(l).sizes()
	s, err := l.Load()
	if err != nil {
		return err
	}
	floatPart := func(name string, a C.gq_addr, size, wanted C.uint64_t, values []float32) error {
		if a == 0 {
			return nil
		}
		if size != wanted {
			return invalid("parts.%s has %d bytes; want %d", name, uint64(size), uint64(wanted))
		}
		to, err := floats("parts."+name, a, uint64(wanted)/4)
		copy(to, values)
		return err
	}
	absmax := s.Absmax
	if n := s.Nested; n != nil {
		absmax = nil
		if parts.absmax != 0 {
			codes, err := sized("parts.absmax", parts.absmax, uint64(parts.absmax_bytes), uint64(want.absmax_bytes))
			if err != nil {
				return err
			}
			copy(codes, n.Codes)
		}
		if err := floatPart("nested_absmax", parts.nested_absmax, parts.nested_absmax_bytes, want.nested_absmax_bytes, n.Absmax); err != nil {
			return err
		}
		if err := floatPart("nested_codebook", parts.nested_codebook, parts.nested_codebook_bytes, want.nested_codebook_bytes, n.Codebook); err != nil {
			return err
		}
		if err := floatPart("offset", parts.offset, parts.offset_bytes, want.offset_bytes, []float32{n.Offset}); err != nil {
			return err
		}
	} else if err := floatPart("absmax", parts.absmax, parts.absmax_bytes, want.absmax_bytes, absmax); err != nil {
		return err
	}
	if err := floatPart("codebook", parts.codebook, parts.codebook_bytes, want.codebook_bytes, s.Codebook); err != nil {
		return err
	}
	if parts.packed == 0 {
		return nil
	}
	packed, err := sized("parts.packed", parts.packed, uint64(parts.packed_bytes), uint64(want.packed_bytes))
	if err != nil {
		return err
	}
	return readAll(l.Parts[checkpoint.Packed], packed, 0, threads)
}

//export go_gq_model_read_layer
func go_gq_model_read_layer(handle *C.gq_model, index C.int64_t, parts *C.gq_const_parts, exec *C.gq_const_exec) C.gq_status {
	return withModel("gq_model_read_layer", handle, func(m *model) error {
		threads, err := execution(exec)
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
		return readParts(*l, (*C.gq_parts)(unsafe.Pointer(parts)), threads)
	})
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
		parts := layout.sizes()
		owned, err := arena(&parts)
		if err != nil {
			return err
		}
		if err := readParts(*l, &parts, 0); err != nil {
			C.free(owned)
			return err
		}
		*out = newState(layout, parts, owned)
		return nil
	})
}

// arena gives every part memory in one allocation of C.
func arena(parts *C.gq_parts) (unsafe.Pointer, error) {
	const align = 64
	var total C.uint64_t
	fields := []struct {
		address *C.gq_addr
		bytes   C.uint64_t
	}{
		{&parts.packed, parts.packed_bytes}, {&parts.absmax, parts.absmax_bytes}, {&parts.nested_absmax, parts.nested_absmax_bytes},
		{&parts.nested_codebook, parts.nested_codebook_bytes}, {&parts.offset, parts.offset_bytes}, {&parts.codebook, parts.codebook_bytes},
	}
	for _, f := range fields {
		total += (f.bytes + align - 1) / align * align
	}
	var base unsafe.Pointer
	if C.posix_memalign(&base, align, C.size_t(max(total, align))) != 0 {
		return nil, failure{C.GQ_ERROR_OUT_OF_MEMORY, fmt.Errorf("no memory for %d bytes", uint64(total))}
	}
	at := C.gq_addr(uintptr(base))
	for _, f := range fields {
		if f.bytes > 0 {
			*f.address = at
			at += C.gq_addr((f.bytes + align - 1) / align * align)
		}
	}
	return base, nil
}

//export go_gq_model_dequantize
func go_gq_model_dequantize(handle *C.gq_model, index, firstRow, rows C.int64_t, out C.gq_addr, outBytes C.size_t, d C.gq_dtype, exec *C.gq_const_exec) C.gq_status {
	return withModel("gq_model_dequantize", handle, func(m *model) error {
		threads, err := execution(exec)
		if err != nil {
			return err
		}
		t, err := weightType("dtype", d)
		if err != nil {
			return err
		}
		found, err := item("layer", m.layers, index)
		if err != nil {
			return err
		}
		l := *found
		all, row := int64(1), int64(1) // a layer without dimensions has one row
		if shape := l.State.Shape; len(shape) > 0 {
			all = shape[0]
			for _, dim := range shape[1:] {
				row *= dim
			}
		}
		if firstRow < 0 || rows < 0 || int64(firstRow) > all || int64(rows) > all-int64(firstRow) {
			return invalid("rows %d to %d of layer %q, which has %d", int64(firstRow), int64(firstRow)+int64(rows), l.Name, all)
		}
		size := int64(t.Bits() / 8)
		values, err := sized("out", out, uint64(outBytes), uint64(int64(rows)*row*size))
		if err != nil {
			return err
		}
		decoder, err := l.Decoder()
		if err != nil {
			return err
		}
		blocksize := int64(l.State.Blocksize)
		piece := max(1, (1<<18)/blocksize) * blocksize
		return pieces(int64(rows)*row, piece, threads, func(first, n int64) error {
			var codes []byte
			return decoder.Read(values[first*size:(first+n)*size], t, int64(firstRow)*row+first, n, &codes)
		})
	})
}
