package quant

import (
	"errors"
	"fmt"
	"math"
	"sync"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/kernel"
)

// int8Rows is LLM.int8's format for weights: an int8 per element and one absmax per row, which bitsandbytes calls SCB.
var int8Rows = Format{Name: "int8", Bits: 8, dequantize: dequantizeRowsInt8}

// int8Step is bitsandbytes' 1/127 (functional.py int8_vectorwise_dequant), and int8ProductStep its 1/127² for products
// (csrc/kernels.cu kdequant_mm_int32_fp16).
const (
	int8Step        float32 = 7.874015718698502e-3
	int8ProductStep float32 = 6.200012e-05
)

// dequantizeRowsInt8: an element is code·absmax·(1/127), rounded after each product. A block is a row. As on the GPU, a NaN is the positive
// one with all bits set.
func dequantizeRowsInt8(codes []byte, absmax []float32, n, blocksize int, dst []byte, d dtype.DType) {
	size := d.Bits() / 8
	for i := range n {
		x := float32(float32(int8(codes[i]))*absmax[i/blocksize]) * int8Step
		if x != x {
			x = math.Float32frombits(0x7fffffff)
		}
		dtype.PutF32(dst[i*size:], d, x)
	}
}

// QuantizeRowsInt8 quantizes the rows of a matrix as LLM.int8 does: round(x·127/absmax), ties to even. bitsandbytes knows
// float16 only, so other dtypes are rounded to it first.
//
// With a threshold above 0, elements of that magnitude or more are outliers: they don't count for absmax, and the
// columns in which they occur, returned in ascending order, get code 0 in all rows. A NaN gets code 0 and does not
// count for absmax; neither does an empty row, whose absmax is -0 as in CUDA.
func QuantizeRowsInt8(src []byte, d dtype.DType, rows, cols int64, threshold float32) (codes []byte, absmax []float32, outliers []int64, err error) {
	if d != dtype.F32 && d != dtype.F16 && d != dtype.BF16 {
		return nil, nil, nil, fmt.Errorf("dtype %s cannot be quantized; F32, F16 and BF16 can", d)
	}
	n, err := elements([]int64{rows, cols})
	if err != nil {
		return nil, nil, nil, err
	}
	size := int64(d.Bits() / 8)
	if int64(len(src)) != n*size {
		return nil, nil, nil, fmt.Errorf("%d×%d elements of %s are %d bytes, the source has %d", rows, cols, d, n*size, len(src))
	}
	if !(threshold >= 0) {
		return nil, nil, nil, fmt.Errorf("threshold %v is negative", threshold)
	}
	outlier := func(x float32) bool { return threshold > 0 && float32(math.Abs(float64(x))) >= threshold }

	codes, absmax = make([]byte, n), make([]float32, rows)
	isOutlier := make([]bool, cols)
	var mutex sync.Mutex
	parallel(rows, max(1, chunkElements/max(1, cols)), 0, func(first, count int64) {
		row, found := make([]float32, cols), make([]bool, cols)
		for r := first; r < first+count; r++ {
			top := float32(math.Copysign(0, -1))
			for c := range row {
				row[c] = dtype.F16ToF32(dtype.F32ToF16(dtype.GetF32(src[(r*cols+int64(c))*size:], d)))
				if x := row[c]; outlier(x) {
					found[c] = true
				} else if x == x {
					top = max(top, float32(math.Abs(float64(x))))
				}
			}
			absmax[r] = top
			// CUDA's __fdividef: 127 times the approximate reciprocal.
			scale := 127 * kernel.Reciprocal(top)
			for c, x := range row {
				if !outlier(x) {
					codes[r*cols+int64(c)] = byte(roundInt8(x * scale))
				}
			}
		}
		mutex.Lock()
		defer mutex.Unlock()
		for c := range found {
			isOutlier[c] = isOutlier[c] || found[c]
		}
	})
	outliers = []int64{}
	for c := range isOutlier {
		if isOutlier[c] {
			outliers = append(outliers, int64(c))
			for r := range rows {
				codes[r*cols+int64(c)] = 0
			}
		}
	}
	return codes, absmax, outliers, nil
}

// roundInt8 rounds to an integer, ties to even, as the GPU does: NaN is 0.
func roundInt8(x float32) int8 {
	if x != x {
		return 0
	}
	return int8(max(-128, min(127, math.RoundToEven(float64(x)))))
}

// DequantizeProductInt8 scales the int32 product of two int8 matrices quantized by rows, activations [rows, k] times
// transposed weights [cols, k], to float16: ((acc·rowAbsmax)·colAbsmax)·(1/127²), rounded after each product.
// dst takes rows·cols float16.
func DequantizeProductInt8(acc []int32, rowAbsmax, colAbsmax []float32, dst []byte) error {
	cols := len(colAbsmax)
	if len(acc) != len(rowAbsmax)*cols || len(dst) != 2*len(acc) {
		return errors.New("the product, its row and column absmax and the result don't have matching sizes")
	}
	for i, a := range acc {
		x := float32(a) * rowAbsmax[i/cols]
		x *= colAbsmax[i%cols]
		dtype.PutF32(dst[2*i:], dtype.F16, x*int8ProductStep)
	}
	return nil
}
