package cuda

// #include "driver.h"
// #include "kernels/args.h"
import "C"

import (
	"math/bits"
	"unsafe"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/quant"
)

// Blocks are elements to be quantized in blocks: n elements of a dtype at src, ⌈n/blocksize⌉ float32 at absmax, and the codes.
type Blocks struct {
	Src, Absmax, Codes uint64
	DType              dtype.DType
	N, Blocksize       int64
}

// Quantize4 quantizes to a 4-bit format, ⌈n/2⌉ bytes of codes, as quant.QuantizeInto does. Any alignment of src and codes will do; 16
// and 4 bytes are fast.
func (d *Device) Quantize4(s Stream, f *quant.Format, b Blocks) error {
	fast, plain := quantizeNF4, quantizeNF4Plain
	if f.Name == "fp4" {
		fast, plain = quantizeFP4, quantizeFP4Plain
	}
	return d.quantize(s, fast, plain, b, 4, 0, 0)
}

// Quantize8 quantizes to codes of a table of 256 float32 in device memory, 0 for the signed dynamic map; see quant.QuantizeBlockwise8.
func (d *Device) Quantize8(s Stream, table uint64, b Blocks) error {
	return d.quantize8(s, table, b, 0)
}

func (d *Device) quantize8(s Stream, table uint64, b Blocks, offset uint64) error {
	if table == 0 {
		if err := d.Prepare(); err != nil {
			return err
		}
		table = d.address(dynamicMap)
	}
	return d.quantize(s, quantizeTable, quantizeTablePlain, b, 8, table, offset)
}

// quantize gives whole tiles to the fast kernel, if they are aligned, and the rest to the plain one.
func (d *Device) quantize(s Stream, fast, plain kernel, b Blocks, codeBits int64, table, offset uint64) error {
	size := int64(b.DType.Bits() / 8)
	args := C.struct_gq_quantize_args{
		src: C.uint64_t(b.Src), absmax: C.uint64_t(b.Absmax), codes: C.uint64_t(b.Codes), table: C.uint64_t(table), offset: C.uint64_t(offset),
		blocksize: C.int32_t(b.Blocksize), log2: C.int32_t(bits.TrailingZeros64(uint64(b.Blocksize))),
	}
	group := max(threads, int(b.Blocksize)/C.GQ_QUANTIZE_LANE)
	tile := int64(C.GQ_QUANTIZE_LANE * C.GQ_QUANTIZE_CHUNKS * group)
	var done int64
	if b.Src%16 == 0 && b.Codes%uint64(codeBits) == 0 { // the codes of 8 elements have codeBits bytes
		done = b.N / tile * tile
	}
	// A grid has fewer than 2^31 CTAs, more than any memory needs.
	if done > 0 {
		args.n = C.int64_t(done)
		if err := d.launch(s, fast.of(b.DType), done/tile, 1, group, unsafe.Pointer(&args)); err != nil {
			return err
		}
	}
	if done == b.N {
		return nil
	}
	args.src += C.uint64_t(done * size)
	args.absmax += C.uint64_t(done / b.Blocksize * 4)
	args.codes += C.uint64_t(done * codeBits / 8)
	args.n = C.int64_t(b.N - done)
	return d.launch(s, plain.of(b.DType), strided(32*ceilDiv(b.N-done, b.Blocksize)), 1, threads, unsafe.Pointer(&args))
}

// NestedWorkspace is the bytes of workspace that QuantizeNested needs: a float32 for each of so many blocks, and partial sums.
func NestedWorkspace(blocks int64) int64 {
	bytes := 4 * blocks
	for n := blocks; n > 1; {
		n = ceilDiv(n, C.GQ_SUM_SPAN)
		bytes += 4 * n
	}
	return (bytes + 15) / 16 * 16
}

// QuantizeNested quantizes to a 4-bit format with nested statistics, as quant.Nest makes them: absmax (a byte per block), nested
// absmax (a float32 per 256 of them) and offset (one float32). b.Absmax is the workspace.
func (d *Device) QuantizeNested(s Stream, f *quant.Format, b Blocks, absmax, nestedAbsmax, offset uint64) error {
	if b.N == 0 {
		return d.zero(s, offset, 4)
	}
	if err := d.Quantize4(s, f, b); err != nil {
		return err
	}
	blocks := ceilDiv(b.N, b.Blocksize)
	args := C.struct_gq_sum_args{in: C.uint64_t(b.Absmax), n: C.int64_t(blocks)}
	next := b.Absmax + uint64(4*blocks)
	for {
		sums := ceilDiv(int64(args.n), C.GQ_SUM_SPAN)
		args.out = C.uint64_t(next)
		if sums == 1 {
			args.out, args.count = C.uint64_t(offset), C.int64_t(blocks)
		}
		if err := d.launch(s, sum, sums, 1, threads, unsafe.Pointer(&args)); err != nil {
			return err
		}
		if sums == 1 {
			break
		}
		args.in, args.n = args.out, C.int64_t(sums)
		next += uint64(4 * sums)
	}
	return d.quantize8(s, 0, Blocks{b.Absmax, nestedAbsmax, absmax, dtype.F32, blocks, quant.NestedBlocksize}, offset)
}

// Codebook copies a format's table of values, as files store it, to device memory.
func (d *Device) Codebook(s Stream, f *quant.Format, to uint64) error {
	from := nf4Values
	if f.Name == "fp4" {
		from = fp4Values
	}
	return d.copyTable(s, from, to)
}

// DynamicMap copies the signed dynamic map to device memory.
func (d *Device) DynamicMap(s Stream, to uint64) error { return d.copyTable(s, dynamicMap, to) }

func (d *Device) copyTable(s Stream, from table, to uint64) error {
	if err := d.Prepare(); err != nil {
		return err
	}
	return failed(C.gq_cu_on_device(d.context, C.uint64_t(to), C.uint64_t(d.address(from)), C.size_t(4*from.count), s.handle()), "copying a table on CUDA device %d", d.Ordinal)
}

func (d *Device) zero(s Stream, address uint64, bytes int64) error {
	return failed(C.gq_cu_zero(d.context, C.uint64_t(address), C.size_t(bytes), s.handle()), "clearing %d bytes on CUDA device %d", bytes, d.Ordinal)
}

// countNonfinite adds the number of NaN and infinite elements to the uint64 at count. src is aligned to its elements.
func (d *Device) countNonfinite(s Stream, src uint64, t dtype.DType, n int64, count uint64) error {
	args := C.struct_gq_nonfinite_args{src: C.uint64_t(src), count: C.uint64_t(count), n: C.int64_t(n)}
	return d.launch(s, nonfinite.of(t), min(strided(n), 1024), 1, threads, unsafe.Pointer(&args))
}

// Rows are rows of a matrix to be quantized as quant.QuantizeRowsInt8 does: rows·cols elements at src, rows float32 at absmax, rows·cols
// codes; with a threshold above 0, outliers takes cols bytes: 1 for a column with an outlier, else 0.
type Rows struct {
	Src, Absmax, Codes, Outliers uint64
	DType                        dtype.DType
	Rows, Cols                   int64
	Threshold                    float32
}

// QuantizeRowsInt8 quantizes rows. Any alignment of src will do.
func (d *Device) QuantizeRowsInt8(s Stream, r Rows) error {
	args := C.struct_gq_rows_args{
		src: C.uint64_t(r.Src), absmax: C.uint64_t(r.Absmax), codes: C.uint64_t(r.Codes), outliers: C.uint64_t(r.Outliers),
		rows: C.int64_t(r.Rows), cols: C.int64_t(r.Cols), threshold: C.float(r.Threshold),
	}
	if r.Outliers != 0 && r.Cols > 0 {
		if err := d.zero(s, r.Outliers, r.Cols); err != nil {
			return err
		}
	}
	if r.Rows == 0 {
		return nil
	}
	if err := d.launch(s, quantizeRows.of(r.DType), min(r.Rows, 1<<20), 1, threads, unsafe.Pointer(&args)); err != nil {
		return err
	}
	if r.Threshold <= 0 || r.Cols == 0 {
		return nil
	}
	return d.launch(s, clearOutliers, ceilDiv(r.Cols, threads), min(r.Rows, 1024), threads, unsafe.Pointer(&args))
}

// Pack4 and Unpack4 are quant.Pack4 and quant.Unpack4; of a code above 15 the lower 4 bits count.
func (d *Device) Pack4(s Stream, packed, codes uint64, n int64, order quant.NibbleOrder) error {
	return d.pack(s, pack, packed, codes, n, order)
}

func (d *Device) Unpack4(s Stream, codes, packed uint64, n int64, order quant.NibbleOrder) error {
	return d.pack(s, unpack, packed, codes, n, order)
}

func (d *Device) pack(s Stream, k kernel, packed, codes uint64, n int64, order quant.NibbleOrder) error {
	if n == 0 {
		return nil
	}
	args := C.struct_gq_pack_args{codes: C.uint64_t(codes), packed: C.uint64_t(packed), n: C.int64_t(n)}
	if order == quant.LowFirst {
		args.low_first = 1
	}
	return d.launch(s, k, strided(ceilDiv(n, 2)), 1, threads, unsafe.Pointer(&args))
}
