package cuda

// #include "driver.h"
import "C"

import (
	"fmt"
	"strings"
	"unsafe"

	"github.com/gquant/gquant/core/dtype"
)

// kernel is the number of a kernel in the list below.
type kernel int

// The kernels that come for each dtype, F32, F16 and BF16 in this order, have the number of the first.
const (
	quantizeNF4 kernel = 3 * iota
	quantizeNF4Plain
	quantizeFP4
	quantizeFP4Plain
	quantizeTable
	quantizeTablePlain
	dequantize4
	dequantize4Nested
	dequantize4Plain
	dequantize8
	dequantize8Plain
	dequantizeRows
	quantizeRows
	nonfinite
	fillBias
	linearTile32 // and for tiles of 64 and 128 tokens
	linearTile64
	linearTile128
	linearTile32Nested
	linearTile64Nested
	linearTile128Nested
	linearTileSum32
	linearTileSum64
	linearTileSum128
	sum
)

const (
	clearOutliers = sum + 1 + iota
	pack
	unpack
	hopperFirst // kernels as hopperTiles has them; behind those fewKernels, each plain and nested
)

var fewFirst = hopperFirst + kernel(3*len(hopperTiles))

// kernels says where each kernel is: the image, which has the name of its .cu file, and the kernel's own name.
var kernels = listKernels()

type location struct{ image, name string }

func listKernels() []location {
	list := make([]location, int(fewFirst)+6*len(fewKernels))
	for k, l := range map[kernel]location{
		quantizeNF4: {"quantize", "gq_quantize_nf4_*"}, quantizeNF4Plain: {"quantize", "gq_quantize_nf4_*_plain"},
		quantizeFP4: {"quantize", "gq_quantize_fp4_*"}, quantizeFP4Plain: {"quantize", "gq_quantize_fp4_*_plain"},
		quantizeTable: {"quantize", "gq_quantize_table_*"}, quantizeTablePlain: {"quantize", "gq_quantize_table_*_plain"},
		dequantize4: {"dequantize", "gq_dequantize_4_*"}, dequantize4Nested: {"dequantize", "gq_dequantize_4_nested_*"},
		dequantize4Plain: {"dequantize", "gq_dequantize_4_*_plain"},
		dequantize8:      {"dequantize", "gq_dequantize_8_*"}, dequantize8Plain: {"dequantize", "gq_dequantize_8_*_plain"},
		dequantizeRows: {"dequantize", "gq_dequantize_rows_*"}, quantizeRows: {"rows", "gq_quantize_rows_*"}, nonfinite: {"statistics", "gq_nonfinite_*"},
		fillBias: {"bias", "gq_bias_*"},
	} {
		for i, d := range []string{"f32", "f16", "bf16"} {
			list[k+kernel(i)] = location{l.image, strings.Replace(l.name, "*", d, 1)}
		}
	}
	// Of linear layers there is none for F32.
	for d, name := range map[dtype.DType]string{dtype.F16: "f16", dtype.BF16: "bf16"} {
		for i, tile := range hopperTiles {
			list[(hopperFirst + kernel(3*i)).of(d)] = location{"linear_hopper", fmt.Sprintf("gq_linear_hopper_%s_%d_%d", name, tile.rows, tile.tokens)}
		}
		for i, k := range fewKernels {
			plain := (fewFirst + kernel(6*i)).of(d)
			list[plain] = location{"linear_few", fmt.Sprintf("gq_linear_few_%s_%d_%d", name, k.columns, k.rows)}
			list[plain+3] = location{"linear_few", list[plain].name + "_nested"}
		}
	}
	for i, t := range linearTiles {
		for d, name := range map[dtype.DType]string{dtype.F16: "f16", dtype.BF16: "bf16"} {
			each := kernel(3 * i)
			list[(linearTile32 + each).of(d)] = location{"linear_tile", fmt.Sprintf("gq_linear_tile_%s_%d", name, t.tokens)}
			list[(linearTile32Nested + each).of(d)] = location{"linear_tile", fmt.Sprintf("gq_linear_tile_%s_%d_nested", name, t.tokens)}
			list[(linearTileSum32 + each).of(d)] = location{"linear_tile", fmt.Sprintf("gq_linear_tile_sum_%s_%d", name, t.tokens)}
		}
	}
	list[sum] = location{"statistics", "gq_sum"}
	list[clearOutliers] = location{"rows", "gq_clear_outliers"}
	list[pack], list[unpack] = location{"pack", "gq_pack"}, location{"pack", "gq_unpack"}
	return list
}

// of is the kernel for a dtype.
func (k kernel) of(d dtype.DType) kernel {
	switch d {
	case dtype.F32:
		return k
	case dtype.F16:
		return k + 1
	default:
		return k + 2
	}
}

// threads of a CTA, but for the fast quantizing kernels with blocks of 4096.
const threads = 256

// Stream is a CUstream; 0 is the legacy default stream.
type Stream uint64

func (s Stream) handle() C.gq_stream { return *(*C.gq_stream)(unsafe.Pointer(&s)) }

// launch puts a kernel on a stream. args points to its struct of arguments, in memory without pointers.
func (d *Device) launch(s Stream, k kernel, x, y int64, threads int, args unsafe.Pointer) error {
	if !d.prepared.Load() {
		if err := d.Prepare(); err != nil {
			return err
		}
	}
	code := C.gq_cu_launch(d.context, d.functions[k], C.uint32_t(x), C.uint32_t(y), C.uint32_t(threads), s.handle(), args)
	if code == 0 {
		return nil
	}
	return failed(code, "launching %s on CUDA device %d", kernels[k].name, d.Ordinal)
}

// strided is a number of CTAs for a kernel whose threads stride over n items.
func strided(n int64) int64 { return min((n+threads-1)/threads, 1<<20) }

func ceilDiv(a, b int64) int64 { return (a + b - 1) / b }
