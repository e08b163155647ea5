package convert

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/gquant/gquant/core/safetensors"
)

// Report says what a run did.
type Report struct {
	Source      string      `json:"source"`
	Outputs     []string    `json:"outputs"` // the files, and the index if there is one
	Quantized   int         `json:"quantized"`
	Dequantized int         `json:"dequantized"`
	Copied      int         `json:"copied"`
	Resumed     int         `json:"resumed"` // items that an earlier, interrupted run had finished
	SourceBytes int64       `json:"source_bytes"`
	OutputBytes int64       `json:"output_bytes"` // sizes of the output files
	LayerBytes  [2]int64    `json:"layer_bytes"`  // of the quantized (or dequantized) layers alone: before, after
	Seconds     float64     `json:"seconds"`
	Nonfinite   []Nonfinite `json:"nonfinite"`
	Warnings    []string    `json:"warnings"`
}

// Nonfinite counts the NaN and Inf elements of a weight that was quantized.
type Nonfinite struct {
	Name  string `json:"name"`
	Count int64  `json:"count"`
}

func (p *Plan) newReport() *Report {
	r := &Report{
		Source: p.Source, SourceBytes: p.Bytes, Warnings: p.Warnings, Nonfinite: []Nonfinite{},
		Quantized: p.Count(Quantize), Dequantized: p.Count(Dequantize), Copied: p.Count(Copy),
	}
	for _, s := range p.Shards {
		r.Outputs = append(r.Outputs, s.Path)
	}
	if p.Index != "" {
		r.Outputs = append(r.Outputs, p.Index)
	}
	return r
}

// count notes the NaN and Inf of a finished layer; with strict they are an error.
func (r *Report) count(q *quantizer, strict bool) error {
	n := q.nonfinite.Load()
	if n == 0 {
		return nil
	}
	if strict {
		return fmt.Errorf("%s: tensor %q has %d elements that are NaN or Inf", q.item.Source.File, q.item.Name, n)
	}
	r.Nonfinite = append(r.Nonfinite, Nonfinite{q.item.Name, n})
	return nil
}

// measure takes the sizes of what was written.
func (r *Report) measure(p *Plan, writers []*safetensors.Writer, elapsed time.Duration) error {
	r.Seconds = elapsed.Seconds()
	slices.SortFunc(r.Nonfinite, func(a, b Nonfinite) int { return strings.Compare(a.Name, b.Name) })
	for _, it := range p.Items {
		if it.Action == Copy {
			continue
		}
		r.LayerBytes[0] += it.Bytes
		for i := range it.parts {
			r.LayerBytes[1] += writers[it.Shard].Tensors()[it.first+i].Bytes()
		}
	}
	for _, s := range p.Shards {
		info, err := os.Stat(s.Path)
		if err != nil {
			return err
		}
		r.OutputBytes += info.Size()
	}
	return nil
}
