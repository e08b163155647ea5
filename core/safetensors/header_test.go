package safetensors

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/gquant/gquant/core/dtype"
)

// backends are what every test of parsing runs on. Under the tag nosonic both are the same.
var backends = map[string]walker{"encoding/json": walkStd, "default": walkDefault}

// conformanceCase is a file and whether it must be accepted; rust is the verdict of safetensors 0.8.0.
type conformanceCase struct {
	Name string `json:"name"`
	File []byte `json:"file"`
	Rust string `json:"rust"`
	Want string `json:"want"`
}

func conformanceCases(t testing.TB) []conformanceCase {
	t.Helper()
	b, err := os.ReadFile("../../tests/vectors/safetensors_header.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct{ Cases []conformanceCase }
	if err := json.Unmarshal(b, &file); err != nil {
		t.Fatal(err)
	}
	if len(file.Cases) < 66 {
		t.Fatalf("only %d conformance cases", len(file.Cases))
	}
	return file.Cases
}

func TestConformance(t *testing.T) {
	for _, c := range conformanceCases(t) {
		for name, walk := range backends {
			_, _, err := readHeader(bytes.NewReader(c.File), int64(len(c.File)), walk)
			if (err == nil) != (c.Want == "accept") {
				t.Errorf("%s, %s: want %s, got error %v", c.Name, name, c.Want, err)
			}
			if err != nil && !errors.As(err, new(*FormatError)) {
				t.Errorf("%s, %s: error %v is no FormatError", c.Name, name, err)
			}
		}
		path := filepath.Join(t.TempDir(), "x.safetensors")
		if err := os.WriteFile(path, c.File, 0o666); err != nil {
			t.Fatal(err)
		}
		f, err := Open(path)
		if (err == nil) != (c.Want == "accept") {
			t.Errorf("%s: want %s, Open says %v", c.Name, c.Want, err)
		}
		if err != nil && !strings.HasPrefix(err.Error(), path+": ") {
			t.Errorf("%s: error %q does not start with the path", c.Name, err)
		}
		if f != nil {
			f.Close()
		}
	}
}

// TestSonicReadsBehindShortInput: sonic.Valid calls "nu" valid where "ll" follows the slice in memory.
func TestSonicReadsBehindShortInput(t *testing.T) {
	for _, whole := range []string{"null", "true", "false", `{"a":null}`, `{"a":1e5}`, `{}`, `{"":""}`} {
		for n := range len(whole) {
			_, err := parseIndex([]byte(whole)[:n], walkDefault)
			_, std := parseIndex([]byte(whole)[:n], walkStd)
			if err == nil || err.Error() != std.Error() {
				t.Errorf("%q: got %v, want %v", whole[:n], err, std)
			}
		}
	}
}

const okTensor = `{"dtype":"F32","shape":[1],"data_offsets":[0,4]}`

func TestParseHeader(t *testing.T) {
	const in = ` {"b\u0062":{"data_offsets":[4,6],"shape":[],"dtype":"BF16"}, "__metadata__":{"k":"\ud83d\ude00\n","plain":"text"},
		"z":{"dtype":"I8","shape":[0,3],"data_offsets":[4,4]},"a":` + okTensor + `} `
	want := []Tensor{
		{"a", dtype.F32, []int64{1}, 0, 4},
		{"z", dtype.I8, []int64{0, 3}, 4, 4},
		{"bb", dtype.BF16, []int64{}, 4, 6},
	}
	for name, walk := range backends {
		b := []byte(in)
		h, err := parseHeader(b, 6, walk)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		clear(b) // the header must not depend on its source
		if !reflect.DeepEqual(h.Tensors, want) {
			t.Errorf("%s: got %v, want %v", name, h.Tensors, want)
		}
		if !reflect.DeepEqual(h.Metadata, map[string]string{"k": "😀\n", "plain": "text"}) {
			t.Errorf("%s: metadata %q", name, h.Metadata)
		}
		for i := range want {
			if h.Find(want[i].Name) != &h.Tensors[i] {
				t.Errorf("%s: Find(%s) gives %v", name, want[i].Name, h.Find(want[i].Name))
			}
		}
		if h.Find("c") != nil {
			t.Errorf("%s: Find found a tensor that is not there", name)
		}
	}
	h, err := ParseHeader([]byte(`{"a":`+okTensor+`}`), 4)
	if err != nil || h.Metadata != nil {
		t.Errorf("without metadata: %v, error %v", h, err)
	}
	if h, err := ParseHeader([]byte(`{"__metadata__":{}}`), 0); err != nil || h.Metadata == nil {
		t.Errorf("empty metadata: %v, error %v", h, err)
	}
}

// TestEqualRangesStayInOrder: empty tensors at one place keep the order of the JSON.
func TestEqualRangesStayInOrder(t *testing.T) {
	b := []byte(`{"full":` + okTensor)
	for i := range 100 {
		at := i * 37 % 8 / 4 * 4 // 0 or 4: before or behind the full one
		b = fmt.Appendf(b, `,"%03d":{"dtype":"U8","shape":[0],"data_offsets":[%d,%d]}`, i, at, at)
	}
	h, err := ParseHeader(append(b, '}'), 4)
	if err != nil {
		t.Fatal(err)
	}
	for i := 1; i < len(h.Tensors); i++ {
		a, b := &h.Tensors[i-1], &h.Tensors[i]
		if a.Begin == b.Begin && a.End == b.End && a.Name > b.Name {
			t.Fatalf("%s comes before %s", a.Name, b.Name)
		}
	}
}

func tensorJSON(dt, shape, offsets string) string {
	return fmt.Sprintf(`{"w":{"dtype":%s,"shape":%s,"data_offsets":%s}}`, dt, shape, offsets)
}

// TestHeaderErrors checks that a rejection names the tensor, the field, and what was wrong with it.
func TestHeaderErrors(t *testing.T) {
	deep := strings.Repeat("[", 200) + strings.Repeat("]", 200)
	for _, c := range []struct {
		in    string
		bytes uint64
		want  string
	}{
		{`{"w":` + okTensor + `,"w":` + okTensor + `}`, 4, `tensor "w": the name "w" occurs twice`},
		{`{"w":` + okTensor + `,"\u0077":` + okTensor + `}`, 4, `tensor "w": the name "w" occurs twice`},
		{`{"__metadata__":{"a":"","a":""}}`, 0, `__metadata__: the key "a" occurs twice`},
		{`{"__metadata__":{"a":"","\u0061":""}}`, 0, `__metadata__: the key "a" occurs twice`},
		{`{"__metadata__":{},"__metadata__":{}}`, 0, `__metadata__ occurs twice`},
		{`{"__metadata__":null}`, 0, `__metadata__ is true, false or null, expected an object`},
		{`{"__metadata__":{"a":1}}`, 0, `__metadata__: the value of "a" is the number "1", expected a string`},
		{`{"w\u0007":` + okTensor + `}`, 4, `the tensor name "w\a" has a control character`},
		{`{"w\u009b":` + okTensor + `}`, 4, `the tensor name "w\u009b" has a control character`},
		{`{"w":7}`, 0, `the value of "w" is the number "7", expected an object with dtype, shape and data_offsets`},
		{`{"w":["F32",[1],[0,4]]}`, 4, `the value of "w" is an array, expected an object with dtype, shape and data_offsets`},
		{`{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":0}}`, 4, `tensor "w": unknown field "x", expected dtype, shape and data_offsets`},
		{`{"w":{"shape":[1],"shape":[1],"dtype":"F32","data_offsets":[0,4]}}`, 4, `tensor "w": shape: the field occurs twice`},
		{`{"w":{"shape":[1],"data_offsets":[0,4]}}`, 4, `tensor "w": dtype: the field is missing`},
		{`{"w":{"dtype":"F32","data_offsets":[0,4]}}`, 4, `tensor "w": shape: the field is missing`},
		{`{"w":{"dtype":"F32","shape":[1]}}`, 4, `tensor "w": data_offsets: the field is missing`},
		{tensorJSON(`"f32"`, `[1]`, `[0,4]`), 4, `tensor "w": dtype: "f32" is not a dtype of the format`},
		{tensorJSON(`4`, `[1]`, `[0,4]`), 4, `tensor "w": dtype: got the number "4", expected a string`},
		{tensorJSON(`"F32"`, `1`, `[0,4]`), 4, `tensor "w": shape: got the number "1", expected an array`},
		{tensorJSON(`"F32"`, `[1,1.0]`, `[0,4]`), 4, `tensor "w": shape: dimension 1 is "1.0", expected a whole number from 0 to 2^48`},
		{tensorJSON(`"F32"`, `[-0]`, `[0,0]`), 0, `tensor "w": shape: dimension 0 is "-0", expected a whole number from 0 to 2^48`},
		{tensorJSON(`"F32"`, `[281474976710657,0]`, `[0,0]`), 0, `tensor "w": shape: dimension 0 is "281474976710657", expected a whole number from 0 to 2^48`},
		{tensorJSON(`"F32"`, `["1"]`, `[0,4]`), 4, `tensor "w": shape: dimension 0 is the string "1", expected a whole number`},
		{tensorJSON(`"F32"`, `[4294967296,4294967296]`, `[0,0]`), 0, `tensor "w": shape: the product of [4294967296 4294967296] overflows 64 bits`},
		{tensorJSON(`"F32"`, `[`+strings.Repeat("1,", 64)+`1]`, `[0,4]`), 4, `tensor "w": shape: more than 64 dimensions`},
		{tensorJSON(`"F4"`, `[3]`, `[0,1]`), 1, `tensor "w": shape: 3 elements of 4 bits do not fill whole bytes`},
		{tensorJSON(`"F32"`, `[1]`, `{}`), 4, `tensor "w": data_offsets: got an object, expected an array`},
		{tensorJSON(`"F32"`, `[1]`, `[0,[4]]`), 4, `tensor "w": data_offsets: element 1 is an array, expected a whole number`},
		{tensorJSON(`"F32"`, `[1]`, `[0,18446744073709551616]`), 4, `tensor "w": data_offsets: element 1 is "18446744073709551616", expected a whole number below 2^64`},
		{tensorJSON(`"F32"`, `[1]`, `[0]`), 4, `tensor "w": data_offsets: 1 elements, expected [begin, end]`},
		{tensorJSON(`"F32"`, `[1]`, `[0,4,4]`), 4, `tensor "w": data_offsets: more than 2 elements, expected [begin, end]`},
		{tensorJSON(`"F32"`, `[1]`, `[4,0]`), 4, `tensor "w": data_offsets: begin 4 is after end 0`},
		{tensorJSON(`"F32"`, `[1]`, `[0,4]`), 3, `tensor "w": data_offsets: the tensor ends at byte 4, but the file has only 3 bytes of data`},
		{tensorJSON(`"F32"`, `[1]`, `[18446744073709551612,18446744073709551615]`), 4, `tensor "w": data_offsets: the tensor ends at byte 18446744073709551615, but the file has only 4 bytes of data`},
		{tensorJSON(`"F32"`, `[2]`, `[0,4]`), 4, `tensor "w": data_offsets: [0, 4] is 4 bytes, but F32 [2] needs 8`},
		{tensorJSON(`"F32"`, `[1]`, `[0,4]`), 5, `the tensors need 4 bytes, but the file has 5 bytes of data`},
		{tensorJSON(`"F32"`, `[1]`, `[4,8]`), 8, `tensor "w": data_offsets: begin is 4, expected 0: it leaves a gap after the start of the data`},
		{`{"v":` + okTensor + `,"w":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}`, 6, `tensor "w": data_offsets: begin is 2, expected 4: it overlaps "v"`},
		{`[]`, 0, `not a JSON object`},
		{`nul`, 0, `not a JSON object`},
		{``, 0, `not a JSON object`},
		{`{`, 0, `not valid JSON: unexpected end of JSON input (JSON byte 1)`},
		{`{} x`, 0, `not valid JSON: invalid character 'x' after top-level value (JSON byte 4)`},
		{`{"a":1,}`, 0, `not valid JSON: invalid character '}' looking for beginning of object key string (JSON byte 8)`},
		{"{}\x00", 0, `not valid JSON: invalid character '\x00' after top-level value (JSON byte 3)`},
		{"\ufeff{}", 0, `byte 0xef outside a string (JSON byte 0)`},
		{"{\"a\xff\":" + okTensor + `}`, 4, `byte 0xff is not valid UTF-8 (JSON byte 3)`},
		{"{\"a\n\":" + okTensor + `}`, 4, `control character 0x0a in a string; it must be escaped (JSON byte 3)`},
		{`{"a\x":` + okTensor + `}`, 4, `unknown escape "\\x" (JSON byte 3)`},
		{`{"\ud800x":` + okTensor + `}`, 4, `surrogate \ud800 without its partner (JSON byte 2)`},
		{`{"\ud800\u0041":` + okTensor + `}`, 4, `surrogate \ud800 without its partner (JSON byte 2)`},
		{`{"\udc00":` + okTensor + `}`, 4, `surrogate \udc00 without its partner (JSON byte 2)`},
		{`{"\udc00\udc00":` + okTensor + `}`, 4, `surrogate \udc00 without its partner (JSON byte 2)`},
		{`{"\u00g0":` + okTensor + `}`, 4, `\u without four hexadecimal digits (JSON byte 2)`},
		{`{"\u00`, 4, `\u without four hexadecimal digits (JSON byte 2)`},
		{`{"a\`, 4, `escape without an end (JSON byte 3)`},
		{`{"a`, 4, `string without an end (JSON byte 1)`},
		{`{"w":{"x":` + deep + `}}`, 4, `nested deeper than 128 levels (JSON byte 136)`},
		{`{}`, math.MaxUint64, `the data section has 18446744073709551615 bytes, more than a file can have`},
		{`{"w` + strings.Repeat("x", 1000) + `":7}`, 0, `the value of "w` + strings.Repeat("x", 199) + `"… (1001 bytes) is the number "7", expected an object with dtype, shape and data_offsets`},
	} {
		for name, walk := range backends {
			_, err := parseHeader([]byte(c.in), c.bytes, walk)
			if err == nil || err.Error() != c.want {
				t.Errorf("%s, %.120s:\n got %v\nwant %s", name, c.in, err, c.want)
			}
		}
	}
}

// TestHeaderEntriesBound feeds more entries than allowed; without the bound they would all go into a map.
func TestHeaderEntriesBound(t *testing.T) {
	if testing.Short() {
		t.Skip("parses 57 MB of JSON")
	}
	b := []byte(`{"__metadata__":{"":""`)
	for i := range maxEntries {
		b = fmt.Appendf(b, `,"%x":""`, i)
	}
	b = append(b, "}}"...)
	_, err := ParseHeader(b, 0)
	if err == nil || err.Error() != "more than 4194304 entries" {
		t.Errorf("%d entries: error %v", maxEntries+1, err)
	}
}

func TestHeaderLengthBound(t *testing.T) {
	if _, err := ParseHeader(make([]byte, maxHeader+1), 0); err == nil || !strings.Contains(err.Error(), "expected at most 100000000") {
		t.Errorf("100,000,001 bytes: error %v", err)
	}
}

func TestSizeOf(t *testing.T) {
	for _, c := range []struct {
		d     dtype.DType
		shape []int64
		want  int64
	}{
		{dtype.F32, nil, 4},
		{dtype.C64, []int64{3}, 24},
		{dtype.F4, []int64{2, 3}, 3},
		{dtype.F6E2M3, []int64{4}, 3},
		{dtype.F6E3M2, []int64{8}, 6},
		{dtype.Bool, []int64{7}, 7},
		{dtype.F64, []int64{5, 0, 5}, 0},
		{dtype.F32, []int64{0, 1 << 32, 1 << 32, 4}, 0},
		{dtype.U8, []int64{1 << 48, 1 << 12}, 1 << 60},
	} {
		got, err := SizeOf(c.d, c.shape)
		if err != nil || got != c.want {
			t.Errorf("SizeOf(%s, %v) = %d, %v; want %d", c.d, c.shape, got, err, c.want)
		}
		tensor := Tensor{DType: c.d, Shape: c.shape, Begin: 5, End: 5 + c.want}
		if tensor.Bytes() != c.want || tensor.Elements()*int64(c.d.Bits()) != 8*c.want && c.want < 1<<60 {
			t.Errorf("%s %v: %d bytes, %d elements", c.d, c.shape, tensor.Bytes(), tensor.Elements())
		}
	}
	for _, c := range []struct {
		d     dtype.DType
		shape []int64
	}{
		{0, nil},
		{dtype.U64 + 1, nil},
		{dtype.F32, []int64{-1}},
		{dtype.F32, []int64{1<<48 + 1}},
		{dtype.F32, []int64{1 << 32, 1 << 32}},
		{dtype.F32, []int64{1 << 32, 1 << 32, 4, 0}},
		{dtype.U8, []int64{1 << 48, 1 << 13}}, // 2^61 bytes are 2^64 bits
		{dtype.F64, []int64{1 << 48, 1 << 12}},
		{dtype.F4, []int64{5}},
		{dtype.F6E2M3, []int64{2}},
		{dtype.F32, make([]int64, 65)},
	} {
		if got, err := SizeOf(c.d, c.shape); err == nil {
			t.Errorf("SizeOf(%s, %v) = %d, want an error", c.d, c.shape, got)
		}
	}
}

// manyTensors is a header like that of a large model.
func manyTensors(n int) (b []byte, dataBytes uint64) {
	specs := make([]Spec, n)
	for i := range specs {
		specs[i] = Spec{Name: fmt.Sprintf("model.layers.%d.self_attn.q_proj.weight", i), DType: dtype.BF16, Shape: []int64{4096, 4096}}
	}
	header, tensors, err := Layout(specs, map[string]string{"format": "pt"})
	if err != nil {
		panic(err)
	}
	for i := range tensors {
		dataBytes = max(dataBytes, uint64(tensors[i].End))
	}
	return header[8:], dataBytes
}

func BenchmarkParseHeader(b *testing.B) {
	header, dataBytes := manyTensors(1000)
	for name, walk := range backends {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(header)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := parseHeader(header, dataBytes, walk); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// fileBytes builds a file from a header's JSON, unchecked.
func fileBytes(header string, data []byte) []byte {
	n := uint64(len(header))
	b := []byte{byte(n), byte(n >> 8), byte(n >> 16), byte(n >> 24), byte(n >> 32), 0, 0, 0}
	return append(append(b, header...), data...)
}
