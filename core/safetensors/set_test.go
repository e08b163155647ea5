package safetensors

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// shard is a file whose tensors have one byte each, the last letter of their names.
func shard(metadata string, names ...string) []byte {
	var entries, data []string
	if metadata != "" {
		entries = append(entries, `"__metadata__":`+metadata)
	}
	for i, name := range names {
		entries = append(entries, fmt.Sprintf(`%q:{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}`, name, i, i+1))
		data = append(data, name[len(name)-1:])
	}
	return fileBytes("{"+strings.Join(entries, ",")+"}", []byte(strings.Join(data, "")))
}

func folder(t *testing.T, files map[string][]byte) string {
	t.Helper()
	dir := t.TempDir()
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// names lists a set's tensors in order and checks that each can be found and read.
func names(t *testing.T, s *Set) (list []string) {
	t.Helper()
	for _, e := range s.Entries() {
		p := make([]byte, 1)
		found, ok := s.Find(e.Name)
		if !ok || found != e {
			t.Errorf("Find(%s) = %v, %v", e.Name, found, ok)
		}
		if err := e.Read(p, 0); err != nil || p[0] != e.Name[len(e.Name)-1] {
			t.Errorf("%s holds %q, error %v", e.Name, p, err)
		}
		list = append(list, e.Name)
	}
	return list
}

func TestOpenSet(t *testing.T) {
	index := []byte(`{"metadata":{"total_size":4,"total_parameters":4.5,"x":null,"y":false,"z":"s"},
		"weight_map":{"a":"m-2.safetensors","b":"m-1.safetensors","d":"m-2.safetensors","c":"m-1.safetensors"}}`)
	shards := map[string][]byte{
		"m-1.safetensors": shard(`{"format":"pt","one":"1"}`, "c", "b"),
		"m-2.safetensors": shard(`{"format":"np","two":"2"}`, "d", "a"),
	}
	with := func(more map[string][]byte) map[string][]byte {
		all := map[string][]byte{}
		for _, m := range []map[string][]byte{shards, more} {
			for k, v := range m {
				all[k] = v
			}
		}
		return all
	}
	both := []string{"c", "b", "d", "a"}
	for _, c := range []struct {
		what  string
		files map[string][]byte
		open  string // in the folder
		want  []string
	}{
		{"one file", shards, "m-2.safetensors", []string{"d", "a"}},
		{"file of another suffix", map[string][]byte{"m.sft": shard("", "q")}, "m.sft", []string{"q"}},
		{"index", with(map[string][]byte{"m.safetensors.index.json": index}), "m.safetensors.index.json", both},
		{"index of any name", with(map[string][]byte{"x.json": index}), "x.json", both},
		{"folder with an index", with(map[string][]byte{"m.safetensors.index.json": index, "other.safetensors": shard("", "a"), "config.json": []byte("{}")}), "", both},
		{"folder with a variant's index", with(map[string][]byte{"m.safetensors.index.fp16.json": index}), "", both},
		{"folder with one file", map[string][]byte{"m.safetensors": shard("", "q"), "config.json": nil, "._m.safetensors": nil}, "", []string{"q"}},
		{"folder with files", shards, "", both},
	} {
		dir := folder(t, c.files)
		s, err := OpenSet(filepath.Join(dir, c.open))
		if err != nil {
			t.Errorf("%s: %v", c.what, err)
			continue
		}
		if got := names(t, s); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: tensors %q, want %q", c.what, got, c.want)
		}
		if s.Path() != filepath.Join(dir, c.open) {
			t.Errorf("%s: path %s", c.what, s.Path())
		}
		if len(c.want) == 4 {
			if want := map[string]string{"format": "pt", "one": "1", "two": "2"}; !reflect.DeepEqual(s.Metadata(), want) {
				t.Errorf("%s: metadata %q, want %q", c.what, s.Metadata(), want)
			}
			if f := s.Files(); len(f) != 2 || filepath.Base(f[0].Path()) != "m-1.safetensors" {
				t.Errorf("%s: files %v", c.what, f)
			}
		}
		if _, ok := s.Find("nobody"); ok {
			t.Errorf("%s: Find found a tensor that is not there", c.what)
		}
		if err := s.Close(); err != nil {
			t.Errorf("%s: %v", c.what, err)
		}
		if err := s.Entries()[0].Read(make([]byte, 1), 0); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s: read after Close: %v", c.what, err)
		}
	}
}

// TestOpenSetLinks: the Hugging Face cache is made of symbolic links.
func TestOpenSetLinks(t *testing.T) {
	blobs := folder(t, map[string][]byte{"1": shard("", "a"), "2": []byte(`{"weight_map":{"a":"m-1.safetensors"}}`)})
	dir := t.TempDir()
	for blob, name := range map[string]string{"1": "m-1.safetensors", "2": "m.safetensors.index.json"} {
		if err := os.Symlink(filepath.Join(blobs, blob), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	s, err := OpenSet(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	names(t, s)
}

func TestOpenSetErrors(t *testing.T) {
	for _, c := range []struct {
		what  string
		index string
		want  []string
	}{
		{"path", `{"weight_map":{"a":"x/one.safetensors"}}`, []string{`tensor "a"`, `"x/one.safetensors" is a path`}},
		{"path up", `{"weight_map":{"a":"../one.safetensors"}}`, []string{`"../one.safetensors" is a path`}},
		{"absolute path", `{"weight_map":{"a":"/etc/passwd"}}`, []string{`"/etc/passwd" is a path`}},
		{"Windows path", `{"weight_map":{"a":"..\\one.safetensors"}}`, []string{`"..\\one.safetensors" is a path`}},
		{"dots", `{"weight_map":{"a":".."}}`, []string{`".." is a path`}},
		{"dot", `{"weight_map":{"a":"."}}`, []string{`"." is a path`}},
		{"empty name", `{"weight_map":{"a":""}}`, []string{`tensor "a"`, "the file name is empty"}},
		{"NUL", `{"weight_map":{"a":"one.safetensors\u0000"}}`, []string{`"one.safetensors\x00" has a control character`}},
		{"missing shard", `{"weight_map":{"a":"one.safetensors","c":"three.safetensors"}}`, []string{`shard "three.safetensors" of tensor "c"`, "no such file"}},
		{"folder as shard", `{"weight_map":{"a":"one.safetensors","c":"folder"}}`, []string{`shard "folder" of tensor "c"`, "is not a regular file but a directory"}},
		{"broken shard", `{"weight_map":{"a":"one.safetensors","c":"broken"}}`, []string{`shard "broken" of tensor "c"`, "too few for the header's length"}},
		{"tensor not in its shard", `{"weight_map":{"a":"one.safetensors","b":"one.safetensors","c":"one.safetensors"}}`, []string{`tensor "c" is not in shard "one.safetensors"`}},
		{"tensor in another shard", `{"weight_map":{"a":"one.safetensors","b":"two.safetensors","d":"two.safetensors"}}`, []string{`tensor "b" is in shard "one.safetensors", but the index says "two.safetensors"`}},
		{"tensor not in the index", `{"weight_map":{"a":"one.safetensors"}}`, []string{`shard "one.safetensors" has the tensor "b", which the index does not name`}},
		{"tensor in two shards", `{"weight_map":{"a":"one.safetensors","b":"one.safetensors","e":"again.safetensors"}}`, []string{`tensor "b" is in two files`, "one.safetensors", "again.safetensors"}},
		{"duplicate tensor", `{"weight_map":{"a":"one.safetensors","a":"one.safetensors"}}`, []string{`weight_map: the tensor "a" occurs twice`}},
		{"duplicate tensor by escape", `{"weight_map":{"a":"one.safetensors","\u0061":"one.safetensors"}}`, []string{`weight_map: the tensor "a" occurs twice`}},
		{"duplicate weight_map", `{"weight_map":{"a":"one.safetensors"},"weight_map":{}}`, []string{"the key weight_map occurs twice"}},
		{"duplicate metadata", `{"metadata":{},"metadata":{}}`, []string{"the key metadata occurs twice"}},
		{"duplicate metadata key", `{"metadata":{"a":1,"a":2}}`, []string{`metadata: the key "a" occurs twice`}},
		{"nested metadata", `{"metadata":{"a":{}}}`, []string{"metadata: a value is an object"}},
		{"metadata null", `{"metadata":null}`, []string{"metadata is true, false or null, expected an object"}},
		{"unknown key", `{"weights":{}}`, []string{`unknown key "weights"`}},
		{"weight_map array", `{"weight_map":[]}`, []string{"weight_map is an array, expected an object"}},
		{"number as shard", `{"weight_map":{"a":1}}`, []string{`the file of tensor "a" is a number, expected a string`}},
		{"no weight_map", `{}`, []string{"no weight_map"}},
		{"empty weight_map", `{"weight_map":{}}`, []string{"no weight_map, or it is empty"}},
		{"array", `[]`, []string{"not a JSON object"}},
		{"no JSON", `{"weight_map":{"a":"one.safetensors"}`, []string{"not valid JSON"}},
		{"bad UTF-8", "{\"weight_map\":{\"a\":\"\xff\"}}", []string{"not valid UTF-8"}},
	} {
		dir := folder(t, map[string][]byte{
			"m.safetensors.index.json": []byte(c.index),
			"one.safetensors":          shard("", "a", "b"),
			"two.safetensors":          shard("", "d"),
			"again.safetensors":        shard("", "e", "b"),
			"broken":                   []byte("x"),
		})
		if err := os.Mkdir(filepath.Join(dir, "folder"), 0o777); err != nil {
			t.Fatal(err)
		}
		_, err := OpenSet(dir)
		wantError(t, c.what, err, append(c.want, "m.safetensors.index.json")...)
	}

	dir := folder(t, map[string][]byte{"config.json": []byte("{}"), "m.bin": nil})
	_, err := OpenSet(dir)
	wantError(t, "nothing there", err, dir, "no .safetensors file")
	dir = folder(t, map[string][]byte{"a.safetensors": shard("", "a"), "b.safetensors": shard("", "b", "a")})
	_, err = OpenSet(dir)
	wantError(t, "repeated tensor", err, `tensor "a" is in two files`, "a.safetensors", "b.safetensors")
	dir = folder(t, map[string][]byte{"a.safetensors.index.json": nil, "b.safetensors.index.json": nil})
	_, err = OpenSet(dir)
	wantError(t, "two indexes", err, "2 index files", "a.safetensors.index.json, b.safetensors.index.json")
	if _, err = OpenSet(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing path: %v", err)
	}
}

func TestWriteIndex(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "m.safetensors.index.json")
	m := map[string]string{"b\"": "m-1.safetensors", "a": "m-2.safetensors"}
	if err := WriteIndex(path, m, 12, false); err != nil {
		t.Fatal(err)
	}
	const want = `{
  "metadata": {
    "total_size": 12
  },
  "weight_map": {
    "a": "m-2.safetensors",
    "b\"": "m-1.safetensors"
  }
}
`
	b, err := os.ReadFile(path)
	if err != nil || string(b) != want {
		t.Errorf("got %s, error %v", b, err)
	}
	if back, err := readIndex(path); err != nil || !reflect.DeepEqual(back, m) {
		t.Errorf("read back %q, error %v", back, err)
	}
	if err := WriteIndex(path, m, 13, false); !errors.Is(err, os.ErrExist) {
		t.Errorf("existing file: error %v", err)
	}
	if err := WriteIndex(path, map[string]string{"a": "m-2.safetensors"}, 13, true); err != nil {
		t.Errorf("replacing: %v", err)
	}
	if back, err := readIndex(path); err != nil || len(back) != 1 {
		t.Errorf("after replacing: %q, error %v", back, err)
	}
	wantError(t, "path as shard", WriteIndex(filepath.Join(dir, "x.json"), map[string]string{"a": "../b"}, 0, false), `tensor "a"`, "is a path")
	wantError(t, "bad name", WriteIndex(filepath.Join(dir, "x.json"), map[string]string{"": "b"}, 0, false), "empty name")
	wantNames(t, dir, "m.safetensors.index.json")
}

// wantNames checks what a folder holds.
func wantNames(t *testing.T, dir string, want ...string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	got := []string{}
	for _, e := range list {
		got = append(got, e.Name())
	}
	if len(got) != len(want) || len(got) > 0 && !reflect.DeepEqual(got, want) {
		t.Errorf("the folder holds %q, want %q", got, want)
	}
}
