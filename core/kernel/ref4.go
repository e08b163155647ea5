package kernel

import (
	"math"

	"github.com/gquant/gquant/core/dtype"
)

// values4 are the numbers that the codes stand for (bitsandbytes csrc/kernels.cu). NF4's code is the rank. FP4's is
// a bit pattern, sign and magnitude, so that its order is not that of the values; code 8 is −0.
var values4 = [...][16]float32{
	NF4: {
		-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
		-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0,
		0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
		0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
	},
	FP4: {
		0, 0.0625 / 12., 8 / 12., 12 / 12., 4 / 12., 6 / 12., 2 / 12., 3 / 12.,
		float32(math.Copysign(0, -1)), -0.0625 / 12., -8 / 12., -12 / 12., -4 / 12., -6 / 12., -2 / 12., -3 / 12.,
	},
}

// Values are the 16 numbers that the codes stand for, in the order of the codes.
func (cb Codebook) Values() [16]float32 { return values4[cb] }

// nf4Thresholds lie between neighbouring codes; a number equal to one gets the lower code. The constants are those of
// bitsandbytes' decision tree, four of them 1 ulp away from the middle.
var nf4Thresholds = [15]float32{
	-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
	-0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
	0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
}

// fp4Thresholds separate the magnitudes, from the smallest up; fp4Magnitudes are the codes between them.
var (
	fp4Thresholds = [7]float32{0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333}
	fp4Magnitudes = [8]byte{0, 1, 6, 7, 4, 5, 2, 3}
)

// code4 is the code of y. NaN compares false with everything and so gets code 0.
func code4(cb Codebook, y float32) byte {
	rank := 0
	if cb == NF4 {
		for _, t := range nf4Thresholds {
			if y > t {
				rank++
			}
		}
		return byte(rank)
	}
	for _, t := range fp4Thresholds {
		if y > t || y < -t {
			rank++
		}
	}
	code := fp4Magnitudes[rank]
	if y < 0 {
		code |= 8
	}
	return code
}

// scan gives the scale of a block of count elements starting at element first, and how many are NaN or ±Inf. NaN does
// not count for the scale; a block of nothing else has the scale −MaxFloat32, where CUDA's maximum starts.
func scan(src []byte, d dtype.DType, first, count int) (absmax float32, nonfinite int) {
	size := d.Bits() / 8
	absmax = -math.MaxFloat32
	for i := first; i < first+count; i++ {
		x := flush(dtype.GetF32(src[i*size:], d))
		magnitude := float32(math.Abs(float64(x)))
		if magnitude > absmax {
			absmax = magnitude
		}
		if magnitude-magnitude != 0 {
			nonfinite++
		}
	}
	return absmax, nonfinite
}

// Quantize4Ref defines Quantize4.
func Quantize4Ref(cb Codebook, src []byte, d dtype.DType, n, blocksize int, absmax []float32, packed []byte) (nonfinite int) {
	check(n, blocksize, 4, src, d, packed, absmax)
	size := d.Bits() / 8
	for b := 0; b*blocksize < n; b++ {
		first := b * blocksize
		count := min(blocksize, n-first)
		scale, bad := scan(src, d, first, count)
		absmax[b] = scale
		nonfinite += bad
		r := Reciprocal(scale)
		code := func(i int) byte {
			x := float32(0) // the partner of an odd last element
			if i < n {
				x = dtype.GetF32(src[i*size:], d)
			}
			return code4(cb, Multiply(x, r))
		}
		for i := first; i < first+count; i += 2 {
			packed[i/2] = code(i)<<4 | code(i+1)
		}
	}
	return nonfinite
}

// Dequantize4Ref defines Dequantize4.
func Dequantize4Ref(cb Codebook, packed []byte, absmax []float32, n, blocksize int, dst []byte, d dtype.DType) {
	check(n, blocksize, 4, dst, d, packed, absmax)
	size := d.Bits() / 8
	values := cb.Values()
	for i := range n {
		code := packed[i/2] >> 4
		if i%2 == 1 {
			code = packed[i/2] & 15
		}
		dtype.PutF32(dst[i*size:], d, scaled(values[code], absmax[i/blocksize]))
	}
}

// Multiply is x·y on the GPU with -ftz=true: subnormal operands count as zero, and so does a product that is below
// 2^-126 after rounding to 24 bits as if exponents had no end. (Measured on an H200. Rounding to the steps of subnormal
// numbers first would save some products that the GPU makes zero.) The float64 product is exact.
func Multiply(x, y float32) float32 {
	product := float64(flush(x)) * float64(flush(y))
	if math.Abs(product) < smallestNormal*(1-0x1p-25) {
		return float32(math.Copysign(0, product))
	}
	return float32(product)
}

// scaled is value·absmax on the GPU: a NaN is the positive one with all bits set.
func scaled(value, absmax float32) float32 {
	product := Multiply(value, absmax)
	if product != product {
		return math.Float32frombits(0x7fffffff)
	}
	return product
}
