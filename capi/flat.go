package main

// #include "types.h"
import "C"

import (
	"errors"
	"slices"
	"strings"
	"unsafe"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/quant"
	"github.com/gquant/gquant/cuda"
)

// quantizeFlat quantizes n elements with a 4-bit format.
func quantizeFlat(name string, src C.gq_addr, d C.gq_dtype, n, blocksize C.int64_t, absmax C.gq_addr, absmaxCount C.int64_t, packed C.gq_addr, packedBytes C.size_t, exec *C.gq_const_exec) error {
	where, t, err := executionIn(exec, d)
	if err != nil {
		return err
	}
	if err := checkFlat(n, blocksize, absmaxCount); err != nil {
		return err
	}
	format, err := quant.Lookup(name)
	if err != nil {
		return err
	}
	if where.device != nil {
		b, err := where.blocks(src, t, n, blocksize, absmax, packed, "packed", uint64(packedBytes), (uint64(n)+1)/2)
		if err != nil {
			return err
		}
		return where.device.Quantize4(where.stream, format, b)
	}
	in, err := memory("src", src, uint64(n)*uint64(t.Bits()/8))
	if err != nil {
		return err
	}
	scales, err := floats("absmax", absmax, uint64(absmaxCount))
	if err != nil {
		return err
	}
	out, err := sized("packed", packed, uint64(packedBytes), (uint64(n)+1)/2)
	if err != nil {
		return err
	}
	return asInvalid(quant.QuantizeInto(format, in, t, int64(n), int(blocksize), scales, out, where.threads))
}

// blocksOf is the number of absmax of n elements.
func blocksOf(n, blocksize C.int64_t) int64 {
	return (int64(n) + int64(blocksize) - 1) / int64(blocksize)
}

// blocks checks the buffers of a quantization on a device.
func (p *place) blocks(src C.gq_addr, t dtype.DType, n, blocksize C.int64_t, absmax, codes C.gq_addr, codesName string, codesBytes, want uint64) (b cuda.Blocks, err error) {
	b = cuda.Blocks{DType: t, N: int64(n), Blocksize: int64(blocksize)}
	if b.Src, err = p.address("src", src, uint64(n)*uint64(t.Bits()/8)); err != nil {
		return b, err
	}
	if b.Absmax, err = p.floatAddress("absmax", absmax, uint64(blocksOf(n, blocksize))); err != nil {
		return b, err
	}
	b.Codes, err = p.sizedAddress(codesName, codes, codesBytes, want)
	return b, err
}

// checkBlocksize checks the blocksize of a quantization.
func checkBlocksize(blocksize C.int64_t) error {
	if allowed := quant.Blocksizes(); blocksize > 1<<20 || !slices.Contains(allowed, int(blocksize)) {
		return invalid("blocksize is %d; want one of %v", int64(blocksize), allowed)
	}
	return nil
}

// checkFlat checks the numbers of a quantization of n elements.
func checkFlat(n, blocksize, absmaxCount C.int64_t) error {
	if err := count("n", n); err != nil {
		return err
	}
	if err := checkBlocksize(blocksize); err != nil {
		return err
	}
	if blocks := blocksOf(n, blocksize); int64(absmaxCount) != blocks {
		return invalid("absmax_count is %d; %d elements in blocks of %d need %d", int64(absmaxCount), int64(n), int64(blocksize), blocks)
	}
	return nil
}

// asInvalid gives errors that core finds in arguments their status.
func asInvalid(_ int64, err error) error {
	if err == nil {
		return nil
	}
	return failure{C.GQ_ERROR_INVALID_ARGUMENT, err}
}

//export go_gq_quantize_nf4
func go_gq_quantize_nf4(src C.gq_addr, d C.gq_dtype, n, blocksize C.int64_t, absmax C.gq_addr, absmaxCount C.int64_t, packed C.gq_addr, packedBytes C.size_t, exec *C.gq_const_exec) C.gq_status {
	return guarded("gq_quantize_nf4", func() error {
		return quantizeFlat("nf4", src, d, n, blocksize, absmax, absmaxCount, packed, packedBytes, exec)
	})
}

//export go_gq_quantize_fp4
func go_gq_quantize_fp4(src C.gq_addr, d C.gq_dtype, n, blocksize C.int64_t, absmax C.gq_addr, absmaxCount C.int64_t, packed C.gq_addr, packedBytes C.size_t, exec *C.gq_const_exec) C.gq_status {
	return guarded("gq_quantize_fp4", func() error {
		return quantizeFlat("fp4", src, d, n, blocksize, absmax, absmaxCount, packed, packedBytes, exec)
	})
}

// table256 reads a table of values; NULL stands for the dynamic map.
func table256(name string, a C.gq_addr, bytes uint64) (*[256]float32, error) {
	if a == 0 {
		return quant.DynamicMap(), nil
	}
	if bytes != 1024 {
		return nil, invalid("%s has %d bytes; want 256 float32", name, bytes)
	}
	values, err := floats(name, a, 256)
	if err != nil {
		return nil, err
	}
	return (*[256]float32)(values), nil
}

//export go_gq_quantize_blockwise
func go_gq_quantize_blockwise(src C.gq_addr, d C.gq_dtype, n, blocksize C.int64_t, table, absmax C.gq_addr, absmaxCount C.int64_t, codes C.gq_addr, codesBytes C.size_t, exec *C.gq_const_exec) C.gq_status {
	return guarded("gq_quantize_blockwise", func() error {
		where, t, err := executionIn(exec, d)
		if err != nil {
			return err
		}
		if err := checkFlat(n, blocksize, absmaxCount); err != nil {
			return err
		}
		if where.device != nil {
			b, err := where.blocks(src, t, n, blocksize, absmax, codes, "codes", uint64(codesBytes), uint64(n))
			if err != nil {
				return err
			}
			values, err := where.tableAddress("table", table)
			if err != nil {
				return err
			}
			return where.device.Quantize8(where.stream, values, b)
		}
		values, err := table256("table", table, 1024)
		if err != nil {
			return err
		}
		in, err := memory("src", src, uint64(n)*uint64(t.Bits()/8))
		if err != nil {
			return err
		}
		scales, err := floats("absmax", absmax, uint64(absmaxCount))
		if err != nil {
			return err
		}
		out, err := sized("codes", codes, uint64(codesBytes), uint64(n))
		if err != nil {
			return err
		}
		return asInvalid(quant.QuantizeBlockwise8(values, in, t, int64(n), int(blocksize), scales, out, where.threads))
	})
}

// tableAddress is the address of a table of 256 values on a device; 0 stands for the dynamic map.
func (p *place) tableAddress(name string, a C.gq_addr) (uint64, error) {
	if a == 0 {
		return 0, nil
	}
	return p.floatAddress(name, a, 256)
}

//export go_gq_quantize_rows_int8
func go_gq_quantize_rows_int8(src C.gq_addr, d C.gq_dtype, rows, cols C.int64_t, threshold C.float, absmax C.gq_addr, absmaxCount C.int64_t, codes C.gq_addr, codesBytes C.size_t, outliers C.gq_addr, outliersBytes C.size_t, exec *C.gq_const_exec) C.gq_status {
	return guarded("gq_quantize_rows_int8", func() error {
		where, t, err := executionIn(exec, d)
		if err != nil {
			return err
		}
		if err := errors.Join(count("rows", rows), count("cols", cols)); err != nil {
			return err
		}
		if cols > 0 && rows > maxBytes/8/cols {
			return invalid("rows is %d and cols %d: no matrix is that large", int64(rows), int64(cols))
		}
		if !(threshold >= 0) {
			return invalid("threshold is %g; want 0 (no outliers) or more", float32(threshold))
		}
		if absmaxCount != rows {
			return invalid("absmax_count is %d; want %d, one per row", int64(absmaxCount), int64(rows))
		}
		n := uint64(rows) * uint64(cols)
		if outliers == 0 && outliersBytes == 0 {
			if where.device != nil && threshold > 0 {
				return invalid("outliers is NULL; with a threshold a device needs %d bytes there", int64(cols))
			}
		} else if uint64(outliersBytes) != uint64(cols) {
			return invalid("outliers has %d bytes; want %d, one per column", uint64(outliersBytes), int64(cols))
		}
		if where.device != nil {
			return where.quantizeRows(src, t, int64(rows), int64(cols), float32(threshold), absmax, codes, uint64(codesBytes), outliers, uint64(outliersBytes))
		}
		in, err := memory("src", src, n*uint64(t.Bits()/8))
		if err != nil {
			return err
		}
		scales, err := floats("absmax", absmax, uint64(rows))
		if err != nil {
			return err
		}
		out, err := sized("codes", codes, uint64(codesBytes), n)
		if err != nil {
			return err
		}
		marks, err := memory("outliers", outliers, uint64(outliersBytes))
		if err != nil {
			return err
		}
		found, values, columns, err := quant.QuantizeRowsInt8(in, t, int64(rows), int64(cols), float32(threshold))
		if err != nil {
			return asInvalid(0, err)
		}
		copy(out, found)
		copy(scales, values)
		clear(marks)
		if marks != nil {
			for _, c := range columns {
				marks[c] = 1
			}
		}
		return nil
	})
}

// quantizeRows is gq_quantize_rows_int8 on a device.
func (p *place) quantizeRows(src C.gq_addr, t dtype.DType, rows, cols int64, threshold float32, absmax, codes C.gq_addr, codesBytes uint64, outliers C.gq_addr, outliersBytes uint64) (err error) {
	r := cuda.Rows{DType: t, Rows: rows, Cols: cols, Threshold: threshold}
	n := uint64(rows) * uint64(cols)
	if r.Src, err = p.address("src", src, n*uint64(t.Bits()/8)); err != nil {
		return err
	}
	if r.Absmax, err = p.floatAddress("absmax", absmax, uint64(rows)); err != nil {
		return err
	}
	if r.Codes, err = p.sizedAddress("codes", codes, codesBytes, n); err != nil {
		return err
	}
	if r.Outliers, err = p.address("outliers", outliers, outliersBytes); err != nil {
		return err
	}
	return p.device.QuantizeRowsInt8(p.stream, r)
}

// codebooks are bitsandbytes' tables by name.
var codebooks = map[string]func() (*[256]float32, error){
	"dynamic":          func() (*[256]float32, error) { return quant.DynamicMap(), nil },
	"dynamic_unsigned": func() (*[256]float32, error) { return quant.UnsignedDynamicMap(), nil },
	"linear":           func() (*[256]float32, error) { return quant.LinearMap(true, 8, true) },
	"linear_unsigned":  func() (*[256]float32, error) { return quant.LinearMap(false, 8, true) },
	"fp8_e4m3":         func() (*[256]float32, error) { return quant.FP8Map(true, 4, 3) },
	"fp8_e5m2":         func() (*[256]float32, error) { return quant.FP8Map(true, 5, 2) },
}

//export go_gq_codebook
func go_gq_codebook(name *C.gq_const_char, table *C.float, count C.int64_t) C.gq_status {
	return guarded("gq_codebook", func() error {
		wanted, err := text("name", name)
		if err != nil {
			return err
		}
		if table == nil || count != 256 {
			return invalid("table is %p with %d values; want room for 256", table, int64(count))
		}
		build, ok := codebooks[wanted]
		if !ok {
			var names []string
			for n := range codebooks {
				names = append(names, n)
			}
			slices.Sort(names)
			return notFound("no codebook is called %q; there are %s", wanted, strings.Join(names, ", "))
		}
		values, err := build()
		if err != nil {
			return err
		}
		copy(unsafe.Slice((*float32)(unsafe.Pointer(table)), 256), values[:])
		return nil
	})
}

// nibbles checks the arguments of packing, and packs or unpacks.
func nibbles(codes C.gq_addr, n C.int64_t, order C.int32_t, packed C.gq_addr, packedBytes C.size_t, exec *C.gq_const_exec,
	onCPU func(codes, packed []byte) error, onDevice func(where *place, codes, packed uint64) error) error {
	where, err := execution(exec)
	if err != nil {
		return err
	}
	if err := count("n", n); err != nil {
		return err
	}
	if order != C.GQ_HIGH_NIBBLE_FIRST && order != C.GQ_LOW_NIBBLE_FIRST {
		return invalid("order is %d; want GQ_HIGH_NIBBLE_FIRST or GQ_LOW_NIBBLE_FIRST", int32(order))
	}
	if where.device != nil {
		unpacked, err := where.address("codes", codes, uint64(n))
		if err != nil {
			return err
		}
		bytes, err := where.sizedAddress("packed", packed, uint64(packedBytes), (uint64(n)+1)/2)
		if err != nil {
			return err
		}
		return onDevice(&where, unpacked, bytes)
	}
	unpacked, err := memory("codes", codes, uint64(n))
	if err != nil {
		return err
	}
	bytes, err := sized("packed", packed, uint64(packedBytes), (uint64(n)+1)/2)
	if err != nil {
		return err
	}
	return asInvalid(0, onCPU(unpacked, bytes))
}

//export go_gq_pack_4bit
func go_gq_pack_4bit(codes C.gq_addr, n C.int64_t, order C.int32_t, packed C.gq_addr, packedBytes C.size_t, exec *C.gq_const_exec) C.gq_status {
	return guarded("gq_pack_4bit", func() error {
		o := quant.NibbleOrder(order)
		return nibbles(codes, n, order, packed, packedBytes, exec,
			func(codes, packed []byte) error { return quant.Pack4(packed, codes, o) },
			func(p *place, codes, packed uint64) error {
				return p.device.Pack4(p.stream, packed, codes, int64(n), o)
			})
	})
}

//export go_gq_unpack_4bit
func go_gq_unpack_4bit(packed C.gq_addr, packedBytes C.size_t, order C.int32_t, codes C.gq_addr, n C.int64_t, exec *C.gq_const_exec) C.gq_status {
	return guarded("gq_unpack_4bit", func() error {
		o := quant.NibbleOrder(order)
		return nibbles(codes, n, order, packed, packedBytes, exec,
			func(codes, packed []byte) error { return quant.Unpack4(codes, packed, o) },
			func(p *place, codes, packed uint64) error {
				return p.device.Unpack4(p.stream, codes, packed, int64(n), o)
			})
	})
}

// dequantizeFlat8 decodes blockwise 8-bit codes.
func dequantizeFlat8(table *[256]float32, codes []byte, absmax []float32, n int64, blocksize int, out []byte, d dtype.DType, threads int) error {
	return asInvalid(0, quant.DequantizeBlockwise8(table, codes, absmax, n, blocksize, out, d, threads))
}
