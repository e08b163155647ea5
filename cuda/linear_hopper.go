package cuda

// #include "driver.h"
// #include "kernels/args.h"
//
// // The rows of W and tokens of tile i, its CTA's threads, and their shared memory; zeros behind the last.
// struct tile { int rows, tokens, threads, shared; };
// #define TILE(rows, tokens, ...) {rows, tokens, GQ_HOPPER_THREADS(rows), GQ_HOPPER_SHARED(rows, tokens, __VA_ARGS__)},
// static inline struct tile hopper_tile(size_t i) {
//     static const struct tile tiles[] = {GQ_HOPPER_TILES(TILE) {0, 0, 0, 0}};
//     return tiles[i];
// }
import "C"

import (
	"cmp"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"slices"
	"sync/atomic"
	"unsafe"

	"github.com/gquant/gquant/core/dtype"
)

// hopper is kernels/linear_hopper.cu, for any number of rows of x. Weights are value·absmax in the dtype of x, both factors rounded.
type hopper struct{}

// hopperTile is a kernel of it, by the rows of the weight and the tokens of a tile; threads of a CTA and bytes of their shared memory.
type hopperTile struct{ rows, tokens, threads, shared int64 }

var hopperTiles = func() (list []hopperTile) {
	for i := C.size_t(0); ; i++ {
		t := C.hopper_tile(i)
		if t.tokens == 0 {
			return list
		}
		list = append(list, hopperTile{int64(t.rows), int64(t.tokens), int64(t.threads), int64(t.shared)})
	}
}()

// findHopperTile is the index of a way's tile; -1 if there is none, which no table names.
func findHopperTile(way Way) int {
	return slices.IndexFunc(hopperTiles, func(t hopperTile) bool { return t.rows == cmp.Or(way.Tall, usualRows) && t.tokens == way.Tokens })
}

// usualRows are those of a tile for which a way names none.
const usualRows = 128

// maxCluster is the most CTAs of a cluster: that many every device has.
const maxCluster = 8

// countClusters asks the driver how many clusters of each size can run at once. Every CTA has a multiprocessor of its own.
func (d *Device) countClusters() error {
	if !d.hasHopper() {
		return nil
	}
	for size := 2; size <= maxCluster; size++ {
		var count C.int
		f := d.functions[hopperFirst.of(dtype.F16)]
		code := C.gq_cu_clusters(d.context, f, C.uint32_t(size), C.uint32_t(hopperTiles[0].threads), C.uint32_t(hopperTiles[0].shared), &count)
		if err := failed(code, "asking CUDA device %d how many clusters of %d it runs", d.Ordinal, size); err != nil {
			return err
		}
		d.clusters[size] = int64(count)
	}
	return nil
}

// hasHopper says whether the device is one: its instructions are in no other architecture.
func (d *Device) hasHopper() bool { return d.about.major == 9 && d.about.minor == 0 }

func (hopper) refused(d *Device, _ Way, w *Weight, l Linear) string {
	switch {
	case !d.hasHopper():
		return "the device is no Hopper"
	case l.K%C.GQ_HOPPER_STEP != 0:
		return fmt.Sprintf("the rows of the weight are no multiple of %d elements", C.GQ_HOPPER_STEP)
	case l.N%8 != 0:
		return "the weight's number of rows is no multiple of 8"
	case l.Y%16 != 0:
		return "y is not aligned to 16 bytes"
	case w.Nested && w.Absmax%2 != 0:
		return "absmax is not aligned to 2 bytes"
	case l.M > 1<<24 || l.K/64*l.N >= 1<<32:
		return "x or the weight is too large"
	}
	return ""
}

// hopperPlan is how tiles are given to CTAs.
type hopperPlan struct {
	tilesOfTokens, tiles, steps int64
	dealt                       int64 // tiles that CTAs share by k
	ctas, cluster               int64 // CTAs, and how many of them are a cluster
	partial                     int64 // bytes of a CTA's partial sums
}

func (hopper) plan(d *Device, way Way, l Linear) hopperPlan {
	t := hopperTiles[findHopperTile(way)]
	p := hopperPlan{tilesOfTokens: ceilDiv(l.M, t.tokens), steps: l.K / C.GQ_HOPPER_STEP, partial: t.tokens * t.rows * 3}
	p.tiles = ceilDiv(l.N, t.rows) * p.tilesOfTokens
	// The sums of a cluster take the place of what its CTAs would read ahead, so it has one tile.
	if p.cluster = min(way.Split, p.steps); p.cluster > 1 && p.tiles <= d.clusters[p.cluster] {
		p.ctas = p.cluster * p.tiles
		return p
	}
	if p.cluster > 1 { // a device with other clusters than the table's
		way.Deal = 1
	}
	p.cluster = 1
	sms := int64(d.about.multiprocessors)
	p.ctas = min(sms, p.tiles)
	if rest := p.tiles % sms; way.Deal > 0 && rest > 0 {
		p.dealt = min(p.tiles, rest+int64(way.Deal-1)*sms)
		if p.dealt == p.tiles {
			p.ctas = min(sms, p.dealt*p.steps)
		}
	}
	return p
}

// within is the plan for the workspace that the layer has.
func (h hopper) within(d *Device, way Way, l Linear) hopperPlan {
	p := h.plan(d, way, l)
	if bytes := p.bytes(); bytes > 0 && (l.WorkspaceBytes < bytes || l.Workspace%16 != 0) {
		way.Deal, way.Split = 0, 0
		p = h.plan(d, way, l)
	}
	return p
}

func (p hopperPlan) bytes() uint64 {
	if p.dealt == 0 {
		return 0
	}
	return uint64(p.ctas * (p.partial + 8))
}

func (h hopper) workspace(d *Device, way Way, l Linear) uint64 { return h.plan(d, way, l).bytes() }

// nextLaunch numbers launches from a random number on: a flag in the workspace, whose content is unknown, never has the next by chance.
func nextLaunch() uint64 {
	if n := launches.Add(1); n != 0 { // which is an erased flag
		return n
	}
	return launches.Add(1)
}

var launches = func() *atomic.Uint64 {
	var seed [8]byte
	_, _ = rand.Read(seed[:]) // never fails
	n := new(atomic.Uint64)
	n.Store(binary.LittleEndian.Uint64(seed[:]))
	return n
}()

// shareOf divides steps: numbers of equal shares, of which the first may be one step longer.
func shareOf(steps, count int64) C.struct_gq_share {
	return C.struct_gq_share{each: C.uint32_t(steps / count), more: C.uint32_t(steps % count)}
}

func (h hopper) launch(d *Device, s Stream, way Way, w *Weight, l Linear) error {
	p := h.within(d, way, l)
	index := findHopperTile(way)
	t := hopperTiles[index]
	args := C.struct_gq_hopper_args{
		linear: d.linearArgs(w, l), partial: C.uint64_t(l.Workspace), flags: C.uint64_t(l.Workspace + uint64(p.ctas*p.partial)),
		launch: C.uint64_t(nextLaunch()), tiles: C.uint32_t(p.tiles), tiles_of_tokens: C.uint32_t(p.tilesOfTokens), steps: C.uint32_t(p.steps),
		dealt: C.uint32_t(p.dealt), of_dealt: shareOf(p.dealt*p.steps, p.ctas), cluster: C.uint32_t(p.cluster), of_tile: shareOf(p.steps, p.cluster),
	}
	n, k := C.uint64_t(l.N), C.uint64_t(l.K)
	maps := [2]C.struct_gq_cu_map{
		{ // even rows and odd ones
			address: args.linear.weight.packed, dimensions: 3, element: 1, swizzle: 64,
			sizes: [3]C.uint64_t{k / 2, n / 2, 2}, strides: [2]C.uint64_t{k, k / 2}, box: [3]C.uint32_t{64, C.uint32_t(t.rows / 2), 2},
		},
		{
			address: args.linear.x, dimensions: 2, element: 2, swizzle: 128,
			sizes: [3]C.uint64_t{k, C.uint64_t(l.M)}, strides: [2]C.uint64_t{2 * k}, box: [3]C.uint32_t{64, C.uint32_t(t.tokens)},
		},
	}
	number := (hopperFirst + kernel(3*index)).of(l.DType)
	code := C.gq_cu_launch_mapped(d.context, d.functions[number], &maps[0], C.uint32_t(p.ctas), C.uint32_t(p.cluster), C.uint32_t(t.threads), C.uint32_t(t.shared),
		s.handle(), unsafe.Pointer(&args))
	return d.launched(number, code)
}
