package quant

import (
	"runtime"
	"slices"

	"github.com/gquant/gquant/core/dtype"
)

// Engine quantizes weights chunk by chunk: the CPU, or a device of package cuda. All give the same bytes.
type Engine interface {
	// Workers is how many workers to use if so many threads are asked for; 0 = as many as are of use.
	Workers(threads int) int
	// ChunkBytes is how much of a source tensor a worker takes at a time: a power of two.
	ChunkBytes() int64
	// NewWorker makes a worker for one goroutine.
	NewWorker() (Worker, error)
}

// Worker is one goroutine's hold on an engine.
type Worker interface {
	// Source is memory for n bytes of a source tensor, at most ChunkBytes; each call gives the same memory.
	Source(n int64) []byte
	// Quantize quantizes the n elements that lie in Source, whole blocks but for the end of the tensor, to a 4-bit format. It fills
	// absmax, and gives the codes, valid until the next call, and the number of NaN and infinite elements.
	Quantize(f *Format, d dtype.DType, n int64, blocksize int, absmax []float32) (codes []byte, nonfinite int64, err error)
	// Close gives the worker's memory back.
	Close() error
}

// CPU is the engine of this package.
type CPU struct{}

// Workers is one per core.
func (CPU) Workers(threads int) int {
	if threads <= 0 {
		return runtime.GOMAXPROCS(0)
	}
	return threads
}

// ChunkBytes is small enough that the bytes are still in the core's cache when they are quantized and written, and large enough that system
// calls don't count.
func (CPU) ChunkBytes() int64 { return 1 << 20 }

// NewWorker makes a worker.
func (CPU) NewWorker() (Worker, error) { return &cpuWorker{}, nil }

type cpuWorker struct{ source, codes []byte }

func (w *cpuWorker) Source(n int64) []byte {
	w.source = slices.Grow(w.source[:0], int(n))[:n]
	return w.source
}

func (w *cpuWorker) Quantize(f *Format, d dtype.DType, n int64, blocksize int, absmax []float32) (codes []byte, nonfinite int64, err error) {
	w.codes = slices.Grow(w.codes[:0], int(n+1)/2)[:(n+1)/2]
	return w.codes, QuantizeBlocks(f, w.source[:n*int64(d.Bits()/8)], d, n, blocksize, absmax, w.codes), nil
}

func (w *cpuWorker) Close() error { return nil }
