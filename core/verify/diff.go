package verify

import (
	"context"
	"fmt"
	"math"
	"regexp"
	"slices"
	"sort"

	"github.com/gquant/gquant/core/checkpoint"
)

// Difference compares one tensor of two models, a the reference. Values that are NaN or Inf in either are left
// out of the sums and counted.
type Difference struct {
	Name      string  `json:"name"`
	FormatA   string  `json:"format_a"` // quantized format, or dtype
	FormatB   string  `json:"format_b"`
	Elements  int64   `json:"elements"`
	Equal     bool    `json:"equal"`      // every value is the same
	MaxError  float64 `json:"max_error"`  // max |a-b|
	MeanError float64 `json:"mean_error"` // mean |a-b|
	MSE       float64 `json:"mse"`        // mean (a-b)²
	SNR       float64 `json:"snr_db"`     // 10·log10(Σa² / Σ(a-b)²), decibel; maxSNR when equal
	Cosine    float64 `json:"cosine"`     // Σab / √(Σa²·Σb²); 1 when equal
	Nonfinite int64   `json:"nonfinite"`

	sums sums
}

// maxSNR stands for the infinite ratio of equal tensors, which JSON has no number for: above any that differ in
// float64.
const maxSNR = 400

// Comparison is the result of Diff.
type Comparison struct {
	A        string       `json:"a"`
	B        string       `json:"b"`
	Tensors  []Difference `json:"tensors"`  // worst SNR first
	Kinds    []Difference `json:"kinds"`    // the same, tensors of one kind together: names that differ in numbers only
	Total    Difference   `json:"total"`    // all tensors together
	Changed  Difference   `json:"changed"`  // those that are not equal together
	OnlyA    []string     `json:"only_a"`   // names that B does not have
	OnlyB    []string     `json:"only_b"`   // names that A does not have
	Mismatch []string     `json:"mismatch"` // names whose shapes differ
	Skipped  []string     `json:"skipped"`  // names whose dtype has no numbers to compare (sub-byte, complex)
}

type sums struct {
	elements, nonfinite int64
	differs             bool
	max, abs, square    float64 // of a-b
	aa, bb, ab          float64
}

func (s *sums) add(o sums) {
	s.elements += o.elements
	s.nonfinite += o.nonfinite
	s.differs = s.differs || o.differs
	s.max = max(s.max, o.max)
	s.abs += o.abs
	s.square += o.square
	s.aa += o.aa
	s.bb += o.bb
	s.ab += o.ab
}

func (s sums) difference(name, formatA, formatB string) Difference {
	d := Difference{Name: name, FormatA: formatA, FormatB: formatB, Elements: s.elements, MaxError: s.max, Nonfinite: s.nonfinite, sums: s}
	n := float64(max(1, s.elements-s.nonfinite))
	d.MeanError, d.MSE = s.abs/n, s.square/n
	d.Equal = !s.differs
	d.SNR, d.Cosine = maxSNR, 1
	if s.square > 0 {
		d.SNR = max(-maxSNR, min(maxSNR, 10*math.Log10(s.aa/s.square)))
	}
	switch {
	case s.max == 0:
	case s.aa > 0 && s.bb > 0:
		d.Cosine = s.ab / (math.Sqrt(s.aa) * math.Sqrt(s.bb))
	default:
		d.Cosine = 0
	}
	return d
}

// Diff compares two models tensor by tensor, quantized layers by their decoded values, until ctx ends.
func Diff(ctx context.Context, pathA, pathB string, threads int) (*Comparison, error) {
	a, err := checkpoint.Open(pathA)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	b, err := checkpoint.Open(pathB)
	if err != nil {
		return nil, err
	}
	defer b.Close()

	c := &Comparison{A: pathA, B: pathB, Tensors: []Difference{}, OnlyA: []string{}, OnlyB: []string{}, Mismatch: []string{}, Skipped: []string{}}
	others := map[string]*values{}
	for _, v := range modelValues(b) {
		others[v.name] = v
	}
	for _, va := range modelValues(a) {
		vb := others[va.name]
		delete(others, va.name)
		switch {
		case vb == nil:
			c.OnlyA = append(c.OnlyA, va.name)
		case !slices.Equal(va.shape, vb.shape):
			c.Mismatch = append(c.Mismatch, fmt.Sprintf("%s: %v and %v", va.name, va.shape, vb.shape))
		case !va.dtype.Numeric() || !vb.dtype.Numeric():
			c.Skipped = append(c.Skipped, va.name)
		default:
			s, err := compare(ctx, va, vb, threads)
			if err != nil {
				return nil, err
			}
			c.Tensors = append(c.Tensors, s.difference(va.name, va.format, vb.format))
		}
	}
	for name := range others {
		c.OnlyB = append(c.OnlyB, name)
	}
	sort.Strings(c.OnlyB)
	if len(c.Tensors) == 0 {
		return nil, fmt.Errorf("%s and %s have no tensor of the same name and shape", pathA, pathB)
	}
	sortWorst(c.Tensors)
	c.summarize()
	return c, nil
}

func sortWorst(ds []Difference) {
	slices.SortStableFunc(ds, func(x, y Difference) int {
		switch {
		case x.SNR < y.SNR:
			return -1
		case x.SNR > y.SNR:
			return 1
		}
		return 0
	})
}

var numbers = regexp.MustCompile(`\d+`)

// Kind is a tensor's name with its numbers as "*": equal for the same layer of every block.
func Kind(name string) string { return numbers.ReplaceAllString(name, "*") }

func (c *Comparison) summarize() {
	type key struct{ kind, a, b string }
	groups := map[key]*sums{}
	var order []key
	var total, changed sums
	for _, d := range c.Tensors {
		k := key{Kind(d.Name), d.FormatA, d.FormatB}
		if groups[k] == nil {
			groups[k] = &sums{}
			order = append(order, k)
		}
		groups[k].add(d.sums)
		total.add(d.sums)
		if !d.Equal {
			changed.add(d.sums)
		}
	}
	for _, k := range order {
		c.Kinds = append(c.Kinds, groups[k].difference(k.kind, k.a, k.b))
	}
	sortWorst(c.Kinds)
	c.Total = total.difference("total", "", "")
	c.Changed = changed.difference("changed", "", "")
}

func compare(ctx context.Context, va, vb *values, threads int) (*sums, error) {
	ra, err := va.open()
	if err != nil {
		return nil, err
	}
	rb, err := vb.open()
	if err != nil {
		return nil, err
	}
	n := va.elements()
	parts := make([]sums, chunkCount(n))
	err = each(ctx, n, threads, func(chunk int, first, count int64, m *memory) error {
		a, b := m.a[:count], m.b[:count]
		if err := ra.read(a, first, m); err != nil {
			return err
		}
		if err := rb.read(b, first, m); err != nil {
			return err
		}
		parts[chunk] = compareChunk(a, b)
		return nil
	})
	var s sums
	for _, p := range parts {
		s.add(p)
	}
	return &s, err
}

func compareChunk(a, b []float64) sums {
	s := sums{elements: int64(len(a))}
	for i, x := range a {
		y := b[i]
		if x-x != 0 || y-y != 0 {
			// NaN on both sides or the same Inf is no difference.
			s.differs = s.differs || x != y && !(math.IsNaN(x) && math.IsNaN(y))
			s.nonfinite++
			continue
		}
		e := x - y
		s.differs = s.differs || e != 0
		s.max = max(s.max, math.Abs(e))
		s.abs += math.Abs(e)
		s.square += e * e
		s.aa += x * x
		s.bb += y * y
		s.ab += x * y
	}
	return s
}
