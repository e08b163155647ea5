package kernel

import (
	"encoding/binary"
	"math"
	"testing"

	"github.com/gquant/gquant/core/dtype"
)

// The fuzzers choose dtype and blocksize by one byte and let every level agree with the reference.

func choose(selector byte) (dtype.DType, int) {
	return []dtype.DType{dtype.BF16, dtype.F16, dtype.F32}[selector%3], []int{32, 64, 96, 128, 256, 512}[selector/3%6]
}

func seeds(f *testing.F) {
	f.Add([]byte{}, byte(0))
	f.Add(normal(dtype.BF16, 129, 1), byte(3))
	f.Add(normal(dtype.F16, 70, 2), byte(4))
	f.Add(normal(dtype.F32, 65, 3), byte(5))
	f.Add([]byte{0xc0, 0x7f, 0x80, 0x7f, 0x80, 0xff, 0, 0x80, 1, 0, 0x80, 0}, byte(0)) // NaN, ±Inf, −0, subnormal, smallest
	f.Add(make([]byte, 300), byte(1))
}

func FuzzQuantize4(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, src []byte, selector byte) {
		if len(src) > 1<<14 {
			return
		}
		d, blocksize := choose(selector)
		n := len(src) * 8 / d.Bits()
		same(t, src[:n*d.Bits()/8], d, blocksize, make([]byte, n), make([]float32, n/blocksize+1), testTable())
	})
}

func FuzzDequantize4(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, codes []byte, selector byte) {
		if len(codes) < 16 || len(codes) > 1<<13 {
			return
		}
		d, blocksize := choose(selector)
		n := len(codes)
		absmax := make([]float32, n/blocksize+1)
		for i := range absmax { // any bits
			absmax[i] = math.Float32frombits(binary.LittleEndian.Uint32(codes[i%(n-3):]))
		}
		same(t, make([]byte, n*d.Bits()/8), d, blocksize, codes, absmax, testTable())
	})
}

func FuzzQuantize8(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, src []byte, selector byte) {
		if len(src) < 4 || len(src) > 1<<13 {
			return
		}
		d, blocksize := choose(selector)
		var table [256]float32 // any bits, in any order
		for i := range table {
			table[i] = math.Float32frombits(binary.LittleEndian.Uint32(src[i%(len(src)-3):]))
		}
		n := len(src) * 8 / d.Bits()
		same(t, src[:n*d.Bits()/8], d, blocksize, make([]byte, n), make([]float32, n/blocksize+1), &table)
	})
}
