package safetensors

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// The index of a sharded model, as transformers and diffusers write it:
//
//	{"metadata": {"total_size": 1234}, "weight_map": {"layer.weight": "model-00001-of-00002.safetensors"}}

// readIndex returns the weight map of an index file: tensor name → file name in the index's folder.
func readIndex(path string) (map[string]string, error) {
	f, info, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// An index names what the headers name, so their limit is ample.
	if info.Size() > maxHeader {
		return nil, withPath(path, problem("the index has %d bytes, expected at most %d", info.Size(), maxHeader))
	}
	b, err := io.ReadAll(io.LimitReader(f, maxHeader))
	if err != nil {
		return nil, err
	}
	m, err := parseIndex(b, walkDefault)
	return m, withPath(path, err)
}

func parseIndex(b []byte, walk walker) (map[string]string, error) {
	var p indexParser
	if err := walkJSON(b, walk, &p); err != nil {
		return nil, err
	}
	if len(p.weightMap) == 0 {
		return nil, problem("the index has no weight_map, or it is empty")
	}
	return p.weightMap, nil
}

// indexPlace is where in an index's grammar the parser stands.
type indexPlace uint8

const (
	indexOutside indexPlace = iota
	indexTop
	indexMetadataOpen
	indexMetadataKey
	indexMetadataValue
	indexMapOpen
	indexMapKey
	indexMapValue
)

// indexParser is the state machine for an index. The metadata are checked, but nothing of them is kept.
type indexParser struct {
	place     indexPlace
	metadata  map[string]bool // the keys seen; nil before the object opens
	weightMap map[string]string
	tensor    string // whose file name is next
}

func (p *indexParser) token(k kind, s string) error {
	switch {
	case p.place == indexOutside && k == objectBegin:
		p.place = indexTop
	case p.place == indexTop && k == key:
		return p.openPart(s)
	case p.place == indexTop && k == objectEnd: // the last token: nothing can follow it in valid JSON

	case p.place == indexMetadataOpen && k == objectBegin:
		p.metadata = map[string]bool{}
		p.place = indexMetadataKey
	case p.place == indexMetadataKey && k == key:
		if p.metadata[s] {
			return problem("metadata: the key %s occurs twice", quote(s))
		}
		p.metadata[strings.Clone(s)] = true
		p.place = indexMetadataValue
	case p.place == indexMetadataValue && (k == text || k == number || k == literal):
		p.place = indexMetadataKey

	case p.place == indexMapOpen && k == objectBegin:
		p.weightMap = map[string]string{}
		p.place = indexMapKey
	case p.place == indexMapKey && k == key:
		return p.openTensor(s)
	case p.place == indexMapValue && k == text:
		if err := checkFileName(s); err != nil {
			return problem("weight_map: tensor %s: %s", quote(p.tensor), err)
		}
		p.weightMap[p.tensor] = strings.Clone(s)
		p.place = indexMapKey

	case (p.place == indexMetadataKey || p.place == indexMapKey) && k == objectEnd:
		p.place = indexTop
	default:
		return p.unexpected(k)
	}
	return nil
}

func (p *indexParser) openPart(s string) error {
	var again bool
	switch s {
	case "metadata":
		again, p.place = p.metadata != nil, indexMetadataOpen
	case "weight_map":
		again, p.place = p.weightMap != nil, indexMapOpen
	default:
		return problem("unknown key %s, expected metadata and weight_map", quote(s))
	}
	if again {
		return problem("the key %s occurs twice", s)
	}
	return nil
}

func (p *indexParser) openTensor(s string) error {
	p.tensor = strings.Clone(s)
	if _, dup := p.weightMap[p.tensor]; dup {
		return problem("weight_map: the tensor %s occurs twice", quote(p.tensor))
	}
	if len(p.weightMap) == maxEntries {
		return problem("weight_map: more than %d tensors", maxEntries)
	}
	p.place = indexMapValue
	return nil
}

func (p *indexParser) unexpected(k kind) error {
	switch p.place {
	case indexMetadataOpen:
		return problem("metadata is %s, expected an object", k)
	case indexMetadataValue:
		return problem("metadata: a value is %s, expected a string, number, true, false or null", k)
	case indexMapOpen:
		return problem("weight_map is %s, expected an object", k)
	}
	return problem("weight_map: the file of tensor %s is %s, expected a string", quote(p.tensor), k)
}

// checkFileName allows only the name of a file beside the index. An index comes from strangers: a path in it could
// name any file of this machine. Both slashes are refused everywhere, so that an index means the same everywhere.
func checkFileName(name string) error {
	switch {
	case name == "":
		return errors.New("the file name is empty")
	case strings.ContainsAny(name, `/\`) || name == "." || name == ".." || !filepath.IsLocal(name):
		return fmt.Errorf("%s is a path, expected the bare name of a file beside the index", quote(name))
	case hasControl(name):
		return fmt.Errorf("the file name %s has a control character", quote(name))
	}
	return nil
}

// WriteIndex writes the index of a sharded model to path: weightMap gives for each tensor the name of its file,
// totalBytes is the size of all tensors' data. The keys are sorted, so equal input gives equal bytes. The file
// appears under its name complete or not at all. An existing file is replaced only with force.
func WriteIndex(path string, weightMap map[string]string, totalBytes int64, force bool) error {
	b := append([]byte("{\n  \"metadata\": {\n    \"total_size\": "), strconv.FormatInt(totalBytes, 10)...)
	b = append(b, "\n  },\n  \"weight_map\": {"...)
	for i, name := range slices.Sorted(maps.Keys(weightMap)) {
		if err := checkName(name); err != nil {
			return err
		}
		if err := checkFileName(weightMap[name]); err != nil {
			return fmt.Errorf("tensor %s: %w", quote(name), err)
		}
		if i > 0 {
			b = append(b, ',')
		}
		b = appendString(append(b, "\n    "...), name)
		b = appendString(append(b, ": "...), weightMap[name])
	}
	b = append(b, "\n  }\n}\n"...)

	out, _, err := openOutput(path, force, nil)
	if err != nil {
		return err
	}
	err = preallocate(out.file, int64(len(b)))
	if err == nil {
		_, err = out.file.WriteAt(b, 0)
	}
	if err == nil {
		err = out.publish()
	}
	if err != nil {
		out.discard()
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}
