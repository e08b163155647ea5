package safetensors

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"reflect"
	"slices"
	"testing"
)

// FuzzHeader parses a header for a data section of a given size with both back ends. They must agree in the
// verdict, in the words of the error and in the result; what is accepted must obey the rules, and must be the same
// after Layout has written it again.
func FuzzHeader(f *testing.F) {
	for _, c := range conformanceCases(f) {
		if len(c.File) < 8 {
			continue
		}
		if n := binary.LittleEndian.Uint64(c.File); n <= uint64(len(c.File)-8) {
			f.Add(c.File[8:8+n], uint64(len(c.File)-8)-n)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, dataBytes uint64) {
		before := bytes.Clone(b)
		h, err := parseHeader(b, dataBytes, walkDefault)
		std, stdErr := parseHeader(b, dataBytes, walkStd)
		if (err == nil) != (stdErr == nil) || err != nil && err.Error() != stdErr.Error() {
			t.Fatalf("verdicts differ:\ndefault: %v\nencoding/json: %v", err, stdErr)
		}
		if !bytes.Equal(b, before) {
			t.Fatal("the parser wrote to its input")
		}
		if err != nil {
			return
		}
		if !reflect.DeepEqual(h, std) {
			t.Fatalf("results differ:\ndefault: %v\nencoding/json: %v", h, std)
		}
		checkHeader(t, h, dataBytes)
		again(t, h)
	})
}

// checkHeader restates the rules for accepted headers.
func checkHeader(t *testing.T, h *Header, dataBytes uint64) {
	end := int64(0)
	for i := range h.Tensors {
		tensor := &h.Tensors[i]
		size, err := SizeOf(tensor.DType, tensor.Shape)
		if err != nil || size != tensor.Bytes() || tensor.Begin != end || h.Find(tensor.Name) != tensor {
			t.Fatalf("tensor %d is %+v: size %d (%v), expected to begin at %d", i, tensor, size, err, end)
		}
		end = tensor.End
	}
	if uint64(end) != dataBytes {
		t.Fatalf("the tensors end at %d of %d", end, dataBytes)
	}
}

// again writes an accepted header with Layout and parses the result.
func again(t *testing.T, h *Header) {
	if h.Find("") != nil {
		return // may be read but not written
	}
	specs := make([]Spec, len(h.Tensors))
	var dataBytes uint64
	for i, tensor := range h.Tensors {
		specs[i] = Spec{Name: tensor.Name, DType: tensor.DType, Shape: tensor.Shape}
		dataBytes += uint64(tensor.Bytes())
	}
	header, tensors, err := Layout(specs, h.Metadata)
	if err != nil {
		t.Fatalf("Layout refuses an accepted header: %v", err)
	}
	if n := binary.LittleEndian.Uint64(header); n != uint64(len(header)-8) || len(header)%dataAlign != 0 {
		t.Fatalf("Layout gives %d bytes and says %d", len(header), n)
	}
	h2, err := ParseHeader(header[8:], dataBytes)
	if err != nil {
		t.Fatalf("the parser refuses Layout's header %s: %v", header[8:], err)
	}
	if len(h2.Metadata) != len(h.Metadata) || len(h.Metadata) > 0 && !reflect.DeepEqual(h2.Metadata, h.Metadata) {
		t.Fatalf("metadata changed: %q, then %q", h.Metadata, h2.Metadata)
	}
	byName := func(a, b Tensor) int { return cmp.Compare(a.Name, b.Name) }
	slices.SortFunc(tensors, byName)
	slices.SortFunc(h2.Tensors, byName)
	if !reflect.DeepEqual(tensors, h2.Tensors) && len(tensors) > 0 {
		t.Fatalf("tensors changed: %v, then %v", tensors, h2.Tensors)
	}
}

// FuzzIndex does the same for the index of a sharded model.
func FuzzIndex(f *testing.F) {
	f.Add([]byte(`{"metadata":{"total_size":4,"x":null,"y":true,"z":1.5e3},"weight_map":{"a":"b.safetensors"}}`))
	f.Add([]byte(`{"weight_map":{"a":"../b","a":"b"}}`))
	f.Add([]byte(`{"metadata":{"a":[]},"weight_map":{}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseIndex(b, walkDefault)
		std, stdErr := parseIndex(b, walkStd)
		if (err == nil) != (stdErr == nil) || err != nil && err.Error() != stdErr.Error() {
			t.Fatalf("verdicts differ:\ndefault: %v\nencoding/json: %v", err, stdErr)
		}
		if !reflect.DeepEqual(m, std) {
			t.Fatalf("results differ:\ndefault: %v\nencoding/json: %v", m, std)
		}
		for _, shard := range m {
			if err := checkFileName(shard); err != nil {
				t.Fatal(err)
			}
		}
	})
}
