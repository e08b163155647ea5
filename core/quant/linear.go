package quant

import (
	"errors"
	"fmt"
	"sync"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/kernel"
)

// Linear computes the linear layer y = x·Wᵀ + bias with the packed weight W, the state's, of shape N×K. x has m rows of K
// elements, y gets m rows of N; both and the bias (N elements; nil for none) are of dtype d (F32, F16 or BF16). It uses at
// most threads cores (0 = all). The state needs Packed, and a 4-bit format.
//
// The weight's elements are float32, not rounded to d, and so are products and sums; kernel.Layer4 has the details. Up to 8
// rows of x are multiplied with codes that are decoded in registers, more with decoded rows in the cache, without a
// difference in the result: a row of y depends on its row of x alone. It does not depend on the number of threads, but its
// last bits may on the instructions that the CPU has (kernel.Level).
func (s *State) Linear(y, x []byte, m int64, d dtype.DType, bias []byte, threads int) error {
	if err := s.Check(); err != nil {
		return err
	}
	if s.Format.linear == nil {
		return fmt.Errorf("format %s has no linear layer on the CPU; nf4 and fp4 have one", s.Format.Name)
	}
	if len(s.Shape) != 2 {
		return fmt.Errorf("a linear layer needs a weight of 2 dimensions, this one has shape %v", s.Shape)
	}
	if s.Packed == nil && s.PackedBytes() > 0 {
		return errors.New("the codes of the state are not in memory")
	}
	if d != dtype.F32 && d != dtype.F16 && d != dtype.BF16 {
		return fmt.Errorf("a linear layer of dtype %s; F32, F16 and BF16 are possible", d)
	}
	n, k, size := s.Shape[0], s.Shape[1], int64(d.Bits()/8)
	if m < 0 {
		return fmt.Errorf("a linear layer with %d rows of x", m)
	}
	for _, width := range []int64{n, k} {
		if _, err := elements([]int64{m, width}); err != nil {
			return fmt.Errorf("%d rows of x with a weight of shape %v: %w", m, s.Shape, err)
		}
	}
	for _, b := range []struct {
		name       string
		bytes      []byte
		rows, cols int64
	}{{"x", x, m, k}, {"y", y, m, n}, {"the bias", bias, 1, n}} {
		if want := b.rows * b.cols * size; int64(len(b.bytes)) != want && (b.name != "the bias" || b.bytes != nil) {
			return fmt.Errorf("%s of %d×%d elements of %s is %d bytes, the buffer has %d", b.name, b.rows, b.cols, d, want, len(b.bytes))
		}
	}

	// A piece is some rows of the weight with some rows of x. Pieces that share rows of x follow one another.
	rows := kernel.Linear4Rows * max(1, chunkElements/(kernel.Linear4Rows*max(1, k)))
	panels := ceilDiv(n, rows)
	parallel(panels*ceilDiv(m, kernel.Linear4Batch), 1, threads, func(piece, _ int64) {
		row, first := piece%panels*rows, piece/panels*kernel.Linear4Batch
		count, batch := min(rows, n-row), min(kernel.Linear4Batch, m-first)
		blocksize := int64(s.Blocksize)
		l := kernel.Layer4{
			Packed: s.Packed, Absmax: s.blockAbsmax(row*k/blocksize, ceilDiv((row+count)*k, blocksize)), Blocksize: s.Blocksize,
			First: int(row), Rows: int(count), K: int(k),
			DType: d, X: x[first*k*size:], M: int(batch), Y: y[(first*n+row)*size:], Stride: int(n),
		}
		if bias != nil {
			l.Bias = bias[row*size:]
		}
		scratch := takeScratch(kernel.Linear4Scratch(l.M, l.K))
		s.Format.linear(&l, *scratch)
		scratches.Put(scratch)
	})
	return nil
}

// scratches keeps the scratch memory of linear layers from call to call: *[]float32.
var scratches sync.Pool

func takeScratch(floats int) *[]float32 {
	if kept, _ := scratches.Get().(*[]float32); kept != nil && len(*kept) >= floats {
		return kept
	}
	scratch := make([]float32, floats)
	return &scratch
}
