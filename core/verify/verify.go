// Package verify checks finished checkpoints: their structure and the contracts of their quantized layers
// (verify.go), and how far two of them are apart (diff.go).
package verify

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sort"
	"strings"

	"github.com/gquant/gquant/core/checkpoint"
	"github.com/gquant/gquant/core/safetensors"
)

// Options of a check.
type Options struct {
	SHA256  bool `json:"sha256"`  // hash every file
	Strict  bool `json:"strict"`  // NaN, Inf and all-zero weights are problems
	Threads int  `json:"threads"` // 0 = all cores
}

// Result is what a check found. A model with Problems should not be published.
type Result struct {
	Path     string   `json:"path"`
	Files    []File   `json:"files"`
	Tensors  int      `json:"tensors"` // as stored
	Layers   int      `json:"layers"`  // quantized
	Formats  []string `json:"formats"` // of the layers
	Problems []string `json:"problems"`
	Suspects []Counts `json:"suspects"` // tensors with NaN, Inf or nothing but zeros
}

// File is one file of the model.
type File struct {
	Path   string `json:"path"`
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256,omitempty"`
}

// Counts are the notable values of a tensor, decoded if it is quantized.
type Counts struct {
	Name    string `json:"name"`
	NaN     int64  `json:"nan"`
	Inf     int64  `json:"inf"`
	AllZero bool   `json:"all_zero"`
}

// Run checks a model. What is wrong in it is in the result; an error means that it could not be read, or that ctx
// ended.
func Run(ctx context.Context, path string, o Options) (*Result, error) {
	set, err := safetensors.OpenSet(path)
	var format *safetensors.FormatError
	if errors.As(err, &format) {
		return &Result{Path: path, Files: []File{}, Formats: []string{}, Problems: []string{err.Error()}, Suspects: []Counts{}}, nil
	}
	if err != nil {
		return nil, err
	}
	m, problems := checkpoint.Scan(set)
	defer m.Close()
	problems = append(problems, m.CheckComfy()...)
	r := &Result{Path: path, Tensors: len(m.Entries()), Layers: len(m.Layers), Formats: []string{}, Problems: []string{}, Suspects: []Counts{}}
	for _, f := range m.Files() {
		file := File{Path: f.Path(), Bytes: f.Size()}
		if o.SHA256 {
			if file.SHA256, err = hash(ctx, f.Path()); err != nil {
				return nil, err
			}
		}
		r.Files = append(r.Files, file)
	}
	formats := map[string]bool{}
	for _, l := range m.Layers {
		formats[l.State.Format.Name] = true
	}
	for f := range formats {
		r.Formats = append(r.Formats, f)
	}
	sort.Strings(r.Formats)
	problems = append(problems, orphans(m)...)
	for _, v := range modelValues(m) {
		if !v.dtype.Numeric() || v.elements() == 0 {
			continue
		}
		c, err := count(ctx, v, o.Threads)
		if err != nil {
			return nil, err
		}
		if c.NaN > 0 || c.Inf > 0 || c.AllZero {
			r.Suspects = append(r.Suspects, *c)
			if o.Strict {
				problems = append(problems, fmt.Errorf("tensor %q: %s", c.Name, c))
			}
		}
	}
	for _, p := range problems {
		r.Problems = append(r.Problems, p.Error())
	}
	return r, nil
}

// String says what was counted.
func (c *Counts) String() string {
	var parts []string
	if c.NaN > 0 {
		parts = append(parts, fmt.Sprintf("%d NaN", c.NaN))
	}
	if c.Inf > 0 {
		parts = append(parts, fmt.Sprintf("%d Inf", c.Inf))
	}
	if c.AllZero {
		parts = append(parts, "all zero")
	}
	return strings.Join(parts, ", ")
}

// orphans are statistics whose layer is missing: bitsandbytes would refuse the file, others would ignore them.
func orphans(m *checkpoint.Model) []error {
	var problems []error
	for _, e := range m.Plain {
		for _, part := range []checkpoint.Part{checkpoint.Absmax, checkpoint.NestedAbsmax, checkpoint.NestedQuantMap, checkpoint.QuantMap} {
			if weight, ok := strings.CutSuffix(e.Name, ".weight."+string(part)); ok {
				problems = append(problems, fmt.Errorf("%s: tensor %q belongs to no layer: %q has no quant_state", e.File.Path(), e.Name, weight+".weight"))
			}
		}
	}
	return problems
}

func count(ctx context.Context, v *values, threads int) (*Counts, error) {
	r, err := v.open()
	if err != nil {
		return nil, err
	}
	n := v.elements()
	type part struct {
		nan, inf int64
		nonzero  bool
	}
	parts := make([]part, chunkCount(n))
	err = each(ctx, n, threads, func(chunk int, first, count int64, m *memory) error {
		if err := r.read(m.a[:count], first, m); err != nil {
			return err
		}
		p := &parts[chunk]
		for _, x := range m.a[:count] {
			if x != 0 {
				p.nonzero = true
			}
			if x-x != 0 {
				if math.IsNaN(x) {
					p.nan++
				} else {
					p.inf++
				}
			}
		}
		return nil
	})
	// One zero is a value, not a sign of a broken file: scalars and short vectors are often zero.
	c := &Counts{Name: v.name, AllZero: n >= 64}
	for _, p := range parts {
		c.NaN += p.nan
		c.Inf += p.inf
		c.AllZero = c.AllZero && !p.nonzero
	}
	return c, err
}

func hash(ctx context.Context, path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	for {
		if _, err := io.CopyN(h, f, 16<<20); err == io.EOF {
			break
		} else if err != nil {
			return "", fmt.Errorf("%s: %w", path, err)
		}
		if err := ctx.Err(); err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
