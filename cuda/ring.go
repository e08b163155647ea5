package cuda

// #include "driver.h"
import "C"

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sync/errgroup"
)

// Reading files into device memory: a few workers, each of which reads into one pinned slot while the other is being copied. Copies of
// 4 MiB reach what PCIe 5 can do; how many workers that takes depends on how fast a core copies out of the page cache.
const (
	ringWorkers = 16 // 128 MiB of slots
	slotBytes   = 4 << 20
	slotAlign   = 64 // of segments within a slot
)

// Pinned slots are kept from one load to the next, because pinning memory takes longer than filling it. All devices share them.
var (
	loading sync.Mutex // held by a load
	pinned  []unsafe.Pointer
)

// ringWorker is a device's stream for one worker, and an event for each of its slots, recorded behind the last copy out of it.
type ringWorker struct {
	device *Device
	stream C.gq_stream
	slots  [2]unsafe.Pointer
	copied [2]C.gq_event
}

// ringWorker gives worker number n, which it makes if need be.
func (d *Device) ringWorker(n int) (*ringWorker, error) {
	if n == len(d.workers) {
		w := &ringWorker{device: d}
		if err := w.make(); err != nil {
			w.release()
			return nil, err
		}
		d.workers = append(d.workers, w)
	}
	w := d.workers[n]
	for i := range w.slots {
		number := n*len(w.slots) + i
		if number == len(pinned) {
			var memory unsafe.Pointer
			if err := failed(C.gq_cu_alloc_pinned(d.context, slotBytes, &memory), "pinning %d bytes of host memory", slotBytes); err != nil {
				return nil, err
			}
			pinned = append(pinned, memory)
		}
		w.slots[i] = pinned[number]
	}
	return w, nil
}

func (w *ringWorker) make() error {
	if err := failed(C.gq_cu_new_stream(w.device.context, &w.stream), "making a stream on CUDA device %d", w.device.Ordinal); err != nil {
		return err
	}
	for i := range w.copied {
		if err := failed(C.gq_cu_new_event(w.device.context, &w.copied[i]), "making an event on CUDA device %d", w.device.Ordinal); err != nil {
			return err
		}
	}
	return nil
}

// release gives back a worker that could not be made, as far as it was.
func (w *ringWorker) release() {
	for _, e := range w.copied {
		if e != nil {
			C.gq_cu_free_event(w.device.context, e)
		}
	}
	if w.stream != nil {
		C.gq_cu_free_stream(w.device.context, w.stream)
	}
}

// Piece is bytes that go to device memory.
type Piece struct {
	To    uint64
	Bytes int64
	Read  func(p []byte, offset int64) error // fills p with the bytes from offset on
}

// segment is a part of a piece that fits into a slot.
type segment struct {
	piece *Piece
	at    int64
	bytes int64
}

// batches cuts pieces into what fills a slot each, in their order.
func batches(pieces []Piece) [][]segment {
	var list [][]segment
	var batch []segment
	used := int64(0)
	for i := range pieces {
		p := &pieces[i]
		for at := int64(0); at < p.Bytes; {
			n := min(p.Bytes-at, slotBytes-used)
			batch = append(batch, segment{p, at, n})
			at += n
			if used += ceilDiv(n, slotAlign) * slotAlign; used >= slotBytes {
				list, batch, used = append(list, batch), nil, 0
			}
		}
	}
	if batch != nil {
		list = append(list, batch)
	}
	return list
}

// Load reads pieces into device memory with at most so many threads (0 = sixteen, or one per core if there are fewer), and returns when
// they are there. It starts when the work that the stream has now is done. One load runs at a time.
func (d *Device) Load(after Stream, threads int, pieces []Piece) (err error) {
	todo := batches(pieces)
	if len(todo) == 0 {
		return nil
	}
	if threads <= 0 {
		threads = runtime.GOMAXPROCS(0)
	}
	loading.Lock()
	defer loading.Unlock()
	workers := make([]*ringWorker, min(threads, ringWorkers, len(todo)))
	for n := range workers {
		if workers[n], err = d.ringWorker(n); err != nil {
			return err
		}
	}
	var before C.gq_event
	if err := failed(C.gq_cu_new_event(d.context, &before), "making an event on CUDA device %d", d.Ordinal); err != nil {
		return err
	}
	defer func() {
		if problem := failed(C.gq_cu_free_event(d.context, before), "ending an event on CUDA device %d", d.Ordinal); err == nil {
			err = problem
		}
	}()
	if err := failed(C.gq_cu_record(d.context, before, after.handle()), "recording an event on CUDA device %d", d.Ordinal); err != nil {
		return err
	}

	var next atomic.Int64
	var stop atomic.Bool
	var group errgroup.Group
	for _, w := range workers {
		group.Go(func() error {
			err := w.run(before, func() []segment {
				if n := next.Add(1) - 1; n < int64(len(todo)) && !stop.Load() {
					return todo[n]
				}
				return nil
			})
			if err != nil {
				stop.Store(true)
			}
			return err
		})
	}
	return group.Wait()
}

// run copies batches until take gives none, and waits for all copies, also after an error: a slot must not be filled again under
// a copy.
func (w *ringWorker) run(before C.gq_event, take func() []segment) (err error) {
	context, ordinal := w.device.context, w.device.Ordinal
	defer func() {
		if problem := failed(C.gq_cu_wait(context, w.stream), "copying to CUDA device %d", ordinal); err == nil {
			err = problem
		}
	}()
	if err := failed(C.gq_cu_stream_waits(context, w.stream, before), "waiting for a stream of CUDA device %d", ordinal); err != nil {
		return err
	}
	for turn := 0; ; turn++ {
		batch := take()
		if batch == nil {
			return nil
		}
		slot, copied := w.slots[turn%len(w.slots)], w.copied[turn%len(w.slots)]
		if turn >= len(w.slots) {
			if err := failed(C.gq_cu_wait_event(context, copied), "copying to CUDA device %d", ordinal); err != nil {
				return err
			}
		}
		used := int64(0)
		for _, g := range batch {
			from := unsafe.Add(slot, used)
			if err := g.piece.Read(unsafe.Slice((*byte)(from), g.bytes), g.at); err != nil {
				return err
			}
			if err := failed(C.gq_cu_to_device(context, C.uint64_t(g.piece.To+uint64(g.at)), from, C.size_t(g.bytes), w.stream), "copying %d bytes to CUDA device %d", g.bytes, ordinal); err != nil {
				return err
			}
			used += ceilDiv(g.bytes, slotAlign) * slotAlign
		}
		if err := failed(C.gq_cu_record(context, copied, w.stream), "recording an event on CUDA device %d", ordinal); err != nil {
			return err
		}
	}
}

// Bytes is a Piece's Read for bytes in memory.
func Bytes(b []byte) func(p []byte, offset int64) error {
	return func(p []byte, offset int64) error {
		if n := copy(p, b[offset:]); n < len(p) {
			return fmt.Errorf("%d bytes of %d", n, len(p))
		}
		return nil
	}
}
