package cuda

// #include "kernels/args.h"
import "C"

import (
	"fmt"
	"math/bits"
	"unsafe"
)

// few is kernels/linear_few.cu, for up to 64 rows of x. Weights are value·absmax in float32, with the 16 values rounded.
type few struct{}

const fewTokens = 64

// linearWidth is how it does so many columns of 8 tokens: the slots of a warp's ring, and the most warps.
type linearWidth struct{ columns, depth, warps int }

var linearWidths = []linearWidth{
	{1, C.GQ_LINEAR_DEPTH, C.GQ_LINEAR_WARPS},
	{2, C.GQ_LINEAR_DEPTH, C.GQ_LINEAR_WARPS},
	{4, C.GQ_LINEAR_DEPTH, C.GQ_LINEAR_WARPS_WIDE},
	{8, C.GQ_LINEAR_DEPTH_WIDE, C.GQ_LINEAR_WARPS_WIDE},
}

// Its shared memory.
const (
	linearTables  = 256*C.GQ_LINEAR_ENTRY + 4*256                                        // pairs of values, nested codebook
	linearSlot    = C.GQ_LINEAR_ROWS * (C.GQ_LINEAR_STEP/2 + 32 + 4*C.GQ_LINEAR_STEP/64) // rows and scales
	linearPartial = 4 * 8 * (C.GQ_LINEAR_ROWS + 4)                                       // of a column of 8 tokens
)

func (few) refused(_ *Device, _ Way, _ *Weight, l Linear) string {
	switch {
	case l.M > fewTokens:
		return fmt.Sprintf("x has more than %d rows", fewTokens)
	case l.K%C.GQ_LINEAR_STEP != 0:
		return fmt.Sprintf("the rows of the weight are no multiple of %d elements", C.GQ_LINEAR_STEP)
	}
	return ""
}

func (few) workspace(*Device, Way, Linear) uint64 { return 0 }

func (few) launch(d *Device, s Stream, _ Way, w *Weight, l Linear) error {
	width := linearWidths[bits.Len64(uint64(l.M-1)/8)] // 8 · 2^i tokens
	perWarp := width.columns*linearPartial + width.depth*linearSlot
	warps := min(width.warps, (int(d.about.shared_memory)-linearTables)/perWarp, int(l.K/C.GQ_LINEAR_STEP))
	shared := linearTables + warps*perWarp
	// As many CTAs as fit, with the same number of tiles or one less each.
	tiles := ceilDiv(l.N, C.GQ_LINEAR_ROWS)
	fit := int64(d.about.multiprocessors) * int64((int(d.about.shared_memory)+reservedShared)/(shared+reservedShared))
	ctas := ceilDiv(tiles, ceilDiv(tiles, fit))
	args := d.linearArgs(w, l)
	k := linear1
	if w.Nested {
		k = linear1Nested
	}
	k = (k + kernel(3*bits.TrailingZeros(uint(width.columns)))).of(l.DType)
	return d.launchLinear(s, k, ctas, 32*warps, shared, unsafe.Pointer(&args))
}
