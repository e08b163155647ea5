package checkpoint

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/quant"
	"github.com/gquant/gquant/core/safetensors"
)

// tensor is one tensor of a test file.
type tensor struct {
	name  string
	dtype dtype.DType
	shape []int64
	data  []byte
}

// write makes a safetensors file in a folder of the test.
func write(t *testing.T, tensors []tensor, metadata map[string]string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "model.safetensors")
	var specs []safetensors.Spec
	for _, x := range tensors {
		specs = append(specs, safetensors.Spec{Name: x.name, DType: x.dtype, Shape: x.shape})
	}
	w, err := safetensors.Create(path, specs, metadata, safetensors.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for i, x := range tensors {
		if err := w.WriteAt(i, x.data, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	return path
}

// quantized makes a layer of the given shape from random bf16 numbers.
func quantized(t *testing.T, format string, shape []int64, o quant.Options) *quant.State {
	t.Helper()
	f, err := quant.Lookup(format)
	if err != nil {
		t.Fatal(err)
	}
	n := shape[0] * shape[1]
	r := rand.New(rand.NewPCG(1, 2))
	source := make([]byte, 0, 2*n)
	for range n {
		source = binary.LittleEndian.AppendUint16(source, dtype.F32ToBF16(float32(r.NormFloat64())))
	}
	s, _, err := quant.Quantize(f, source, dtype.BF16, shape, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// parts are the tensors of a layer as bitsandbytes writes them.
func parts(t *testing.T, weight string, s *quant.State) []tensor {
	t.Helper()
	target := Target{Format: s.Format, Blocksize: s.Blocksize, Nested: s.Nested != nil, Storage: dtype.U8, Convention: bitsandbytes}
	var all []tensor
	for _, o := range target.Outputs(weight, s.Shape, s.DType) {
		x := tensor{o.Spec.Name, o.Spec.DType, o.Spec.Shape, s.Packed}
		if o.Part != Packed {
			raw, err := Encode(o.Part, weight, s)
			if err != nil {
				t.Fatal(err)
			}
			x.data = raw
		}
		if o.Spec.Late {
			x.shape = []int64{int64(len(x.data))}
		}
		all = append(all, x)
	}
	return all
}

// decoded reads a whole layer as bf16.
func decoded(t *testing.T, l *Layer) []byte {
	t.Helper()
	d, err := l.Decoder()
	if err != nil {
		t.Fatal(err)
	}
	n := l.State.Elements()
	out := make([]byte, 2*n)
	var codes []byte
	// In uneven pieces, so that reads start and end inside blocks and bytes.
	for first, piece := int64(0), int64(1); first < n; piece = piece*3 + 1 {
		count := min(piece, n-first)
		if err := d.Read(out[2*first:2*(first+count)], dtype.BF16, first, count, &codes); err != nil {
			t.Fatal(err)
		}
		first += count
	}
	return out
}

// want is the whole layer decoded from memory.
func want(t *testing.T, s *quant.State) []byte {
	t.Helper()
	out := make([]byte, 2*s.Elements())
	if err := s.DequantizeRange(out, dtype.BF16, 0, s.Elements(), 1); err != nil {
		t.Fatal(err)
	}
	return out
}

func rename(all []tensor, f func(string) string) []tensor {
	out := slices.Clone(all)
	for i := range out {
		out[i].name = f(out[i].name)
	}
	return out
}

// Every way in which layers were seen in published files opens and decodes to the same values.
func TestVariants(t *testing.T) {
	for _, format := range []string{"nf4", "fp4"} {
		for _, nested := range []bool{false, true} {
			s := quantized(t, format, []int64{96, 130}, quant.Options{Blocksize: 64, Nested: nested})
			base := parts(t, "a.b.weight", s)
			plain := tensor{"a.b.bias", dtype.BF16, []int64{96}, make([]byte, 192)}
			reshape := func(d dtype.DType, shape ...int64) []tensor {
				out := slices.Clone(base)
				out[0].dtype, out[0].shape = d, shape
				return out
			}
			bytesOf := int64(len(s.Packed))
			for name, file := range map[string][]tensor{
				"as written":   append(slices.Clone(base), plain),
				"row":          reshape(dtype.U8, 1, bytesOf),
				"int8":         reshape(dtype.I8, bytesOf, 1),
				"bf16 storage": reshape(dtype.BF16, bytesOf/2, 1),
				"f16 storage":  reshape(dtype.F16, bytesOf/2, 1),
				"f32 storage":  reshape(dtype.F32, bytesOf/4, 1),
				"prefix":       rename(base, func(n string) string { return "model.diffusion_model." + n }),
				"bare":         rename(base, func(n string) string { return strings.TrimPrefix(n, "a.b.") }),
				"parameter":    rename(base, func(n string) string { return strings.Replace(n, "a.b.weight", "experts.gate_up_proj", 1) }),
				"gptqmodel": rename(base, func(n string) string {
					n = strings.TrimSuffix(n, ".bitsandbytes__"+format)
					return strings.Replace(n, "weight.", "weight_", 1)
				}),
				"no quant_map": slices.DeleteFunc(slices.Clone(base), func(x tensor) bool { return strings.HasSuffix(x.name, ".quant_map") }),
			} {
				t.Run(format+"/"+name, func(t *testing.T) {
					m, err := Open(write(t, file, nil))
					if err != nil {
						t.Fatal(err)
					}
					defer m.Close()
					if len(m.Layers) != 1 {
						t.Fatalf("%d layers", len(m.Layers))
					}
					l := m.Layers[0]
					if l.State.Format.Name != format || l.Nested != nested || !slices.Equal(l.State.Shape, s.Shape) || l.State.DType != dtype.BF16 {
						t.Errorf("layer %+v", l)
					}
					if wanted := (name == "gptqmodel"); (l.Convention == gptqmodel) != wanted {
						t.Errorf("convention %q", l.Convention)
					}
					if m.Layer(file[0].name) != l {
						t.Errorf("no layer named %q", file[0].name)
					}
					if !bytes.Equal(decoded(t, l), want(t, s)) {
						t.Error("values differ")
					}
					if wanted := len(file) - len(l.Parts); len(m.Plain) != wanted {
						t.Errorf("%d plain tensors, want %d", len(m.Plain), wanted)
					}
				})
			}
		}
	}
}

func TestShapeNullReadsAsOneRow(t *testing.T) {
	s := quantized(t, "nf4", []int64{8, 64}, quant.Options{Blocksize: 64})
	file := parts(t, "w.weight", s)
	last := &file[len(file)-1]
	last.data = bytes.Replace(last.data, []byte(`[8, 64]`), []byte(`null`), 1)
	last.shape = []int64{int64(len(last.data))}
	m, err := Open(write(t, file, nil))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if got := m.Layers[0].State.Shape; !slices.Equal(got, []int64{512}) {
		t.Errorf("shape %v", got)
	}
}

// LLM.int8: value = code · SCB / 127.
func TestInt8(t *testing.T) {
	codes := []byte{127, 0x81, 1, 64, 0, 0xff} // 127 -127 1 / 64 0 -1
	scb := binary.LittleEndian.AppendUint32(nil, 0x40000000)
	scb = binary.LittleEndian.AppendUint32(scb, 0x3f000000) // 2.0, 0.5
	file := []tensor{
		{"l.weight", dtype.I8, []int64{2, 3}, codes},
		{"l.SCB", dtype.F32, []int64{2}, scb},
		{"l.weight_format", dtype.U8, []int64{}, []byte{0}},
	}
	m, err := Open(write(t, file, nil))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	d, err := m.Layers[0].Decoder()
	if err != nil {
		t.Fatal(err)
	}
	out := make([]byte, 2*6)
	var memory []byte
	if err := d.Read(out, dtype.F16, 0, 6, &memory); err != nil {
		t.Fatal(err)
	}
	for i, want := range []float32{2, -2, 2.0 / 127, 64 * 0.5 / 127, 0, -0.5 / 127} {
		if got := dtype.GetF32(out[2*i:], dtype.F16); got != dtype.F16ToF32(dtype.F32ToF16(want)) {
			t.Errorf("element %d: %v, want %v", i, got, want)
		}
	}
	file[2].data = []byte{2}
	if _, err := Open(write(t, file, nil)); err == nil || !strings.Contains(err.Error(), "row-major") {
		t.Errorf("col_turing: %v", err)
	}
}

// A layer whose parts contradict each other is refused, with the tensor's name in the error.
func TestBrokenLayers(t *testing.T) {
	for _, c := range []struct {
		name   string
		nested bool
		change func(file []tensor) []tensor
		want   string
	}{
		{"absmax too short", false, func(f []tensor) []tensor {
			f[1].shape, f[1].data = []int64{f[1].shape[0] - 1}, f[1].data[4:]
			return f
		}, `"w.weight.absmax"`},
		{"absmax missing", false, func(f []tensor) []tensor { return slices.Delete(f, 1, 2) }, "no absmax"},
		{"codes missing", false, func(f []tensor) []tensor { return f[1:] }, `"w.weight" are missing`},
		{"codes too short", false, func(f []tensor) []tensor {
			f[0].shape, f[0].data = []int64{f[0].shape[0] - 1, 1}, f[0].data[1:]
			return f
		}, `"w.weight" has`},
		{"codes of a strange dtype", false, func(f []tensor) []tensor {
			f[0].dtype, f[0].shape = dtype.I64, []int64{f[0].shape[0] / 8, 1}
			return f
		}, "dtype I64"},
		{"name and JSON disagree", false, func(f []tensor) []tensor {
			f[3].name = strings.Replace(f[3].name, "nf4", "fp4", 1)
			return f
		}, `format "nf4"`},
		{"JSON broken", false, func(f []tensor) []tensor {
			f[3].data[0] = 'x'
			return f
		}, "quant_state"},
		{"nested_absmax missing", true, func(f []tensor) []tensor { return slices.Delete(f, 2, 3) }, "no nested_absmax"},
		{"nested absmax plain", true, func(f []tensor) []tensor {
			f[1].dtype = dtype.I8
			return f
		}, `"w.weight.absmax" is I8`},
		{"described twice", false, func(f []tensor) []tensor {
			g := f[3]
			g.name = "w.weight_quant_state"
			return append(f, g)
		}, "described twice"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := quantized(t, "nf4", []int64{64, 64}, quant.Options{Blocksize: 64, Nested: c.nested})
			_, err := Open(write(t, c.change(parts(t, "w.weight", s)), nil))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %s", err, c.want)
			}
		})
	}
}

func TestComfyDescriptionsAreChecked(t *testing.T) {
	s := quantized(t, "nf4", []int64{64, 64}, quant.Options{Blocksize: 64, Nested: true})
	file := parts(t, "w.weight", s)
	text := ComfyJSON("w.weight", s)
	file = append(file, tensor{"w.comfy_quant", dtype.U8, []int64{int64(len(text))}, text})
	good := ComfyMetadata{}
	good.Add("w.weight", s)
	orphan := ComfyMetadata{"w": good["w"], "gone": good["w"]}
	wrong := ComfyMetadata{"w": bytes.Replace(good["w"], []byte(`"block_size":64`), []byte(`"block_size":128`), 1)}
	for _, c := range []struct {
		metadata ComfyMetadata
		want     string
	}{{good, ""}, {orphan, `"gone"`}, {wrong, "block_size is 128"}} {
		m, err := Open(write(t, file, c.metadata.Apply(map[string]string{"format": "pt"})))
		if err != nil {
			t.Fatal(err)
		}
		problems := m.CheckComfy()
		m.Close()
		if c.want == "" && len(problems) > 0 || c.want != "" && (len(problems) != 1 || !strings.Contains(problems[0].Error(), c.want)) {
			t.Errorf("problems %v, want %q", problems, c.want)
		}
		if _, ok := m.Layers[0].Parts[ComfyQuant]; !ok || len(m.Plain) != 0 {
			t.Error("comfy_quant does not belong to its layer")
		}
	}
}
