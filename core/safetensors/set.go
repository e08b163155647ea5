package safetensors

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Set is a whole model: one file, or the shards that an index or a folder names. Any number of goroutines may
// read from it at once.
type Set struct {
	path     string
	files    []*File
	entries  []Entry
	index    map[string]int // name → place in entries
	metadata map[string]string
}

// Entry is a tensor and the file that holds it.
type Entry struct {
	*Tensor
	File *File
}

// Read fills p with the tensor's bytes from off on; see File.ReadAt.
func (e Entry) Read(p []byte, off int64) error { return e.File.ReadAt(e.Tensor, p, off) }

// OpenSet opens a model. path is one of
//   - a safetensors file,
//   - an index: a .json file such as model.safetensors.index.json, whose shards lie beside it,
//   - a folder: its index if it has one, else all its .safetensors files, which must not repeat a tensor's name.
//     Files whose name starts with a dot are not looked at.
//
// All headers are checked before it returns. An index must name every tensor of every shard it uses, and no
// other. The caller closes the set.
func OpenSet(path string) (*Set, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	s := &Set{path: path, index: map[string]int{}}
	switch {
	case info.IsDir():
		err = s.openFolder(path)
	case strings.HasSuffix(path, ".json"):
		err = s.openIndex(path)
	default:
		err = s.add(path)
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// openFolder opens what a folder holds.
func (s *Set) openFolder(dir string) error {
	list, err := os.ReadDir(dir) // sorted by name
	if err != nil {
		return err
	}
	var indexes, files []string
	for _, e := range list {
		switch name := e.Name(); {
		case strings.HasPrefix(name, "."):
		case isIndexName(name):
			indexes = append(indexes, name)
		case strings.HasSuffix(name, ".safetensors"):
			files = append(files, name)
		}
	}
	switch {
	case len(indexes) == 1:
		return s.openIndex(filepath.Join(dir, indexes[0]))
	case len(indexes) > 1:
		return fmt.Errorf("%s has %d index files (%s): name the one to open", dir, len(indexes), strings.Join(indexes, ", "))
	case len(files) == 0:
		return fmt.Errorf("%s has no .safetensors file and no .safetensors.index.json", dir)
	}
	for _, name := range files {
		if err := s.add(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// isIndexName knows model.safetensors.index.json and the names of variants, model.safetensors.index.fp16.json.
func isIndexName(name string) bool {
	return strings.Contains(name, ".safetensors.index.") && strings.HasSuffix(name, ".json")
}

// openIndex opens the shards of an index and compares their tensors with its map.
func (s *Set) openIndex(path string) error {
	weightMap, err := readIndex(path)
	if err != nil {
		return err
	}
	firstOf := map[string]string{} // shard → its first tensor, for errors
	for tensor, shard := range weightMap {
		if first, ok := firstOf[shard]; !ok || tensor < first {
			firstOf[shard] = tensor
		}
	}
	for _, shard := range slices.Sorted(maps.Keys(firstOf)) {
		if err := s.add(filepath.Join(filepath.Dir(path), shard)); err != nil {
			return fmt.Errorf("index %s: shard %s of tensor %s: %w", path, quote(shard), quote(firstOf[shard]), err)
		}
	}
	for _, e := range s.entries {
		shard, ok := weightMap[e.Name]
		if here := filepath.Base(e.File.path); !ok {
			return fmt.Errorf("index %s: shard %s has the tensor %s, which the index does not name", path, quote(here), quote(e.Name))
		} else if shard != here {
			return fmt.Errorf("index %s: tensor %s is in shard %s, but the index says %s", path, quote(e.Name), quote(here), quote(shard))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(weightMap)) {
		if _, ok := s.index[name]; !ok {
			return fmt.Errorf("index %s: tensor %s is not in shard %s", path, quote(name), quote(weightMap[name]))
		}
	}
	return nil
}

// add opens one more file of the set.
func (s *Set) add(path string) error {
	f, err := Open(path)
	if err != nil {
		return err
	}
	s.files = append(s.files, f)
	for i := range f.header.Tensors {
		t := &f.header.Tensors[i]
		if other, dup := s.index[t.Name]; dup {
			return fmt.Errorf("tensor %s is in two files: %s and %s", quote(t.Name), s.entries[other].File.path, path)
		}
		s.index[t.Name] = len(s.entries)
		s.entries = append(s.entries, Entry{t, f})
	}
	for k, v := range f.header.Metadata {
		if s.metadata == nil {
			s.metadata = map[string]string{}
		}
		if _, ok := s.metadata[k]; !ok {
			s.metadata[k] = v
		}
	}
	return nil
}

// Path is the path that the set was opened with.
func (s *Set) Path() string { return s.path }

// Files lists the files in the order of their names. The slice belongs to the set.
func (s *Set) Files() []*File { return s.files }

// Entries lists the tensors, file by file, in the order of their data. The slice belongs to the set.
func (s *Set) Entries() []Entry { return s.entries }

// Find returns the tensor of that name.
func (s *Set) Find(name string) (Entry, bool) {
	i, ok := s.index[name]
	if !ok {
		return Entry{}, false
	}
	return s.entries[i], true
}

// Metadata joins the metadata of the files; where they differ the first file wins. It is nil if no file has any,
// and belongs to the set.
func (s *Set) Metadata() map[string]string { return s.metadata }

// Close closes all files.
func (s *Set) Close() error {
	var errs []error
	for _, f := range s.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}
