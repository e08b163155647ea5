package verify

import (
	"context"
	"runtime"
	"sync/atomic"

	"github.com/gquant/gquant/core/checkpoint"
	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/safetensors"
	"golang.org/x/sync/errgroup"
)

// chunkElements is how many values are looked at together. Sums are made per chunk and added in chunk order, so
// results do not depend on the number of threads.
const chunkElements = 1 << 17

// values reads the numbers of one tensor: plain, or decoded from a quantized layer.
type values struct {
	name   string
	dtype  dtype.DType // of the numbers: a layer's source dtype
	format string      // the layer's format, or the dtype's name
	shape  []int64
	entry  *safetensors.Entry
	layer  *checkpoint.Layer
}

// modelValues lists the tensors that a model stands for, its quantized layers as the weights they were.
func modelValues(m *checkpoint.Model) []*values {
	var all []*values
	for i := range m.Plain {
		e := &m.Plain[i]
		all = append(all, &values{e.Name, e.DType, e.DType.String(), e.Shape, e, nil})
	}
	for _, l := range m.Layers {
		all = append(all, &values{l.Name, l.State.DType, l.State.Format.Name, l.State.Shape, nil, l})
	}
	return all
}

func (v *values) elements() int64 {
	n := int64(1)
	for _, dim := range v.shape {
		n *= dim
	}
	return n
}

// reader is a values being read: it holds the statistics of a layer.
type reader struct {
	*values
	decoder *checkpoint.Decoder
}

func (v *values) open() (*reader, error) {
	r := &reader{values: v}
	if v.layer == nil {
		return r, nil
	}
	var err error
	r.decoder, err = v.layer.Decoder()
	return r, err
}

// memory is one worker's.
type memory struct {
	raw, codes []byte
	a, b       []float64
}

// read fills dst with the values from element first on.
func (r *reader) read(dst []float64, first int64, m *memory) error {
	size := int64(r.dtype.Bits() / 8)
	if need := int64(len(dst)) * size; int64(cap(m.raw)) < need {
		m.raw = make([]byte, need)
	}
	raw := m.raw[:int64(len(dst))*size]
	var err error
	if r.decoder != nil {
		err = r.decoder.Read(raw, r.dtype, first, int64(len(dst)), &m.codes)
	} else {
		err = r.entry.Read(raw, first*size)
	}
	if err != nil {
		return err
	}
	return r.dtype.Float64s(dst, raw)
}

// each calls do for every chunk of n elements, on several threads, until ctx ends.
func each(ctx context.Context, n int64, threads int, do func(chunk int, first, count int64, m *memory) error) error {
	chunks := (n + chunkElements - 1) / chunkElements
	if threads <= 0 {
		threads = runtime.GOMAXPROCS(0)
	}
	var next atomic.Int64
	var group errgroup.Group
	for range min(int64(threads), chunks) {
		group.Go(func() error {
			m := &memory{a: make([]float64, min(n, chunkElements)), b: make([]float64, min(n, chunkElements))}
			for {
				chunk := next.Add(1) - 1
				if chunk >= chunks {
					return nil
				}
				if err := ctx.Err(); err != nil {
					return err
				}
				first := chunk * chunkElements
				if err := do(int(chunk), first, min(chunkElements, n-first), m); err != nil {
					return err
				}
			}
		})
	}
	return group.Wait()
}

// chunkCount is the number of chunks that each makes of n elements.
func chunkCount(n int64) int { return int((n + chunkElements - 1) / chunkElements) }
