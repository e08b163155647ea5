package verify

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/safetensors"
)

// file writes a safetensors file of F32 vectors.
func file(t *testing.T, vectors map[string][]float32) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "m.safetensors")
	var specs []safetensors.Spec
	for name, v := range vectors {
		specs = append(specs, safetensors.Spec{Name: name, DType: dtype.F32, Shape: []int64{int64(len(v))}})
	}
	w, err := safetensors.Create(path, specs, nil, safetensors.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for i, s := range specs {
		var raw []byte
		for _, f := range vectors[s.Name] {
			raw = binary.LittleEndian.AppendUint32(raw, math.Float32bits(f))
		}
		if err := w.WriteAt(i, raw, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	return path
}

func near(a, b float64) bool { return math.Abs(a-b) <= 1e-12*math.Max(math.Abs(a), math.Abs(b)) }

func TestDiffNumbers(t *testing.T) {
	nan, inf := float32(math.NaN()), float32(math.Inf(1))
	a := file(t, map[string][]float32{"l.0.w": {3, 4, 0}, "l.1.w": {1, 1}, "same": {5, nan, inf}, "nan": {1, nan}, "x": {1}, "shape": {1, 2}, "zero": {0, 0}})
	b := file(t, map[string][]float32{"l.0.w": {3, 3, 2}, "l.1.w": {1, 2}, "same": {5, nan, inf}, "nan": {1, 2}, "y": {1}, "shape": {1, 2, 3}, "zero": {0, 1}})
	c, err := Diff(t.Context(), a, b, 0)
	if err != nil {
		t.Fatal(err)
	}
	byName := map[string]Difference{}
	for _, d := range c.Tensors {
		byName[d.Name] = d
	}
	// By hand: differences 0, 1, -2; Σa² = 25, Σe² = 5, Σb² = 22, Σab = 21.
	d := byName["l.0.w"]
	if d.Equal || d.MaxError != 2 || d.MeanError != 1 || !near(d.MSE, 5.0/3) || !near(d.SNR, 10*math.Log10(5)) || !near(d.Cosine, 21/math.Sqrt(25*22)) {
		t.Errorf("l.0.w: %+v", d)
	}
	if d := byName["same"]; !d.Equal || d.SNR != maxSNR || d.Cosine != 1 || d.Nonfinite != 2 {
		t.Errorf("same: %+v", d)
	}
	if d := byName["nan"]; d.Equal || d.Nonfinite != 1 {
		t.Errorf("nan: %+v", d)
	}
	if d := byName["zero"]; d.Equal || d.SNR != -maxSNR || d.Cosine != 0 {
		t.Errorf("zero: %+v", d)
	}
	if c.Tensors[0].Name != "zero" || c.Tensors[1].Name != "l.1.w" {
		t.Errorf("not worst first: %+v", c.Tensors)
	}
	if !slices.Equal(c.OnlyA, []string{"x"}) || !slices.Equal(c.OnlyB, []string{"y"}) || len(c.Mismatch) != 1 {
		t.Errorf("only A %v, only B %v, mismatch %v", c.OnlyA, c.OnlyB, c.Mismatch)
	}
	i := slices.IndexFunc(c.Kinds, func(d Difference) bool { return d.Name == "l.*.w" })
	if i < 0 || c.Kinds[i].Elements != 5 || !near(c.Kinds[i].MSE, 6.0/5) {
		t.Errorf("kinds %+v", c.Kinds)
	}
	if c.Changed.Elements != 9 || c.Changed.MaxError != 2 {
		t.Errorf("changed %+v", c.Changed)
	}
	if _, err := Diff(t.Context(), a, file(t, map[string][]float32{"other": {1}}), 0); err == nil {
		t.Error("models without a common tensor were compared")
	}
}

func TestDiffDoesNotDependOnThreads(t *testing.T) {
	n := 3*chunkElements + 77
	va, vb := make([]float32, n), make([]float32, n)
	for i := range va {
		va[i], vb[i] = float32(math.Sin(float64(i))), float32(math.Sin(float64(i))*1.01)
	}
	a, b := file(t, map[string][]float32{"w": va}), file(t, map[string][]float32{"w": vb})
	one, err := Diff(t.Context(), a, b, 1)
	if err != nil {
		t.Fatal(err)
	}
	many, err := Diff(t.Context(), a, b, 5)
	if err != nil {
		t.Fatal(err)
	}
	if one.Tensors[0] != many.Tensors[0] {
		t.Errorf("%+v and %+v", one.Tensors[0], many.Tensors[0])
	}
}

func TestVerifyCountsAndHashes(t *testing.T) {
	zeros := make([]float32, 64)
	path := file(t, map[string][]float32{"ok": {0, 1}, "bad": {float32(math.NaN()), float32(math.Inf(-1)), 1}, "zeros": zeros, "short": {0}})
	r, err := Run(t.Context(), path, Options{SHA256: true})
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(r.Suspects, func(a, b Counts) int { return strings.Compare(a.Name, b.Name) })
	if !slices.Equal(r.Suspects, []Counts{{"bad", 1, 1, false}, {"zeros", 0, 0, true}}) {
		t.Errorf("suspects %+v", r.Suspects)
	}
	if len(r.Problems) != 0 {
		t.Errorf("problems %v", r.Problems)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if sum := sha256.Sum256(b); r.Files[0].SHA256 != hex.EncodeToString(sum[:]) || r.Files[0].Bytes != int64(len(b)) {
		t.Errorf("files %+v", r.Files)
	}
	if r, err = Run(t.Context(), path, Options{Strict: true}); err != nil || len(r.Problems) != 2 {
		t.Errorf("strict: %v %v", r.Problems, err)
	}
}

func TestVerifyReportsStrayStatistics(t *testing.T) {
	r, err := Run(t.Context(), file(t, map[string][]float32{"l.weight": {1}, "l.weight.absmax": {1}}), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Problems) != 1 || !strings.Contains(r.Problems[0], `"l.weight.absmax" belongs to no layer`) {
		t.Errorf("problems %v", r.Problems)
	}
	if _, err := Run(t.Context(), filepath.Join(t.TempDir(), "none"), Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}
