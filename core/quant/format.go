// Package quant holds the formats that weights are quantized to, the state of a quantized weight, and the work
// of going from one to the other on all cores.
//
// A format says how numbers are stored. Quantize turns a tensor into a State: codes, and the statistics that give
// codes their values; DequantizeRange turns codes back. The 4-bit formats and the nested statistics give the bytes of
// bitsandbytes' CUDA backend; the package kernel says what those are. Results do not depend on the number of threads.
//
// A new format is a file like nf4.go and a line in the table below.
package quant

import (
	"fmt"
	"strings"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/kernel"
)

// Format is one way to store numbers. Formats are compared by pointer.
type Format struct {
	Name     string
	Bits     int       // of one code
	Codebook []float32 // the value of each code, where a table says it

	// Both work on whole blocks, on one thread. n is the number of elements.
	quantize   func(src []byte, d dtype.DType, n, blocksize int, absmax []float32, codes []byte) (nonfinite int)
	dequantize func(codes []byte, absmax []float32, n, blocksize int, dst []byte, d dtype.DType)

	// linear computes some columns of a linear layer with a weight of this format, on one thread; nil if it cannot.
	linear func(l *kernel.Layer4, scratch []float32)
}

var formats = []*Format{&nf4, &fp4, &int8Rows}

// Formats lists all formats.
func Formats() []*Format { return formats }

// Lookup finds a format by its name.
func Lookup(name string) (*Format, error) {
	var names []string
	for _, f := range formats {
		if f.Name == name {
			return f, nil
		}
		names = append(names, f.Name)
	}
	return nil, fmt.Errorf("unknown format %q; there are %s", name, strings.Join(names, ", "))
}
