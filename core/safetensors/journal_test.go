package safetensors

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"testing"
	"time"

	"github.com/gquant/gquant/core/dtype"
)

// resumeSpecs has a tensor for each of 64 work items; item i fills its tensor with byte i+1.
const (
	resumeItems = 64
	resumeSize  = 10_000
)

func resumeSpecs() (specs []Spec, data [][]byte) {
	for i := range resumeItems {
		specs = append(specs, Spec{Name: fmt.Sprintf("t%02d", i), DType: dtype.U8, Shape: []int64{resumeSize}})
		data = append(data, bytes.Repeat([]byte{byte(i + 1)}, resumeSize))
	}
	return specs, data
}

// createResumable starts or continues the job with that key.
func createResumable(t *testing.T, path, key string) *Writer {
	t.Helper()
	specs, _ := resumeSpecs()
	w, err := Create(path, specs, nil, CreateOptions{Resume: key})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Abort(true) })
	return w
}

func doItems(t *testing.T, w *Writer, items ...int) {
	t.Helper()
	_, data := resumeSpecs()
	for _, i := range items {
		if err := w.WriteAt(i, data[i], 0); err != nil {
			t.Fatal(err)
		}
		if err := w.MarkDone(i); err != nil {
			t.Fatal(err)
		}
	}
}

func doneItems(w *Writer) (items []int) {
	for i := range resumeItems {
		if w.Done(i) {
			items = append(items, i)
		}
	}
	return items
}

// finish does what is left, checking that what is done has its data.
func finish(t *testing.T, w *Writer, path string) {
	t.Helper()
	specs, data := resumeSpecs()
	for i := range resumeItems {
		if !w.Done(i) {
			doItems(t, w, i)
		}
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	wantFile(t, path, specs, data, nil)
	wantNames(t, filepath.Dir(path), filepath.Base(path))
}

func TestResume(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m")
	w := createResumable(t, path, "key\n1")
	doItems(t, w, 5, 1, 63, 5)
	if err := w.Abort(true); err != nil {
		t.Fatal(err)
	}
	w = createResumable(t, path, "key\n1")
	if got := doneItems(w); !reflect.DeepEqual(got, []int{1, 5, 63}) {
		t.Fatalf("second run: %v are done", got)
	}
	doItems(t, w, 0)
	if err := w.Abort(true); err != nil {
		t.Fatal(err)
	}
	w = createResumable(t, path, "key\n1")
	if got := doneItems(w); !reflect.DeepEqual(got, []int{0, 1, 5, 63}) {
		t.Fatalf("third run: %v are done", got)
	}
	finish(t, w, path)
}

// TestResumeStartsOver: a partial file that is not this job's must not be continued.
func TestResumeStartsOver(t *testing.T) {
	specs, _ := resumeSpecs()
	renamed := append([]Spec{}, specs...)
	renamed[0].Name = "u00" // same sizes, other header
	larger := append([]Spec{{Name: "x", DType: dtype.U8, Shape: []int64{1}}}, specs...)
	for _, c := range []struct {
		what  string
		specs []Spec
		key   string
		spoil func(path string) error
	}{
		{"other key", specs, "other", nil},
		{"no key", specs, "", nil},
		{"other size", larger, "key", nil},
		{"other header", renamed, "key", nil},
		{"no journal", specs, "key", func(p string) error { return os.Remove(p + ".partial.journal") }},
		{"empty journal", specs, "key", func(p string) error { return os.Truncate(p+".partial.journal", 0) }},
		{"torn first line", specs, "key", func(p string) error { return os.Truncate(p+".partial.journal", 20) }},
		{"cut partial file", specs, "key", func(p string) error { return os.Truncate(p+".partial", 5000) }},
		{"no partial file", specs, "key", func(p string) error { return os.Remove(p + ".partial") }},
	} {
		path := filepath.Join(t.TempDir(), "m")
		w := createResumable(t, path, "key")
		doItems(t, w, 7)
		if err := w.Abort(true); err != nil {
			t.Fatal(err)
		}
		if c.spoil != nil {
			if err := c.spoil(path); err != nil {
				t.Fatal(err)
			}
		}
		w, err := Create(path, c.specs, nil, CreateOptions{Resume: c.key})
		if err != nil {
			t.Fatalf("%s: %v", c.what, err)
		}
		if w.Done(7) {
			t.Errorf("%s: item 7 counts as done", c.what)
		}
		if err := w.Commit(); err != nil {
			t.Fatalf("%s: %v", c.what, err)
		}
		b, err := os.ReadFile(path)
		if err != nil || bytes.IndexByte(b[4096+4096:], 8) >= 0 {
			t.Errorf("%s: item 7's data are still there, error %v", c.what, err)
		}
		wantNames(t, filepath.Dir(path), "m")
	}
}

// TestTornJournal spoils the end of a journal in the ways that a crash can.
func TestTornJournal(t *testing.T) {
	for _, c := range []struct {
		end  string
		want []int
	}{
		{"1", []int{5}}, // the start of "12\n"
		{"12\n3", []int{5, 12}},
		{"12\n\x00\x00\x00", []int{5, 12}}, // the file had grown, the data were not there yet
		{"\x00\x00\n12\n", []int{5}},
		{"-3\n12\n", []int{5}},
		{"\n", []int{5}},
		{"99999999999999999999\n12\n", []int{5}},
	} {
		path := filepath.Join(t.TempDir(), "m")
		w := createResumable(t, path, "key")
		doItems(t, w, 5)
		if err := w.Abort(true); err != nil {
			t.Fatal(err)
		}
		j, err := os.OpenFile(path+".partial.journal", os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := j.WriteString(c.end); err != nil {
			t.Fatal(err)
		}
		j.Close()
		w = createResumable(t, path, "key")
		if got := doneItems(w); !reflect.DeepEqual(got, c.want) {
			t.Errorf("end %q: %v are done, want %v", c.end, got, c.want)
		}
		// The next line must not be glued to the torn one.
		doItems(t, w, 2)
		if err := w.Abort(true); err != nil {
			t.Fatal(err)
		}
		w = createResumable(t, path, "key")
		if got, want := doneItems(w), append([]int{2}, c.want...); !reflect.DeepEqual(got, want) {
			t.Errorf("end %q: after one more item %v are done, want %v", c.end, got, want)
		}
	}
}

// TestJournalAfterData: a line may appear in the journal only after the data were made durable.
func TestJournalAfterData(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m")
	w := createResumable(t, path, "key")
	head, err := os.ReadFile(path + ".partial.journal")
	if err != nil {
		t.Fatal(err)
	}
	journalHas := func(want string) {
		t.Helper()
		if b, err := os.ReadFile(path + ".partial.journal"); err != nil || string(b) != string(head)+want {
			t.Errorf("the journal is %q, want %q behind its head, error %v", b, want, err)
		}
	}
	doItems(t, w, 1, 2)
	journalHas("") // not yet: the second has not passed
	w.journal.last = time.Now().Add(-2 * journalPause)
	doItems(t, w, 3)
	journalHas("1\n2\n3\n")
	doItems(t, w, 4)
	journalHas("1\n2\n3\n")
	if err := w.Abort(true); err != nil {
		t.Fatal(err)
	}
	journalHas("1\n2\n3\n4\n")
}

// The tests below run this test binary again as another process.
const (
	roleVariable = "SAFETENSORS_TEST_ROLE"
	pathVariable = "SAFETENSORS_TEST_PATH"
)

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role != "" {
		roles[role](os.Getenv(pathVariable))
		return
	}
	os.Exit(m.Run())
}

var roles = map[string]func(path string){"work": workForever}

func runRole(role, path string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleVariable+"="+role, pathVariable+"="+path)
	cmd.Stderr = os.Stderr
	return cmd
}

// workForever does a job's items, slowly, prints each, and waits at the last one to be killed.
func workForever(path string) {
	specs, data := resumeSpecs()
	w, err := Create(path, specs, nil, CreateOptions{Resume: "key"})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for i := range resumeItems - 1 {
		if w.Done(i) {
			continue
		}
		if err := w.WriteAt(i, data[i], 0); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		w.journal.mu.Lock()
		w.journal.last = time.Time{} // every item is due
		w.journal.mu.Unlock()
		if err := w.MarkDone(i); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("done", i)
		time.Sleep(time.Millisecond)
	}
	select {}
}

// TestKilled kills a job several times in the middle and then finishes it.
func TestKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m")
	reported := -1
	for round := range 4 {
		cmd := runRole("work", path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var item int
			if _, err := fmt.Sscanf(lines.Text(), "done %d", &item); err != nil {
				t.Fatal(lines.Text())
			}
			if item <= reported {
				t.Errorf("item %d was done again, %d had been reported", item, reported)
			}
			if reported = item; item >= 10*(round+1) {
				break
			}
		}
		if round == 0 && runtime.GOOS == "linux" { // it is at work now
			specs, _ := resumeSpecs()
			_, err := Create(path, specs, nil, CreateOptions{Resume: "key"})
			wantError(t, "two processes", err, "is being written by another process")
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		wantNames(t, filepath.Dir(path), "m.partial", "m.partial.journal")
	}
	w := createResumable(t, path, "key")
	done := doneItems(w)
	if len(done) <= reported {
		t.Errorf("%v are done, item %d was the last reported", done, reported)
	}
	p := make([]byte, resumeSize)
	_, data := resumeSpecs()
	f, err := os.Open(path + ".partial")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, i := range done {
		if _, err := f.ReadAt(p, w.dataStart+w.tensors[i].Begin); err != nil || !bytes.Equal(p, data[i]) {
			t.Errorf("item %d counts as done without its data, error %v", i, err)
		}
	}
	finish(t, w, path)
}
