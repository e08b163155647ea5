package kernel

import (
	"bytes"
	"math"
	"testing"

	"github.com/gquant/gquant/core/dtype"
)

// Defects of bitsandbytes' other backends, each of which has had consequences for its users; here they must not come
// back on any level.

func halves(d dtype.DType, values ...float32) []byte {
	src := make([]byte, 2*len(values))
	for i, v := range values {
		dtype.PutF32(src[2*i:], d, v)
	}
	return src
}

func fill(n int, value float32) []float32 {
	values := make([]float32, n)
	for i := range values {
		values[i] = value
	}
	return values
}

// Its CPU writes 0x77 (NF4), or the code of whichever zero sorts first (FP4), for a block of zeros.
func TestDefectZeroBlock(t *testing.T) {
	eachLevel(t, func(t *testing.T, k kernels) {
		for _, cb := range []Codebook{NF4, FP4} {
			// The second block has no full group.
			src, absmax, packed := halves(dtype.BF16, fill(64+7, 0)...), fill(2, 5), bytes.Repeat([]byte{0xff}, 36)
			k.quantize4(cb, src, dtype.BF16, 71, 64, absmax, packed)
			if absmax[0] != 0 || absmax[1] != 0 || !bytes.Equal(packed, make([]byte, 36)) {
				t.Errorf("codebook %d: absmax %v, codes %x", cb, absmax, packed)
			}
		}
	})
}

// Its CPU makes the whole block of a NaN code 15 (NF4) or 3 (FP4).
func TestDefectNaNSpreads(t *testing.T) {
	eachLevel(t, func(t *testing.T, k kernels) {
		for _, d := range []dtype.DType{dtype.BF16, dtype.F16} {
			values := fill(64, 1)
			values[9] = float32(math.NaN())
			absmax, packed := make([]float32, 1), make([]byte, 32)
			if bad := k.quantize4(NF4, halves(d, values...), d, 64, 64, absmax, packed); bad != 1 {
				t.Errorf("%d nonfinite elements, want 1", bad)
			}
			want := bytes.Repeat([]byte{0xff}, 32)
			want[4] = 0xf0
			if absmax[0] != 1 || !bytes.Equal(packed, want) {
				t.Errorf("%s: absmax %v, codes %x", d, absmax, packed)
			}
		}
	})
}

// Its CPU divides in the last, shorter block and multiplies in the others, so that equal blocks get different codes.
func TestDefectTailBlockDiffers(t *testing.T) {
	eachLevel(t, func(t *testing.T, k kernels) {
		for _, cb := range []Codebook{NF4, FP4} {
			for _, d := range []dtype.DType{dtype.BF16, dtype.F16, dtype.F32} {
				for seed := range uint64(50) {
					head := normal(d, 62, seed)
					size := d.Bits() / 8
					// A block of 64 that ends in zeros, then the same numbers alone.
					src := append(append(append([]byte(nil), head...), make([]byte, 2*size)...), head...)
					absmax, packed := make([]float32, 2), make([]byte, 63)
					k.quantize4(cb, src, d, 126, 64, absmax, packed)
					if absmax[0] != absmax[1] || !bytes.Equal(packed[:31], packed[32:]) {
						t.Fatalf("codebook %d, %s: absmax %v, codes %x and %x", cb, d, absmax, packed[:31], packed[32:])
					}
				}
			}
		}
	})
}

// Its CPU's FP4 gives small negative numbers the code of +0 and small positive ones that of −0.
func TestDefectFP4SignOfSmallNumbers(t *testing.T) {
	eachLevel(t, func(t *testing.T, k kernels) {
		values := append([]float32{1, 0.001, -0.001, 0, float32(math.Copysign(0, -1)), 0x1p-127, -0x1p-127, -0x1p-126}, fill(56, 0)...)
		absmax, packed := make([]float32, 1), make([]byte, 32)
		k.quantize4(FP4, halves(dtype.BF16, values...), dtype.BF16, 64, 64, absmax, packed)
		if want := []byte{0x30, 0x80, 0x00, 0x08}; !bytes.Equal(packed[:4], want) {
			t.Errorf("codes %x, want %x", packed[:4], want)
		}
		dst := make([]byte, 128)
		k.dequantize4(FP4, packed, absmax, 64, 64, dst, dtype.BF16)
		if dst[5] != 0x80 || dst[3] != 0 { // code 8 is −0
			t.Errorf("signs of the decoded zeros: %x", dst[:16])
		}
	})
}

// Its CPU's 8-bit quantizer has no code for zero: 0 becomes 131, 2e-5.
func TestDefectEightBitsWithoutZero(t *testing.T) {
	table := [256]float32(floats(open(t, "thresholds4.safetensors").bytes("dynamic.code")))
	eachLevel(t, func(t *testing.T, k kernels) {
		src := halves(dtype.BF16, append([]float32{1, 0, 1e-6, -1e-6, -1}, fill(59, 0)...)...)
		absmax, codes := make([]float32, 1), make([]byte, 64)
		k.quantize8(&table, src, dtype.BF16, 64, 64, absmax, codes)
		if want := []byte{255, 127, 128, 126, 0}; !bytes.Equal(codes[:5], want) {
			t.Errorf("codes %v, want %v", codes[:5], want)
		}
	})
}

// Its CUDA kernel writes past the codes when their number is odd and the storage dtype is wide; here nothing is ever
// written behind (n+1)/2 bytes, and the last low nibble is the code of 0.
func TestDefectOddLength(t *testing.T) {
	eachLevel(t, func(t *testing.T, k kernels) {
		for n := 1; n < 200; n += 2 {
			packed := bytes.Repeat([]byte{0xee}, n/2+1+64)
			k.quantize4(NF4, halves(dtype.F16, fill(n, 2)...), dtype.F16, n, 64, make([]float32, 4), packed)
			if packed[n/2] != 0xf7 || !bytes.Equal(packed[n/2+1:], bytes.Repeat([]byte{0xee}, 64)) {
				t.Fatalf("%d elements: %x", n, packed[n/2:])
			}
		}
	})
}
