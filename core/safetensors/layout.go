package safetensors

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/gquant/gquant/core/dtype"
)

// dataAlign is where the data section may start: at a page, so that readers can use direct I/O and map tensors.
// The header is padded with spaces up to there.
const dataAlign = 4096

// Spec is a tensor to be written.
type Spec struct {
	Name  string
	DType dtype.DType
	Shape []int64
	// Late marks a text, of dtype U8 and one dimension, whose length is known only when everything else is
	// written: Shape is the greatest length, and Commit cuts the tensor to what WriteLate gave it.
	Late bool
}

// Layout decides where each tensor of a new file goes. header is the start of the file up to the data section,
// including the 8-byte length; tensors[i] belongs to specs[i].
//
// Equal input gives equal bytes. The data are in the Rust writer's order, descending by dtype and then ascending
// by name, with the late tensors behind all others; the data section starts at a multiple of 4096, so every tensor is aligned to its element. The JSON is
// compact, with "__metadata__" first and its keys sorted (the Rust writer leaves them in hash order).
//
// Names must be valid UTF-8, not empty, without control characters, and unique.
func Layout(specs []Spec, metadata map[string]string) (header []byte, tensors []Tensor, err error) {
	if len(specs)+len(metadata) > maxEntries {
		return nil, nil, fmt.Errorf("%d tensors and %d metadata keys, expected at most %d in all", len(specs), len(metadata), maxEntries)
	}
	tensors, order, err := arrangeSpecs(specs)
	if err != nil {
		return nil, nil, err
	}
	header, err = encodeHeader(tensors, order, metadata)
	if err != nil {
		return nil, nil, err
	}
	header, err = padHeader(header, (len(header)+dataAlign-1)/dataAlign*dataAlign)
	if err != nil {
		return nil, nil, err
	}
	return header, tensors, nil
}

// padHeader fills the header up with spaces to size bytes and notes its length at its start.
func padHeader(b []byte, size int) ([]byte, error) {
	if size-8 > maxHeader {
		return nil, fmt.Errorf("the header has %d bytes, expected at most %d; use several shards", size-8, maxHeader)
	}
	if len(b) > size {
		return nil, fmt.Errorf("the header has %d bytes, the space kept for it %d", len(b), size)
	}
	b = append(b, bytes.Repeat([]byte{' '}, size-len(b))...)
	binary.LittleEndian.PutUint64(b, uint64(size-8))
	return b, nil
}

// encodeHeader writes the JSON of the tensors in this order, behind 8 bytes for its length.
func encodeHeader(tensors []Tensor, order []int, metadata map[string]string) ([]byte, error) {
	b := make([]byte, 8, dataAlign)
	b = append(b, '{')
	if len(metadata) > 0 {
		b = append(b, `"`+metadataKey+`":{`...)
		for i, k := range slices.Sorted(maps.Keys(metadata)) {
			if !utf8.ValidString(k) || !utf8.ValidString(metadata[k]) {
				return nil, fmt.Errorf("metadata: the key %s or its value is not valid UTF-8", quote(k))
			}
			if i > 0 {
				b = append(b, ',')
			}
			b = appendString(b, k)
			b = append(b, ':')
			b = appendString(b, metadata[k])
		}
		b = append(b, '}')
	}
	for _, i := range order {
		if len(b) > 9 {
			b = append(b, ',')
		}
		b = tensors[i].appendJSON(b)
	}
	return append(b, '}'), nil
}

// arrangeSpecs checks the specs and places them in the data section. order lists them as they lie there.
func arrangeSpecs(specs []Spec) (tensors []Tensor, order []int, err error) {
	tensors = make([]Tensor, len(specs))
	order = make([]int, len(specs))
	sizes := make([]int64, len(specs))
	seen := make(map[string]struct{}, len(specs))
	for i, s := range specs {
		if err := checkName(s.Name); err != nil {
			return nil, nil, err
		}
		if _, dup := seen[s.Name]; dup {
			return nil, nil, fmt.Errorf("two tensors have the name %s", quote(s.Name))
		}
		seen[s.Name] = struct{}{}
		if sizes[i], err = SizeOf(s.DType, s.Shape); err != nil {
			return nil, nil, fmt.Errorf("tensor %s: %w", quote(s.Name), err)
		}
		if s.Late && (s.DType != dtype.U8 || len(s.Shape) != 1) {
			return nil, nil, fmt.Errorf("tensor %s: only a U8 tensor of one dimension can be late", quote(s.Name))
		}
		tensors[i] = Tensor{Name: s.Name, DType: s.DType, Shape: append([]int64{}, s.Shape...)}
		order[i] = i
	}
	slices.SortFunc(order, func(i, j int) int {
		a, b := &tensors[i], &tensors[j]
		if specs[i].Late != specs[j].Late {
			if specs[i].Late {
				return 1
			}
			return -1
		}
		return cmp.Or(cmp.Compare(b.DType, a.DType), cmp.Compare(a.Name, b.Name))
	})
	var end int64
	for _, i := range order {
		if sizes[i] > math.MaxInt64-maxHeader-dataAlign-end {
			return nil, nil, errors.New("all tensors together are larger than a file can be")
		}
		tensors[i].Begin, tensors[i].End = end, end+sizes[i]
		end += sizes[i]
	}
	return tensors, order, nil
}

// checkName says whether a tensor may be written under this name.
func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("a tensor has an empty name")
	case name == metadataKey:
		return errors.New("a tensor cannot have the name " + metadataKey)
	case !utf8.ValidString(name):
		return fmt.Errorf("the tensor name %s is not valid UTF-8", quote(name))
	case hasControl(name):
		return fmt.Errorf("the tensor name %s has a control character", quote(name))
	}
	return nil
}

func (t *Tensor) appendJSON(b []byte) []byte {
	b = appendString(b, t.Name)
	b = append(b, `:{"dtype":"`+t.DType.String()+`","shape":[`...)
	for i, dim := range t.Shape {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendInt(b, dim, 10)
	}
	b = strconv.AppendInt(append(b, `],"data_offsets":[`...), t.Begin, 10)
	b = strconv.AppendInt(append(b, ','), t.End, 10)
	return append(b, "]}"...)
}

// appendString writes a JSON string as serde_json does: nothing is escaped but quotes, backslashes and the
// characters below 0x20.
func appendString(b []byte, s string) []byte {
	b = append(b, '"')
	for i := range len(s) {
		switch c := s[i]; c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\b':
			b = append(b, `\b`...)
		case '\f':
			b = append(b, `\f`...)
		case '\n':
			b = append(b, `\n`...)
		case '\r':
			b = append(b, `\r`...)
		case '\t':
			b = append(b, `\t`...)
		default:
			if c < 0x20 {
				b = fmt.Appendf(b, `\u%04x`, c)
			} else {
				b = append(b, c)
			}
		}
	}
	return append(b, '"')
}
