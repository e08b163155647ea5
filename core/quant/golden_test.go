package quant

import (
	"bytes"
	"encoding/binary"
	"math"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/kernel"
	"github.com/gquant/gquant/core/safetensors"
)

// The files that bitsandbytes' CUDA backend wrote.
type vectors struct {
	*safetensors.File
	t *testing.T
}

func open(t *testing.T, name string) vectors {
	t.Helper()
	f, err := safetensors.Open(filepath.Join("../../tests/vectors/bitsandbytes", name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return vectors{f, t}
}

// bytes of a tensor; nil if the file does not have it.
func (v vectors) bytes(name string) []byte {
	tensor := v.Header().Find(name)
	if tensor == nil {
		return nil
	}
	raw := make([]byte, tensor.Bytes())
	if err := v.ReadAt(tensor, raw, 0); err != nil {
		v.t.Fatal(err)
	}
	return raw
}

func (v vectors) floats(name string) []float32 {
	raw := v.bytes(name)
	values := make([]float32, len(raw)/4)
	for i := range values {
		values[i] = math.Float32frombits(binary.LittleEndian.Uint32(raw[4*i:]))
	}
	return values
}

func sameFloats(a, b []float32) bool {
	return slices.EqualFunc(a, b, func(x, y float32) bool { return math.Float32bits(x) == math.Float32bits(y) })
}

// eachLevel runs the test on every CPU level.
func eachLevel(t *testing.T, test func(t *testing.T)) {
	before := kernel.Level()
	defer kernel.Use(before)
	for _, level := range kernel.Levels() {
		t.Run(level, func(t *testing.T) {
			if err := kernel.Use(level); err != nil {
				t.Fatal(err)
			}
			test(t)
		})
	}
}

var dtypes = map[string]dtype.DType{"f32": dtype.F32, "f16": dtype.F16, "bf16": dtype.BF16}

// Weights quantized with nested statistics. Their offset is a mean whose last bits depend on the order of additions, so it
// is given; the mean of this package must be near.
func TestGoldenNested(t *testing.T) {
	v := open(t, "nested8.safetensors")
	if got, want := DynamicMap()[:], open(t, "thresholds4.safetensors").floats("dynamic.code"); !sameFloats(got, want) {
		t.Error("the dynamic map differs")
	}
	eachLevel(t, func(t *testing.T) {
		cases := 0
		for d, name := range map[dtype.DType]string{dtype.F32: "f32", dtype.F16: "f16", dtype.BF16: "bf16"} {
			for _, format := range []string{"nf4", "fp4"} {
				cases++
				p := "nested." + name + "." + format
				f, err := Lookup(format)
				if err != nil {
					t.Fatal(err)
				}
				src := v.bytes(p + ".input")
				shape := v.Header().Find(p + ".input").Shape
				s, bad, err := Quantize(f, src, d, shape, Options{Blocksize: 64})
				if err != nil || bad != 0 {
					t.Fatal(err, bad)
				}
				if !bytes.Equal(s.Packed, v.bytes(p+".packed")) {
					t.Errorf("%s: codes differ", p)
				}
				if !sameFloats(s.Absmax, v.floats(p+".absmax_f32")) {
					t.Errorf("%s: absmax differs", p)
				}
				offset := v.floats(p + ".offset")[0]
				if mean := Mean(s.Absmax); math.Abs(float64(mean-offset)) > 1e-6*float64(offset) {
					t.Errorf("%s: mean %v, offset %v", p, mean, offset)
				}
				s.Nested, s.Absmax = NestWithOffset(s.Absmax, offset), nil
				if !bytes.Equal(s.Nested.Codes, v.bytes(p+".absmax_u8")) {
					t.Errorf("%s: nested codes differ", p)
				}
				if !sameFloats(s.Nested.Absmax, v.floats(p+".nested_absmax")) {
					t.Errorf("%s: nested absmax differs", p)
				}
				dst := make([]byte, len(src))
				if err := s.DequantizeRange(dst, d, 0, s.Elements(), 0); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(dst, v.bytes(p+".dequant")) {
					t.Errorf("%s: values differ", p)
				}
			}
		}
		if cases != 6 {
			t.Errorf("%d cases", cases)
		}
	})
}

// State dicts of bitsandbytes' modules, in every storage dtype and for every source dtype: they decode to what
// bitsandbytes decodes, and their JSON is written again byte for byte.
func TestGoldenModules(t *testing.T) {
	v := open(t, "modules.safetensors")
	marker := regexp.MustCompile(`^((nf4|fp4)\.(nested|plain)\.\w+\.(\w+))\.weight\.quant_state\.bitsandbytes__(nf4|fp4)$`)
	eachLevel(t, func(t *testing.T) {
		cases := 0
		for _, tensor := range v.Header().Tensors {
			m := marker.FindStringSubmatch(tensor.Name)
			if m == nil {
				continue
			}
			cases++
			text, weight := v.bytes(tensor.Name), m[1]+".weight"
			s, err := ParseJSON(text)
			if err != nil {
				t.Fatal(err)
			}
			s.Packed = v.bytes(weight)
			if s.Nested != nil {
				s.Nested.Codes = v.bytes(weight + ".absmax")
				s.Nested.Absmax = v.floats(weight + ".nested_absmax")
				s.Nested.Codebook = v.floats(weight + ".nested_quant_map")
			} else {
				s.Absmax = v.floats(weight + ".absmax")
			}
			if (s.Nested != nil) != (m[3] == "nested") || s.DType != dtypes[m[4]] || s.Format.Name != m[2] {
				t.Errorf("%s: state %s", m[1], text)
			}
			if got := s.JSON(); !bytes.Equal(got, text) {
				t.Errorf("%s: wrote %s, read %s", m[1], got, text)
			}
			if !sameFloats(s.Codebook, v.floats(weight+".quant_map")) {
				t.Errorf("%s: quant_map differs", m[1])
			}
			want := v.bytes(m[1] + ".reference")
			dst := make([]byte, len(want))
			if err := s.DequantizeRange(dst, s.DType, 0, s.Elements(), 2); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(dst, want) {
				t.Errorf("%s: values differ", m[1])
			}
		}
		if cases != 36 {
			t.Errorf("%d cases, want 36", cases)
		}
	})
}

func TestGoldenInt8(t *testing.T) {
	v := open(t, "int8.safetensors")
	for _, c := range []struct {
		name      string
		threshold float32
	}{{"0.0", 0}, {"6.0", 6}} {
		p := "row." + c.name
		codes, absmax, outliers, err := QuantizeRowsInt8(v.bytes(p+".input"), dtype.F16, 48, 320, c.threshold)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(codes, v.bytes(p+".codes")) {
			t.Errorf("%s: codes differ", p)
		}
		if !sameFloats(absmax, v.floats(p+".stats")) {
			t.Errorf("%s: absmax differs", p)
		}
		var columns []byte
		for _, column := range outliers {
			columns = binary.LittleEndian.AppendUint64(columns, uint64(column))
		}
		if !bytes.Equal(columns, v.bytes(p+".outlier_cols")) {
			t.Errorf("%s: outlier columns %v", p, outliers)
		}
	}
	a, w := v.bytes("mm.a"), v.bytes("mm.w")
	rawAcc := v.bytes("mm.acc")
	acc := make([]int32, len(rawAcc)/4)
	for i := range acc {
		acc[i] = int32(binary.LittleEndian.Uint32(rawAcc[4*i:]))
		sum, row, column := int32(0), i/96, i%96
		for k := range 320 {
			sum += int32(int8(a[row*320+k])) * int32(int8(w[column*320+k]))
		}
		if sum != acc[i] {
			t.Fatalf("product %d is %d, want %d", i, sum, acc[i])
		}
	}
	dst := make([]byte, 2*len(acc))
	if err := DequantizeProductInt8(acc, v.floats("mm.a_stats"), v.floats("mm.w_stats"), dst); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(dst, v.bytes("mm.out_f16")) {
		t.Error("scaled products differ")
	}
}

// A row of LLM.int8 weights as bitsandbytes decodes it: code·SCB·(1/127) in float32, then the dtype.
func TestInt8Dequantize(t *testing.T) {
	v := open(t, "modules.safetensors")
	f, err := Lookup("int8")
	if err != nil {
		t.Fatal(err)
	}
	s := &State{Format: f, Shape: []int64{96, 128}, Blocksize: 128, DType: dtype.F16, Packed: v.bytes("int8.weight"), Absmax: v.floats("int8.SCB")}
	for _, d := range dtypes {
		size := d.Bits() / 8
		dst := make([]byte, 96*128*size)
		if err := s.DequantizeRange(dst, d, 0, 96*128, 1); err != nil {
			t.Fatal(err)
		}
		for i, code := range s.Packed {
			x := float32(int8(code)) * s.Absmax[i/128]
			x *= 7.874015718698502e-3
			want := make([]byte, size)
			if dtype.PutF32(want, d, x); !bytes.Equal(dst[i*size:i*size+size], want) {
				t.Fatalf("%s: element %d is %x, want %x", d, i, dst[i*size:i*size+size], want)
			}
		}
	}
	if !strings.Contains(s.Format.Name, "int8") || s.Blocks() != 96 || s.PackedBytes() != 96*128 {
		t.Errorf("%d blocks, %d bytes", s.Blocks(), s.PackedBytes())
	}
}
