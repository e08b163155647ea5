package cuda

// #include "kernels/args.h"
import "C"

import (
	"math/bits"
	"unsafe"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/quant"
)

// Weight is a quantized weight in device memory.
type Weight struct {
	Format    *quant.Format // nil for blockwise 8-bit codes
	Blocksize int64         // elements per absmax; the row length for int8
	Packed    uint64
	Absmax    uint64 // float32, or uint8 when nested
	Nested    bool
	// When nested: a float32 per 256 absmax, 256 float32 (0 for the signed dynamic map), and one float32.
	NestedAbsmax, NestedCodebook, Offset uint64
	Codebook                             uint64 // 256 float32, for blockwise 8-bit codes; 0 for the signed dynamic map
}

// Dequantize decodes elements first … first+n of the flat weight to out, as quant.State's DequantizeRange does. Any alignment will do;
// it is fast when out is aligned to 16 bytes and what it is decoded from to 2 or 4 bytes (8 for 8-bit codes).
func (d *Device) Dequantize(s Stream, w *Weight, t dtype.DType, out uint64, first, n int64) error {
	if n == 0 {
		return nil
	}
	if err := d.Prepare(); err != nil {
		return err
	}
	args := C.struct_gq_dequantize_args{weight: d.weight(w), out: C.uint64_t(out), first: C.int64_t(first), n: C.int64_t(n)}
	fast, plain, codeBits := dequantize4, dequantize4Plain, int64(4)
	switch {
	case w.Format == nil:
		fast, plain, codeBits = dequantize8, dequantize8Plain, 8
	case w.Format.Bits == 8:
		return d.launch(s, dequantizeRows.of(t), strided(n), 1, threads, unsafe.Pointer(&args))
	case w.Nested:
		fast = dequantize4Nested
	}

	size := int64(t.Bits() / 8)
	group := 16 / size // elements that a thread makes at a time
	var done int64
	if aligned := uint64(group * codeBits / 8); first%group == 0 && out%16 == 0 && (w.Packed+uint64(first*codeBits/8))%aligned == 0 {
		done = n / group * group
	}
	if done > 0 {
		args.n = C.int64_t(done)
		if err := d.launch(s, fast.of(t), ceilDiv(done/group, threads*C.GQ_DEQUANTIZE_CHUNKS), 1, threads, unsafe.Pointer(&args)); err != nil {
			return err
		}
	}
	if done == n {
		return nil
	}
	args.out, args.first, args.n = C.uint64_t(out+uint64(done*size)), C.int64_t(first+done), C.int64_t(n-done)
	return d.launch(s, plain.of(t), strided(n-done), 1, threads, unsafe.Pointer(&args))
}

// weight is the kernels' form of a weight. The device is prepared.
func (d *Device) weight(w *Weight) C.struct_gq_weight {
	c := C.struct_gq_weight{
		packed: C.uint64_t(w.Packed), absmax: C.uint64_t(w.Absmax), codebook: C.uint64_t(w.Codebook),
		blocksize: C.int64_t(w.Blocksize), log2: C.int32_t(bits.TrailingZeros64(uint64(w.Blocksize))),
	}
	switch {
	case w.Format == nil:
		if w.Codebook == 0 {
			c.codebook = C.uint64_t(d.address(dynamicMap))
		}
	case w.Format.Name == "nf4":
		c.format = C.GQ_NF4
	case w.Format.Name == "fp4":
		c.format = C.GQ_FP4
	}
	if w.Nested {
		c.nested_absmax, c.nested_codebook, c.offset = C.uint64_t(w.NestedAbsmax), C.uint64_t(w.NestedCodebook), C.uint64_t(w.Offset)
		if w.NestedCodebook == 0 {
			c.nested_codebook = C.uint64_t(d.address(dynamicMap))
		}
	}
	return c
}
