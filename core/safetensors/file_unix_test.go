//go:build unix

package safetensors

import (
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestOpenFIFO: opening a FIFO must not wait for a writer.
func TestOpenFIFO(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(path, 0o666); err != nil {
		t.Skip(err)
	}
	result := make(chan error, 1)
	go func() {
		_, err := Open(path)
		result <- err
	}()
	select {
	case err := <-result:
		wantError(t, "FIFO", err, path, "is not a regular file but a FIFO")
	case <-time.After(10 * time.Second):
		t.Fatal("Open hangs on a FIFO")
	}
}
