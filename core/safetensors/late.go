package safetensors

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// A late tensor is written at the place and with the length that the first layout gave it, filled up with spaces.
// So it survives an interrupted run like any other data. settle then cuts the spaces off, moves the late tensors
// together and writes the header that is true.

// WriteLate gives a late tensor its text: not longer than its Spec says, and not ending in a space.
func (w *Writer) WriteLate(i int, text []byte) error {
	if i < 0 || i >= len(w.tensors) || !w.specs[i].Late {
		return fmt.Errorf("%s: there is no late tensor %d", w.out.path, i)
	}
	t := &w.tensors[i]
	if int64(len(text)) > t.Bytes() || bytes.HasSuffix(text, []byte{' '}) {
		return fmt.Errorf("%s: tensor %s: cannot take a text of %d bytes, expected at most %d and no space at the end", w.out.path, quote(t.Name), len(text), t.Bytes())
	}
	return w.WriteAt(i, append(slices.Clone(text), bytes.Repeat([]byte{' '}, int(t.Bytes())-len(text))...), 0)
}

// Late returns the text of a late tensor that is written, in this run or in one that this one resumes.
func (w *Writer) Late(i int) ([]byte, error) {
	if i < 0 || i >= len(w.tensors) || !w.specs[i].Late {
		return nil, fmt.Errorf("%s: there is no late tensor %d", w.out.path, i)
	}
	t := &w.tensors[i]
	text := make([]byte, t.Bytes())
	if _, err := w.out.file.ReadAt(text, w.dataStart+t.Begin); err != nil {
		return nil, fmt.Errorf("tensor %s: reading it back: %w", quote(t.Name), err)
	}
	return bytes.TrimRight(text, " "), nil
}

// SetMetadata replaces the header metadata given to Create, at Commit. The header must not become longer by it.
func (w *Writer) SetMetadata(metadata map[string]string) { w.metadata = metadata }

// settle gives the late tensors their true lengths and writes the final header.
func (w *Writer) settle() error {
	_, order, err := arrangeSpecs(w.specs)
	if err != nil {
		return err
	}
	tensors := slices.Clone(w.tensors)
	first := slices.IndexFunc(order, func(i int) bool { return w.specs[i].Late })
	var texts []byte
	size := w.size
	if first >= 0 {
		start := tensors[order[first]].Begin
		for _, i := range order[first:] {
			text, err := w.Late(i)
			if err != nil {
				return err
			}
			t := &tensors[i]
			t.Begin = start + int64(len(texts))
			texts = append(texts, text...)
			t.End = start + int64(len(texts))
			t.Shape = []int64{int64(len(text))}
		}
		size = w.dataStart + start + int64(len(texts))
	}
	header, err := encodeHeader(tensors, order, w.metadata)
	if err != nil {
		return err
	}
	if header, err = padHeader(header, int(w.dataStart)); err != nil {
		return err
	}
	if first >= 0 {
		// From here on the file is no longer one that an interrupted run could continue.
		if err := os.Remove(w.journalPath); err == nil {
			if err := syncFolder(filepath.Dir(w.journalPath)); err != nil {
				return err
			}
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if _, err := w.out.file.WriteAt(texts, size-int64(len(texts))); err != nil {
			return err
		}
		if err := w.out.file.Truncate(size); err != nil {
			return err
		}
	}
	if _, err := w.out.file.WriteAt(header, 0); err != nil {
		return err
	}
	w.tensors, w.size = tensors, size
	return nil
}
