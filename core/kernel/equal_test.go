package kernel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/gquant/gquant/core/dtype"
)

// guard is a slice with bytes behind and before it that must not change.
type guard struct {
	memory []byte
	size   int
}

const guardBytes, guardByte = 67, 0xa5

// guarded takes size bytes at an odd address.
func guarded(size int) guard {
	g := guard{bytes.Repeat([]byte{guardByte}, guardBytes+size+guardBytes), size}
	return g
}

func (g guard) bytes() []byte { return g.memory[guardBytes : guardBytes+g.size] }

func (g guard) intact() bool {
	border := bytes.Repeat([]byte{guardByte}, guardBytes)
	return bytes.Equal(g.memory[:guardBytes], border) && bytes.Equal(g.memory[guardBytes+g.size:], border)
}

// same compares all kernels on every level with the reference, with unaligned buffers between guard bytes. Every element
// of src is quantized, and the codes in codes, arbitrary bytes, are dequantized.
func same(t *testing.T, src []byte, d dtype.DType, blocksize int, codes []byte, absmax []float32, table *[256]float32) {
	t.Helper()
	before := Level()
	defer Use(before)
	size := d.Bits() / 8
	n := len(src) / size
	blocks := (n + blocksize - 1) / blocksize
	input := guarded(n * size)
	copy(input.bytes(), src)

	for _, cb := range []Codebook{NF4, FP4, -1} { // −1: 8 bits
		bits := 4
		if cb < 0 {
			bits = 8
		}
		quantize := func(k kernels, absmax []float32, out []byte) int {
			if cb < 0 {
				return k.quantize8(table, input.bytes(), d, n, blocksize, absmax, out)
			}
			return k.quantize4(cb, input.bytes(), d, n, blocksize, absmax, out)
		}
		dequantize := func(k kernels, out []byte) {
			if cb < 0 {
				k.dequantize8(table, codes, absmax, n, blocksize, out, d)
			} else {
				k.dequantize4(cb, codes, absmax, n, blocksize, out, d)
			}
		}
		wantCodes, wantAbsmax, wantValues := make([]byte, (n*bits+7)/8), make([]float32, blocks), make([]byte, n*size)
		wantNonfinite := quantize(reference, wantAbsmax, wantCodes)
		dequantize(reference, wantValues)

		for _, level := range Levels() {
			if err := Use(level); err != nil {
				t.Fatal(err)
			}
			name := fmt.Sprintf("%s, codebook %d, %s, %d elements, blocksize %d", level, cb, d, n, blocksize)
			gotCodes, gotAbsmax, gotValues := guarded(len(wantCodes)), make([]float32, blocks+2), guarded(len(wantValues))
			gotAbsmax[0], gotAbsmax[blocks+1] = 7, 7
			if got := quantize(compiled, gotAbsmax[1:blocks+1], gotCodes.bytes()); got != wantNonfinite {
				t.Errorf("%s: %d nonfinite, want %d", name, got, wantNonfinite)
			}
			if got, want := raw(gotAbsmax[1:blocks+1]), raw(wantAbsmax); !bytes.Equal(got, want) {
				t.Errorf("%s: absmax differs at %d", name, difference(got, want)/4)
			}
			if got := gotCodes.bytes(); !bytes.Equal(got, wantCodes) {
				i := difference(got, wantCodes)
				t.Errorf("%s: codes differ at byte %d: %02x, want %02x", name, i, got[i], wantCodes[i])
			}
			dequantize(compiled, gotValues.bytes())
			if got := gotValues.bytes(); !bytes.Equal(got, wantValues) {
				i := difference(got, wantValues) / size * size
				t.Errorf("%s: element %d is %x, want %x", name, i/size, got[i:i+size], wantValues[i:i+size])
			}
			if !gotCodes.intact() || !gotValues.intact() || gotAbsmax[0] != 7 || gotAbsmax[blocks+1] != 7 {
				t.Errorf("%s: wrote beyond a buffer", name)
			}
			if !input.intact() || !bytes.Equal(input.bytes(), src[:n*size]) {
				t.Fatalf("%s: changed its input", name)
			}
		}
	}
}

var (
	reference = kernels{Quantize4Ref, Dequantize4Ref, Quantize8Ref, Dequantize8Ref, AbsmaxRef, Linear4Ref}
	compiled  = kernels{Quantize4, Dequantize4, Quantize8, Dequantize8, Absmax, func(l *Layer4) {
		Linear4(l, make([]float32, Linear4Scratch(l.M, l.K)))
	}}
)

// scales are absmax of all kinds, also such as no quantizer makes.
func scales(random *rand.Rand, n int) []float32 {
	absmax := make([]float32, n)
	for i := range absmax {
		absmax[i] = float32(math.Exp(random.NormFloat64() * 8))
		if random.IntN(4) == 0 {
			absmax[i] = math.Float32frombits(random.Uint32())
		}
	}
	return absmax
}

func randomBytes(random *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(random.Uint32())
	}
	return b
}

// Every number of 16 bits, beside absmax of every size: in order of their bits, shuffled, and scaled down to a block's
// absmax of 1.
func TestEveryHalf(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for _, d := range []dtype.DType{dtype.BF16, dtype.F16} {
		var ordered, shuffled, below []byte
		for _, bits := range random.Perm(1 << 16) {
			shuffled = binary.LittleEndian.AppendUint16(shuffled, uint16(bits))
		}
		for bits := range 1 << 16 {
			ordered = binary.LittleEndian.AppendUint16(ordered, uint16(bits))
			if bits%63 == 0 {
				below = append(below, 0, 0)
				dtype.PutF32(below[len(below)-2:], d, 1)
			}
			x := dtype.GetF32(ordered[2*bits:], d)
			if !(math.Abs(float64(x)) <= 1) {
				x = 0
			}
			below = append(below, 0, 0)
			dtype.PutF32(below[len(below)-2:], d, x)
		}
		for _, src := range [][]byte{ordered, shuffled, below} {
			n := len(src) / 2
			same(t, src, d, 64, randomBytes(random, n), scales(random, n/64+1), testTable())
		}
	}
}

// Every length around the sizes of groups and blocks, every blocksize, every dtype, numbers of every kind.
func TestLengthsAndBlocksizes(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for _, d := range []dtype.DType{dtype.BF16, dtype.F16, dtype.F32} {
		lengths := []int{0, 1, 2, 3, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 1023, 1025, 4095, 4096, 4097, 8191}
		for n := 130; n < 200 && !testing.Short(); n++ {
			lengths = append(lengths, n)
		}
		for _, n := range lengths {
			for _, blocksize := range []int{32, 64, 96, 128, 256, 4096} {
				src := normal(d, n, uint64(n))
				for range n / 16 { // any bits: NaN, Inf, subnormal numbers, …
					i := random.IntN(len(src))
					src[i] = byte(random.Uint32())
				}
				same(t, src, d, blocksize, randomBytes(random, n), scales(random, n/blocksize+1), testTable())
			}
		}
	}
}

// Blocks scaled from the smallest to the largest numbers, among them some whose products are subnormal.
func TestScales(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	var src []byte
	for exponent := -150; exponent <= 128; exponent++ {
		for i := range 64 {
			x := math.Ldexp(random.NormFloat64(), exponent-2)
			if i%8 == 0 {
				x = math.Ldexp(random.NormFloat64(), -126) // near the border of subnormal numbers
			}
			src = binary.LittleEndian.AppendUint32(src, math.Float32bits(float32(x)))
		}
	}
	n := len(src) / 4
	same(t, src, dtype.F32, 64, randomBytes(random, n), scales(random, n/64), testTable())
}

// Numbers on and right beside the thresholds of blocks with any absmax: a reciprocal, product or threshold that is off by
// one unit in the last place gives another code.
func TestThresholdsOfAnyAbsmax(t *testing.T) {
	random := rand.New(rand.NewPCG(9, 10))
	thresholds := nf4Thresholds[:]
	for _, threshold := range fp4Thresholds {
		thresholds = append(thresholds, threshold, -threshold)
	}
	blocks := 20_000
	if testing.Short() {
		blocks = 2_000
	}
	var src []byte
	for range blocks {
		absmax := math.Float32frombits(127<<23 | random.Uint32N(1<<23))
		src = binary.LittleEndian.AppendUint32(src, math.Float32bits(absmax))
		for i := range 63 {
			x := math.Float32bits(thresholds[i%len(thresholds)] * absmax)
			src = binary.LittleEndian.AppendUint32(src, x+random.Uint32N(3)-1)
		}
	}
	same(t, src, dtype.F32, 64, make([]byte, blocks*64), make([]float32, blocks), testTable())
}

// NaN and infinite elements beside numbers of every size, among them only subnormal ones and none.
func TestNonfiniteBesideAnything(t *testing.T) {
	nan, inf := uint32(0x7fc00000), uint32(0xff800000)
	for _, others := range []uint32{0, 0x80000000, 1, 0x007fffff, 0x00800000, 0x3f800000, 0x7f7fffff, nan, inf} {
		for _, special := range []uint32{nan, 0xffffffff, inf} {
			var src []byte
			for i := range 64 {
				bits := others
				if i%32 == 5 {
					bits = special
				}
				src = binary.LittleEndian.AppendUint32(src, bits)
			}
			same(t, src, dtype.F32, 64, make([]byte, 64), make([]float32, 1), testTable())
			for i := range 64 { // the same as bfloat16
				copy(src[2*i:], src[4*i+2:4*i+4])
			}
			same(t, src[:128], dtype.BF16, 64, make([]byte, 64), make([]float32, 1), testTable())
		}
	}
}

// A table need not be ascending; the search is defined all the same.
func TestAnyTable(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 8))
	for range 20 {
		var table [256]float32
		for i := range table {
			table[i] = float32(random.NormFloat64())
			if random.IntN(8) == 0 {
				table[i] = math.Float32frombits(random.Uint32())
			}
		}
		src := normal(dtype.F32, 1000, random.Uint64())
		same(t, src, dtype.F32, 64, randomBytes(random, 1000), scales(random, 16), &table)
	}
}

// The level is a choice of speed, and one that does not exist is refused.
func TestUse(t *testing.T) {
	before := Level()
	defer Use(before)
	if err := Use("sse9"); err == nil {
		t.Error("an unknown level was accepted")
	}
	if Level() != before {
		t.Errorf("a refused level changed %s to %s", before, Level())
	}
	for _, level := range Levels() {
		if err := Use(level); err != nil || Level() != level {
			t.Errorf("level %s: %v, %s in use", level, err, Level())
		}
	}
}

// The environment variable forces a level at start-up. One that does not exist is reported, and the best is in use.
func TestEnvironment(t *testing.T) {
	if os.Getenv("GQUANT_TEST_CHILD") != "" {
		fmt.Printf("level %s, error %v\n", Level(), Err())
		return
	}
	levels := Levels()
	for value, want := range map[string]string{
		"":        "level " + levels[len(levels)-1] + ", error <nil>",
		"generic": "level generic, error <nil>",
		"sse9":    "level " + levels[len(levels)-1] + ", error environment variable GQUANT_CPU: no CPU level \"sse9\"",
	} {
		child := exec.Command(os.Args[0], "-test.run=^TestEnvironment$")
		child.Env = append(os.Environ(), "GQUANT_TEST_CHILD=1", "GQUANT_CPU="+value)
		if out, err := child.CombinedOutput(); err != nil || !strings.Contains(string(out), want) {
			t.Errorf("GQUANT_CPU=%q: %v, %s; want %s", value, err, out, want)
		}
	}
}

// Buffers that are too short panic before anything is written.
func TestShortBuffers(t *testing.T) {
	full := func() (src []byte, absmax []float32, packed []byte) {
		return make([]byte, 200), make([]float32, 2), make([]byte, 50)
	}
	panics := func(name string, f func()) {
		t.Helper()
		defer func() {
			if recover() == nil {
				t.Errorf("%s: no panic", name)
			}
		}()
		f()
	}
	src, absmax, packed := full()
	Quantize4(NF4, src, dtype.BF16, 100, 64, absmax, packed)
	panics("source", func() { Quantize4(NF4, src[:199], dtype.BF16, 100, 64, absmax, packed) })
	panics("absmax", func() { Quantize4(NF4, src, dtype.BF16, 100, 64, absmax[:1], packed) })
	panics("packed", func() { Quantize4(NF4, src, dtype.BF16, 100, 64, absmax, packed[:49]) })
	panics("blocksize", func() { Quantize4(NF4, src, dtype.BF16, 100, 16, absmax, packed) })
	panics("dtype", func() { Quantize4(NF4, src, dtype.I16, 100, 64, absmax, packed) })
	panics("negative", func() { Dequantize4(NF4, packed, absmax, -1, 64, src, dtype.BF16) })
	panics("values", func() { Dequantize4(NF4, packed, absmax, 100, 64, src[:199], dtype.BF16) })
	panics("codes", func() { Quantize8(testTable(), src, dtype.BF16, 100, 64, absmax, packed) })
	panics("codes", func() { Dequantize8(testTable(), packed, absmax, 100, 64, src, dtype.BF16) })
}
