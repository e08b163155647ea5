package cuda

// #include <stdlib.h>
// #include "cublaslt.h"
// #include "kernels/args.h"
import "C"

import (
	"errors"
	"os"
	"sync"
	"unsafe"

	"github.com/gquant/gquant/core/dtype"
)

const (
	// slabBytes of a decoded weight at least are multiplied at once, if it has as many: smaller products leave multiprocessors idle.
	slabBytes = 64 << 20
	// slabStep divides the rows of a slab, so that its columns of y are aligned as y is, up to 256 bytes.
	slabStep = 128
	// workspaceStep is what addresses in a workspace are multiples of, as far as the workspace's own is.
	workspaceStep = 256
	// maxAlgorithms that are remembered for a device.
	maxAlgorithms = 1024
	// allocationFailed is CUBLAS_STATUS_ALLOC_FAILED, negated.
	allocationFailed = -3
)

// library is cuBLASLt for one device: its handle and what it found to be fastest.
type library struct {
	lock       sync.Mutex
	handle     unsafe.Pointer
	algorithms map[C.struct_gq_lt_product]C.struct_gq_lt_algorithm
}

// PrepareMatmul loads cuBLASLt and makes its handle for the device, unless that is done: Unavailable if there is none. Afterwards calls of
// Matmul can be captured in graphs.
func (d *Device) PrepareMatmul() error {
	d.library.lock.Lock()
	defer d.library.lock.Unlock()
	return d.openLibrary()
}

// openLibrary is PrepareMatmul with the lock.
func (d *Device) openLibrary() error {
	if d.library.handle != nil {
		return nil
	}
	named := os.Getenv("GQUANT_CUBLASLT")
	var path *C.char
	if named != "" {
		path = C.CString(named)
		defer C.free(unsafe.Pointer(path))
	}
	var what [512]C.char
	switch code := C.gq_lt_open(path, &what[0], C.size_t(len(what))); {
	case code == -2:
		return unavailable("libcublasLt has no function %s; version 12 or 13 is needed", C.GoString(&what[0]))
	case code == -1 && named != "":
		return unavailable("libcublasLt, which GQUANT_CUBLASLT names, cannot be loaded: %s", C.GoString(&what[0]))
	case code == -1:
		return unavailable("neither libcublasLt.so.13 nor libcublasLt.so.12 can be loaded (GQUANT_CUBLASLT can name one): %s", C.GoString(&what[0]))
	}
	if err := failed(C.gq_lt_create(d.context, &d.library.handle), "starting libcublasLt on CUDA device %d", d.Ordinal); err != nil {
		return err
	}
	d.library.algorithms = map[C.struct_gq_lt_product]C.struct_gq_lt_algorithm{}
	return nil
}

// slabs is how a workspace is divided: room for so many decoded rows, and cuBLASLt's own workspace.
type slabs struct {
	rows        int64
	at, library uint64 // where cuBLASLt's begins, and its bytes
}

// libraryBytes is what the documentation of cublasSetWorkspace recommends.
func (d *Device) libraryBytes() uint64 {
	if d.about.major >= 9 {
		return 32 << 20
	}
	return 4 << 20
}

// MatmulWorkspace is the bytes of workspace without which Matmul cannot work, and those with which it is as fast as it can be with slabs. The
// device is prepared.
func (d *Device) MatmulWorkspace(l Linear) (least, best uint64) {
	if l.M == 0 || l.N == 0 || l.K == 0 {
		return 0, 0
	}
	row := l.K * int64(l.DType.Bits()/8)
	best = decoded(evenRows(l.N, max(1, l.N*row/slabBytes)), row) + d.libraryBytes()
	return decoded(min(l.N, slabStep), row), best
}

// slabs divides a workspace of at least the least bytes. Rows come first, of which there are as many as fit, but they leave cuBLASLt half.
func (d *Device) slabs(l Linear, workspace uint64) slabs {
	row := l.K * int64(l.DType.Bits()/8)
	least := decoded(min(l.N, slabStep), row)
	fit := int64((workspace - min(d.libraryBytes(), (workspace-least)/2)) / uint64(row))
	if fit < l.N {
		fit -= fit % slabStep
	}
	s := slabs{rows: evenRows(l.N, ceilDiv(l.N, min(fit, l.N)))}
	s.at = decoded(s.rows, row)
	s.library = min(d.libraryBytes(), workspace-min(workspace, s.at)) / workspaceStep * workspaceStep
	return s
}

// evenRows is the rows of a slab when a weight has so many slabs.
func evenRows(n, count int64) int64 { return min(n, roundUp(ceilDiv(n, count), slabStep)) }

// decoded is the bytes of so many decoded rows in a workspace.
func decoded(rows, row int64) uint64 { return uint64(roundUp(rows*row, workspaceStep)) }

func roundUp(n, step int64) int64 { return ceilDiv(n, step) * step }

// MatmulRefused says why Matmul cannot do it; "" if it can.
func MatmulRefused(l Linear) string {
	if (l.X|l.Bias|l.Y)%uint64(l.DType.Bits()/8) != 0 {
		return "x, y or bias is not aligned to its elements"
	}
	return ""
}

// Matmul computes the layer, if MatmulRefused has no objection, for any M, N and K and dtype F32, F16 and BF16: it decodes slabs of rows into
// the workspace, which has at least the least bytes of MatmulWorkspace at an address divisible by 16, and cuBLASLt multiplies with them, with
// float32 sums. Unavailable says what is missing. The result depends on the addresses' alignment and the workspace's size, and on
// nothing else.
func (d *Device) Matmul(s Stream, w *Weight, l Linear, workspace, bytes uint64) error {
	if l.M == 0 || l.N == 0 {
		return nil
	}
	if l.K == 0 {
		return d.fillBias(s, l)
	}
	division := d.slabs(l, bytes)
	p := C.struct_gq_lt_product{
		m: C.int64_t(l.M), rows: C.int64_t(division.rows), k: C.int64_t(l.K), ld: C.int64_t(l.N), dtype: libraryType(l.DType),
		align_weight: alignment(workspace), align_x: alignment(l.X), align_y: alignment(l.Y), workspace_bytes: C.uint64_t(division.library),
	}
	if l.Bias != 0 {
		p.bias = C.GQ_LT_EPILOGUE
		if l.Bias%C.GQ_LT_BIAS_ALIGNMENT != 0 {
			p.bias = C.GQ_LT_ADD_TO_Y
		}
	}
	last := (l.N-1)%division.rows + 1
	// All is found before anything is written.
	algorithms, err := d.algorithms(p, last)
	if errors.As(err, new(Unavailable)) && p.bias == C.GQ_LT_EPILOGUE {
		p.bias = C.GQ_LT_ADD_TO_Y
		algorithms, err = d.algorithms(p, last)
	}
	if err != nil {
		return err
	}
	if p.bias == C.GQ_LT_ADD_TO_Y {
		if err := d.fillBias(s, l); err != nil {
			return err
		}
	}
	size := int64(l.DType.Bits() / 8)
	for first := int64(0); first < l.N; first += division.rows {
		rows := min(division.rows, l.N-first)
		if err := d.Dequantize(s, w, l.DType, workspace, first*l.K, rows*l.K); err != nil {
			return err
		}
		at := C.struct_gq_lt_addresses{
			weight: C.uint64_t(workspace), x: C.uint64_t(l.X), y: C.uint64_t(l.Y + uint64(first*size)), workspace: C.uint64_t(workspace + division.at),
		}
		if p.bias == C.GQ_LT_EPILOGUE {
			at.bias = C.uint64_t(l.Bias + uint64(first*size))
		}
		algorithm := &algorithms[0]
		if rows < division.rows {
			algorithm = &algorithms[1]
		}
		p.rows = C.int64_t(rows)
		code := C.gq_lt_multiply(d.context, d.library.handle, &p, algorithm, &at, s.handle())
		if err := failed(code, "multiplying with libcublasLt on CUDA device %d", d.Ordinal); err != nil {
			return err
		}
	}
	return nil
}

// algorithms finds those for slabs of the product's rows, and for the last slab, which may have fewer.
func (d *Device) algorithms(p C.struct_gq_lt_product, last int64) (found [2]C.struct_gq_lt_algorithm, err error) {
	d.library.lock.Lock()
	defer d.library.lock.Unlock()
	if err := d.openLibrary(); err != nil {
		return found, err
	}
	for i, rows := range []C.int64_t{p.rows, C.int64_t(last)} {
		p.rows = rows
		if found[i], err = d.algorithm(&p); err != nil {
			return found, err
		}
	}
	return found, nil
}

// algorithm asks cuBLASLt, or remembers what it said, with the lock.
func (d *Device) algorithm(p *C.struct_gq_lt_product) (C.struct_gq_lt_algorithm, error) {
	algorithm, known := d.library.algorithms[*p]
	if known {
		return algorithm, nil
	}
	code := C.gq_lt_find(d.context, d.library.handle, p, &algorithm)
	if code == C.GQ_LT_NONE {
		return algorithm, unavailable("libcublasLt can do no product of [%d, %d] and [%d, %d]ᵀ on CUDA device %d", int64(p.m), int64(p.k), int64(p.rows), int64(p.k), d.Ordinal)
	}
	if err := failed(code, "asking libcublasLt for an algorithm on CUDA device %d", d.Ordinal); err != nil {
		return algorithm, err
	}
	if len(d.library.algorithms) >= maxAlgorithms {
		clear(d.library.algorithms)
	}
	d.library.algorithms[*p] = algorithm
	return algorithm, nil
}

// fillBias puts the bias, or zeros if there is none, into every row of y.
func (d *Device) fillBias(s Stream, l Linear) error {
	if l.Bias == 0 {
		return d.zero(s, l.Y, l.M*l.N*int64(l.DType.Bits()/8))
	}
	args := C.struct_gq_bias_args{bias: C.uint64_t(l.Bias), y: C.uint64_t(l.Y), m: C.int64_t(l.M), n: C.int64_t(l.N)}
	return d.launch(s, fillBias.of(l.DType), strided(l.N), min(l.M, 65535), threads, unsafe.Pointer(&args))
}

func libraryType(t dtype.DType) C.int {
	switch t {
	case dtype.F32:
		return C.GQ_LT_F32
	case dtype.F16:
		return C.GQ_LT_F16
	default:
		return C.GQ_LT_BF16
	}
}

// alignment is the largest power of two that divides an address, of those that cuBLASLt tells apart.
func alignment(address uint64) C.uint32_t { return C.uint32_t((address | 256) & -(address | 256)) }
