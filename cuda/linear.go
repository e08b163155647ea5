package cuda

// #include "driver.h"
// #include "kernels/args.h"
import "C"

import (
	"math/bits"
	"unsafe"

	"github.com/gquant/gquant/core/dtype"
)

// LinearTokens is the number of tokens up to which Linear reads the packed weights itself.
const LinearTokens = 64

// linearWidth is how kernels/linear.cu does so many columns of 8 tokens: the slots of a warp's ring, and the most warps.
type linearWidth struct{ columns, depth, warps int }

var linearWidths = []linearWidth{
	{1, C.GQ_LINEAR_DEPTH, C.GQ_LINEAR_WARPS},
	{2, C.GQ_LINEAR_DEPTH, C.GQ_LINEAR_WARPS},
	{4, C.GQ_LINEAR_DEPTH, C.GQ_LINEAR_WARPS_WIDE},
	{8, C.GQ_LINEAR_DEPTH_WIDE, C.GQ_LINEAR_WARPS_WIDE},
}

// Shared memory of kernels/linear.cu.
const (
	linearTables   = 256*C.GQ_LINEAR_ENTRY + 4*256                                        // pairs of values, nested codebook
	linearSlot     = C.GQ_LINEAR_ROWS * (C.GQ_LINEAR_STEP/2 + 32 + 4*C.GQ_LINEAR_STEP/64) // rows and scales
	reservedShared = 1024                                                                 // that the system takes of each CTA
	linearPartial  = 4 * 8 * (C.GQ_LINEAR_ROWS + 4)                                       // of a column of 8 tokens
)

// Linear is a linear layer with a 4-bit weight: y = x·Wᵀ + bias, x is [M, K], W [N, K], bias [N] or 0, y [M, N], of dtype F16 or BF16.
type Linear struct {
	X, Bias, Y uint64
	DType      dtype.DType
	M, N, K    int64
}

// hasLinear says whether the device has what the kernels need: it is no Turing.
func (d *Device) hasLinear() bool { return d.about.major >= 8 }

// LinearRefused says why Linear cannot do it; "" if it can.
func (d *Device) LinearRefused(w *Weight, l Linear) string {
	switch {
	case w.Format == nil || w.Format.Bits != 4:
		return "the weight is not nf4 or fp4"
	case l.DType != dtype.F16 && l.DType != dtype.BF16:
		return "x is not F16 or BF16"
	case l.M > LinearTokens:
		return "x has more than 64 rows"
	case l.K%C.GQ_LINEAR_STEP != 0 || l.K == 0 || l.K > 1<<24 || l.N > 1<<31:
		return "the rows of the weight are no multiple of 128 elements"
	case w.Blocksize < 64 || l.K%w.Blocksize != 0:
		return "the rows of the weight are no whole blocks of 64 elements or more"
	case w.Packed%16 != 0 || l.X%16 != 0:
		return "the codes or x are not aligned to 16 bytes"
	case !w.Nested && w.Absmax%16 != 0:
		return "absmax is not aligned to 16 bytes"
	case l.Y%2 != 0 || l.Bias%2 != 0:
		return "y or bias is not aligned to its elements"
	case !d.hasLinear():
		return "the device is older than Ampere"
	}
	return ""
}

// Linear computes the layer, if LinearRefused has no objection. Weights are value·absmax in float32, NF4's 16 values rounded; sums
// are float32, in an order that depends on K and the number of warps alone.
func (d *Device) Linear(s Stream, w *Weight, l Linear) error {
	if l.M == 0 || l.N == 0 {
		return nil
	}
	width := linearWidths[bits.Len64(uint64(l.M-1)/8)] // 8 · 2^i tokens
	perWarp := width.columns*linearPartial + width.depth*linearSlot
	warps := min(width.warps, (int(d.about.shared_memory)-linearTables)/perWarp, int(l.K/C.GQ_LINEAR_STEP))
	shared := linearTables + warps*perWarp
	// As many CTAs as fit, with the same number of tiles or one less each.
	tiles := ceilDiv(l.N, C.GQ_LINEAR_ROWS)
	fit := int64(d.about.multiprocessors) * int64((int(d.about.shared_memory)+reservedShared)/(shared+reservedShared))
	ctas := ceilDiv(tiles, ceilDiv(tiles, fit))
	args := C.struct_gq_linear_args{
		weight: d.weight(w), x: C.uint64_t(l.X), bias: C.uint64_t(l.Bias), y: C.uint64_t(l.Y),
		m: C.int64_t(l.M), n: C.int64_t(l.N), k: C.int64_t(l.K),
	}
	k := linear1
	if w.Nested {
		k = linear1Nested
	}
	k = (k + kernel(3*bits.TrailingZeros(uint(width.columns)))).of(l.DType)
	early := C.int(0)
	if d.about.major >= 9 {
		early = 1
	}
	code := C.gq_cu_launch_shared(d.context, d.functions[k], C.uint32_t(ctas), C.uint32_t(32*warps), C.uint32_t(shared), early, s.handle(), unsafe.Pointer(&args))
	if code == 0 {
		return nil
	}
	return failed(code, "launching %s on CUDA device %d", kernels[k].name, d.Ordinal)
}
