package convert

import (
	"slices"

	"github.com/gquant/gquant/core/checkpoint"
	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/safetensors"
)

// dequantizer turns a quantized layer into a plain tensor.
type dequantizer struct {
	item     *Item
	out      *safetensors.Writer
	dtype    dtype.DType
	elements int64
	perChunk int64 // elements: whole blocks
	decoder  *checkpoint.Decoder
}

func newDequantizer(it *Item, w *safetensors.Writer, chunkBytes int64) *dequantizer {
	d := it.parts[0].Spec.DType
	blocksize := int64(it.layer.State.Blocksize)
	blocks := max(1, chunkBytes*8/int64(d.Bits())/blocksize)
	return &dequantizer{item: it, out: w, dtype: d, elements: it.layer.State.Elements(), perChunk: blocks * blocksize}
}

func (d *dequantizer) chunks() int { return max(1, int((d.elements+d.perChunk-1)/d.perChunk)) }

func (d *dequantizer) open() (err error) {
	d.decoder, err = d.item.layer.Decoder()
	return err
}

func (d *dequantizer) run(chunk int, s *scratch) error {
	first := int64(chunk) * d.perChunk
	count := min(d.perChunk, d.elements-first)
	size := int64(d.dtype.Bits() / 8)
	s.values = slices.Grow(s.values[:0], int(count*size))[:count*size]
	if err := d.decoder.Read(s.values, d.dtype, first, count, &s.codes); err != nil {
		return err
	}
	return d.out.WriteAt(d.item.first, s.values, first*size)
}

func (d *dequantizer) finish() error {
	d.decoder = nil
	return nil
}
