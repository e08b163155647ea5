package dtype

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"testing"
)

// decode is the value of a binary floating-point code, written with arithmetic instead of bit tricks: the
// definition in IEEE 754 for a format with infinities.
func decode(code uint32, exponentBits, mantissaBits int) float64 {
	bias := 1<<(exponentBits-1) - 1
	mantissa := float64(code & (1<<mantissaBits - 1))
	exponent := int(code>>mantissaBits) & (1<<exponentBits - 1)
	sign := 1.0
	if code>>(exponentBits+mantissaBits)&1 == 1 {
		sign = -1
	}
	switch exponent {
	case 0:
		return math.Copysign(mantissa*math.Pow(2, float64(1-bias-mantissaBits)), sign)
	case 1<<exponentBits - 1:
		if mantissa != 0 {
			return math.NaN()
		}
		return math.Inf(int(sign))
	}
	return sign * (math.Pow(2, float64(mantissaBits)) + mantissa) * math.Pow(2, float64(exponent-bias-mantissaBits))
}

// same compares values, telling -0 from 0 and taking all NaNs as one.
func same(a, b float64) bool {
	return a == b && math.Signbit(a) == math.Signbit(b) || a != a && b != b
}

// TestHalvesExhaustive widens every 16-bit code and narrows it again.
func TestHalvesExhaustive(t *testing.T) {
	for code := range uint32(1 << 16) {
		bits := uint16(code)
		for _, c := range []struct {
			name   string
			wide   float32
			want   float64
			narrow func(float32) uint16
			quiet  uint16
		}{
			{"F16", F16ToF32(bits), decode(code, 5, 10), F32ToF16, 0x200},
			{"BF16", BF16ToF32(bits), decode(code, 8, 7), F32ToBF16, 0x40},
		} {
			if !same(float64(c.wide), c.want) {
				t.Fatalf("%s %#04x is %v, want %v", c.name, bits, c.wide, c.want)
			}
			want := bits
			if c.want != c.want {
				want |= c.quiet
			}
			if got := c.narrow(c.wide); got != want {
				t.Fatalf("%s %#04x comes back as %#04x, want %#04x", c.name, bits, got, want)
			}
		}
	}
}

// nearest rounds by search: the code whose value is nearest, the even one of two. Beyond the largest finite value
// IEEE rounds as if the next power of two were a number, and calls it infinity.
func nearest(f float32, exponentBits, mantissaBits int) uint16 {
	if f != f {
		panic("NaN")
	}
	magnitude := math.Abs(float64(f))
	inf := uint32(1<<exponentBits-1) << mantissaBits
	value := func(code uint32) float64 {
		if code == inf {
			return 2 * decode(inf-1<<mantissaBits, exponentBits, mantissaBits) // the power of two there
		}
		return decode(code, exponentBits, mantissaBits)
	}
	low, high := uint32(0), inf // value(low) ≤ magnitude; magnitude < value(high) or high is infinity
	for high-low > 1 {
		if middle := (low + high) / 2; value(middle) <= magnitude {
			low = middle
		} else {
			high = middle
		}
	}
	code := low
	if down, up := magnitude-value(low), value(high)-magnitude; up < down || up == down && high%2 == 0 {
		code = high
	}
	if math.Signbit(float64(f)) {
		code |= 1 << (exponentBits + mantissaBits)
	}
	return uint16(code)
}

func TestRounding(t *testing.T) {
	check := func(f float32) {
		t.Helper()
		if f != f {
			return
		}
		if got, want := F32ToF16(f), nearest(f, 5, 10); got != want {
			t.Errorf("F32ToF16(%v) = %#04x, want %#04x", f, got, want)
		}
		if got, want := F32ToBF16(f), nearest(f, 8, 7); got != want {
			t.Errorf("F32ToBF16(%v) = %#04x, want %#04x", f, got, want)
		}
	}
	// Around every point half-way between two codes of either type.
	for code := range uint32(1 << 16) {
		for _, middle := range []uint32{
			code<<16 | 0x8000,
			math.Float32bits(float32((decode(code, 5, 10) + decode(code+1, 5, 10)) / 2)),
		} {
			for d := range uint32(3) {
				check(math.Float32frombits(middle + d - 1))
			}
		}
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 100_000 {
		check(math.Float32frombits(rnd.Uint32()))
	}
}

// TestRoundingPublished are values from the standards, independent of the code above.
func TestRoundingPublished(t *testing.T) {
	inf := float32(math.Inf(1))
	for _, c := range []struct {
		f    float32
		f16  uint16
		bf16 uint16
	}{
		{0, 0, 0},
		{float32(math.Copysign(0, -1)), 0x8000, 0x8000},
		{1, 0x3c00, 0x3f80},
		{-2, 0xc000, 0xc000},
		{65504, 0x7bff, 0x4780},                            // the largest half
		{65519.996, 0x7bff, 0x4780},                        // the last value that rounds down to it
		{65520, 0x7c00, 0x4780},                            // half-way to 2^16: infinity
		{0x1p-14, 0x0400, 0x3880},                          // the smallest normal half
		{0x1p-24, 0x0001, 0x3380},                          // the smallest half
		{0x1p-25, 0x0000, 0x3300},                          // half of it: to even
		{0x1.000002p-25, 0x0001, 0x3300},                   // a little more
		{0x1.8p-24, 0x0002, 0x33c0},                        // 1.5 of it: to even
		{1 + 0x1p-11, 0x3c00, 0x3f80},                      // half-way: to even
		{1 + 3*0x1p-11, 0x3c02, 0x3f80},                    //
		{1 + 0x1p-8, 0x3c04, 0x3f80},                       // half-way for bfloat16
		{1 + 3*0x1p-8, 0x3c0c, 0x3f82},                     //
		{0x1.fep127, 0x7c00, 0x7f7f},                       // the largest bfloat16
		{0x1.fefffep127, 0x7c00, 0x7f7f},                   // the last value that rounds down to it
		{0x1.ffp127, 0x7c00, 0x7f80},                       // half-way to 2^128
		{math.MaxFloat32, 0x7c00, 0x7f80},                  //
		{math.SmallestNonzeroFloat32, 0, 0},                //
		{0x1p-133, 0, 0x0001},                              // the smallest bfloat16
		{0x1p-134, 0, 0x0000},                              // half of it: to even
		{inf, 0x7c00, 0x7f80},                              //
		{-inf, 0xfc00, 0xff80},                             //
		{math.Float32frombits(0x7f800001), 0x7e00, 0x7fc0}, // a NaN whose payload is cut off stays NaN
		{math.Float32frombits(0xffffffff), 0xffff, 0xffff},
	} {
		if got := F32ToF16(c.f); got != c.f16 {
			t.Errorf("F32ToF16(%x) = %#04x, want %#04x", c.f, got, c.f16)
		}
		if got := F32ToBF16(c.f); got != c.bf16 {
			t.Errorf("F32ToBF16(%x) = %#04x, want %#04x", c.f, got, c.bf16)
		}
	}
}

func TestPutGet(t *testing.T) {
	for _, c := range []struct {
		d    DType
		want string
	}{
		{F32, "\x01\x00\x80\x3f"},
		{F16, "\x00\x3c"},
		{BF16, "\x80\x3f"},
	} {
		b := []byte("xxxxx")
		PutF32(b, c.d, 1.0000001)
		if string(b) != c.want+"xxxxx"[len(c.want):] {
			t.Errorf("PutF32 %s gives %q", c.d, b)
		}
		if got := GetF32(b, c.d); c.d == F32 && got != 1.0000001 || c.d != F32 && got != 1 {
			t.Errorf("GetF32 %s gives %v", c.d, got)
		}
	}
	for _, d := range All() {
		if d == F32 || d == F16 || d == BF16 {
			continue
		}
		for name, call := range map[string]func(){
			"PutF32": func() { PutF32(make([]byte, 8), d, 1) },
			"GetF32": func() { GetF32(make([]byte, 8), d) },
		} {
			func() {
				defer func() {
					if recover() == nil {
						t.Errorf("%s of %s does not panic", name, d)
					}
				}()
				call()
			}()
		}
	}
}

// TestSmallFloats checks the values that the definitions publish: OCP 8-bit Floating Point 1.0 tables 1 and 2 for
// E5M2 and E4M3, OCP Microscaling 1.0 for E8M0, ONNX's table for the FNUZ types.
func TestSmallFloats(t *testing.T) {
	nan, inf := math.NaN(), math.Inf(1)
	negativeZero := math.Copysign(0, -1)
	for _, c := range []struct {
		d    DType
		want map[uint8]float64
		nans int
	}{
		{F8E5M2, map[uint8]float64{
			0x00: 0, 0x80: negativeZero, 0x01: 0x1p-16, 0x03: 0.75 * 0x1p-14, 0x04: 0x1p-14, 0x3c: 1, 0xbd: -1.25,
			0x7b: 57344, 0xfb: -57344, 0x7c: inf, 0xfc: -inf, 0x7d: nan, 0x7e: nan, 0x7f: nan, 0xff: nan}, 6},
		{F8E4M3, map[uint8]float64{
			0x00: 0, 0x80: negativeZero, 0x01: 0x1p-9, 0x07: 0.875 * 0x1p-6, 0x08: 0x1p-6, 0x38: 1, 0xb9: -1.125,
			0x78: 256, 0x7e: 448, 0xfe: -448, 0x7f: nan, 0xff: nan}, 2},
		{F8E4M3FNUZ, map[uint8]float64{
			0x00: 0, 0x80: nan, 0x01: 0x1p-10, 0x07: 0.875 * 0x1p-7, 0x08: 0x1p-7, 0x40: 1, 0x7f: 240, 0xff: -240}, 1},
		{F8E5M2FNUZ, map[uint8]float64{
			0x00: 0, 0x80: nan, 0x01: 0x1p-17, 0x03: 0.75 * 0x1p-15, 0x04: 0x1p-15, 0x40: 1, 0x7f: 57344, 0xff: -57344}, 1},
		{F8E8M0, map[uint8]float64{
			0x00: 0x1p-127, 0x01: 0x1p-126, 0x7f: 1, 0x80: 2, 0xfe: 0x1p127, 0xff: nan}, 1},
	} {
		codes := make([]byte, 256)
		for i := range codes {
			codes[i] = byte(i)
		}
		got := make([]float64, 256)
		if err := c.d.Float64s(got, codes); err != nil {
			t.Fatal(err)
		}
		nans, last := 0, 127 // the last code before the negative ones
		if c.d == F8E8M0 {
			last = 254
		}
		for code, v := range got {
			if v != v {
				nans++
			}
			if want, ok := c.want[uint8(code)]; ok && !same(v, want) {
				t.Errorf("%s %#02x is %v, want %v", c.d, code, v, want)
			}
			// Larger codes of one sign are farther from zero, and the signs mirror each other.
			if code > 0 && code <= last && v <= got[code-1] {
				t.Errorf("%s %#02x is %v, not above %v", c.d, code, v, got[code-1])
			}
			if c.d != F8E8M0 && code > 128 && !same(v, -got[code-128]) {
				t.Errorf("%s %#02x is %v, want %v", c.d, code, v, -got[code-128])
			}
		}
		if nans != c.nans {
			t.Errorf("%s has %d NaNs, want %d", c.d, nans, c.nans)
		}
	}
}

func TestFloat64s(t *testing.T) {
	le := binary.LittleEndian
	for _, c := range []struct {
		d    DType
		src  []byte
		want []float64
	}{
		{Bool, []byte{0, 1}, []float64{0, 1}},
		{U8, []byte{0, 255}, []float64{0, 255}},
		{I8, []byte{0x80, 0x7f}, []float64{-128, 127}},
		{U16, []byte{0xff, 0xff, 1, 0}, []float64{65535, 1}},
		{I16, []byte{0, 0x80, 0xff, 0x7f}, []float64{-32768, 32767}},
		{U32, []byte{0xff, 0xff, 0xff, 0xff}, []float64{1<<32 - 1}},
		{I32, []byte{0, 0, 0, 0x80}, []float64{-1 << 31}},
		{U64, le.AppendUint64(nil, 1<<63), []float64{1 << 63}},
		{I64, le.AppendUint64(nil, 1<<63), []float64{-1 << 63}},
		{F16, []byte{0, 0x3c, 0, 0xfc}, []float64{1, math.Inf(-1)}},
		{BF16, []byte{0x80, 0x3f, 0, 0x80}, []float64{1, math.Copysign(0, -1)}},
		{F32, le.AppendUint32(nil, math.Float32bits(-1.5)), []float64{-1.5}},
		{F64, le.AppendUint64(nil, math.Float64bits(math.Pi)), []float64{math.Pi}},
	} {
		got := make([]float64, len(c.want))
		if err := c.d.Float64s(got, c.src); err != nil {
			t.Errorf("%s: %v", c.d, err)
		}
		for i := range got {
			if !same(got[i], c.want[i]) {
				t.Errorf("%s: element %d is %v, want %v", c.d, i, got[i], c.want[i])
			}
		}
		if err := c.d.Float64s(make([]float64, len(c.want)), c.src[:len(c.src)-1]); err == nil {
			t.Errorf("%s: a source that is a byte short is no error", c.d)
		}
	}
	for _, d := range All() {
		want := d != C64 && d.Bits() >= 8
		if err := d.Float64s(make([]float64, 1), make([]byte, 8)); (err == nil) != want || d.Numeric() != want {
			t.Errorf("%s: Numeric says %v, Float64s %v", d, d.Numeric(), err)
		}
	}
}
