package checkpoint

import (
	"fmt"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/quant"
)

// Decoder reads the values of a layer piece by piece. It holds the layer's absmax and none of its codes.
// Several goroutines may read at once.
type Decoder struct {
	layer  *Layer
	absmax []float32
}

// Decoder loads the layer's statistics.
func (l *Layer) Decoder() (*Decoder, error) {
	state, err := l.Load()
	if err != nil {
		return nil, err
	}
	return &Decoder{l, state.FlatAbsmax()}, nil
}

// Read decodes count elements of the flat, row-major weight from element first on into dst, as dtype d (F32, F16
// or BF16). codes is memory for the packed bytes, reused between calls.
func (r *Decoder) Read(dst []byte, d dtype.DType, first, count int64, codes *[]byte) error {
	s := &r.layer.State
	if first < 0 || count < 0 || first > s.Elements()-count {
		return fmt.Errorf("layer %q: elements %d…%d of %d", r.layer.Name, first, first+count, s.Elements())
	}
	// Whole blocks: a block starts at a whole byte, as blocksizes are even or codes have 8 bits.
	blocksize := int64(s.Blocksize)
	start := first / blocksize
	end := (first + count + blocksize - 1) / blocksize
	elements := min(end*blocksize, s.Elements()) - start*blocksize
	shape := []int64{elements}
	if elements%blocksize == 0 { // int8 wants rows of one block
		shape = []int64{elements / blocksize, blocksize}
	}
	part := quant.State{Format: s.Format, Shape: shape, Blocksize: s.Blocksize, DType: s.DType, Absmax: r.absmax[start:end]}
	size := part.PackedBytes()
	if int64(cap(*codes)) < size {
		*codes = make([]byte, size)
	}
	part.Packed = (*codes)[:size]
	if err := r.layer.ReadPacked(part.Packed, start*blocksize*int64(s.Format.Bits)/8); err != nil {
		return err
	}
	return part.DequantizeRange(dst, d, first-start*blocksize, count, 1)
}
