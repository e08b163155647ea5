package quant

import (
	"bytes"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/kernel"
)

// 4096×4096 weights, so many that their codes, 8 MiB each, are never in a cache when their turn comes.
const benchSide, benchWeights = 4096, 24

// The medians of BenchmarkLinear: GB/s count the codes and absmax. Those of BenchmarkRead, of as much memory, are the limit
// for few rows of x.
func BenchmarkLinear(b *testing.B) {
	before := kernel.Level()
	defer kernel.Use(before)
	for _, nested := range []bool{false, true} {
		weights := benchStates(b, nested)
		for _, level := range kernel.Levels()[1:] {
			for _, m := range []int64{1, 2, 4, 8, 9, 16, 64, 512} {
				b.Run(fmt.Sprintf("%s/nested=%v/M=%d", level, nested, m), func(b *testing.B) {
					if err := kernel.Use(level); err != nil {
						b.Fatal(err)
					}
					x, y := normal(dtype.BF16, m*benchSide, 1), make([]byte, 2*m*benchSide)
					seconds := median(b, func(turn int) {
						if err := weights[turn%benchWeights].Linear(y, x, m, dtype.BF16, nil, 0); err != nil {
							b.Fatal(err)
						}
					})
					b.ReportMetric(float64(statsBytes(weights[0]))/seconds/1e9, "GB/s")
					b.ReportMetric(float64(2*m*benchSide*benchSide)/seconds/1e9, "Gflop/s")
				})
			}
		}
	}
}

// BenchmarkRead reads bytes and does nothing with them, from as many goroutines as Linear has. The search for a byte that
// does not occur is a loop of vector loads.
func BenchmarkRead(b *testing.B) {
	weights := make([][]byte, benchWeights)
	for i := range weights {
		weights[i] = bytes.Repeat([]byte{1}, benchSide*benchSide/2)
	}
	seconds := median(b, func(turn int) {
		codes := weights[turn%benchWeights]
		parallel(int64(len(codes)), 256<<10, 0, func(first, count int64) {
			if bytes.IndexByte(codes[first:first+count], 0) >= 0 {
				b.Error("found what is not there")
			}
		})
	})
	b.ReportMetric(float64(benchSide*benchSide/2)/seconds/1e9, "GB/s")
}

// median is the median time of a call of work, in seconds. It is reported in milliseconds.
func median(b *testing.B, work func(turn int)) float64 {
	var times []float64
	for b.Loop() {
		start := time.Now()
		work(len(times))
		times = append(times, time.Since(start).Seconds())
	}
	slices.Sort(times)
	middle := times[len(times)/2]
	b.ReportMetric(middle*1e3, "median-ms")
	return middle
}

func statsBytes(s *State) int64 {
	if s.Nested != nil {
		return int64(len(s.Packed) + len(s.Nested.Codes) + 4*len(s.Nested.Absmax))
	}
	return int64(len(s.Packed) + 4*len(s.Absmax))
}

func benchStates(b *testing.B, nested bool) []*State {
	first, _ := quantized(b, "nf4", dtype.BF16, []int64{benchSide, benchSide}, Options{Nested: nested})
	states := make([]*State, benchWeights)
	var copies sync.WaitGroup
	for i := range states {
		copies.Go(func() {
			s := *first
			s.Packed, s.Absmax = bytes.Clone(s.Packed), append([]float32(nil), s.Absmax...)
			if s.Nested != nil {
				n := *s.Nested
				n.Codes = bytes.Clone(n.Codes)
				s.Nested, s.Absmax = &n, nil
			}
			states[i] = &s
		})
	}
	copies.Wait()
	return states
}
