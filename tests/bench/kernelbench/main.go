// Command kernelbench measures core/quant for tests/bench/bench.py: seconds per call, of many calls, as JSON.
//
//	kernelbench -size 4096 -blocksize 64 -threads 2 -repeat 20
//	kernelbench -header FILE     (the first parse of a header in a fresh process)
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/kernel"
	"github.com/gquant/gquant/core/quant"
	"github.com/gquant/gquant/core/safetensors"
)

func main() {
	size := flag.Int64("size", 4096, "rows and columns of the weight")
	blocksize := flag.Int("blocksize", 64, "elements per absmax")
	threads := flag.Int("threads", runtime.NumCPU(), "threads")
	repeat := flag.Int("repeat", 20, "measured calls of each kind")
	header := flag.String("header", "", "only open this safetensors file")
	flag.Parse()
	var result any
	var err error
	if *header != "" {
		result, err = measureHeader(*header)
	} else {
		result, err = measureKernels(*size, *blocksize, *threads, *repeat)
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(result)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kernelbench:", err)
		os.Exit(1)
	}
}

func measureHeader(path string) (any, error) {
	start := time.Now()
	f, err := safetensors.Open(path)
	if err != nil {
		return nil, err
	}
	elapsed := time.Since(start)
	return map[string]any{"seconds": elapsed.Seconds(), "tensors": len(f.Header().Tensors)}, f.Close()
}

func measureKernels(size int64, blocksize, threads, repeat int) (any, error) {
	times := map[string][]float64{}
	shape := []int64{size, size}
	for _, name := range []string{"nf4", "fp4"} {
		format, err := quant.Lookup(name)
		if err != nil {
			return nil, err
		}
		for label, d := range map[string]dtype.DType{"bf16": dtype.BF16, "f16": dtype.F16, "f32": dtype.F32} {
			src := normal(d, size*size)
			state, _, err := quant.Quantize(format, src, d, shape, quant.Options{Blocksize: blocksize, Threads: threads})
			if err != nil {
				return nil, err
			}
			times["quantize "+name+" "+label], err = measure(repeat, nothing, func() error {
				quantize(state, src, d, threads)
				return nil
			})
			if err != nil {
				return nil, err
			}
			times["dequantize to new memory "+name+" "+label], err = measure(repeat, debug.FreeOSMemory, func() error { // make gets its memory from the system then, as bitsandbytes does
				return state.DequantizeRange(make([]byte, len(src)), d, 0, size*size, threads)
			})
			if err != nil {
				return nil, err
			}
			dst := make([]byte, len(src))
			times["dequantize "+name+" "+label], err = measure(repeat, nothing, func() error {
				return state.DequantizeRange(dst, d, 0, size*size, threads)
			})
			if err != nil {
				return nil, err
			}
		}
	}
	return map[string]any{"level": kernel.Level(), "times": times}, nil
}

// quantize does what quant.Quantize does, with the memory that the state has, and in chunks as a conversion.
func quantize(s *quant.State, src []byte, d dtype.DType, threads int) {
	const chunk = 1 << 19 // elements, whole blocks of any size
	n, size, blocksize := s.Elements(), int64(d.Bits()/8), int64(s.Blocksize)
	var next atomic.Int64
	var group sync.WaitGroup
	for range threads {
		group.Go(func() {
			for {
				first := (next.Add(1) - 1) * chunk
				if first >= n {
					return
				}
				count := min(chunk, n-first)
				absmax := s.Absmax[first/blocksize : (first+count+blocksize-1)/blocksize]
				quant.QuantizeBlocks(s.Format, src[first*size:(first+count)*size], d, count, s.Blocksize, absmax, s.Packed[first/2:(first+count+1)/2])
			}
		})
	}
	group.Wait()
}

func nothing() {}

// measure gives the seconds of each call, after two that are not counted. What prepare does is not counted either.
func measure(repeat int, prepare func(), call func() error) ([]float64, error) {
	times := make([]float64, 0, repeat)
	for i := range repeat + 2 {
		prepare()
		start := time.Now()
		if err := call(); err != nil {
			return nil, err
		}
		if i >= 2 {
			times = append(times, time.Since(start).Seconds())
		}
	}
	return times, nil
}

// normal gives normal numbers × 0.02.
func normal(d dtype.DType, n int64) []byte {
	random := rand.New(rand.NewPCG(1, 2))
	size := int64(d.Bits() / 8)
	out := make([]byte, n*size)
	for i := range n {
		dtype.PutF32(out[i*size:], d, float32(random.NormFloat64()*0.02))
	}
	return out
}
