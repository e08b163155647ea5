package convert

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/gquant/gquant/core/checkpoint"
	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/quant"
	"github.com/gquant/gquant/core/safetensors"
)

// source writes a model of three blocks in bf16: linear layers with rows that are no multiple of the blocksize, one
// of them with an odd number of elements, norms and an embedding.
func source(t *testing.T) (path string, weights map[string][]byte) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "model.safetensors")
	var specs []safetensors.Spec
	for block := range 3 {
		for name, shape := range map[string][]int64{
			"attn.q.weight": {1024, 1024}, "mlp.up.weight": {129, 161}, "mlp.down.weight": {96, 130}, "norm.weight": {96}, "attn.q.bias": {1024},
		} {
			specs = append(specs, safetensors.Spec{Name: fmt.Sprintf("blocks.%d.%s", block, name), DType: dtype.BF16, Shape: shape})
		}
	}
	specs = append(specs, safetensors.Spec{Name: "embed_tokens.weight", DType: dtype.BF16, Shape: []int64{500, 96}})
	metadata := map[string]string{"author": "nobody"}
	w, err := safetensors.Create(path, specs, metadata, safetensors.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	weights = map[string][]byte{}
	for i, s := range specs {
		// The content depends on the name only, not on the order of the map above.
		r := rand.New(rand.NewPCG(uint64(len(s.Name)), uint64(s.Name[7])))
		n := int64(1)
		for _, d := range s.Shape {
			n *= d
		}
		var raw []byte
		for range n {
			raw = binary.LittleEndian.AppendUint16(raw, dtype.F32ToBF16(float32(r.NormFloat64())*0.02))
		}
		weights[s.Name] = raw
		if err := w.WriteAt(i, raw, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	return path, weights
}

// run converts a model and returns the report.
func run(t *testing.T, path string, o Options) (*Report, error) {
	t.Helper()
	m, err := checkpoint.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	p, err := New(m, o)
	if err != nil {
		return nil, err
	}
	return Run(context.Background(), p, quant.CPU{}, func(int64) {})
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What lands in the file is what quant makes of the whole weight at once, and everything else is copied.
func TestConvertedLayersEqualQuantizedWeights(t *testing.T) {
	path, weights := source(t)
	for _, c := range []struct {
		mode      string
		blocksize int
		nested    bool
		storage   string
	}{{"nf4", 64, false, "uint8"}, {"nf4", 64, true, "bf16"}, {"fp4", 4096, true, "f32"}, {"fp4", 32, false, "int8"}} {
		o := DefaultOptions()
		o.Mode, o.BlockSize, o.DoubleQuant, o.QuantStorage, o.Convention = c.mode, c.blocksize, c.nested, c.storage, "comfy"
		o.Output = filepath.Join(t.TempDir(), "out.safetensors")
		report, err := run(t, path, o)
		if err != nil {
			t.Fatal(err)
		}
		if report.Quantized != 9 || report.Copied != 7 {
			t.Errorf("%d quantized, %d copied", report.Quantized, report.Copied)
		}
		m, err := checkpoint.Open(o.Output)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		if problems := m.CheckComfy(); len(problems) > 0 {
			t.Error(problems)
		}
		if m.Metadata()["author"] != "nobody" {
			t.Errorf("metadata %v", m.Metadata())
		}
		if len(m.Layers) != 9 || len(m.Plain) != 7 {
			t.Fatalf("%d layers, %d plain tensors", len(m.Layers), len(m.Plain))
		}
		for _, l := range m.Layers {
			want, _, err := quant.Quantize(l.State.Format, weights[l.Name], dtype.BF16, l.State.Shape, quant.Options{Blocksize: c.blocksize, Nested: c.nested})
			if err != nil {
				t.Fatal(err)
			}
			packed := make([]byte, want.PackedBytes())
			if err := l.ReadPacked(packed, 0); err != nil {
				t.Fatal(err)
			}
			got, err := l.Load()
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(packed, want.Packed) || !slices.Equal(got.FlatAbsmax(), want.FlatAbsmax()) || !bytes.Equal(got.JSON(), want.JSON()) {
				t.Errorf("%s %s differs from quantizing it whole", c.mode, l.Name)
			}
			if _, ok := l.Parts[checkpoint.ComfyQuant]; !ok {
				t.Errorf("%s has no .comfy_quant", l.Name)
			}
		}
		for _, e := range m.Plain {
			got := make([]byte, e.Bytes())
			if err := e.Read(got, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, weights[e.Name]) {
				t.Errorf("%s was not copied", e.Name)
			}
		}
	}
}

func TestOutputDoesNotDependOnThreads(t *testing.T) {
	path, _ := source(t)
	var first []byte
	for _, threads := range []int{1, 2, 7} {
		o := DefaultOptions()
		o.DoubleQuant, o.Threads = true, threads
		o.Output = filepath.Join(t.TempDir(), "out.safetensors")
		if _, err := run(t, path, o); err != nil {
			t.Fatal(err)
		}
		if got := read(t, o.Output); first == nil {
			first = got
		} else if !bytes.Equal(got, first) {
			t.Errorf("%d threads give other bytes", threads)
		}
	}
}

func TestShards(t *testing.T) {
	path, _ := source(t)
	folder := t.TempDir()
	o := DefaultOptions()
	o.Output = filepath.Join(folder, "out.safetensors")
	if _, err := run(t, path, o); err != nil {
		t.Fatal(err)
	}
	o.Output = filepath.Join(folder, "sharded.safetensors")
	o.MaxShardSize = 700_000
	report, err := run(t, path, o)
	if err != nil {
		t.Fatal(err)
	}
	index := filepath.Join(folder, "sharded.safetensors.index.json")
	if len(report.Outputs) < 4 || report.Outputs[len(report.Outputs)-1] != index {
		t.Fatalf("outputs %v", report.Outputs)
	}
	whole, err := checkpoint.Open(filepath.Join(folder, "out.safetensors"))
	if err != nil {
		t.Fatal(err)
	}
	defer whole.Close()
	sharded, err := checkpoint.Open(index)
	if err != nil {
		t.Fatal(err)
	}
	defer sharded.Close()
	if problems := sharded.CheckComfy(); len(problems) > 0 {
		t.Error(problems)
	}
	if len(sharded.Layers) != len(whole.Layers) || len(sharded.Entries()) != len(whole.Entries()) {
		t.Fatalf("%d layers, %d tensors", len(sharded.Layers), len(sharded.Entries()))
	}
	for _, e := range whole.Entries() {
		other, ok := sharded.Find(e.Name)
		if !ok {
			t.Errorf("%s is missing", e.Name)
			continue
		}
		a, b := make([]byte, e.Bytes()), make([]byte, other.Bytes())
		if err := errors.Join(e.Read(a, 0), other.Read(b, 0)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) {
			t.Errorf("%s differs", e.Name)
		}
	}
	for _, f := range sharded.Files() {
		if f.Size() > o.MaxShardSize+16384 {
			t.Errorf("%s has %d bytes", f.Path(), f.Size())
		}
	}
}

// A run that is stopped after any number of chunks and then resumed gives the bytes of an undisturbed one, and
// one that is stopped without --resume leaves nothing.
func TestInterruptedRuns(t *testing.T) {
	path, _ := source(t)
	o := DefaultOptions()
	o.DoubleQuant, o.Threads = true, 1
	o.Output = filepath.Join(t.TempDir(), "whole.safetensors")
	if _, err := run(t, path, o); err != nil {
		t.Fatal(err)
	}
	want := read(t, o.Output)
	for _, resume := range []bool{false, true} {
		for _, stopAfter := range []int64{0, 1, 5, 15} {
			folder := t.TempDir()
			o.Output, o.Resume = filepath.Join(folder, "out.safetensors"), resume
			m, err := checkpoint.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			p, err := New(m, o)
			if err != nil {
				t.Fatal(err)
			}
			ctx, stop := context.WithCancel(context.Background())
			var chunks atomic.Int64
			if stopAfter == 0 {
				stop()
			}
			_, err = Run(ctx, p, quant.CPU{}, func(int64) {
				if chunks.Add(1) == stopAfter {
					stop()
				}
			})
			stop()
			m.Close()
			if !errors.Is(err, context.Canceled) {
				t.Fatalf("error %v", err)
			}
			left, err := os.ReadDir(folder)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(o.Output); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the output exists after an interrupted run: %v", err)
			}
			if !resume {
				if len(left) != 0 {
					t.Errorf("an interrupted run left %v", left)
				}
				continue
			}
			report, err := run(t, path, o)
			if err != nil {
				t.Fatal(err)
			}
			if stopAfter == 15 && report.Resumed == 0 {
				t.Error("nothing was resumed")
			}
			if !bytes.Equal(read(t, o.Output), want) {
				t.Errorf("resumed after %d chunks: other bytes", stopAfter)
			}
			if left, _ := os.ReadDir(folder); len(left) != 1 {
				t.Errorf("the resumed run left %v", left)
			}
		}
	}
}

func TestResumeStartsOverWhenThePlanDiffers(t *testing.T) {
	path, _ := source(t)
	folder := t.TempDir()
	o := DefaultOptions()
	o.Resume, o.Output = true, filepath.Join(folder, "out.safetensors")
	m, err := checkpoint.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	p, err := New(m, o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var chunks atomic.Int64
	if _, err := Run(ctx, p, quant.CPU{}, func(int64) {
		if chunks.Add(1) == 15 {
			stop()
		}
	}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	stop()
	o.Mode = "fp4"
	report, err := run(t, path, o)
	if err != nil {
		t.Fatal(err)
	}
	if report.Resumed != 0 {
		t.Errorf("%d items of an nf4 run were taken for fp4", report.Resumed)
	}
}

func TestNonfiniteWeights(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bad.safetensors")
	raw := make([]byte, 4*64*64)
	for i, f := range []float64{1, math.NaN(), 3, math.Inf(-1)} {
		binary.LittleEndian.PutUint32(raw[4*i:], math.Float32bits(float32(f)))
	}
	w, err := safetensors.Create(path, []safetensors.Spec{{Name: "l.weight", DType: dtype.F32, Shape: []int64{64, 64}}}, nil, safetensors.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.WriteAt(0, raw, 0), w.Commit()); err != nil {
		t.Fatal(err)
	}
	o := DefaultOptions()
	o.Output = filepath.Join(t.TempDir(), "out.safetensors")
	o.Strict = true
	if _, err := run(t, path, o); err == nil || !strings.Contains(err.Error(), `"l.weight" has 2 elements`) {
		t.Errorf("strict: %v", err)
	}
	if left, _ := os.ReadDir(filepath.Dir(o.Output)); len(left) != 0 {
		t.Errorf("a failed run left %v", left)
	}
	o.Strict = false
	report, err := run(t, path, o)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(report.Nonfinite, []Nonfinite{{"l.weight", 2}}) {
		t.Errorf("nonfinite %v", report.Nonfinite)
	}
}

// Quantizing what is quantized already changes nothing; there is nothing left to do.
func TestQuantizedInput(t *testing.T) {
	path, _ := source(t)
	o := DefaultOptions()
	o.Output = filepath.Join(t.TempDir(), "once.safetensors")
	o.Exclude = []string{"blocks.2.*"}
	if _, err := run(t, path, o); err != nil {
		t.Fatal(err)
	}
	once := o.Output
	o.Output, o.Exclude = filepath.Join(t.TempDir(), "twice.safetensors"), nil
	report, err := run(t, once, o)
	if err != nil {
		t.Fatal(err)
	}
	if report.Quantized != 3 {
		t.Errorf("%d quantized", report.Quantized)
	}
	direct := DefaultOptions()
	direct.Output = filepath.Join(t.TempDir(), "direct.safetensors")
	if _, err := run(t, path, direct); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(read(t, o.Output), read(t, direct.Output)) {
		t.Error("quantizing in two steps gives another file than in one")
	}
	twice := o.Output
	o.Output = filepath.Join(t.TempDir(), "thrice.safetensors")
	if _, err := run(t, twice, o); err == nil || !strings.Contains(err.Error(), "nothing to quantize") || !strings.Contains(err.Error(), "already nf4") {
		t.Errorf("error %v", err)
	}
}

func TestDequantizeIsTheWayBack(t *testing.T) {
	path, _ := source(t)
	o := DefaultOptions()
	o.DoubleQuant = true
	o.Output = filepath.Join(t.TempDir(), "q.safetensors")
	if _, err := run(t, path, o); err != nil {
		t.Fatal(err)
	}
	m, err := checkpoint.Open(o.Output)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	plain := filepath.Join(t.TempDir(), "plain.safetensors")
	p, err := NewDequantize(m, 0, Options{Output: plain})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Run(context.Background(), p, quant.CPU{}, func(int64) {}); err != nil {
		t.Fatal(err)
	}
	back, err := checkpoint.Open(plain)
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	if len(back.Layers) != 0 || len(back.Plain) != 16 {
		t.Fatalf("%d layers, %d tensors", len(back.Layers), len(back.Plain))
	}
	if _, ok := back.Metadata()["_quantization_metadata"]; ok {
		t.Error("the plain model still has quantization metadata")
	}
	for _, l := range m.Layers {
		d, err := l.Decoder()
		if err != nil {
			t.Fatal(err)
		}
		want, got := make([]byte, 2*l.State.Elements()), make([]byte, 2*l.State.Elements())
		var codes []byte
		e, ok := back.Find(l.Name)
		if !ok || e.DType != dtype.BF16 || !slices.Equal(e.Shape, l.State.Shape) {
			t.Fatalf("%s: %v", l.Name, e.Tensor)
		}
		if err := errors.Join(d.Read(want, dtype.BF16, 0, l.State.Elements(), &codes), e.Read(got, 0)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s differs", l.Name)
		}
	}
}
