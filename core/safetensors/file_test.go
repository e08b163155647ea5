package safetensors

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gquant/gquant/core/dtype"
)

// write makes a file in a new folder and returns its path.
func write(t *testing.T, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, b, 0o666); err != nil {
		t.Fatal(err)
	}
	return path
}

// wantError checks that an error came, with all these parts.
func wantError(t *testing.T, what string, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: no error, want one with %q", what, parts)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%s: error %q lacks %q", what, err, part)
		}
	}
}

const twoTensors = `{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[4],"data_offsets":[3,7]}}`

func TestFileReadAt(t *testing.T) {
	path := write(t, "m.safetensors", fileBytes(twoTensors, []byte("abcdefg")))
	f, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if start := int64(8 + len(twoTensors)); f.Path() != path || f.DataStart() != start || f.Size() != start+7 {
		t.Errorf("path %s, data start %d, size %d", f.Path(), f.DataStart(), f.Size())
	}
	b := f.Header().Find("b")
	p := make([]byte, 2)
	if err := f.ReadAt(b, p, 1); err != nil || string(p) != "ef" {
		t.Errorf("read %q, error %v", p, err)
	}
	if err := f.ReadAt(b, p[:0], 4); err != nil {
		t.Errorf("reading nothing at the end: %v", err)
	}
	for _, off := range []int64{-1, 3, 5, 1 << 62, -1 << 63} {
		wantError(t, fmt.Sprint("read at ", off), f.ReadAt(b, p, off), path, `tensor "b"`, fmt.Sprintf("cannot read 2 bytes at %d, it has 4", off))
	}
	for _, foreign := range []Tensor{{"x", dtype.U8, nil, 0, 8}, {"x", dtype.U8, nil, -1, 3}, {"x", dtype.U8, nil, 5, 4}} {
		wantError(t, "foreign tensor", f.ReadAt(&foreign, nil, 0), path, `tensor "x"`, "are not in this file")
	}
	f.Close()
	if err := f.ReadAt(b, p, 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("read after Close: %v", err)
	}
}

// TestTruncatedWhileReading cuts the file after its header was checked.
func TestTruncatedWhileReading(t *testing.T) {
	path := write(t, "m.safetensors", fileBytes(twoTensors, []byte("abcdefg")))
	f, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.Truncate(path, f.Size()-2); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 4)
	err = f.ReadAt(f.Header().Find("b"), p, 0)
	wantError(t, "cut file", err, path, `tensor "b"`, "file truncated while reading",
		fmt.Sprintf("it ends at byte %d, 4 bytes were wanted at %d", f.Size()-2, f.DataStart()+3))
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("error %v is no ErrUnexpectedEOF", err)
	}
	if err := f.ReadAt(f.Header().Find("a"), p[:3], 0); err != nil || string(p[:3]) != "abc" {
		t.Errorf("the part that is left: %q, error %v", p[:3], err)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	_, err := Open(dir)
	wantError(t, "folder", err, dir, "is not a regular file but a directory")
	_, err = Open(os.DevNull)
	wantError(t, "device", err, os.DevNull, "is not a regular file but a device")
	_, err = Open(filepath.Join(dir, "none"))
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(write(t, "m.safetensors", fileBytes("{}", nil)), link); err != nil {
		t.Fatal(err)
	}
	if f, err := Open(link); err != nil {
		t.Errorf("symbolic link: %v", err)
	} else {
		f.Close()
	}
}

// TestHeaderLengthInFile: the length is checked before so much is allocated, against the limit and the file.
func TestHeaderLengthInFile(t *testing.T) {
	for _, c := range []struct {
		n    uint64
		size int64
		want string
	}{
		{100_000_001, 1 << 40, "the header's length is 100000001, expected at most 100000000"},
		{1<<64 - 1, 1 << 40, "the header's length is 18446744073709551615, expected at most 100000000"},
		{93, 100, "the header's length is 93, but only 92 bytes follow"},
	} {
		_, _, err := readHeader(bytes.NewReader(binary.LittleEndian.AppendUint64(nil, c.n)), c.size, walkDefault)
		wantError(t, fmt.Sprint("length ", c.n), err, c.want)
		if !errors.As(err, new(*FormatError)) {
			t.Errorf("length %d: %v is no FormatError", c.n, err)
		}
	}
}

// TestReadHeaderTruncated: a file may have become shorter since its size was asked for.
func TestReadHeaderTruncated(t *testing.T) {
	b := fileBytes(twoTensors, []byte("abcdefg"))
	for _, n := range []int{0, 7, 8, 20} {
		_, _, err := readHeader(bytes.NewReader(b[:n]), int64(len(b)), walkDefault)
		if !errors.Is(err, io.EOF) {
			t.Errorf("%d bytes left: error %v", n, err)
		}
	}
}
