package cuda

// #include "graph.h"
import "C"

import (
	"context"
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"time"
	"unsafe"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/quant"
)

// Timed is how long a layer took that way.
type Timed struct {
	N    int64 `json:"n"`
	K    int64 `json:"k"`
	Rows int64 `json:"rows"`
	Way
	Time time.Duration `json:"nanoseconds"`
}

// The rows of x, and the shapes (N, K), that Measure tries.
var (
	measuredRows   = []int64{1, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192}
	measuredShapes = [][2]int64{{3072, 3072}, {4096, 4096}, {9216, 3072}, {12288, 3072}, {3072, 12288}, {14336, 4096}, {4096, 14336}, {8192, 8192}}
)

// Measure tries ways to compute linear layers of nf4 weights, and makes the device's table of them. every is called with each
// measurement. The device should have nothing else to do, and memory for a few hundred MB.
func (d *Device) Measure(ctx context.Context, every func(Timed)) (*Table, error) {
	if err := d.Prepare(); err != nil {
		return nil, err
	}
	info, err := Describe(d.Ordinal)
	if err == nil {
		err = d.PrepareMatmul()
	}
	if err != nil {
		return nil, err
	}
	t := &Table{Device: info.Name}
	for _, shape := range measuredShapes {
		tuned, err := d.measureShape(ctx, shape[0], shape[1], every)
		if err != nil {
			return nil, err
		}
		t.Shapes = append(t.Shapes, tuned)
	}
	return t, nil
}

// measured is the device memory of a shape's measurements.
type measured struct {
	device  *Device
	stream  C.gq_stream
	buffers []uint64
	weights []Weight // copies that together are larger than the caches
	layer   Linear
}

func (d *Device) measureShape(ctx context.Context, n, k int64, every func(Timed)) (_ Tuned, err error) {
	m := &measured{device: d, layer: Linear{DType: dtype.BF16, N: n, K: k, Settled: true}}
	defer func() { err = errors.Join(err, m.free()) }()
	if err := m.allocate(); err != nil {
		return Tuned{}, err
	}
	tuned := Tuned{N: n, K: k}
	for _, rows := range measuredRows {
		m.layer.M = rows
		best := Timed{Time: math.MaxInt64}
		for _, way := range d.candidates(rows, n) {
			if err := ctx.Err(); err != nil {
				return Tuned{}, err
			}
			if why := tried(way).refused(d, way, &m.weights[0], m.layer); why != "" {
				continue
			}
			took, err := m.time(way)
			if err != nil {
				return Tuned{}, err
			}
			found := Timed{n, k, rows, way, took}
			if every != nil {
				every(found)
			}
			if took < best.Time {
				best = found
			}
		}
		if best.Kernel == "" {
			continue
		}
		best.Way.Rows = rows
		if last := len(tuned.Ways) - 1; last >= 0 && sameWay(tuned.Ways[last], best.Way) {
			tuned.Ways[last].Rows = rows
		} else {
			tuned.Ways = append(tuned.Ways, best.Way)
		}
	}
	return tuned, nil
}

func sameWay(a, b Way) bool {
	a.Rows = b.Rows
	return a == b
}

// decode is what is done where no kernel reads the packed weight.
type decode struct{}

func (decode) refused(*Device, Way, *Weight, Linear) string { return "" }

func (decode) workspace(d *Device, _ Way, l Linear) uint64 {
	_, best := d.MatmulWorkspace(l)
	return best
}

func (decode) launch(d *Device, s Stream, _ Way, w *Weight, l Linear) error {
	return d.Matmul(s, w, l, l.Workspace, l.WorkspaceBytes)
}

// tried is what does a way.
func tried(way Way) linearKernel {
	if way.Kernel == "decode" {
		return decode{}
	}
	return linearKernels[way.Kernel]
}

// candidates are the ways that may be fast for so many rows of x, and n of the weight.
func (d *Device) candidates(rows, n int64) (list []Way) {
	list = append(list, Way{Kernel: "few"}, Way{Kernel: "tile"}, Way{Kernel: "decode"})
	for _, t := range hopperTiles {
		if t.tokens >= 2*max(rows, 16) || t.tokens < 128 && t.tokens*8 < rows {
			continue
		}
		way := Way{Kernel: "hopper", Tokens: t.tokens}
		if t.rows != usualRows {
			way.Tall = t.rows
		}
		for way.Deal = range 3 {
			list = append(list, way)
		}
		way.Deal = 0
		for way.Split = 2; way.Split <= maxCluster; way.Split++ {
			if ceilDiv(n, t.rows)*ceilDiv(rows, t.tokens) <= d.clusters[way.Split] {
				list = append(list, way)
			}
		}
	}
	return list
}

const (
	measuredBytes  = 220e6 // of weights: no cache holds them
	measuredRepeat = 5
)

// allocate makes weights of random codes, x, y, and workspace for all ways.
func (m *measured) allocate() (err error) {
	d, n, k := m.device, m.layer.N, m.layer.K
	if err := failed(C.gq_cu_new_stream(d.context, &m.stream), "making a stream on CUDA device %d", d.Ordinal); err != nil {
		return err
	}
	alloc := func(bytes int64) (address uint64) {
		if err == nil {
			address, err = d.Alloc(bytes)
			m.buffers = append(m.buffers, address)
		}
		return address
	}
	most := slices.Max(measuredRows)
	m.layer.X, m.layer.Y = alloc(2*most*k), alloc(2*most*n)
	for _, m.layer.M = range measuredRows {
		for _, way := range d.candidates(m.layer.M, n) {
			m.layer.WorkspaceBytes = max(m.layer.WorkspaceBytes, tried(way).workspace(d, way, m.layer))
		}
	}
	m.layer.Workspace = alloc(int64(m.layer.WorkspaceBytes))
	nf4, lookup := quant.Lookup("nf4")
	if err = errors.Join(err, lookup); err != nil {
		return err
	}
	random := rand.New(rand.NewPCG(1, 2))
	codes, absmax, x := make([]byte, n*k/2), make([]byte, n*k/16), make([]byte, 2*most*k)
	for i := range len(codes) / 8 {
		binary.LittleEndian.PutUint64(codes[8*i:], random.Uint64())
	}
	for i := range len(absmax) / 4 {
		binary.LittleEndian.PutUint32(absmax[4*i:], math.Float32bits(0.01+0.05*random.Float32()))
	}
	for i := range len(x) / 2 {
		binary.LittleEndian.PutUint16(x[2*i:], uint16(math.Float32bits(random.Float32()*2-1)>>16))
	}
	if err = d.upload(m.layer.X, x); err != nil {
		return err
	}
	for range int(measuredBytes/float64(len(codes)+len(absmax))) + 2 {
		w := Weight{Format: nf4, Packed: alloc(int64(len(codes))), Absmax: alloc(int64(len(absmax))), Blocksize: 64}
		if err == nil {
			err = errors.Join(d.upload(w.Packed, codes), d.upload(w.Absmax, absmax))
		}
		if err != nil {
			return err
		}
		m.weights = append(m.weights, w)
	}
	return nil
}

func (m *measured) free() (err error) {
	if m.stream != nil {
		err = failed(C.gq_cu_free_stream(m.device.context, m.stream), "ending a stream on CUDA device %d", m.device.Ordinal)
	}
	for _, address := range m.buffers {
		err = errors.Join(err, m.device.Free(address))
	}
	return err
}

// time is how long a layer takes, one of many behind one another, with a weight that is in no cache.
func (m *measured) time(way Way) (time.Duration, error) {
	d, count := m.device, 24
	if m.layer.M > 1024 {
		count = 4
	}
	switch code := C.gq_cu_capture(d.context, m.stream); {
	case code < 0:
		return 0, unavailable("the NVIDIA driver is too old to measure: it has no graphs")
	case code != 0:
		return 0, failed(code, "capturing a graph on CUDA device %d", d.Ordinal)
	}
	var launched error
	for i := 0; i < count && launched == nil; i++ {
		w := &m.weights[i%len(m.weights)]
		launched = tried(way).launch(d, *(*Stream)(unsafe.Pointer(&m.stream)), way, w, m.layer)
	}
	var times [measuredRepeat]C.float
	err := failed(C.gq_cu_replay(d.context, m.stream, measuredRepeat, &times[0]), "measuring %s on CUDA device %d", way.Kernel, d.Ordinal)
	slices.Sort(times[:])
	return time.Duration(float64(times[measuredRepeat/2]) * 1e6 / float64(count)), errors.Join(launched, err)
}
