package dtype

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/x448/float16"
)

// F16ToF32 widens an IEEE binary16; exact, signalling NaNs become quiet.
func F16ToF32(bits uint16) float32 { return float16.Frombits(bits).Float32() }

// F32ToF16 rounds to the nearest binary16, ties to even; NaN stays NaN (quiet).
func F32ToF16(f float32) uint16 { return float16.Fromfloat32(f).Bits() }

// BF16ToF32 widens a bfloat16; exact.
func BF16ToF32(bits uint16) float32 { return math.Float32frombits(uint32(bits) << 16) }

// F32ToBF16 rounds to the nearest bfloat16, ties to even; NaN stays NaN (quiet, sign and upper payload kept).
func F32ToBF16(f float32) uint16 {
	b := math.Float32bits(f)
	if f != f {
		return uint16(b>>16) | 0x40
	}
	return uint16((b + 0x7fff + b>>16&1) >> 16)
}

// PutF32 rounds f to the type d (F32, F16 or BF16) and stores it at the start of dst.
func PutF32(dst []byte, d DType, f float32) {
	switch d {
	case F32:
		binary.LittleEndian.PutUint32(dst, math.Float32bits(f))
	case F16:
		binary.LittleEndian.PutUint16(dst, F32ToF16(f))
	case BF16:
		binary.LittleEndian.PutUint16(dst, F32ToBF16(f))
	default:
		panic("dtype: PutF32 of " + d.String())
	}
}

// GetF32 reads the value of type d (F32, F16 or BF16) at the start of src; exact.
func GetF32(src []byte, d DType) float32 {
	switch d {
	case F32:
		return math.Float32frombits(binary.LittleEndian.Uint32(src))
	case F16:
		return F16ToF32(binary.LittleEndian.Uint16(src))
	case BF16:
		return BF16ToF32(binary.LittleEndian.Uint16(src))
	default:
		panic("dtype: GetF32 of " + d.String())
	}
}

// small describes an 8-bit float: exponent bits, bias, and what its extreme codes mean.
type small struct {
	exponent, bias int
	special        uint8 // ieee: infinities and NaNs; fn: all-ones is NaN; fnuz: only negative zero is NaN
}

const (
	ieee = iota
	fn
	fnuz
)

// Widths and biases: OCP 8-bit Floating Point Specification 1.0 (E4M3, E5M2); the FNUZ variants as in ONNX and ml_dtypes.
var smallFloats = map[DType]small{
	F8E5M2:     {5, 15, ieee},
	F8E4M3:     {4, 7, fn},
	F8E4M3FNUZ: {4, 8, fnuz},
	F8E5M2FNUZ: {5, 16, fnuz},
}

var smallTables = decodeTables()

func decodeTables() map[DType]*[256]float64 {
	tables := map[DType]*[256]float64{}
	for d, s := range smallFloats {
		t := new([256]float64)
		for code := range t {
			t[code] = s.decode(uint8(code))
		}
		tables[d] = t
	}
	// E8M0 is a power of two: 2^(code-127), 0xff is NaN (OCP Microscaling Formats 1.0).
	t := new([256]float64)
	for code := range t {
		t[code] = math.Ldexp(1, code-127)
	}
	t[255] = math.NaN()
	tables[F8E8M0] = t
	return tables
}

func (s small) decode(code uint8) float64 {
	mantissaBits := 7 - s.exponent
	exponent := int(code>>mantissaBits) & (1<<s.exponent - 1)
	mantissa := int(code) & (1<<mantissaBits - 1)
	sign := 1.0
	if code&0x80 != 0 {
		sign = -1
	}
	switch {
	case s.special == ieee && exponent == 1<<s.exponent-1:
		if mantissa != 0 {
			return math.NaN()
		}
		return math.Inf(int(sign))
	case s.special == fn && code&0x7f == 0x7f, s.special == fnuz && code == 0x80:
		return math.NaN()
	case exponent == 0:
		return math.Copysign(math.Ldexp(float64(mantissa), 1-s.bias-mantissaBits), sign)
	}
	return sign * math.Ldexp(float64(1<<mantissaBits+mantissa), exponent-s.bias-mantissaBits)
}

// Numeric says whether Float64s can read the type: every whole-byte real type.
func (d DType) Numeric() bool { return d.Valid() && d.Bits() >= 8 && d != C64 }

// Float64s converts len(dst) elements from the start of src; exact except for 64-bit integers above 2^53.
// It fails for types that are not Numeric and when src is too short.
func (d DType) Float64s(dst []float64, src []byte) error {
	if !d.Numeric() {
		return fmt.Errorf("elements of dtype %s have no single number", d)
	}
	size := d.Bits() / 8
	if len(src) < len(dst)*size {
		return fmt.Errorf("%d bytes hold fewer than %d elements of dtype %s", len(src), len(dst), d)
	}
	le := binary.LittleEndian
	switch d {
	case F32:
		for i := range dst {
			dst[i] = float64(math.Float32frombits(le.Uint32(src[4*i:])))
		}
	case BF16:
		for i := range dst {
			dst[i] = float64(BF16ToF32(le.Uint16(src[2*i:])))
		}
	case F16:
		for i := range dst {
			dst[i] = float64(F16ToF32(le.Uint16(src[2*i:])))
		}
	case F64:
		for i := range dst {
			dst[i] = math.Float64frombits(le.Uint64(src[8*i:]))
		}
	case Bool, U8:
		for i := range dst {
			dst[i] = float64(src[i])
		}
	case I8:
		for i := range dst {
			dst[i] = float64(int8(src[i]))
		}
	case I16:
		for i := range dst {
			dst[i] = float64(int16(le.Uint16(src[2*i:])))
		}
	case U16:
		for i := range dst {
			dst[i] = float64(le.Uint16(src[2*i:]))
		}
	case I32:
		for i := range dst {
			dst[i] = float64(int32(le.Uint32(src[4*i:])))
		}
	case U32:
		for i := range dst {
			dst[i] = float64(le.Uint32(src[4*i:]))
		}
	case I64:
		for i := range dst {
			dst[i] = float64(int64(le.Uint64(src[8*i:])))
		}
	case U64:
		for i := range dst {
			dst[i] = float64(le.Uint64(src[8*i:]))
		}
	default:
		t := smallTables[d]
		for i := range dst {
			dst[i] = t[src[i]]
		}
	}
	return nil
}
