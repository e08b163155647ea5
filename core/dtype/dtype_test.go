package dtype

import (
	"strings"
	"testing"
)

// TestTable checks the table against the format's own list, written out here once more: names in the order of
// increasing alignment, bits per element, torch's names.
func TestTable(t *testing.T) {
	const want = `BOOL 8 bool
F4 4 float4_e2m1fn_x2
F6_E2M3 6
F6_E3M2 6
U8 8 uint8
I8 8 int8
F8_E5M2 8 float8_e5m2
F8_E4M3 8 float8_e4m3fn
F8_E8M0 8 float8_e8m0fnu
F8_E4M3FNUZ 8 float8_e4m3fnuz
F8_E5M2FNUZ 8 float8_e5m2fnuz
I16 16 int16
U16 16 uint16
F16 16 float16
BF16 16 bfloat16
I32 32 int32
U32 32 uint32
F32 32 float32
C64 64 complex64
F64 64 float64
I64 64 int64
U64 64 uint64`
	bits := map[string]int{"4": 4, "6": 6, "8": 8, "16": 16, "32": 32, "64": 64}
	all := All()
	lines := strings.Split(want, "\n")
	if len(all) != len(lines) {
		t.Fatalf("%d types, want %d", len(all), len(lines))
	}
	for i, line := range lines {
		f := append(strings.Fields(line), "")
		d := all[i]
		if d.String() != f[0] || d.Bits() != bits[f[1]] || d.Torch() != f[2] || !d.Valid() {
			t.Errorf("type %d is %s, %d bits, torch %q; want %s", i, d, d.Bits(), d.Torch(), line)
		}
		if i > 0 && d <= all[i-1] {
			t.Errorf("%s does not come after %s", d, all[i-1])
		}
		if got, err := Parse(f[0]); err != nil || got != d {
			t.Errorf("Parse(%s) = %s, %v", f[0], got, err)
		}
		if f[2] == "" {
			continue
		}
		if got, err := FromTorch(f[2]); err != nil || got != d {
			t.Errorf("FromTorch(%s) = %s, %v", f[2], got, err)
		}
	}
}

func TestUnknown(t *testing.T) {
	for _, name := range []string{"", "f32", "F32 ", "float32", "F128", "dtype(0)"} {
		if d, err := Parse(name); err == nil {
			t.Errorf("Parse(%q) = %s, want an error", name, d)
		}
	}
	for _, name := range []string{"", "F32", "torch.float32", "Float32"} {
		if d, err := FromTorch(name); err == nil {
			t.Errorf("FromTorch(%q) = %s, want an error", name, d)
		}
	}
	for _, d := range []DType{0, U64 + 1, 255} {
		if d.Valid() || d.Bits() != 0 || d.Torch() != "" || d.Float() || d.Numeric() || !strings.HasPrefix(d.String(), "dtype(") {
			t.Errorf("%d passes for a type: %s, %d bits", uint8(d), d, d.Bits())
		}
		if err := d.Float64s(nil, nil); err == nil {
			t.Errorf("Float64s of %s: no error", d)
		}
	}
}

// TestFloat: a type is a float exactly if its name says so, and C64 is not one.
func TestFloat(t *testing.T) {
	for _, d := range All() {
		if want := strings.HasPrefix(d.String(), "F") || d == BF16; d.Float() != want {
			t.Errorf("%s.Float() = %v", d, d.Float())
		}
	}
}
