package convert

import (
	"fmt"
	"sync/atomic"

	"github.com/gquant/gquant/core/checkpoint"
	"github.com/gquant/gquant/core/quant"
	"github.com/gquant/gquant/core/safetensors"
)

// quantizer turns a plain weight into a quantized layer. The codes go to the file chunk by chunk; absmax, a
// float32 per block, is kept until the layer is complete.
type quantizer struct {
	item      *Item
	out       *safetensors.Writer
	elements  int64
	perChunk  int64 // elements of a full chunk: whole blocks, an even number
	absmax    []float32
	nonfinite atomic.Int64
}

func newQuantizer(it *Item, w *safetensors.Writer, chunkBytes int64) *quantizer {
	// chunkBytes is a power of two and so is the blocksize, hence no chunk ends inside a block or a byte.
	return &quantizer{item: it, out: w, elements: it.entry.Elements(), perChunk: chunkBytes * 8 / int64(it.entry.DType.Bits())}
}

func (q *quantizer) chunks() int { return int((q.elements + q.perChunk - 1) / q.perChunk) }

func (q *quantizer) open() error {
	blocksize := int64(q.item.target.Blocksize)
	q.absmax = make([]float32, (q.elements+blocksize-1)/blocksize)
	return nil
}

func (q *quantizer) run(chunk int, s *scratch) error {
	it, first := q.item, int64(chunk)*q.perChunk
	count := min(q.perChunk, q.elements-first)
	size := int64(it.entry.DType.Bits() / 8)
	if err := it.entry.Read(s.worker.Source(count*size), first*size); err != nil {
		return err
	}
	blocksize := int64(it.target.Blocksize)
	absmax := q.absmax[first/blocksize : (first+count+blocksize-1)/blocksize]
	packed, nonfinite, err := s.worker.Quantize(it.target.Format, it.entry.DType, count, int(blocksize), absmax)
	if err != nil {
		return fmt.Errorf("tensor %q: %w", it.Name, err)
	}
	q.nonfinite.Add(nonfinite)
	return q.out.WriteAt(it.first, packed, first/2)
}

// finish writes the statistics. The bytes behind the last code of a wide storage type stay zero.
func (q *quantizer) finish() error {
	it := q.item
	state := it.target.Longest(it.Shape, it.entry.DType)
	state.Codebook = it.target.Format.Codebook
	if it.target.Nested {
		state.Nested = quant.Nest(q.absmax)
	} else {
		state.Absmax = q.absmax
	}
	for i, o := range it.parts {
		if o.Part == checkpoint.Packed {
			continue
		}
		raw, err := checkpoint.Encode(o.Part, it.Name, state)
		if err != nil {
			return err
		}
		if o.Spec.Late {
			err = q.out.WriteLate(it.first+i, raw)
		} else {
			err = q.out.WriteAt(it.first+i, raw, 0)
		}
		if err != nil {
			return err
		}
	}
	q.absmax = nil
	return nil
}

// finalMetadata describes the shard's layers once more, now with the values found while quantizing: they are read
// back from the layers' state texts, which a resumed run may not have written itself.
func (p *Plan) finalMetadata(shard int, w *safetensors.Writer) (map[string]string, error) {
	metadata := p.Shards[shard].metadata
	comfy, err := checkpoint.ParseComfyMetadata(metadata)
	if err != nil || comfy == nil {
		return metadata, err
	}
	for _, it := range p.Items {
		if it.Shard != shard || it.Action != Quantize || !it.target.Nested {
			continue
		}
		for i, o := range it.parts {
			if o.Part != checkpoint.QuantState {
				continue
			}
			text, err := w.Late(it.first + i)
			if err != nil {
				return nil, err
			}
			state, err := quant.ParseJSON(text)
			if err != nil {
				return nil, fmt.Errorf("tensor %q: %w", o.Spec.Name, err)
			}
			comfy.Add(it.Name, state)
		}
	}
	return comfy.Apply(metadata), nil
}
