package quant

import (
	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/kernel"
)

// nf4 is bitsandbytes' NormalFloat: 16 quantiles of a normal distribution, times the absmax of the block.
var nf4 = format4("nf4", kernel.NF4)

// format4 is a format of one of the kernels' 4-bit codebooks. Element 2i is the high nibble of byte i.
func format4(name string, cb kernel.Codebook) Format {
	values := storedValues(cb)
	return Format{
		Name: name, Bits: 4, Codebook: values[:],
		quantize: func(src []byte, d dtype.DType, n, blocksize int, absmax []float32, codes []byte) int {
			return kernel.Quantize4(cb, src, d, n, blocksize, absmax, codes)
		},
		dequantize: func(codes []byte, absmax []float32, n, blocksize int, dst []byte, d dtype.DType) {
			kernel.Dequantize4(cb, codes, absmax, n, blocksize, dst, d)
		},
		linear: func(l *kernel.Layer4, scratch []float32) {
			l.Codebook = cb
			kernel.Linear4(l, scratch)
		},
	}
}

// storedValues are a codebook's values as bitsandbytes writes them to files (quant_map): FP4's −0 is +0 there.
func storedValues(cb kernel.Codebook) [16]float32 {
	values := cb.Values()
	for i := range values {
		values[i] += 0 // −0 + 0 = +0
	}
	return values
}
