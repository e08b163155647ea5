package quant

import (
	"fmt"
	"sync/atomic"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/kernel"
)

// QuantizeBlockwise8 finds 8-bit codes with any table of 256 ascending values (bitsandbytes' quantize_blockwise), in blocks
// of a multiple of 32 elements. It fills absmax and codes and returns the number of NaN and infinite elements.
func QuantizeBlockwise8(table *[256]float32, src []byte, d dtype.DType, n int64, blocksize int, absmax []float32, codes []byte, threads int) (nonfinite int64, err error) {
	if err := checkBlockwise8(src, d, n, blocksize, absmax, codes); err != nil {
		return 0, err
	}
	var bad atomic.Int64
	size := int64(d.Bits() / 8)
	parallel(n, wholeBlocks(blocksize), threads, func(first, count int64) {
		bad.Add(int64(kernel.Quantize8(table, src[first*size:], d, int(count), blocksize, absmax[first/int64(blocksize):], codes[first:])))
	})
	return bad.Load(), nil
}

// DequantizeBlockwise8 is the way back from QuantizeBlockwise8.
func DequantizeBlockwise8(table *[256]float32, codes []byte, absmax []float32, n int64, blocksize int, dst []byte, d dtype.DType, threads int) error {
	if err := checkBlockwise8(dst, d, n, blocksize, absmax, codes); err != nil {
		return err
	}
	size := int64(d.Bits() / 8)
	parallel(n, wholeBlocks(blocksize), threads, func(first, count int64) {
		kernel.Dequantize8(table, codes[first:], absmax[first/int64(blocksize):], int(count), blocksize, dst[first*size:], d)
	})
	return nil
}

func checkBlockwise8(values []byte, d dtype.DType, n int64, blocksize int, absmax []float32, codes []byte) error {
	if d != dtype.F32 && d != dtype.F16 && d != dtype.BF16 {
		return fmt.Errorf("dtype %s; want F32, F16 or BF16", d)
	}
	if blocksize <= 0 || blocksize%32 != 0 {
		return fmt.Errorf("blocksize %d is not a multiple of 32", blocksize)
	}
	if n < 0 || n > maxElements {
		return fmt.Errorf("%d elements", n)
	}
	size := int64(d.Bits() / 8)
	if blocks := ceilDiv(n, int64(blocksize)); int64(len(values)) != n*size || int64(len(codes)) != n || int64(len(absmax)) != blocks {
		return fmt.Errorf("%d elements of %s with blocksize %d need %d bytes of values, %d codes and %d absmax; there are %d, %d and %d",
			n, d, blocksize, n*size, n, blocks, len(values), len(codes), len(absmax))
	}
	return nil
}
