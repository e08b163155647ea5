package safetensors

import (
	"fmt"
	"strconv"
	"strings"
)

// FormatError says how a file breaks the rules of the format: the bytes were read, but they are not valid.
// Failures to read at all are errors of package os instead.
type FormatError struct {
	Path    string // the file; "" where only header bytes were given
	Tensor  string // the tensor concerned; "" for the file as a whole
	Field   string // dtype, shape or data_offsets; "" for the tensor as a whole
	Offset  int64  // byte of the header's JSON (or of the index) where it was noticed; -1 when it has no single place
	Problem string // what was found and what was expected
}

func (e *FormatError) Error() string {
	var b strings.Builder
	if e.Path != "" {
		b.WriteString(e.Path + ": ")
	}
	if e.Tensor != "" || e.Field != "" {
		b.WriteString("tensor " + quote(e.Tensor) + ": ")
	}
	if e.Field != "" {
		b.WriteString(e.Field + ": ")
	}
	b.WriteString(e.Problem)
	if e.Offset >= 0 {
		fmt.Fprintf(&b, " (JSON byte %d)", e.Offset)
	}
	return b.String()
}

func problem(format string, args ...any) *FormatError {
	return &FormatError{Offset: -1, Problem: fmt.Sprintf(format, args...)}
}

func problemAt(offset int, format string, args ...any) *FormatError {
	return &FormatError{Offset: int64(offset), Problem: fmt.Sprintf(format, args...)}
}

// withPath names the file that an error is about.
func withPath(path string, err error) error {
	if err == nil {
		return nil
	}
	if e, ok := err.(*FormatError); ok {
		e.Path = path
		return e
	}
	return fmt.Errorf("%s: %w", path, err)
}

// quote shows a string from a file in an error: on one line, and cut, since a name can be 100 MB long.
func quote(s string) string {
	const most = 200
	if len(s) > most {
		return strconv.Quote(s[:most]) + fmt.Sprintf("… (%d bytes)", len(s))
	}
	return strconv.Quote(s)
}
