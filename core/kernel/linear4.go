package kernel

import (
	"fmt"

	"github.com/gquant/gquant/core/dtype"
)

// Layer4 is a linear layer with a 4-bit weight, y = x·Wᵀ + bias, or those columns of y that belong to some rows of W.
//
//	y[m][n] = Σ x[m][k] · W[n][k] + bias[n]
//
// An element of W is value · absmax, rounded to float32 and not to the dtype of x: the decoded F32 element of Dequantize4.
// Products and sums are float32, and y is rounded once, to the dtype that x, bias and y share. A product and a sum
// may be one fused operation, and the order of additions is Linear4's own; so results may differ between levels, each of
// them within the error of float32 sums. Subnormal numbers may count as zero.
type Layer4 struct {
	Codebook  Codebook
	Packed    []byte    // of the whole weight
	Absmax    []float32 // from the block on that holds the first element of row First
	Blocksize int       // a power of two, at least 32
	First     int       // the first row of the weight to use
	Rows      int       // how many rows: the columns of y
	K         int       // elements of a row of the weight, and of x

	DType  dtype.DType // F32, F16 or BF16
	X      []byte      // M rows of K elements
	M      int
	Bias   []byte // Rows elements; nil if there is none
	Y      []byte // row m starts at element m·Stride
	Stride int
}

// check panics unless the buffers are large enough. It returns the block that holds the first element.
func (l *Layer4) check() (block int) {
	if l.First < 0 || l.Rows < 0 || l.K < 0 || l.M < 0 || l.Stride < l.Rows {
		panic(fmt.Sprintf("kernel: rows %d…%d of %d elements, %d rows of x, %d elements from row to row of y", l.First, l.First+l.Rows, l.K, l.M, l.Stride))
	}
	if l.Blocksize&(l.Blocksize-1) != 0 {
		panic(fmt.Sprintf("kernel: blocksize %d is not a power of two", l.Blocksize))
	}
	n := product(l.First+l.Rows, l.K)
	end := blocks(l.DType, n, l.Blocksize)
	block = l.First * l.K / l.Blocksize
	size := l.DType.Bits() / 8
	if l.M == 0 || l.Rows == 0 {
		return block
	}
	if got, want := len(l.Packed), (n+1)/2; got < want {
		panic(fmt.Sprintf("kernel: %d codes of 4 bits need %d bytes, the buffer has %d", n, want, got))
	}
	if got, want := len(l.Absmax), end-block; got < want {
		panic(fmt.Sprintf("kernel: %d blocks need as many absmax, the buffer has %d", want, got))
	}
	if got, want := len(l.X), product(l.M, l.K)*size; got < want {
		panic(fmt.Sprintf("kernel: x needs %d bytes, the buffer has %d", want, got))
	}
	if got, want := len(l.Bias), l.Rows*size; l.Bias != nil && got < want {
		panic(fmt.Sprintf("kernel: the bias needs %d bytes, the buffer has %d", want, got))
	}
	if got, want := len(l.Y), (product(l.M-1, l.Stride)+l.Rows)*size; got < want {
		panic(fmt.Sprintf("kernel: y needs %d bytes, the buffer has %d", want, got))
	}
	return block
}

// product is a·b; it panics where no buffer could be so large.
func product(a, b int) int {
	if b > 0 && a > maxBlocks/b {
		panic(fmt.Sprintf("kernel: %d × %d elements", a, b))
	}
	return a * b
}

// Linear4Ref is Linear4 with sums in float64, which are exact but for their last bits.
func Linear4Ref(l *Layer4) {
	block := l.check()
	values := l.Codebook.Values()
	size := l.DType.Bits() / 8
	for n := range l.Rows {
		for m := range l.M {
			sum := 0.0
			for k := range l.K {
				i := (l.First+n)*l.K + k
				code := l.Packed[i/2] >> 4
				if i%2 == 1 {
					code = l.Packed[i/2] & 15
				}
				w := scaled(values[code], l.Absmax[i/l.Blocksize-block])
				sum += float64(dtype.GetF32(l.X[(m*l.K+k)*size:], l.DType)) * float64(w)
			}
			if l.Bias != nil {
				sum += float64(dtype.GetF32(l.Bias[n*size:], l.DType))
			}
			dtype.PutF32(l.Y[(m*l.Stride+n)*size:], l.DType, float32(sum))
		}
	}
}
