package cuda

// #include "driver.h"
import "C"

import (
	"errors"
	"runtime"
	"unsafe"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/quant"
)

// Engine quantizes on a device what is read from files: it is the quant.Engine of package convert. A worker has pinned memory for a
// chunk and its codes, device memory for both, and a stream; while one waits for its copies, the others read and write files.
type Engine struct{ device *Device }

const (
	// engineChunk is larger than the CPU's chunk: a copy to the device has to be worth its start.
	engineChunk = 2 << 20
	// engineWorkers have 45 MB of pinned memory in all. Most of their time goes into the system's copies from and to files.
	engineWorkers = 16
)

// NewEngine makes the engine of a device.
func NewEngine(ordinal int) (*Engine, error) {
	d, err := Open(ordinal)
	if err != nil {
		return nil, err
	}
	return &Engine{d}, d.Prepare()
}

// Workers is one per core, at most sixteen.
func (e *Engine) Workers(threads int) int {
	if threads <= 0 {
		threads = runtime.GOMAXPROCS(0)
	}
	return min(threads, engineWorkers)
}

// ChunkBytes is 2 MiB.
func (e *Engine) ChunkBytes() int64 { return engineChunk }

// The results of a chunk lie one behind another, to be copied at once: a count of elements that are no numbers, absmax, codes.
const (
	absmaxAt    = 64
	resultBytes = absmaxAt + 4*engineChunk/2/32 + engineChunk/2/2 // for the smallest blocks and elements
)

type engineWorker struct {
	device *Device
	stream Stream
	// The source, and behind it the results.
	pinned unsafe.Pointer
	memory uint64
}

// NewWorker makes a worker.
func (e *Engine) NewWorker() (quant.Worker, error) {
	w := &engineWorker{device: e.device}
	var stream C.gq_stream
	if err := failed(C.gq_cu_new_stream(e.device.context, &stream), "making a stream on CUDA device %d", e.device.Ordinal); err != nil {
		return nil, err
	}
	w.stream = *(*Stream)(unsafe.Pointer(&stream))
	if err := failed(C.gq_cu_alloc_pinned(e.device.context, engineChunk+resultBytes, &w.pinned), "pinning %d bytes of host memory", engineChunk+resultBytes); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	var err error
	if w.memory, err = e.device.Alloc(engineChunk + resultBytes); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

func (w *engineWorker) Close() error {
	context := w.device.context
	err := failed(C.gq_cu_wait(context, w.stream.handle()), "waiting for CUDA device %d", w.device.Ordinal)
	if w.pinned != nil {
		err = errors.Join(err, failed(C.gq_cu_free_pinned(context, w.pinned), "freeing pinned memory"))
	}
	err = errors.Join(err, w.device.Free(w.memory))
	return errors.Join(err, failed(C.gq_cu_free_stream(context, w.stream.handle()), "ending a stream on CUDA device %d", w.device.Ordinal))
}

func (w *engineWorker) Source(n int64) []byte { return unsafe.Slice((*byte)(w.pinned), n) }

func (w *engineWorker) Quantize(f *quant.Format, t dtype.DType, n int64, blocksize int, absmax []float32) (codes []byte, nonfinite int64, err error) {
	d, context, stream := w.device, w.device.context, w.stream.handle()
	size, blocks, packed := int64(t.Bits()/8), ceilDiv(n, int64(blocksize)), (n+1)/2
	codesAt := absmaxAt + 4*blocks
	results, host := w.memory+engineChunk, unsafe.Add(w.pinned, engineChunk)
	steps := []func() error{
		func() error {
			return failed(C.gq_cu_to_device(context, C.uint64_t(w.memory), w.pinned, C.size_t(n*size), stream), "copying %d bytes to CUDA device %d", n*size, d.Ordinal)
		},
		func() error { return d.zero(w.stream, results, 8) },
		func() error {
			return d.Quantize4(w.stream, f, Blocks{w.memory, results + absmaxAt, results + uint64(codesAt), t, n, int64(blocksize)})
		},
		func() error { return d.countNonfinite(w.stream, w.memory, t, n, results) },
		func() error {
			return failed(C.gq_cu_to_host(context, host, C.uint64_t(results), C.size_t(codesAt+packed), stream), "copying %d bytes from CUDA device %d", codesAt+packed, d.Ordinal)
		},
		func() error {
			return failed(C.gq_cu_wait(context, stream), "quantizing on CUDA device %d", d.Ordinal)
		},
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return nil, 0, err
		}
	}
	copy(absmax, unsafe.Slice((*float32)(unsafe.Add(host, absmaxAt)), blocks))
	return unsafe.Slice((*byte)(unsafe.Add(host, codesAt)), packed), *(*int64)(host), nil
}
