package safetensors

import (
	"fmt"
	"math/bits"

	"github.com/gquant/gquant/core/dtype"
)

// Bounds on one tensor. The format's JSON schema gives dimensions 48 bits; the rank has no limit there, and 64 is
// far above any real tensor.
const (
	maxRank = 64
	maxDim  = 1 << 48
)

// Tensor is one entry of a header.
type Tensor struct {
	Name       string
	DType      dtype.DType
	Shape      []int64 // in elements; empty for a scalar
	Begin, End int64   // the bytes of the data section that it occupies
}

// Bytes is the size of the tensor's data.
func (t *Tensor) Bytes() int64 { return t.End - t.Begin }

// Elements is the product of the shape; 1 for a scalar.
func (t *Tensor) Elements() int64 {
	n := int64(1)
	for _, dim := range t.Shape {
		n *= dim
	}
	return n
}

// SizeOf gives the bytes that a tensor of this type and shape occupies. It fails when a dimension is negative or
// above 2^48, when there are more than 64, when the size overflows, and when a type of 4 or 6 bits does not
// fill whole bytes. Like the Rust reader it multiplies from the left and fails at the first overflow, so
// [0, 2^32, 2^32] is an empty tensor and [2^32, 2^32, 0] an error.
func SizeOf(d dtype.DType, shape []int64) (int64, error) {
	if !d.Valid() {
		return 0, fmt.Errorf("%s is not a dtype of the format", d)
	}
	if len(shape) > maxRank {
		return 0, fmt.Errorf("%d dimensions, expected at most %d", len(shape), maxRank)
	}
	n := uint64(1)
	for i, dim := range shape {
		if dim < 0 || dim > maxDim {
			return 0, fmt.Errorf("dimension %d is %d, expected 0 to 2^48", i, dim)
		}
		var over uint64
		if over, n = bits.Mul64(n, uint64(dim)); over != 0 {
			return 0, fmt.Errorf("the product of %v overflows 64 bits", shape)
		}
	}
	over, size := bits.Mul64(n, uint64(d.Bits()))
	if over != 0 {
		return 0, fmt.Errorf("the size of %v elements of %d bits overflows 64 bits", shape, d.Bits())
	}
	if size%8 != 0 {
		return 0, fmt.Errorf("%d elements of %d bits do not fill whole bytes", n, d.Bits())
	}
	return int64(size / 8), nil
}
