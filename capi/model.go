package main

// #include <stdlib.h>
// #include "types.h"
import "C"

import (
	"errors"
	"maps"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"github.com/gquant/gquant/core/checkpoint"
	"github.com/gquant/gquant/core/globs"
	"github.com/gquant/gquant/core/quant"
	"github.com/gquant/gquant/core/safetensors"
	"github.com/gquant/gquant/cuda"
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

	// If the model was loaded to a device: all of it lies in one allocation there.
	device     *cuda.Device
	arena      uint64
	layerParts []C.gq_parts
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
		where, err := device("options.device", o.device)
		if err != nil {
			return err
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
		m := newModel(opened, prefix, wanted)
		if where != nil {
			if err := m.toDevice(where); err != nil {
				return errors.Join(err, m.close())
			}
		}
		*handle = modelHandle(models.add(m))
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
		return m.close()
	})
}

// close gives back all that the model holds.
func (m *model) close() error {
	for _, p := range m.memory {
		C.free(p)
	}
	var err error
	if m.device != nil {
		err = m.device.Free(m.arena)
	}
	return errors.Join(err, m.Close())
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

//export go_gq_model_dequantize
func go_gq_model_dequantize(handle *C.gq_model, index, firstRow, rows C.int64_t, out C.gq_addr, outBytes C.size_t, d C.gq_dtype, exec *C.gq_const_exec) C.gq_status {
	return withModel("gq_model_dequantize", handle, func(m *model) error {
		where, err := execution(exec)
		if err != nil {
			return err
		}
		if where.device != nil {
			return unsupported("a file is decoded on the CPU: on %s read the layer with gq_model_read_layer, and decode its state with gq_dequantize", deviceName(where.ordinal()))
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
		threads := where.threads
		if threads == 0 {
			threads = runtime.GOMAXPROCS(0)
		}
		var group errgroup.Group
		group.SetLimit(threads)
		all = int64(rows) * row
		for first := int64(0); first < all; first += piece {
			group.Go(func() error {
				var codes []byte
				n := min(piece, all-first)
				return decoder.Read(values[first*size:(first+n)*size], t, int64(firstRow)*row+first, n, &codes)
			})
		}
		return group.Wait()
	})
}
