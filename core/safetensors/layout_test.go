package safetensors

import (
	"strings"
	"testing"

	"github.com/gquant/gquant/core/dtype"
)

func TestLayoutBytes(t *testing.T) {
	specs := []Spec{
		{Name: "norm", DType: dtype.BF16, Shape: []int64{3}},
		{Name: "b\"\\é\u2028/", DType: dtype.U8, Shape: []int64{5, 1}},
		{Name: "a", DType: dtype.U8, Shape: nil},
		{Name: "steps", DType: dtype.I64, Shape: []int64{1}},
		{Name: "four", DType: dtype.F4, Shape: []int64{2}},
		{Name: "empty", DType: dtype.F32, Shape: []int64{0, 7}},
	}
	const json = `{"__metadata__":{"a":"\b\f\n\r\t\u0000\u001f` + "\x7f" + `","format":"pt"},` +
		`"steps":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},` +
		`"empty":{"dtype":"F32","shape":[0,7],"data_offsets":[8,8]},` +
		`"norm":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]},` +
		`"a":{"dtype":"U8","shape":[],"data_offsets":[14,15]},` +
		`"b\"\\é` + "\u2028" + `/":{"dtype":"U8","shape":[5,1],"data_offsets":[15,20]},` +
		`"four":{"dtype":"F4","shape":[2],"data_offsets":[20,21]}}`
	want := "\xf8\x0f\x00\x00\x00\x00\x00\x00" + json + strings.Repeat(" ", 4088-len(json))
	for range 20 { // map order must not show
		header, tensors, err := Layout(specs, map[string]string{"format": "pt", "a": "\b\f\n\r\t\x00\x1f\x7f"})
		if err != nil {
			t.Fatal(err)
		}
		if string(header) != want {
			t.Fatalf("got  %q\nwant %q", header, want)
		}
		for i, begin := range []int64{8, 15, 14, 0, 20, 8} {
			if tensors[i].Name != specs[i].Name || tensors[i].Begin != begin {
				t.Fatalf("tensor %d is %+v, want %s at %d", i, tensors[i], specs[i].Name, begin)
			}
		}
		if h, err := ParseHeader(header[8:], 21); err != nil || h.Metadata["a"] != "\b\f\n\r\t\x00\x1f\x7f" {
			t.Fatalf("own header: %v, error %v", h, err)
		}
	}
	header, _, err := Layout(nil, nil)
	if want := "\xf8\x0f\x00\x00\x00\x00\x00\x00{}" + strings.Repeat(" ", 4086); err != nil || string(header) != want {
		t.Errorf("nothing to write: %q, error %v", header, err)
	}
}

// TestLayoutPadding walks the header's length over a page border.
func TestLayoutPadding(t *testing.T) {
	sizes := map[int]bool{}
	for n := 3900; n < 4200; n++ {
		header, _, err := Layout([]Spec{{Name: strings.Repeat("n", n), DType: dtype.U8, Shape: nil}}, nil)
		if err != nil || len(header)%4096 != 0 {
			t.Fatalf("name of %d bytes: header of %d bytes, error %v", n, len(header), err)
		}
		if _, err := ParseHeader(header[8:], 1); err != nil {
			t.Fatalf("name of %d bytes: %v", n, err)
		}
		sizes[len(header)] = true
	}
	if len(sizes) != 2 || !sizes[4096] || !sizes[8192] {
		t.Errorf("header sizes %v, want 4096 and 8192", sizes)
	}
}

func TestLayoutErrors(t *testing.T) {
	one := func(name string, d dtype.DType, shape ...int64) []Spec {
		return []Spec{{Name: name, DType: d, Shape: shape}}
	}
	for _, c := range []struct {
		specs    []Spec
		metadata map[string]string
		want     string
	}{
		{one("", dtype.U8), nil, "a tensor has an empty name"},
		{one("__metadata__", dtype.U8), nil, "a tensor cannot have the name __metadata__"},
		{one("a\x00", dtype.U8), nil, `the tensor name "a\x00" has a control character`},
		{one("a\xff", dtype.U8), nil, `the tensor name "a\xff" is not valid UTF-8`},
		{append(one("a", dtype.U8), one("a", dtype.F32)...), nil, `two tensors have the name "a"`},
		{one("a", 0), nil, `tensor "a": dtype(0) is not a dtype of the format`},
		{one("a", dtype.F4, 3), nil, `tensor "a": 3 elements of 4 bits do not fill whole bytes`},
		{one("a", dtype.U8, -1), nil, `tensor "a": dimension 0 is -1, expected 0 to 2^48`},
		{nil, map[string]string{"a": "\xff"}, `metadata: the key "a" or its value is not valid UTF-8`},
		{nil, map[string]string{"\xff": ""}, `metadata: the key "\xff" or its value is not valid UTF-8`},
		{nil, map[string]string{"a": strings.Repeat("x", maxHeader)}, "the header has 100003832 bytes, expected at most 100000000; use several shards"},
	} {
		if _, _, err := Layout(c.specs, c.metadata); err == nil || err.Error() != c.want {
			t.Errorf("got %v, want %s", err, c.want)
		}
	}
	var huge []Spec // 8 × 2^60 bytes
	for _, name := range strings.Split("abcdefgh", "") {
		huge = append(huge, Spec{Name: name, DType: dtype.U8, Shape: []int64{1 << 48, 1 << 12}})
	}
	if _, _, err := Layout(huge, nil); err == nil || !strings.Contains(err.Error(), "larger than a file can be") {
		t.Errorf("2^63 bytes: error %v", err)
	}
}
