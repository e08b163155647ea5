package cuda

// #include <stddef.h>
// #include "kernels/args.h"
//
// // What kernel i takes: zeros behind the last. per_warp: bytes of shared memory.
// struct few { int columns, rows, warps, per_warp; };
// #define FEW(columns, rows, depth, warps) {columns, rows, warps, (depth) * GQ_LINEAR_SLOT(rows)},
// static inline struct few few_kernel(size_t i) {
//     static const struct few kernels[] = {GQ_LINEAR_FEW(FEW) {0, 0, 0, 0}};
//     return kernels[i];
// }
import "C"

import (
	"fmt"
	"math/bits"
	"unsafe"
)

// few is kernels/linear_few.cu, for up to 32 rows of x. Weights are value·absmax in float32, with the 16 values rounded.
type few struct{}

const fewTokens = 32

// fewKernel is a kernel of it: for so many columns of 8 tokens, and rows of W that a CTA has at a time; the most warps, and a warp's shared memory.
type fewKernel struct{ columns, rows, warps, perWarp int64 }

var fewKernels = func() (list []fewKernel) {
	for i := C.size_t(0); ; i++ {
		k := C.few_kernel(i)
		if k.columns == 0 {
			return list
		}
		list = append(list, fewKernel{int64(k.columns), int64(k.rows), int64(k.warps), int64(k.per_warp)})
	}
}()

// fewTables is shared memory of all warps: pairs of values, and the nested codebook.
const fewTables = 256*C.GQ_LINEAR_ENTRY + 4*256

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

// fewPlan is how it does a layer.
type fewPlan struct {
	kernel              int // of fewKernels
	ctas, warps, shared int64
	rows                int64 // of W, that a CTA has at most
}

// plan chooses the kernel that leaves a CTA the fewest rows, and of those the one that has the most of them at a time.
func (few) plan(d *Device, l Linear) (best fewPlan) {
	for i, k := range fewKernels {
		if k.columns != 1<<bits.Len64(uint64(l.M-1)/8) {
			continue
		}
		// Warps share k; there are no more of them than give the last one less to do.
		steps := l.K / C.GQ_LINEAR_STEP
		warps := min(k.warps, (int64(d.about.shared_memory)-fewTables)/k.perWarp)
		warps = ceilDiv(steps, ceilDiv(steps, warps))
		shared, tiles := fewTables+warps*k.perWarp, ceilDiv(l.N, k.rows)
		each := ceilDiv(tiles, int64(d.about.multiprocessors)*((int64(d.about.shared_memory)+reservedShared)/(shared+reservedShared)))
		if best.rows == 0 || each*k.rows < best.rows {
			best = fewPlan{i, ceilDiv(tiles, each), warps, shared, each * k.rows}
		}
	}
	return best
}

func (f few) launch(d *Device, s Stream, _ Way, w *Weight, l Linear) error {
	p, args := f.plan(d, l), d.linearArgs(w, l)
	k := kernel(6 * p.kernel)
	if w.Nested {
		k += 3
	}
	return d.launchLinear(s, (fewFirst + k).of(l.DType), p.ctas, int(32*p.warps), int(p.shared), unsafe.Pointer(&args))
}
