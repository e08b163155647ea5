package safetensors

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"github.com/gquant/gquant/core/dtype"
)

// randomSpecs makes tensors of every type, some empty, and their data.
func randomSpecs(rnd *rand.Rand, n int) (specs []Spec, data [][]byte) {
	all := dtype.All()
	for i := range n {
		s := Spec{Name: fmt.Sprintf("t%d.%c", i, rune(0x20+rnd.IntN(0x5f))), DType: all[rnd.IntN(len(all))]}
		for range rnd.IntN(4) {
			s.Shape = append(s.Shape, int64(rnd.IntN(20)))
		}
		if s.DType.Bits()%8 != 0 {
			s.Shape = append(s.Shape, 4)
		}
		size, err := SizeOf(s.DType, s.Shape)
		if err != nil {
			panic(err)
		}
		b := make([]byte, size)
		for j := range b {
			b[j] = byte(rnd.Uint32())
		}
		specs, data = append(specs, s), append(data, b)
	}
	return specs, data
}

// piece is one WriteAt.
type piece struct {
	tensor   int
	from, to int64
}

func randomPieces(rnd *rand.Rand, data [][]byte) (all []piece) {
	for i, b := range data {
		for at := int64(0); at < int64(len(b)); {
			n := min(1+rnd.Int64N(3000), int64(len(b))-at)
			all = append(all, piece{i, at, at + n})
			at += n
		}
	}
	rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

// wantFile checks that a file holds these tensors, aligned, and nothing else.
func wantFile(t *testing.T, path string, specs []Spec, data [][]byte, metadata map[string]string) {
	t.Helper()
	f, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if len(f.Header().Tensors) != len(specs) || !reflect.DeepEqual(f.Header().Metadata, metadata) {
		t.Fatalf("%d tensors, metadata %q", len(f.Header().Tensors), f.Header().Metadata)
	}
	for i, s := range specs {
		tensor := f.Header().Find(s.Name)
		if tensor == nil || tensor.DType != s.DType || len(tensor.Shape) != len(s.Shape) || tensor.Bytes() != int64(len(data[i])) {
			t.Fatalf("tensor %d is %+v, want %+v", i, tensor, s)
		}
		if align := int64(max(8, s.DType.Bits()) / 8); (f.DataStart()+tensor.Begin)%align != 0 {
			t.Errorf("%s %s is not aligned: it starts at %d", s.DType, s.Name, f.DataStart()+tensor.Begin)
		}
		got := make([]byte, tensor.Bytes())
		if err := f.ReadAt(tensor, got, 0); err != nil || !bytes.Equal(got, data[i]) {
			t.Fatalf("tensor %d: data differ, error %v", i, err)
		}
	}
}

func TestRoundTrip(t *testing.T) {
	for seed := range uint64(30) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		specs, data := randomSpecs(rnd, rnd.IntN(40))
		metadata := map[string]string{"seed": fmt.Sprint(seed), "text": "\"\\\n"}
		dir := t.TempDir()
		path := filepath.Join(dir, "m.safetensors")
		w, err := Create(path, specs, metadata, CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		work := make(chan piece)
		var workers sync.WaitGroup
		for range 4 {
			workers.Go(func() {
				for p := range work {
					if err := w.WriteAt(p.tensor, data[p.tensor][p.from:p.to], p.from); err != nil {
						t.Error(err)
					}
				}
			})
		}
		for _, p := range randomPieces(rnd, data) {
			work <- p
		}
		close(work)
		workers.Wait()
		if _, err := os.Lstat(path); err == nil {
			t.Error("the file is visible before Commit")
		}
		if err := w.Commit(); err != nil {
			t.Fatal(err)
		}
		wantFile(t, path, specs, data, metadata)
		if info, err := os.Stat(path); err != nil || info.Size() != w.Size() {
			t.Errorf("size %d, Size() says %d", info.Size(), w.Size())
		}
		wantNames(t, dir, "m.safetensors")
		if err := w.Abort(false); err != nil {
			t.Errorf("Abort after Commit: %v", err)
		}
		wantNames(t, dir, "m.safetensors")
		wantError(t, "second Commit", w.Commit(), path, "has ended")
		if len(specs) > 0 && len(data[0]) > 0 {
			if err := w.WriteAt(0, data[0][:1], 0); !errors.Is(err, os.ErrClosed) {
				t.Errorf("WriteAt after Commit: %v", err)
			}
		}
	}
}

var oneSpec = []Spec{{Name: "a", DType: dtype.U8, Shape: []int64{4}}}

func TestWriteAtBounds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m")
	w, err := Create(path, append(oneSpec, Spec{Name: "b", DType: dtype.U8, Shape: []int64{4}}), nil, CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort(false)
	for _, off := range []int64{-1, 3, 5, 1 << 62, -1 << 63} {
		wantError(t, fmt.Sprint("write at ", off), w.WriteAt(0, []byte("xy"), off), path, `tensor "a"`, fmt.Sprintf("cannot write 2 bytes at %d, it has 4", off))
	}
	for _, i := range []int{-1, 2} {
		wantError(t, fmt.Sprint("tensor ", i), w.WriteAt(i, nil, 0), path, fmt.Sprintf("there is no tensor %d", i))
	}
	wantError(t, "item", w.MarkDone(-1), "work item -1")
}

func TestCreateRefuses(t *testing.T) {
	dir := t.TempDir()
	existing := filepath.Join(dir, "m")
	if err := os.WriteFile(existing, []byte("old"), 0o666); err != nil {
		t.Fatal(err)
	}
	_, err := Create(existing, oneSpec, nil, CreateOptions{})
	if !errors.Is(err, os.ErrExist) {
		t.Errorf("existing file: error %v", err)
	}
	dangling := filepath.Join(dir, "dangling")
	if err := os.Symlink(filepath.Join(dir, "nothing"), dangling); err != nil {
		t.Fatal(err)
	}
	if _, err = Create(dangling, oneSpec, nil, CreateOptions{}); !errors.Is(err, os.ErrExist) {
		t.Errorf("dangling link: error %v", err)
	}
	for _, force := range []bool{false, true} {
		o := CreateOptions{Force: force}
		_, err = Create(dir, oneSpec, nil, o)
		wantError(t, "directory", err, dir, "is a directory")
		_, err = Create(os.DevNull, oneSpec, nil, o)
		wantError(t, "device", err, os.DevNull, "is a device")
		_, err = Create(filepath.Join(dir, "no", "m"), oneSpec, nil, o)
		wantError(t, "missing folder", err, "the folder "+filepath.Join(dir, "no")+" does not exist")
		_, err = Create(filepath.Join(existing, "m"), oneSpec, nil, o)
		wantError(t, "file as folder", err, existing+" is not a folder")
		_, err = Create("", oneSpec, nil, o)
		wantError(t, "no name", err, "no file name")
		_, err = Create(filepath.Join(dir, "n"), append(oneSpec, oneSpec...), nil, o)
		wantError(t, "bad specs", err, filepath.Join(dir, "n"), `two tensors have the name "a"`)
	}
	if err := os.Symlink(existing, filepath.Join(dir, "l.partial")); err != nil {
		t.Fatal(err)
	}
	_, err = Create(filepath.Join(dir, "l"), oneSpec, nil, CreateOptions{})
	wantError(t, "link as partial file", err, "l.partial is in the way")
	if b, err := os.ReadFile(existing); err != nil || string(b) != "old" {
		t.Errorf("the existing file holds %q, error %v", b, err)
	}
	wantNames(t, dir, "dangling", "l.partial", "m")
}

func TestForce(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "m")
	if err := os.WriteFile(path, []byte("old"), 0o666); err != nil {
		t.Fatal(err)
	}
	w, err := Create(path, oneSpec, nil, CreateOptions{Force: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.WriteAt(0, []byte("data"), 0); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(path); string(b) != "old" {
		t.Errorf("before Commit the file holds %q", b)
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	wantFile(t, path, oneSpec, [][]byte{[]byte("data")}, nil)
	wantNames(t, dir, "m")
}

// TestFileAppears: a file that another program makes while ours is written must survive.
func TestFileAppears(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "m")
	w, err := Create(path, oneSpec, nil, CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("theirs"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(); !errors.Is(err, os.ErrExist) {
		t.Errorf("Commit over a new file: error %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "theirs" {
		t.Errorf("the file holds %q", b)
	}
	if err := w.Abort(false); err != nil {
		t.Error(err)
	}
	wantNames(t, dir, "m")
}

func TestLinkNew(t *testing.T) {
	dir := folder(t, map[string][]byte{"from": []byte("1"), "there": []byte("2")})
	if err := linkNew(filepath.Join(dir, "from"), filepath.Join(dir, "there")); !errors.Is(err, os.ErrExist) {
		t.Errorf("onto an existing file: error %v", err)
	}
	if err := linkNew(filepath.Join(dir, "from"), filepath.Join(dir, "to")); err != nil {
		t.Error(err)
	}
	wantNames(t, dir, "there", "to")
}

func TestTwoWriters(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("writers lock each other out on Linux only")
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "m")
	for _, key := range []string{"", "key"} {
		w, err := Create(path, oneSpec, nil, CreateOptions{Resume: key})
		if err != nil {
			t.Fatal(err)
		}
		for _, other := range []string{"", "key"} {
			_, err := Create(path, oneSpec, nil, CreateOptions{Resume: other, Force: true})
			wantError(t, "second writer", err, path+" is being written by another process or job")
			if !errors.Is(err, syscall.EWOULDBLOCK) {
				t.Errorf("error %v is no EWOULDBLOCK", err)
			}
		}
		if err := w.WriteAt(0, []byte("data"), 0); err != nil {
			t.Fatal(err)
		}
		if err := w.Commit(); err != nil {
			t.Fatal(err)
		}
		wantFile(t, path, oneSpec, [][]byte{[]byte("data")}, nil)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	// Many at once: exactly one may win each round, and the file must be one writer's.
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			for range 20 {
				w, err := Create(path, oneSpec, nil, CreateOptions{Force: true})
				if err != nil {
					if !errors.Is(err, syscall.EWOULDBLOCK) {
						t.Error(err)
					}
					continue
				}
				if err := w.WriteAt(0, bytes.Repeat([]byte{byte(i)}, 4), 0); err != nil {
					t.Error(err)
				}
				if err := w.Commit(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	f, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 4)
	if err := f.ReadAt(f.Header().Find("a"), p, 0); err != nil || !bytes.Equal(p, bytes.Repeat(p[:1], 4)) {
		t.Errorf("the file holds %v, error %v", p, err)
	}
	wantNames(t, dir, "m")
}

// TestStalePartial: what a killed run left is replaced, not continued, and not written through: it may be a second
// name of a finished file.
func TestStalePartial(t *testing.T) {
	dir := folder(t, map[string][]byte{"finished": []byte("precious"), "m.partial.journal": []byte("junk")})
	path := filepath.Join(dir, "m")
	if err := os.Link(filepath.Join(dir, "finished"), path+".partial"); err != nil {
		t.Fatal(err)
	}
	w, err := Create(path, oneSpec, nil, CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	wantFile(t, path, oneSpec, [][]byte{make([]byte, 4)}, nil)
	if b, _ := os.ReadFile(filepath.Join(dir, "finished")); string(b) != "precious" {
		t.Errorf("the other name's file holds %q", b)
	}
	wantNames(t, dir, "finished", "m")
}

func TestAbort(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "m")
	for _, c := range []struct {
		key  string
		keep bool
		want []string
	}{
		{"", false, nil},
		{"", true, nil}, // nothing could resume it
		{"key", false, nil},
		{"key", true, []string{"m.partial", "m.partial.journal"}},
	} {
		w, err := Create(path, oneSpec, nil, CreateOptions{Resume: c.key})
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Abort(c.keep); err != nil {
			t.Error(err)
		}
		wantNames(t, dir, c.want...)
		if err := w.Abort(!c.keep); err != nil {
			t.Error(err)
		}
		wantNames(t, dir, c.want...)
		wantError(t, "Commit after Abort", w.Commit(), path, "has ended")
	}
}

// TestFailedSyncIsFinal: after the kernel has reported lost data once, a second sync succeeds; nothing may be
// recorded or committed then.
func TestFailedSyncIsFinal(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "m")
	w, err := Create(path, oneSpec, nil, CreateOptions{Resume: "key"})
	if err != nil {
		t.Fatal(err)
	}
	good := w.out.file
	if w.out.file, err = os.Open(os.DevNull); err != nil { // cannot be synced
		t.Fatal(err)
	}
	if err := w.MarkDone(3); err != nil {
		t.Fatal(err)
	}
	if err := w.journal.flush(); err == nil {
		t.Fatal("the sync did not fail")
	}
	w.out.file.Close()
	w.out.file = good
	if err := w.journal.flush(); err == nil {
		t.Error("the journal was written after a failed sync")
	}
	if err := w.Commit(); err == nil {
		t.Error("the file was committed after a failed sync")
	}
	if err := w.Abort(true); err == nil {
		t.Error("Abort does not tell that the journal is incomplete")
	}
	w, err = Create(path, oneSpec, nil, CreateOptions{Resume: "key"})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort(false)
	if w.Done(3) {
		t.Error("the item counts as done although its data were lost")
	}
}
