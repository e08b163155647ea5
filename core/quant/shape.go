package quant

import "fmt"

// elements is the number of elements of a shape; an error for what no tensor can have.
func elements(shape []int64) (int64, error) {
	n := int64(1)
	for _, dim := range shape {
		if dim < 0 {
			return 0, fmt.Errorf("shape %v has a negative dimension", shape)
		}
		if dim > 0 && n > maxElements/dim {
			return 0, fmt.Errorf("shape %v is too large", shape)
		}
		n *= dim
	}
	return n, nil
}

// maxElements keeps every size in bytes far below the range of int64.
const maxElements = 1 << 48
