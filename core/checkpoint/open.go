// Package checkpoint knows what quantized layers look like in a safetensors model.
//
// A quantized layer is a weight whose codes and statistics are several tensors, tied together by their names
// and by a small JSON text. A convention is one such way of naming. Open finds the layers of any model;
// Target (target.go) lists the tensors that a new layer is written as.
package checkpoint

import (
	"errors"
	"fmt"

	"github.com/gquant/gquant/core/safetensors"
)

// Model is an opened safetensors model, its tensors sorted into quantized layers and plain tensors.
type Model struct {
	*safetensors.Set
	Layers []*Layer            // in file order
	Plain  []safetensors.Entry // in file order: every tensor that belongs to no layer
	byName map[string]*Layer
}

// Open opens a file, a shard index or a folder and finds its quantized layers. It fails if any layer is
// incomplete or contradicts itself. The caller closes the model.
func Open(path string) (*Model, error) {
	set, err := safetensors.OpenSet(path)
	if err != nil {
		return nil, err
	}
	m, problems := Scan(set)
	if len(problems) > 0 {
		set.Close()
		return nil, errors.Join(problems...)
	}
	return m, nil
}

// Scan finds the quantized layers of an open set and reports every layer that is broken; those are left out
// of Layers and their tensors count as Plain. The model takes over the set.
func Scan(set *safetensors.Set) (*Model, []error) {
	m := &Model{Set: set, byName: map[string]*Layer{}}
	var problems []error
	claimed := map[string]bool{}
	for _, marker := range set.Entries() {
		l, err := detect(set, marker)
		if l == nil && err == nil {
			continue
		}
		if err == nil && m.byName[l.Name] != nil {
			err = fmt.Errorf("layer %q is described twice, by %q and by another tensor", l.Name, marker.Name)
		}
		if err == nil {
			err = l.check()
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("%s: %w", marker.File.Path(), err))
			continue
		}
		m.Layers = append(m.Layers, l)
		m.byName[l.Name] = l
		for _, e := range l.Parts {
			claimed[e.Name] = true
		}
	}
	for _, e := range set.Entries() {
		if !claimed[e.Name] {
			m.Plain = append(m.Plain, e)
		}
	}
	return m, problems
}

// Layer finds a quantized layer by the name of the tensor it stands for; nil if there is none.
func (m *Model) Layer(name string) *Layer { return m.byName[name] }
