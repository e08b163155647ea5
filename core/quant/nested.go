package quant

import (
	"fmt"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/kernel"
)

// NestedBlocksize is the number of absmax that share a nested absmax. bitsandbytes' kernels accept no other.
const NestedBlocksize = 256

// Nested are quantized statistics (bitsandbytes' compress_statistics, "double quantization"): from absmax, their mean
// is subtracted, and the rest is quantized to 8 bits in blocks of 256.
//
//	absmax[b] = Codebook[Codes[b]] · Absmax[b/Blocksize] + Offset
type Nested struct {
	Codes     []byte      // one per block of the weight
	Absmax    []float32   // one per Blocksize codes
	Codebook  []float32   // 256 values
	Blocksize int         // 256
	DType     dtype.DType // of the decoded absmax: F32
	Offset    float32     // the mean
}

// Nest quantizes absmax. The mean is Mean's; bitsandbytes' own depends on the device, see there.
func Nest(absmax []float32) *Nested { return NestWithOffset(absmax, Mean(absmax)) }

// NestWithOffset quantizes absmax with a given mean. With the mean that bitsandbytes found, it gives its bytes.
func NestWithOffset(absmax []float32, offset float32) *Nested {
	table := DynamicMap()
	n := &Nested{
		Codes:     make([]byte, len(absmax)),
		Absmax:    make([]float32, ceilDiv(int64(len(absmax)), NestedBlocksize)),
		Codebook:  table[:],
		Blocksize: NestedBlocksize,
		DType:     dtype.F32,
		Offset:    offset,
	}
	var src [4 * NestedBlocksize]byte
	for b := range n.Absmax {
		first := b * NestedBlocksize
		block := absmax[first:min(first+NestedBlocksize, len(absmax))]
		for i, v := range block {
			dtype.PutF32(src[4*i:], dtype.F32, v-offset)
		}
		kernel.Quantize8(table, src[:4*len(block)], dtype.F32, len(block), NestedBlocksize, n.Absmax[b:], n.Codes[first:])
	}
	return n
}

// Mean is the mean of absmax in float32, with a fixed order of additions: neighbours are added, then neighbouring
// sums, and so on, the list thought of as filled up with zeros to a power of two; one division by the length ends it.
// torch's order differs between its devices and releases, so bitsandbytes' offset can differ in its last bits.
func Mean(absmax []float32) float32 {
	if len(absmax) == 0 {
		return 0
	}
	sums := append([]float32(nil), absmax...)
	for len(sums) > 1 {
		half := (len(sums) + 1) / 2
		for i := range half {
			if 2*i+1 < len(sums) {
				sums[i] = sums[2*i] + sums[2*i+1]
			} else {
				sums[i] = sums[2*i]
			}
		}
		sums = sums[:half]
	}
	return sums[0] / float32(len(absmax))
}

// decode fills absmax with those of the blocks from block first on. The product is the GPU's; the sum is torch's.
func (n *Nested) decode(absmax []float32, first int64) {
	table, size := (*[256]float32)(n.Codebook), int64(n.Blocksize)
	codes := n.Codes[first:][:len(absmax)]
	// The rest of the nested block that first lies in, then whole ones.
	head := min(int64(len(codes)), ceilDiv(first, size)*size-first)
	kernel.Absmax(table, codes[:head], n.Absmax[first/size:], n.Blocksize, n.Offset, absmax)
	kernel.Absmax(table, codes[head:], n.Absmax[ceilDiv(first, size):], n.Blocksize, n.Offset, absmax[head:])
}

func (n *Nested) check(blocks int64) error {
	if n.Blocksize <= 0 {
		return fmt.Errorf("nested blocksize %d", n.Blocksize)
	}
	if int64(len(n.Codes)) != blocks {
		return fmt.Errorf("%d blocks need as many nested absmax codes, there are %d", blocks, len(n.Codes))
	}
	if want := ceilDiv(blocks, int64(n.Blocksize)); int64(len(n.Absmax)) != want {
		return fmt.Errorf("%d blocks with nested blocksize %d need %d nested absmax, there are %d", blocks, n.Blocksize, want, len(n.Absmax))
	}
	if len(n.Codebook) != 256 {
		return fmt.Errorf("the nested codebook has %d entries, not 256", len(n.Codebook))
	}
	if n.DType != dtype.F32 {
		return fmt.Errorf("nested dtype %s; only F32 is known", n.DType)
	}
	return nil
}
