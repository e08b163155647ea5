package kernel

// #cgo CFLAGS: -O3 -Wall -Wextra
// #cgo noescape gq_call_quantize4
// #cgo nocallback gq_call_quantize4
// #cgo noescape gq_call_dequantize4
// #cgo nocallback gq_call_dequantize4
// #cgo noescape gq_call_quantize8
// #cgo nocallback gq_call_quantize8
// #cgo noescape gq_call_dequantize8
// #cgo nocallback gq_call_dequantize8
// #cgo noescape gq_call_absmax
// #cgo nocallback gq_call_absmax
// #cgo noescape gq_call_linear4
// #cgo nocallback gq_call_linear4
//
// #include "dispatch.h"
import "C"

import (
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"unsafe"

	"github.com/gquant/gquant/core/dtype"
)

// level is one build of the kernels that this machine can run.
type level struct {
	name  string
	table *C.struct_gq_level
}

var (
	levels  = available() // from the plainest to the best
	current atomic.Pointer[level]
	initErr error
)

// Environment is the environment variable that forces a level.
const Environment = "GQUANT_CPU"

func init() {
	current.Store(&levels[len(levels)-1])
	if name := os.Getenv(Environment); name != "" {
		if err := Use(name); err != nil {
			initErr = fmt.Errorf("environment variable %s: %w", Environment, err)
		}
	}
}

// Err says whether GQUANT_CPU named a level that this machine cannot run. The best level is in use then.
func Err() error { return initErr }

// Level is the name of the level in use.
func Level() string { return current.Load().name }

// Levels are the names of the levels that this machine can run, from the plainest to the best.
func Levels() []string {
	names := make([]string, len(levels))
	for i, l := range levels {
		names[i] = l.name
	}
	return names
}

// Use switches all following calls to a level. That changes the speed and, of results, only how Linear4 rounds.
func Use(name string) error {
	for i := range levels {
		if levels[i].name == name {
			current.Store(&levels[i])
			return nil
		}
	}
	return fmt.Errorf("no CPU level %q on this machine; there are %s", name, strings.Join(Levels(), ", "))
}

// Quantize4 finds the 4-bit codes of n elements and the scale of each block. It fills (n+1)/2 bytes of packed and
// ⌈n/blocksize⌉ of absmax. It returns how many elements are NaN or infinite.
func Quantize4(cb Codebook, src []byte, d dtype.DType, n, blocksize int, absmax []float32, packed []byte) (nonfinite int) {
	check(n, blocksize, 4, src, d, packed, absmax)
	return int(C.gq_call_quantize4(current.Load().table, C.int(cb), number(d), bytesOf(src), C.int64_t(n), C.int64_t(blocksize), floatsOf(absmax), bytesOf(packed)))
}

// Dequantize4 turns n 4-bit codes into elements of dst.
func Dequantize4(cb Codebook, packed []byte, absmax []float32, n, blocksize int, dst []byte, d dtype.DType) {
	check(n, blocksize, 4, dst, d, packed, absmax)
	C.gq_call_dequantize4(current.Load().table, C.int(cb), number(d), bytesOf(packed), floatsOf(absmax), C.int64_t(n), C.int64_t(blocksize), bytesOf(dst))
}

// Quantize8 finds for each of n elements the entry of the table that is nearest to element/absmax. The table is
// ascending, from −1 or 0 to 1. It returns how many elements are NaN or infinite.
func Quantize8(table *[256]float32, src []byte, d dtype.DType, n, blocksize int, absmax []float32, codes []byte) (nonfinite int) {
	check(n, blocksize, 8, src, d, codes, absmax)
	return int(C.gq_call_quantize8(current.Load().table, floatsOf(table[:]), number(d), bytesOf(src), C.int64_t(n), C.int64_t(blocksize), floatsOf(absmax), bytesOf(codes)))
}

// Dequantize8 turns n 8-bit codes into elements of dst.
func Dequantize8(table *[256]float32, codes []byte, absmax []float32, n, blocksize int, dst []byte, d dtype.DType) {
	check(n, blocksize, 8, dst, d, codes, absmax)
	C.gq_call_dequantize8(current.Load().table, floatsOf(table[:]), number(d), bytesOf(codes), floatsOf(absmax), C.int64_t(n), C.int64_t(blocksize), bytesOf(dst))
}

// Absmax decodes nested statistics: absmax[i] = table[codes[i]] · nested[i/blocksize] + offset. The product is that of
// Multiply, the sum is rounded once more.
func Absmax(table *[256]float32, codes []byte, nested []float32, blocksize int, offset float32, absmax []float32) {
	checkAbsmax(codes, nested, blocksize, absmax)
	C.gq_call_absmax(current.Load().table, floatsOf(table[:]), bytesOf(codes), floatsOf(nested), C.int64_t(len(codes)), C.int64_t(blocksize), C.float(offset), floatsOf(absmax))
}

// Sizes of a call of Linear4 that callers who spread a layer over threads should choose: so many rows of the weight, or a
// multiple, and so many rows of x.
const (
	Linear4Rows  = C.GQ_PANEL
	Linear4Batch = C.GQ_BATCH
)

// Linear4Scratch is the number of floats of scratch memory that Linear4 needs for m rows of x with k elements each.
func Linear4Scratch(m, k int) int { return int(C.gq_linear4_scratch(C.int64_t(m), C.int64_t(k))) }

// Linear4 computes some columns of a linear layer. See Layer4 for what the sums are; on each level their additions have a
// fixed order, the same for a row of x whatever the others are and whichever columns a call computes.
func Linear4(l *Layer4, scratch []float32) {
	block := l.check()
	if got, want := len(scratch), Linear4Scratch(l.M, l.K); got < want {
		panic(fmt.Sprintf("kernel: %d rows of %d elements need %d floats of scratch memory, there are %d", l.M, l.K, want, got))
	}
	if l.M == 0 || l.Rows == 0 {
		return
	}
	start := block * l.Blocksize
	C.gq_call_linear4(current.Load().table, C.int(l.Codebook), number(l.DType), bytesOf(l.Packed[start/2:]), floatsOf(l.Absmax),
		C.int64_t(l.Blocksize), C.int64_t(l.First*l.K-start), C.int64_t(l.Rows), C.int64_t(l.K),
		bytesOf(l.X), C.int64_t(l.M), bytesOf(l.Bias), bytesOf(l.Y), C.int64_t(l.Stride), floatsOf(scratch))
}

func number(d dtype.DType) C.int {
	switch d {
	case dtype.F16:
		return C.GQ_F16
	case dtype.BF16:
		return C.GQ_BF16
	}
	return C.GQ_F32
}

func bytesOf(b []byte) *C.uint8_t   { return (*C.uint8_t)(unsafe.Pointer(unsafe.SliceData(b))) }
func floatsOf(f []float32) *C.float { return (*C.float)(unsafe.Pointer(unsafe.SliceData(f))) }
