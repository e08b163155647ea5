package safetensors

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gquant/gquant/core/dtype"
)

var lateSpecs = []Spec{
	{Name: "z.state", DType: dtype.U8, Shape: []int64{1000}, Late: true},
	{Name: "weight", DType: dtype.F32, Shape: []int64{2}},
	{Name: "a.state", DType: dtype.U8, Shape: []int64{30}, Late: true},
	{Name: "codes", DType: dtype.U8, Shape: []int64{3}},
}

var (
	lateWeight = []byte{1, 2, 3, 4, 5, 6, 7, 8}
	lateCodes  = []byte{9, 10, 11}
)

// checkLate opens the file and compares every tensor.
func checkLate(t *testing.T, path string, metadata map[string]string) {
	t.Helper()
	f, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for name, want := range map[string][]byte{"weight": lateWeight, "codes": lateCodes, "a.state": []byte("short"), "z.state": []byte(`{"k": 1}`)} {
		tensor := f.Header().Find(name)
		if tensor == nil || tensor.Bytes() != int64(len(want)) {
			t.Fatalf("%s: %+v", name, tensor)
		}
		got := make([]byte, len(want))
		if err := f.ReadAt(tensor, got, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if got := f.Header().Metadata["m"]; got != metadata["m"] {
		t.Errorf("metadata %q", got)
	}
	if f.DataStart()%4096 != 0 {
		t.Errorf("data start at %d", f.DataStart())
	}
}

func TestLateTensorsEndAtTheirTrueLength(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m.safetensors")
	w, err := Create(path, lateSpecs, map[string]string{"m": "a long placeholder"}, CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.WriteAt(1, lateWeight, 0), w.WriteLate(0, []byte(`{"k": 1}`)), w.WriteAt(3, lateCodes, 0), w.WriteLate(2, []byte("short"))); err != nil {
		t.Fatal(err)
	}
	if text, err := w.Late(0); err != nil || string(text) != `{"k": 1}` {
		t.Errorf("Late gives %q, %v", text, err)
	}
	w.SetMetadata(map[string]string{"m": "true"})
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	checkLate(t, path, map[string]string{"m": "true"})
	if info, err := os.Stat(path); err != nil || info.Size() != w.Size() || w.Tensors()[0].Bytes() != 8 {
		t.Errorf("the writer says %d bytes and %+v, the file has %v", w.Size(), w.Tensors()[0], info)
	}
}

func TestLateTextsSurviveAnInterruption(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m.safetensors")
	metadata := map[string]string{"m": "same"}
	w, err := Create(path, lateSpecs, metadata, CreateOptions{Resume: "job"})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.WriteAt(1, lateWeight, 0), w.WriteLate(0, []byte(`{"k": 1}`)), w.MarkDone(0), w.Abort(true)); err != nil {
		t.Fatal(err)
	}
	if w, err = Create(path, lateSpecs, metadata, CreateOptions{Resume: "job"}); err != nil {
		t.Fatal(err)
	}
	if !w.Done(0) {
		t.Fatal("nothing was kept")
	}
	if text, err := w.Late(0); err != nil || string(text) != `{"k": 1}` {
		t.Errorf("Late gives %q, %v", text, err)
	}
	if err := errors.Join(w.WriteAt(3, lateCodes, 0), w.WriteLate(2, []byte("short")), w.Commit()); err != nil {
		t.Fatal(err)
	}
	checkLate(t, path, metadata)
	if left, _ := filepath.Glob(path + ".*"); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestLateTensorErrors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m.safetensors")
	for _, s := range []Spec{{Name: "x", DType: dtype.I8, Shape: []int64{4}, Late: true}, {Name: "x", DType: dtype.U8, Shape: []int64{4, 1}, Late: true}} {
		if _, err := Create(path, []Spec{s}, nil, CreateOptions{}); err == nil || !strings.Contains(err.Error(), "late") {
			t.Errorf("%+v: %v", s, err)
		}
	}
	w, err := Create(path, lateSpecs, nil, CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{
		"too long":        w.WriteLate(2, bytes.Repeat([]byte{'x'}, 31)),
		"space at end":    w.WriteLate(2, []byte("x ")),
		"not late":        w.WriteLate(1, []byte("x")),
		"no such tensor":  w.WriteLate(9, []byte("x")),
		"negative number": w.WriteLate(-1, []byte("x")),
	} {
		if err == nil {
			t.Errorf("%s: no error", what)
		}
	}
	// A header that outgrows its place is an error, and the file does not appear.
	w.SetMetadata(map[string]string{"m": strings.Repeat("x", 5000)})
	if err := w.Commit(); err == nil || !strings.Contains(err.Error(), "header") {
		t.Errorf("long metadata: %v", err)
	}
	if err := w.Abort(false); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file exists: %v", err)
	}
}
