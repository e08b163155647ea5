// Package convert turns a checkpoint into another one: plan first, then stream.
//
// A plan decides, before any weight is read, what every tensor becomes, where it lands and why (plan.go, by the
// table in rules.go). Run carries it out (run.go): chunks of the source are read, quantized and written at their
// final offsets by a few workers, so that memory does not grow with the model.
package convert

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/gquant/gquant/core/checkpoint"
	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/globs"
	"github.com/gquant/gquant/core/safetensors"
)

// Action is what happens to a tensor.
type Action string

// The actions.
const (
	Copy       Action = "copy"
	Quantize   Action = "quantize"
	Dequantize Action = "dequantize"
)

// Item is one tensor of the source, or one quantized layer, and what it becomes. Items do not depend on one
// another: each reads its own bytes and writes its own.
type Item struct {
	Name    string         `json:"name"`
	Action  Action         `json:"action"`
	Reason  string         `json:"reason"`
	DType   string         `json:"dtype"`
	Shape   []int64        `json:"shape"`
	Bytes   int64          `json:"bytes"`
	Format  string         `json:"format,omitempty"` // of the quantized layer, read or written
	Source  Source         `json:"source"`
	Shard   int            `json:"shard"` // index into Plan.Shards
	Outputs []OutputTensor `json:"outputs"`

	entry  safetensors.Entry // copy, quantize
	layer  *checkpoint.Layer // dequantize
	target checkpoint.Target // quantize
	parts  []checkpoint.Output
	first  int // index of the first output among the shard's specs
}

// OutputBytes is the size of what the item becomes.
func (it *Item) OutputBytes() int64 {
	var n int64
	for _, o := range it.Outputs {
		n += o.Bytes
	}
	return n
}

// Source is the byte range that an item reads.
type Source struct {
	File   string `json:"file"`
	Offset int64  `json:"offset"`
}

// OutputTensor is one tensor to be written; Offset counts from the start of its file. A tensor whose size is not
// known before its layer is quantized has its largest size here.
type OutputTensor struct {
	Name   string  `json:"name"`
	DType  string  `json:"dtype"`
	Shape  []int64 `json:"shape"`
	Bytes  int64   `json:"bytes"`
	Offset int64   `json:"offset"`
}

// Shard is one output file.
type Shard struct {
	Path  string `json:"path"`
	Bytes int64  `json:"bytes"` // of the tensors

	specs    []safetensors.Spec
	metadata map[string]string // at its longest: the descriptions of nested layers hold values found while quantizing
}

// Plan is everything a conversion will do.
type Plan struct {
	Source      string   `json:"source"`
	Output      string   `json:"output"`          // the file, or with several shards the name they derive theirs from
	Index       string   `json:"index,omitempty"` // the index file, with several shards
	Options     Options  `json:"options"`
	Shards      []Shard  `json:"shards"`
	Items       []*Item  `json:"items"`
	Bytes       int64    `json:"bytes"`
	OutputBytes int64    `json:"output_bytes"`
	Warnings    []string `json:"warnings"`
}

// Count is the number of items with the action.
func (p *Plan) Count(a Action) int {
	n := 0
	for _, it := range p.Items {
		if it.Action == a {
			n++
		}
	}
	return n
}

// New plans the quantization of a model. It reads headers and quantization states only.
func New(m *checkpoint.Model, o Options) (*Plan, error) {
	target, err := o.target()
	if err != nil {
		return nil, err
	}
	exclude, err := globs.New(o.Exclude)
	if err != nil {
		return nil, OptionError{err}
	}
	include, err := globs.New(o.Include)
	if err != nil {
		return nil, OptionError{err}
	}
	if o.Output == "" {
		o.Output = DefaultOutput(m.Path(), o.Mode)
	}
	p := &Plan{Source: m.Path(), Output: o.Output, Options: o, Warnings: []string{}}
	names := make([]string, 0, len(m.Plain))
	for _, e := range m.Plain {
		names = append(names, e.Name)
		excluded, included := exclude.Match(e.Name), include.Match(e.Name)
		it := newCopy(e)
		switch reason := keepReason(e.Tensor); {
		case excluded != "":
			it.Reason = "excluded by " + excluded
		case included != "" && quantizable(e.DType) && e.Elements() > 0:
			it.quantize(target, "included by "+included)
		case reason != "":
			it.Reason = reason
		default:
			it.quantize(target, "linear weight")
		}
		p.Items = append(p.Items, it)
	}
	for _, l := range m.Layers {
		for _, e := range l.Parts {
			it := newCopy(e)
			it.Reason = "already " + l.State.Format.Name
			p.Items = append(p.Items, it)
		}
	}
	p.Warnings = append(p.Warnings, exclude.Warnings("exclude", names)...)
	p.Warnings = append(p.Warnings, include.Warnings("include", names)...)
	if p.Count(Quantize) == 0 {
		return nil, fmt.Errorf("%s: nothing to quantize: %s", m.Path(), p.whyNothing())
	}
	return p, p.place(m)
}

// NewDequantize plans the way back: every quantized layer becomes one plain tensor of dtype d, or of the dtype it
// was quantized from when d is 0.
func NewDequantize(m *checkpoint.Model, d dtype.DType, o Options) (*Plan, error) {
	if len(m.Layers) == 0 {
		return nil, fmt.Errorf("%s: no quantized layer found", m.Path())
	}
	if o.Device != "" && o.Device != "cpu" {
		return nil, badOption("device %q: weights are restored on the cpu", o.Device)
	}
	if d != 0 && !quantizable(d) {
		return nil, badOption("dtype %s is not one of F32, F16, BF16", d)
	}
	if o.Output == "" {
		o.Output = DefaultOutput(m.Path(), "dequantized")
	}
	p := &Plan{Source: m.Path(), Output: o.Output, Options: o, Warnings: []string{}}
	for _, e := range m.Plain {
		it := newCopy(e)
		it.Reason = "not quantized"
		p.Items = append(p.Items, it)
	}
	for _, l := range m.Layers {
		packed := l.Parts[checkpoint.Packed]
		it := newCopy(packed)
		it.Bytes, it.Name, it.Action, it.Format, it.layer = l.Bytes(), l.Name, Dequantize, l.State.Format.Name, l
		it.Reason = "quantized layer"
		it.parts = []checkpoint.Output{{Spec: safetensors.Spec{Name: l.Name, DType: cmp.Or(d, l.State.DType), Shape: l.State.Shape}}}
		p.Items = append(p.Items, it)
	}
	return p, p.place(m)
}

// newCopy is the item of a tensor that stays as it is.
func newCopy(e safetensors.Entry) *Item {
	return &Item{
		Name: e.Name, Action: Copy, DType: e.DType.String(), Shape: e.Shape, Bytes: e.Bytes(),
		Source: Source{e.File.Path(), e.File.DataStart() + e.Begin},
		entry:  e,
		parts:  []checkpoint.Output{{Spec: safetensors.Spec{Name: e.Name, DType: e.DType, Shape: e.Shape}}},
	}
}

func (it *Item) quantize(t checkpoint.Target, reason string) {
	it.Action, it.Reason, it.Format, it.target = Quantize, reason, t.Format.Name, t
	it.parts = t.Outputs(it.Name, it.Shape, it.entry.DType)
}

// whyNothing counts the reasons for which tensors stay.
func (p *Plan) whyNothing() string {
	counts := map[string]int{}
	for _, it := range p.Items {
		counts[it.Reason]++
	}
	var reasons []string
	for r := range counts {
		reasons = append(reasons, r)
	}
	slices.Sort(reasons)
	text := fmt.Sprintf("%d tensors", len(p.Items))
	for _, r := range reasons {
		text += fmt.Sprintf(", %d %s", counts[r], r)
	}
	return text
}

// place orders the items as they lie in the source, deals them out to output files and finds their offsets.
func (p *Plan) place(m *checkpoint.Model) error {
	if o := p.Options; o.Threads < 0 || o.MaxShardSize < 0 {
		return badOption("threads %d and max_shard_size %d: neither can be negative", o.Threads, o.MaxShardSize)
	}
	order := map[string]int{}
	for i, e := range m.Entries() {
		order[e.Name] = i
	}
	slices.SortFunc(p.Items, func(a, b *Item) int { return cmp.Compare(order[a.entry.Name], order[b.entry.Name]) })
	p.Shards = []Shard{{}}
	for _, it := range p.Items {
		var size int64
		for _, o := range it.parts {
			n, err := safetensors.SizeOf(o.Spec.DType, o.Spec.Shape)
			if err != nil {
				return fmt.Errorf("tensor %q: %w", o.Spec.Name, err)
			}
			size += n
		}
		shard := &p.Shards[len(p.Shards)-1]
		if limit := p.Options.MaxShardSize; limit > 0 && shard.Bytes > 0 && shard.Bytes+size > limit {
			p.Shards = append(p.Shards, Shard{})
			shard = &p.Shards[len(p.Shards)-1]
		}
		it.Shard, it.first = len(p.Shards)-1, len(shard.specs)
		for _, o := range it.parts {
			shard.specs = append(shard.specs, o.Spec)
		}
		shard.Bytes += size
		p.Bytes += it.Bytes
		p.OutputBytes += size
	}
	if err := p.describe(m); err != nil {
		return err
	}
	for i := range p.Shards {
		if err := p.layout(i); err != nil {
			return err
		}
	}
	return p.checkOutput(m)
}

// describe fills in the header metadata of every shard: the source's own, and ComfyUI's description of the
// quantized layers that the shard holds.
func (p *Plan) describe(m *checkpoint.Model) error {
	own, err := checkpoint.ParseComfyMetadata(m.Metadata())
	if err != nil {
		return fmt.Errorf("%s: %w", p.Source, err)
	}
	for i := range p.Shards {
		comfy := checkpoint.ComfyMetadata{}
		for _, it := range p.Items {
			if it.Shard != i || it.Action == Dequantize {
				continue
			}
			if it.Action == Quantize {
				comfy.Add(it.Name, it.target.Longest(it.Shape, it.entry.DType))
			} else if module := checkpoint.ComfyModule(it.Name); own[module] != nil {
				comfy[module] = own[module]
			}
		}
		metadata := comfy.Apply(m.Metadata())
		if len(m.Metadata()) == 0 {
			metadata["format"] = "pt" // older transformers refuse a file that does not say so
		}
		p.Shards[i].metadata = metadata
	}
	return nil
}

// layout names the shard's file and finds the offsets of its tensors.
func (p *Plan) layout(shard int) error {
	s := &p.Shards[shard]
	s.Path = p.Output
	if n := len(p.Shards); n > 1 {
		base := p.Output[:len(p.Output)-len(filepath.Ext(p.Output))]
		s.Path = fmt.Sprintf("%s-%05d-of-%05d%s", base, shard+1, n, extension)
		p.Index = base + indexExtension
	}
	header, tensors, err := safetensors.Layout(s.specs, s.metadata)
	if err != nil {
		return fmt.Errorf("%s: %w", s.Path, err)
	}
	for _, it := range p.Items {
		if it.Shard != shard {
			continue
		}
		for i := range it.parts {
			t := &tensors[it.first+i]
			it.Outputs = append(it.Outputs, OutputTensor{t.Name, t.DType.String(), t.Shape, t.Bytes(), int64(len(header)) + t.Begin})
		}
	}
	return nil
}

// checkOutput refuses to write over what it reads, and over what is there unless Force allows it. Nothing is
// created yet, so a plan fails for the reasons its run would.
func (p *Plan) checkOutput(m *checkpoint.Model) error {
	paths := []string{}
	for _, s := range p.Shards {
		paths = append(paths, s.Path)
	}
	if p.Index != "" {
		paths = append(paths, p.Index)
	}
	for _, path := range paths {
		info, err := os.Stat(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if info.IsDir() {
			return fmt.Errorf("output %s is a directory", path)
		}
		for _, f := range m.Files() {
			if source, err := os.Stat(f.Path()); err == nil && os.SameFile(source, info) {
				return fmt.Errorf("output %s is the input", path)
			}
		}
		if !p.Options.Force {
			return fmt.Errorf("output %s exists; --force replaces it: %w", path, os.ErrExist)
		}
	}
	return nil
}
