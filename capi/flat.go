package main

// #include "types.h"
import "C"

import (
	"slices"
	"strings"
	"unsafe"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/quant"
)

// quantizeFlat quantizes n elements with a 4-bit format.
func quantizeFlat(name string, src C.gq_addr, d C.gq_dtype, n, blocksize C.int64_t, absmax C.gq_addr, absmaxCount C.int64_t, packed C.gq_addr, packedBytes C.size_t, exec *C.gq_const_exec) error {
	threads, err := execution(exec)
	if err != nil {
		return err
	}
	t, err := weightType("dtype", d)
	if err != nil {
		return err
	}
	if err := checkBlocks(n, blocksize, quant.Blocksizes()); err != nil {
		return err
	}
	blocks := (int64(n) + int64(blocksize) - 1) / int64(blocksize)
	if int64(absmaxCount) != blocks {
		return invalid("absmax_count is %d; %d elements in blocks of %d need %d", int64(absmaxCount), int64(n), int64(blocksize), blocks)
	}
	format, err := quant.Lookup(name)
	if err != nil {
		return err
	}
	in, err := memory("src", src, uint64(n)*uint64(t.Bits()/8))
	if err != nil {
		return err
	}
	scales, err := floats("absmax", absmax, uint64(blocks))
	if err != nil {
		return err
	}
	out, err := sized("packed", packed, uint64(packedBytes), (uint64(n)+1)/2)
	if err != nil {
		return err
	}
	return asInvalid(quant.QuantizeInto(format, in, t, int64(n), int(blocksize), scales, out, threads))
}

// checkBlocks checks a number of elements and a blocksize.
func checkBlocks(n, blocksize C.int64_t, allowed []int) error {
	if err := count("n", n); err != nil {
		return err
	}
	if blocksize > 1<<20 || !slices.Contains(allowed, int(blocksize)) {
		return invalid("blocksize is %d; want one of %v", int64(blocksize), allowed)
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
		threads, err := execution(exec)
		if err != nil {
			return err
		}
		t, err := weightType("dtype", d)
		if err != nil {
			return err
		}
		if err := checkBlocks(n, blocksize, quant.Blocksizes()); err != nil {
			return err
		}
		values, err := table256("table", table, 1024)
		if err != nil {
			return err
		}
		if absmaxCount < 0 || absmaxCount > n {
			return invalid("absmax_count is %d", int64(absmaxCount))
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
		return asInvalid(quant.QuantizeBlockwise8(values, in, t, int64(n), int(blocksize), scales, out, threads))
	})
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

// nibbles checks the arguments of packing.
func nibbles(codes C.gq_addr, n C.int64_t, order C.int32_t, packed C.gq_addr, packedBytes C.size_t, exec *C.gq_const_exec) (unpacked, bytes []byte, err error) {
	if _, err := execution(exec); err != nil {
		return nil, nil, err
	}
	if err := count("n", n); err != nil {
		return nil, nil, err
	}
	if order != C.GQ_HIGH_NIBBLE_FIRST && order != C.GQ_LOW_NIBBLE_FIRST {
		return nil, nil, invalid("order is %d; want GQ_HIGH_NIBBLE_FIRST or GQ_LOW_NIBBLE_FIRST", int32(order))
	}
	if unpacked, err = memory("codes", codes, uint64(n)); err != nil {
		return nil, nil, err
	}
	bytes, err = sized("packed", packed, uint64(packedBytes), (uint64(n)+1)/2)
	return unpacked, bytes, err
}

//export go_gq_pack_4bit
func go_gq_pack_4bit(codes C.gq_addr, n C.int64_t, order C.int32_t, packed C.gq_addr, packedBytes C.size_t, exec *C.gq_const_exec) C.gq_status {
	return guarded("gq_pack_4bit", func() error {
		in, out, err := nibbles(codes, n, order, packed, packedBytes, exec)
		if err != nil {
			return err
		}
		return asInvalid(0, quant.Pack4(out, in, quant.NibbleOrder(order)))
	})
}

//export go_gq_unpack_4bit
func go_gq_unpack_4bit(packed C.gq_addr, packedBytes C.size_t, order C.int32_t, codes C.gq_addr, n C.int64_t, exec *C.gq_const_exec) C.gq_status {
	return guarded("gq_unpack_4bit", func() error {
		out, in, err := nibbles(codes, n, order, packed, packedBytes, exec)
		if err != nil {
			return err
		}
		return asInvalid(0, quant.Unpack4(out, in, quant.NibbleOrder(order)))
	})
}

// dequantizeFlat8 decodes blockwise 8-bit codes.
func dequantizeFlat8(table *[256]float32, codes []byte, absmax []float32, n int64, blocksize int, out []byte, d dtype.DType, threads int) error {
	return asInvalid(0, quant.DequantizeBlockwise8(table, codes, absmax, n, blocksize, out, d, threads))
}
