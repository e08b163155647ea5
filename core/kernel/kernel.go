// Package kernel holds the inner loops that turn weights into codes and codes into weights on the CPU, and that multiply
// with coded weights.
//
// Every function comes in several builds, called levels: plain C, AVX2, AVX-512. The best one that the
// machine has is chosen at start-up (dispatch.go). Beside each stands a plain Go twin, named …Ref, which is the
// definition: all levels give its bytes, for every input. The definition is what bitsandbytes' CUDA kernels do,
// with their arithmetic: float32 where subnormal inputs and results count as zero, and an approximate
// reciprocal (reciprocal.go). Linear4 alone is defined up to the rounding of its sums (linear4.go).
//
// # Bytes
//
// Elements are counted in the flat order of the tensor. Block b holds the elements [b·blocksize, (b+1)·blocksize);
// the last block may be shorter. A block has one scale, absmax[b], the largest magnitude in it.
//
//	4 bits: element 2i is the high nibble of packed[i], element 2i+1 the low one; after an odd number of
//	        elements the last low nibble is the code of 0.
//	8 bits: element i is codes[i], an index into a table of 256 values.
//
// An element's value is table[code] · absmax[b], rounded to float32 and then to the type asked for.
//
// # Calling
//
// src and dst hold elements of dtype F32, F16 or BF16, little-endian, at any alignment. A blocksize is a multiple
// of 32. The functions panic when a buffer is shorter than n and the blocksize need; they never touch what is
// behind that. They allocate nothing and start no goroutines; callers split large tensors at block borders.
package kernel

import (
	"fmt"

	"github.com/gquant/gquant/core/dtype"
)

// Codebook is a table of 16 values for 4-bit codes, and the rule that finds the code of a number.
type Codebook int

// The 4-bit codebooks of bitsandbytes.
const (
	NF4 Codebook = iota // quantiles of a normal distribution
	FP4                 // 1 sign, 2 exponent and 1 mantissa bits, scaled to ±1
)

// maxBlocks bounds absmax so that no size below overflows.
const maxBlocks = 1 << 48

// blocks checks the arguments that all kernels share and gives the number of blocks.
func blocks(d dtype.DType, n, blocksize int) int {
	if d != dtype.F32 && d != dtype.F16 && d != dtype.BF16 {
		panic(fmt.Sprintf("kernel: dtype %s; want F32, F16 or BF16", d))
	}
	if blocksize < 32 || blocksize%32 != 0 {
		panic(fmt.Sprintf("kernel: blocksize %d is not a positive multiple of 32", blocksize))
	}
	if n < 0 || n > maxBlocks {
		panic(fmt.Sprintf("kernel: %d elements", n))
	}
	return (n + blocksize - 1) / blocksize
}

// check panics unless the buffers hold n elements, their codes of the given bits, and absmax.
func check(n, blocksize, bits int, values []byte, d dtype.DType, codes []byte, absmax []float32) {
	need := blocks(d, n, blocksize)
	if got, want := len(values), n*d.Bits()/8; got < want {
		panic(fmt.Sprintf("kernel: %d elements of %s need %d bytes, the buffer has %d", n, d, want, got))
	}
	if got, want := len(codes), (n*bits+7)/8; got < want {
		panic(fmt.Sprintf("kernel: %d codes of %d bits need %d bytes, the buffer has %d", n, bits, want, got))
	}
	if len(absmax) < need {
		panic(fmt.Sprintf("kernel: %d blocks need as many absmax, the buffer has %d", need, len(absmax)))
	}
}

// checkAbsmax panics unless the buffers hold the nested statistics and their decoded absmax.
func checkAbsmax(codes []byte, nested []float32, blocksize int, absmax []float32) {
	if blocksize <= 0 {
		panic(fmt.Sprintf("kernel: nested blocksize %d", blocksize))
	}
	if got, want := len(nested), (len(codes)+blocksize-1)/blocksize; got < want || len(absmax) < len(codes) {
		panic(fmt.Sprintf("kernel: %d codes of absmax need %d nested absmax and as many results, the buffers have %d and %d", len(codes), want, got, len(absmax)))
	}
}
