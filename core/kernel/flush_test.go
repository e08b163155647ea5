package kernel

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/gquant/gquant/core/dtype"
)

// What mul.ftz.f32 gave on an H200: of 261,383 products below 2^-126 that IEEE arithmetic rounds to 2^-126, it kept those
// of at least 2^-126 − 2^-151 and no other.
func TestProductsBelowTheSmallestNormal(t *testing.T) {
	for _, c := range []struct {
		x, y, want float32
	}{
		{0x1p-63, 0x1p-63, 0x1p-126},
		{-0x1p-63, 0x1p-63, -0x1p-126},
		// (1 − 2^-24)·(1 + 2^-23) is 1 + 2^-24 − 2^-47: above.
		{0x1.fffffep-64, 0x1.000002p-63, 0x1p-126},
		// (1 − 2^-24)² is 1 − 2^-23 + 2^-48: IEEE gives 2^-126 − 2^-149, a subnormal number.
		{0x1.fffffep-64, 0x1.fffffep-64, 0},
		// 1 − 2^-24 times 1: 2^-126 − 2^-150 is half a step of subnormal numbers below, IEEE rounds it up to even.
		{0x1.fffffep-64, 0x1p-63, 0},
		{-0x1.fffffep-64, 0x1p-63, float32(math.Copysign(0, -1))},
		{0x1p-127, 0x1p100, 0}, // a subnormal operand
	} {
		if got := Multiply(c.x, c.y); math.Float32bits(got) != math.Float32bits(c.want) {
			t.Errorf("%x · %x is %x, want %x", c.x, c.y, got, c.want)
		}
	}
}

// Every level flushes what the reference flushes: products on both sides of the border, as y of a negative FP4 element
// and as dequantized values.
func TestLevelsAgreeAtTheSmallestNormal(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	const n, blocksize = 1 << 14, 64
	src := make([]byte, 4*n)
	absmax := make([]float32, n/blocksize)
	codes := make([]byte, n)
	border := 0
	for b := range absmax {
		scale := float32(1 + r.Float64()) // one element of the block; the others are near 2^-126·scale
		reciprocal := Reciprocal(scale)
		for i := range blocksize {
			x := -float32(0x1p-126 / float64(reciprocal) * (1 + float64(r.IntN(9)-5)*0x1p-25))
			if i == 0 {
				x = scale
			} else if y := float64(x) * float64(reciprocal); -y < 0x1p-126 && float32(y) == -0x1p-126 {
				border++
			}
			binary.LittleEndian.PutUint32(src[4*(b*blocksize+i):], math.Float32bits(x))
		}
		absmax[b] = float32(0x1p-126 / math.Abs(float64(values4[NF4][r.IntN(15)]+1e-30)) * (1 + float64(r.IntN(9)-5)*0x1p-25))
	}
	if border < n/10 {
		t.Fatalf("only %d elements lie at the border", border)
	}
	for i := range codes {
		codes[i] = byte(r.IntN(256))
	}
	table := new([256]float32)
	for i := range table {
		table[i] = float32(i-127) / 128
	}
	same(t, src, dtype.F32, blocksize, codes, absmax, table)
}
