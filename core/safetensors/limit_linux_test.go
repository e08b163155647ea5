package safetensors

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func init() { roles["limited"] = workLimited }

// workLimited tries to write a file beyond the process's limit.
func workLimited(path string) {
	limit := syscall.Rlimit{Cur: 100_000, Max: 100_000}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	specs, _ := resumeSpecs()
	_, err := Create(path, specs, nil, CreateOptions{Resume: "key"})
	fmt.Println(err)
	err = WriteIndex(path+".json", map[string]string{strings.Repeat("x", 200_000): "a"}, 0, false)
	fmt.Println(err)
	w, err := Create(path, specs[:5], nil, CreateOptions{})
	if err == nil {
		err = w.Commit()
	}
	fmt.Println(err)
}

// TestSizeLimit: too large a file is an error at once and not a signal later.
func TestSizeLimit(t *testing.T) {
	dir := t.TempDir()
	out, err := runRole("limited", filepath.Join(dir, "m")).Output()
	if err != nil {
		t.Fatalf("the process ended with %v, output %s", err, out)
	}
	lines := strings.Split(string(out), "\n")
	if len(lines) != 4 || lines[2] != "<nil>" {
		t.Fatalf("output %s", out)
	}
	for i, need := range []string{"the file needs 648192 bytes", "the file needs 200"} {
		if !strings.Contains(lines[i], "cannot write") && !strings.Contains(lines[i], "writing") ||
			!strings.Contains(lines[i], need) || !strings.Contains(lines[i], "only 100000 to one file") || !strings.Contains(lines[i], "file too large") {
			t.Errorf("error %d: %s", i, lines[i])
		}
	}
	wantNames(t, dir, "m")
}
