package quant

import (
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/gquant/gquant/core/dtype"
)

// DefaultBlocksize is bitsandbytes' for 4-bit formats.
const DefaultBlocksize = 64

// Blocksizes are the numbers of elements per absmax that bitsandbytes' 4-bit formats can have.
func Blocksizes() []int { return []int{32, 64, 128, 256, 512, 1024, 2048, 4096} }

// Options of Quantize.
type Options struct {
	Blocksize int  // 0 = 64
	Nested    bool // quantize absmax too
	Threads   int  // 0 = all cores
}

// Quantize turns a tensor of dtype F32, F16 or BF16 into a 4-bit format. nonfinite is the number of elements that are
// NaN or infinite: what the format makes of them is rarely wanted.
func Quantize(f *Format, src []byte, d dtype.DType, shape []int64, o Options) (s *State, nonfinite int64, err error) {
	if o.Blocksize == 0 {
		o.Blocksize = DefaultBlocksize
	}
	s = &State{Format: f, Shape: slices.Clone(shape), Blocksize: o.Blocksize, DType: d, Codebook: f.Codebook}
	if f.Bits != 4 {
		return nil, 0, fmt.Errorf("format %s is not quantized in blocks; see QuantizeRowsInt8", f.Name)
	}
	if err := s.checkFields(); err != nil {
		return nil, 0, err
	}
	n := s.Elements()
	if want := n * int64(d.Bits()/8); int64(len(src)) != want {
		return nil, 0, fmt.Errorf("shape %v of %s has %d bytes, the source %d", shape, d, want, len(src))
	}
	s.Packed = make([]byte, s.PackedBytes())
	s.Absmax = make([]float32, s.Blocks())
	if nonfinite, err = QuantizeInto(f, src, d, n, o.Blocksize, s.Absmax, s.Packed, o.Threads); err != nil {
		return nil, 0, err
	}
	if o.Nested {
		s.Nested, s.Absmax = Nest(s.Absmax), nil
	}
	return s, nonfinite, nil
}

// QuantizeInto quantizes n elements to a 4-bit format, into absmax and packed, which have exactly the room that they
// need, on at most threads cores (0 = all). It returns the number of NaN and infinite elements.
func QuantizeInto(f *Format, src []byte, d dtype.DType, n int64, blocksize int, absmax []float32, packed []byte, threads int) (nonfinite int64, err error) {
	shape := State{Format: f, Shape: []int64{n}, Blocksize: blocksize, DType: d}
	if f.Bits != 4 {
		return 0, fmt.Errorf("format %s is not quantized in blocks; see QuantizeRowsInt8", f.Name)
	}
	if err := shape.checkFields(); err != nil {
		return 0, err
	}
	size := int64(d.Bits() / 8)
	if int64(len(src)) != n*size || int64(len(absmax)) != shape.Blocks() || int64(len(packed)) != shape.PackedBytes() {
		return 0, fmt.Errorf("%d elements of %s with blocksize %d need %d bytes of source, %d absmax and %d bytes of codes; there are %d, %d and %d",
			n, d, blocksize, n*size, shape.Blocks(), shape.PackedBytes(), len(src), len(absmax), len(packed))
	}
	var bad atomic.Int64
	parallel(n, chunkElements, threads, func(first, count int64) {
		bad.Add(QuantizeBlocks(f, src[first*size:], d, count, blocksize, absmax[first/int64(blocksize):], packed[first/2:]))
	})
	return bad.Load(), nil
}

// QuantizeBlocks quantizes n elements, whole blocks but for the end of the tensor, on the calling thread. absmax
// and packed take the results of these blocks. It returns the number of NaN and infinite elements.
func QuantizeBlocks(f *Format, src []byte, d dtype.DType, n int64, blocksize int, absmax []float32, packed []byte) (nonfinite int64) {
	return int64(f.quantize(src, d, int(n), blocksize, absmax, packed))
}

// DequantizeBlocks is the way back from QuantizeBlocks.
func DequantizeBlocks(f *Format, packed []byte, absmax []float32, n int64, blocksize int, dst []byte, d dtype.DType) {
	f.dequantize(packed, absmax, int(n), blocksize, dst, d)
}
