package kernel

import "github.com/gquant/gquant/core/dtype"

// code8 is bitsandbytes' search of the 256 values for the one nearest to y (csrc/kernels.cu, dQuantize). It is meant
// for ascending tables, but defined for all. NaN gets code 0. A number in the middle gets the even one of two codes.
func code8(table *[256]float32, y float32) byte {
	pivot, lower, upper := 127, 0, 255
	for step := 64; step > 0; step /= 2 {
		if y > flush(table[pivot]) {
			lower = pivot
			pivot += step
		} else {
			upper = pivot
			pivot -= step
		}
	}
	value := flush(table[pivot])
	if y > value {
		if y > middle(flush(table[upper]), value) {
			return byte(upper)
		}
	} else if y < middle(flush(table[lower]), value) {
		return byte(lower)
	}
	return byte(pivot)
}

// middle is the mean of two neighbours, as the GPU computes it.
func middle(a, b float32) float32 { return flush(flush(a+b) * 0.5) }

// Quantize8Ref defines Quantize8.
func Quantize8Ref(table *[256]float32, src []byte, d dtype.DType, n, blocksize int, absmax []float32, codes []byte) (nonfinite int) {
	check(n, blocksize, 8, src, d, codes, absmax)
	size := d.Bits() / 8
	for b := 0; b*blocksize < n; b++ {
		first := b * blocksize
		count := min(blocksize, n-first)
		scale, bad := scan(src, d, first, count)
		absmax[b] = scale
		nonfinite += bad
		r := Reciprocal(scale)
		for i := first; i < first+count; i++ {
			codes[i] = code8(table, Multiply(dtype.GetF32(src[i*size:], d), r))
		}
	}
	return nonfinite
}

// Dequantize8Ref defines Dequantize8.
func Dequantize8Ref(table *[256]float32, codes []byte, absmax []float32, n, blocksize int, dst []byte, d dtype.DType) {
	check(n, blocksize, 8, dst, d, codes, absmax)
	size := d.Bits() / 8
	for i := range n {
		dtype.PutF32(dst[i*size:], d, scaled(table[codes[i]], absmax[i/blocksize]))
	}
}

// AbsmaxRef defines Absmax.
func AbsmaxRef(table *[256]float32, codes []byte, nested []float32, blocksize int, offset float32, absmax []float32) {
	checkAbsmax(codes, nested, blocksize, absmax)
	for i, code := range codes {
		absmax[i] = scaled(table[code], nested[i/blocksize]) + offset
	}
}
