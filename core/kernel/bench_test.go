package kernel

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/gquant/gquant/core/dtype"
)

// A piece of a tensor as the callers cut them, on one core: 2^18 elements stay in the second-level cache.
const benchElements = 1 << 18

func BenchmarkKernels(b *testing.B) {
	before := Level()
	defer Use(before)
	table := testTable()
	for _, level := range Levels() {
		for _, d := range []dtype.DType{dtype.BF16, dtype.F16, dtype.F32} {
			src := normal(d, benchElements, 1)
			absmax := make([]float32, benchElements/64)
			packed := make([]byte, benchElements)
			run := func(name string, work func()) {
				b.Run(fmt.Sprintf("%s/%s/%s", name, level, d), func(b *testing.B) {
					if err := Use(level); err != nil {
						b.Fatal(err)
					}
					b.SetBytes(int64(len(src)))
					for b.Loop() {
						work()
					}
				})
			}
			for name, cb := range map[string]Codebook{"nf4": NF4, "fp4": FP4} {
				run("quantize-"+name, func() { Quantize4(cb, src, d, benchElements, 64, absmax, packed) })
				run("dequantize-"+name, func() { Dequantize4(cb, packed, absmax, benchElements, 64, src, d) })
			}
			run("quantize-8", func() { Quantize8(table, src, d, benchElements, 256, absmax, packed) })
			run("dequantize-8", func() { Dequantize8(table, packed, absmax, benchElements, 256, src, d) })
		}
	}
}

// normal is n normally distributed numbers, the same for the same seed.
func normal(d dtype.DType, n int, seed uint64) []byte {
	random := rand.New(rand.NewPCG(seed, 0))
	size := d.Bits() / 8
	src := make([]byte, n*size)
	for i := range n {
		dtype.PutF32(src[i*size:], d, float32(random.NormFloat64()))
	}
	return src
}

// testTable is an ascending table of 256 values.
func testTable() *[256]float32 {
	var table [256]float32
	for i := range table {
		x := (float32(i) - 127) / 128
		table[i] = x * x * x
		if i == 255 {
			table[i] = 1
		}
	}
	return &table
}
