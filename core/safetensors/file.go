package safetensors

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// File is one open safetensors file. Any number of goroutines may read from it at once.
type File struct {
	file      *os.File
	path      string
	header    *Header
	dataStart int64
	size      int64
}

// Open opens a file and checks its header and its size. Errors about its content are of type *FormatError.
// The caller closes it.
func Open(path string) (*File, error) {
	file, info, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	h, start, err := readHeader(file, info.Size(), walkDefault)
	if err != nil {
		file.Close()
		return nil, withPath(path, err)
	}
	return &File{file: file, path: path, header: h, dataStart: start, size: info.Size()}, nil
}

// openRegular opens a file for reading and refuses what is none: directories, FIFOs, devices.
func openRegular(path string) (*os.File, os.FileInfo, error) {
	// Without O_NONBLOCK the opening of a FIFO would wait for a writer; regular files ignore the flag.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file but a %s", path, fileKind(info.Mode()))
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// readHeader reads and checks the length prefix and the header of a file of size bytes. The length is bounded by
// the file before memory is allocated for it.
func readHeader(r io.ReaderAt, size int64, walk walker) (*Header, int64, error) {
	if size < 8 {
		return nil, 0, problem("the file has %d bytes, too few for the header's length", size)
	}
	var prefix [8]byte
	if _, err := r.ReadAt(prefix[:], 0); err != nil {
		return nil, 0, fmt.Errorf("reading the header's length: %w", err)
	}
	n := binary.LittleEndian.Uint64(prefix[:])
	if n > maxHeader {
		return nil, 0, problem("the header's length is %d, expected at most %d; this may be no safetensors file", n, maxHeader)
	}
	if n > uint64(size-8) {
		return nil, 0, problem("the header's length is %d, but only %d bytes follow; the file is cut off, or no safetensors file", n, size-8)
	}
	b := make([]byte, n)
	if _, err := r.ReadAt(b, 8); err != nil && n > 0 {
		return nil, 0, fmt.Errorf("reading the header's %d bytes: %w", n, err)
	}
	start := 8 + int64(n)
	h, err := parseHeader(b, uint64(size-start), walk)
	return h, start, err
}

func fileKind(m os.FileMode) string {
	switch {
	case m.IsDir():
		return "directory"
	case m&os.ModeNamedPipe != 0:
		return "FIFO"
	case m&os.ModeSocket != 0:
		return "socket"
	case m&os.ModeDevice != 0:
		return "device"
	}
	return m.Type().String()
}

// Path is the path that the file was opened with.
func (f *File) Path() string { return f.path }

// Header is the file's header; it stays valid after Close.
func (f *File) Header() *Header { return f.header }

// DataStart is the offset of the data section in the file.
func (f *File) DataStart() int64 { return f.dataStart }

// Size is the size of the file in bytes.
func (f *File) Size() int64 { return f.size }

// ReadAt fills p with the tensor's bytes from off on, where 0 is the tensor's first byte. It reads all of p or
// fails; a range outside the tensor is an error.
func (f *File) ReadAt(t *Tensor, p []byte, off int64) error {
	if t.Begin < 0 || t.End < t.Begin || t.End > f.size-f.dataStart {
		return fmt.Errorf("%s: tensor %s: its bytes [%d, %d] are not in this file", f.path, quote(t.Name), t.Begin, t.End)
	}
	if off < 0 || off > t.Bytes() || int64(len(p)) > t.Bytes()-off {
		return fmt.Errorf("%s: tensor %s: cannot read %d bytes at %d, it has %d", f.path, quote(t.Name), len(p), off, t.Bytes())
	}
	at := f.dataStart + t.Begin + off
	n, err := f.file.ReadAt(p, at) // reads on after short reads
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: tensor %s: file truncated while reading: it ends at byte %d, %d bytes were wanted at %d: %w",
			f.path, quote(t.Name), at+int64(n), len(p), at, io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("tensor %s: reading %d bytes at file offset %d: %w", quote(t.Name), len(p), at, err)
}

// Close closes the file. Reads that are under way fail or complete.
func (f *File) Close() error { return f.file.Close() }
