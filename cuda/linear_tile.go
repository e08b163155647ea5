package cuda

// #include "kernels/args.h"
import "C"

import "unsafe"

// tile is kernels/linear_tile.cu, for any number of rows of x, which divides tiles if there is workspace. Up to 64 rows weights are
// value·absmax in float32, with the 16 values rounded; above, the products are rounded to the dtype of x.
type tile struct{}

// linearTile is a tile of it: its tokens, and the CTAs that a multiprocessor's registers have room for.
type linearTile struct{ tokens, ctas int64 }

var linearTiles = []linearTile{{32, 2}, {64, 1}, {128, 1}}

// tilePlan is how it does a layer.
type tilePlan struct {
	kernel        kernel // its place in linearTiles, 3 for each
	tiles, tokens int64
	steps         int64 // of a tile
	ctas, grain   int64 // see gq_linear_tile_args
	depth         int64
	shared        int64
}

// divided says whether CTAs share tiles, so that their parts have to be added up.
func (p *tilePlan) divided() bool { return p.grain < p.steps && p.tiles%p.ctas != 0 }

// workspace is the size of the partial sums in bytes.
func (p *tilePlan) workspace() int64 {
	if !p.divided() {
		return 0
	}
	return p.ctas * 2 * C.GQ_TILE_ROWS * p.tokens * 4
}

// What adding up the parts of tiles takes, in steps: from the start of a second kernel, and for a part on each CTA.
const (
	tileSumStart = 4
	tileSumPart  = 5
)

// planTile divides the work. dividing says whether CTAs may share tiles.
func (d *Device) planTile(l Linear, dividing bool) tilePlan {
	i := 0
	for i < len(linearTiles)-1 && linearTiles[i].tokens < l.M {
		i++
	}
	t := linearTiles[i]
	const weights = C.GQ_TILE_ROWS * (C.GQ_TILE_STEP/2 + 4*C.GQ_TILE_STEP/64) // and scales, in a slot
	slots := t.tokens*C.GQ_TILE_STEP*2 + weights
	available, perSM := int64(d.about.shared_memory), t.ctas
	depth := func(shared int64) int64 { return min(C.GQ_TILE_DEPTH, (shared-C.GQ_TILE_TABLES-weights)/slots) }
	if each := (available+reservedShared)/perSM - reservedShared; depth(each) >= 2 {
		available = each
	} else {
		perSM = 1
	}
	steps, tiles := l.K/C.GQ_TILE_STEP, ceilDiv(l.N, C.GQ_TILE_ROWS)*ceilDiv(l.M, t.tokens)
	fit, total := int64(d.about.multiprocessors)*perSM, tiles*steps
	p := tilePlan{kernel: kernel(3 * i), tiles: tiles, tokens: t.tokens, steps: steps, depth: depth(available)}
	p.shared = C.GQ_TILE_TABLES + p.depth*slots + weights

	// Whole tiles, as many for each CTA or one less.
	waves := ceilDiv(tiles, fit)
	p.ctas, p.grain = ceilDiv(tiles, waves), steps
	if !dividing {
		return p
	}
	least := waves * steps
	consider := func(ctas, parts int64) {
		if cost := ceilDiv(total, ctas) + tileSumStart + tileSumPart*parts/fit; cost < least {
			least, p.ctas, p.grain = cost, ctas, 1
		}
	}
	for split := int64(2); split <= min(fit/tiles, steps); split++ { // each CTA has a part of one tile
		consider(split*tiles, split*tiles)
	}
	consider(min(fit, total), min(fit, total)+tiles)
	return p
}

func (tile) refused(*Device, Way, *Weight, Linear) string { return "" }

func (tile) workspace(d *Device, _ Way, l Linear) uint64 {
	p := d.planTile(l, true)
	return uint64(p.workspace())
}

func (tile) launch(d *Device, s Stream, _ Way, w *Weight, l Linear) error {
	p := d.planTile(l, true)
	if uint64(p.workspace()) > l.WorkspaceBytes || l.Workspace%16 != 0 {
		p = d.planTile(l, false)
	}
	args := C.struct_gq_linear_tile_args{
		linear: d.linearArgs(w, l), workspace: C.uint64_t(l.Workspace),
		ctas: C.int64_t(p.ctas), grain: C.int64_t(p.grain), depth: C.int32_t(p.depth),
	}
	k := linearTile32
	if w.Nested {
		k = linearTile32Nested
	}
	if err := d.launchLinear(s, (k + p.kernel).of(l.DType), p.ctas, C.GQ_TILE_THREADS, int(p.shared), unsafe.Pointer(&args)); err != nil {
		return err
	}
	if !p.divided() {
		return nil
	}
	return d.launchLinear(s, (linearTileSum32 + p.kernel).of(l.DType), p.tiles*p.tokens/8, C.GQ_TILE_THREADS, 0, unsafe.Pointer(&args))
}
