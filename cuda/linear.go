package cuda

// #include "driver.h"
// #include "kernels/args.h"
import "C"

import (
	"unsafe"

	"github.com/gquant/gquant/core/dtype"
)

// Linear is a linear layer with a 4-bit weight: y = x·Wᵀ + bias, x is [M, K], W [N, K], bias [N] or 0, y [M, N], of dtype F16 or BF16.
type Linear struct {
	X, Bias, Y uint64
	DType      dtype.DType
	M, N, K    int64
	// Settled: nothing that is still at work on the stream writes the weight, which may be read while the kernel before ends.
	Settled bool
	// Device memory that the layer may use: with LinearWorkspace bytes it is fastest.
	Workspace, WorkspaceBytes uint64
}

// reservedShared is the shared memory that the system takes of each CTA, in bytes.
const reservedShared = 1024

// A linearKernel computes layers from packed weights.
type linearKernel interface {
	// refused says why it cannot compute a layer; "" if it can.
	refused(d *Device, way Way, w *Weight, l Linear) string
	// workspace is the number of bytes that it can use.
	workspace(d *Device, way Way, l Linear) uint64
	launch(d *Device, s Stream, way Way, w *Weight, l Linear) error
}

// linearKernels by their names in tables.
var linearKernels = map[string]linearKernel{"few": few{}, "tile": tile{}, "hopper": hopper{}}

// way is how the table wants a layer to be computed. If its kernel cannot, others may be able to; else it says why not.
func (d *Device) way(w *Weight, l Linear) (Way, string) {
	if why := d.unfit(w, l); why != "" {
		return Way{}, why
	}
	chosen, refused := d.table.lookup(l.N, l.K, l.M), "weights of this shape are decoded first for so many rows of x"
	ways := []Way{chosen, {Kernel: "few"}, {Kernel: "tile"}}
	if chosen.Kernel == "decode" {
		ways = nil
	}
	for _, way := range ways {
		why := linearKernels[way.Kernel].refused(d, way, w, l)
		if why == "" {
			return way, ""
		}
		if way == chosen {
			refused = why
		}
	}
	return Way{}, refused
}

// hasLinear says whether the device has what the kernels need: it is no Turing.
func (d *Device) hasLinear() bool { return d.about.major >= 8 }

// unfit says why no kernel can compute a layer; "" if one may.
func (d *Device) unfit(w *Weight, l Linear) string {
	switch {
	case w.Format == nil || w.Format.Bits != 4:
		return "the weight is not nf4 or fp4"
	case l.DType != dtype.F16 && l.DType != dtype.BF16:
		return "x is not F16 or BF16"
	case l.K%64 != 0 || l.K == 0 || l.K > 1<<24 || l.N > 1<<31:
		return "the rows of the weight are no multiple of 64 elements"
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

// LinearRefused says why Linear cannot compute a layer from the packed weight; "" if it can.
func (d *Device) LinearRefused(w *Weight, l Linear) string {
	_, why := d.way(w, l)
	return why
}

// LinearWorkspace is the number of bytes of workspace with which Linear is fastest.
func (d *Device) LinearWorkspace(w *Weight, l Linear) uint64 {
	way, why := d.way(w, l)
	if why != "" || l.M == 0 || l.N == 0 {
		return 0
	}
	return linearKernels[way.Kernel].workspace(d, way, l)
}

// Linear computes the layer, if LinearRefused has no objection. Sums are float32, in an order that depends on the shapes, the device, its table and
// whether the workspace is large enough.
func (d *Device) Linear(s Stream, w *Weight, l Linear) error {
	if l.M == 0 || l.N == 0 {
		return nil
	}
	way, why := d.way(w, l)
	if why != "" {
		return unavailable("%s", why)
	}
	return linearKernels[way.Kernel].launch(d, s, way, w, l)
}

func (d *Device) linearArgs(w *Weight, l Linear) C.struct_gq_linear_args {
	args := C.struct_gq_linear_args{
		weight: d.weight(w), x: C.uint64_t(l.X), bias: C.uint64_t(l.Bias), y: C.uint64_t(l.Y),
		m: C.int64_t(l.M), n: C.int64_t(l.N), k: C.int64_t(l.K),
	}
	if l.Settled {
		args.settled = 1
	}
	return args
}

// launchLinear launches a kernel with shared memory. From Hopper on it starts while the kernel before it ends, for which it waits itself.
func (d *Device) launchLinear(s Stream, k kernel, ctas int64, threads, shared int, args unsafe.Pointer) error {
	early := C.int(0)
	if d.about.major >= 9 {
		early = 1
	}
	return d.launched(k, C.gq_cu_launch_shared(d.context, d.functions[k], C.uint32_t(ctas), C.uint32_t(threads), C.uint32_t(shared), early, s.handle(), args))
}

// launched is the error of a launch.
func (d *Device) launched(k kernel, code C.int) error {
	if code == 0 {
		return nil
	}
	return failed(code, "launching %s on CUDA device %d", kernels[k].name, d.Ordinal)
}
