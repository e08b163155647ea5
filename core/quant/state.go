package quant

import (
	"errors"
	"fmt"
	"slices"

	"github.com/gquant/gquant/core/dtype"
)

// State is one quantized weight: what it was and the tensors it is now.
type State struct {
	Format    *Format
	Shape     []int64     // of the weight; nil if unknown
	Blocksize int         // elements per absmax, in flat order; the row length for int8
	DType     dtype.DType // of the weight before it was quantized: F32, F16 or BF16
	Packed    []byte      // the codes; nil while they stay in a file
	Absmax    []float32   // one per block; nil when Nested
	Nested    *Nested     // the quantized absmax; nil when Absmax
	Codebook  []float32   // the table stored beside the codes; decoding uses the format's own
}

// Elements is the number of elements of the weight.
func (s *State) Elements() int64 {
	n, _ := elements(s.Shape) // Check reports the error
	return n
}

// Blocks is the number of absmax.
func (s *State) Blocks() int64 {
	if s.Blocksize <= 0 {
		return 0
	}
	return ceilDiv(s.Elements(), int64(s.Blocksize))
}

// PackedBytes is the number of bytes of the codes.
func (s *State) PackedBytes() int64 { return ceilDiv(s.Elements()*int64(s.Format.Bits), 8) }

func ceilDiv(a, b int64) int64 { return (a + b - 1) / b }

// Check reports what in the state contradicts itself. Packed may be missing.
func (s *State) Check() error {
	if err := s.checkFields(); err != nil {
		return err
	}
	if s.Packed != nil && int64(len(s.Packed)) != s.PackedBytes() {
		return fmt.Errorf("%s codes of shape %v need %d bytes, there are %d", s.Format.Name, s.Shape, s.PackedBytes(), len(s.Packed))
	}
	if s.Nested == nil {
		if int64(len(s.Absmax)) != s.Blocks() {
			return fmt.Errorf("shape %v with blocksize %d needs %d absmax, there are %d", s.Shape, s.Blocksize, s.Blocks(), len(s.Absmax))
		}
		return nil
	}
	if s.Absmax != nil {
		return errors.New("a state has absmax or nested absmax, not both")
	}
	return s.Nested.check(s.Blocks())
}

// checkFields checks what is not a tensor.
func (s *State) checkFields() error {
	if s.Format == nil {
		return errors.New("a state needs a format")
	}
	if _, err := elements(s.Shape); err != nil {
		return err
	}
	if s.DType != dtype.F32 && s.DType != dtype.F16 && s.DType != dtype.BF16 {
		return fmt.Errorf("dtype %s cannot be quantized; F32, F16 and BF16 can", s.DType)
	}
	if s.Format == &int8Rows {
		if len(s.Shape) == 0 || s.Shape[len(s.Shape)-1] != int64(s.Blocksize) {
			return fmt.Errorf("blocksize %d is not the row length of shape %v, as format int8 wants", s.Blocksize, s.Shape)
		}
		if s.Nested != nil {
			return errors.New("format int8 has no nested statistics")
		}
		return nil
	}
	if !slices.Contains(Blocksizes(), s.Blocksize) {
		return fmt.Errorf("blocksize %d is not one of %v", s.Blocksize, Blocksizes())
	}
	return nil
}

// FlatAbsmax gives the absmax of every block as float32: the state's own, or nested ones decoded.
// The state must have passed Check.
func (s *State) FlatAbsmax() []float32 {
	if s.Nested == nil {
		return s.Absmax
	}
	absmax := make([]float32, len(s.Nested.Codes))
	s.Nested.decode(absmax, 0)
	return absmax
}

// DequantizeRange decodes count elements of the flat weight, from element first on, into dst, as dtype d (F32, F16
// or BF16), on at most threads cores (0 = all). The state needs Packed.
func (s *State) DequantizeRange(dst []byte, d dtype.DType, first, count int64, threads int) error {
	if err := s.Check(); err != nil {
		return err
	}
	if s.Packed == nil {
		return errors.New("the codes of the state are not in memory")
	}
	if d != dtype.F32 && d != dtype.F16 && d != dtype.BF16 {
		return fmt.Errorf("cannot dequantize to dtype %s; F32, F16 and BF16 can be", d)
	}
	if first < 0 || count < 0 || first > s.Elements()-count {
		return fmt.Errorf("elements %d…%d of a weight of %d", first, first+count, s.Elements())
	}
	size, blocksize := int64(d.Bits()/8), int64(s.Blocksize)
	if int64(len(dst)) != count*size {
		return fmt.Errorf("%d elements of %s are %d bytes, the buffer has %d", count, d, count*size, len(dst))
	}
	if count == 0 {
		return nil
	}
	start := first / blocksize * blocksize
	parallel(first+count-start, wholeBlocks(s.Blocksize), threads, func(offset, n int64) {
		from, to := start+offset, start+offset+n // from is the start of a block
		if from < first {                        // the range starts inside this block
			next := min(from+blocksize, to)
			block := make([]byte, (next-from)*size)
			s.decode(block, d, from, next)
			copy(dst, block[(first-from)*size:])
			from = next
		}
		if from < to {
			s.decode(dst[(from-first)*size:(to-first)*size], d, from, to)
		}
	})
	return nil
}

// decode decodes the elements [from, to); from is the start of a block.
func (s *State) decode(dst []byte, d dtype.DType, from, to int64) {
	absmax := s.blockAbsmax(from/int64(s.Blocksize), ceilDiv(to, int64(s.Blocksize)))
	DequantizeBlocks(s.Format, s.Packed[from*int64(s.Format.Bits)/8:], absmax, to-from, s.Blocksize, dst, d)
}

// blockAbsmax is FlatAbsmax of the blocks [from, to).
func (s *State) blockAbsmax(from, to int64) []float32 {
	if s.Nested == nil {
		return s.Absmax[from:to]
	}
	absmax := make([]float32, to-from)
	s.Nested.decode(absmax, from)
	return absmax
}
