package cuda

// #include "driver.h"
// #include "kernels/args.h"
//
// // The tokens of tile i and its kernel's shared memory; zeros behind the last.
// struct tile { int tokens, shared; };
// #define TILE(tokens, x, w, staged, entry) {tokens, GQ_HOPPER_SHARED(tokens, x, w, staged, entry)},
// static inline struct tile hopper_tile(size_t i) {
//     static const struct tile tiles[] = {GQ_HOPPER_TILES(TILE) {0, 0}};
//     return tiles[i];
// }
import "C"

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"slices"
	"sync/atomic"
	"unsafe"
)

// hopper is kernels/linear_hopper.cu, for any number of rows of x. Weights are value·absmax in the dtype of x, both factors rounded.
type hopper struct{}

// hopperTile is a kernel of it, for tiles of so many tokens, and a CTA's shared memory.
type hopperTile struct{ tokens, shared int64 }

var hopperTiles = func() (list []hopperTile) {
	for i := C.size_t(0); ; i++ {
		t := C.hopper_tile(i)
		if t.tokens == 0 {
			return list
		}
		list = append(list, hopperTile{int64(t.tokens), int64(t.shared)})
	}
}()

// findHopperTile is the index of a tile; -1 if there is none, which no table names.
func findHopperTile(tokens int64) int {
	return slices.IndexFunc(hopperTiles, func(t hopperTile) bool { return t.tokens == tokens })
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
	ctas                        int64
	partial                     int64 // bytes of a CTA's partial sums
}

func (hopper) plan(d *Device, way Way, l Linear) hopperPlan {
	p := hopperPlan{tilesOfTokens: ceilDiv(l.M, way.Tokens), steps: l.K / C.GQ_HOPPER_STEP, partial: way.Tokens * C.GQ_HOPPER_ROWS * 4}
	p.tiles = ceilDiv(l.N, C.GQ_HOPPER_ROWS) * p.tilesOfTokens
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

func (h hopper) launch(d *Device, s Stream, way Way, w *Weight, l Linear) error {
	if way.Deal > 0 && (l.WorkspaceBytes < h.plan(d, way, l).bytes() || l.Workspace%16 != 0) {
		way.Deal = 0
	}
	p := h.plan(d, way, l)
	index := findHopperTile(way.Tokens)
	args := C.struct_gq_hopper_args{
		linear: d.linearArgs(w, l), partial: C.uint64_t(l.Workspace), flags: C.uint64_t(l.Workspace + uint64(p.ctas*p.partial)),
		launch: C.uint64_t(nextLaunch()), tiles: C.uint32_t(p.tiles), tiles_of_tokens: C.uint32_t(p.tilesOfTokens), steps: C.uint32_t(p.steps),
		dealt: C.uint32_t(p.dealt),
	}
	n, k := C.uint64_t(l.N), C.uint64_t(l.K)
	maps := [2]C.struct_gq_cu_map{
		{ // even rows and odd ones
			address: args.linear.weight.packed, dimensions: 3, element: 1, swizzle: 64,
			sizes: [3]C.uint64_t{k / 2, n / 2, 2}, strides: [2]C.uint64_t{k, k / 2}, box: [3]C.uint32_t{64, C.GQ_HOPPER_ROWS / 2, 2},
		},
		{
			address: args.linear.x, dimensions: 2, element: 2, swizzle: 128,
			sizes: [3]C.uint64_t{k, C.uint64_t(l.M)}, strides: [2]C.uint64_t{2 * k}, box: [3]C.uint32_t{64, C.uint32_t(way.Tokens)},
		},
	}
	number := (hopperFirst + kernel(3*index)).of(l.DType)
	code := C.gq_cu_launch_mapped(d.context, d.functions[number], &maps[0], C.uint32_t(p.ctas), C.GQ_HOPPER_THREADS, C.uint32_t(hopperTiles[index].shared),
		s.handle(), unsafe.Pointer(&args))
	return d.launched(number, code)
}
