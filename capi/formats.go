package main

// #include "types.h"
import "C"

import (
	"encoding/json"
	"runtime"
	"slices"
	"sync"

	"github.com/gquant/gquant/core/kernel"
	"github.com/gquant/gquant/core/quant"
	"github.com/gquant/gquant/cuda"
)

// blockwise8 is the name of the format whose table of values is the caller's; core's formats have their own.
const blockwise8 = "blockwise8"

// formats are the formats by their number in the header, which counts from 1. Texts are made once and stay.
var formats = sync.OnceValue(func() []C.gq_format_info {
	var list []C.gq_format_info
	for i, name := range []string{"nf4", "fp4", "int8", blockwise8} {
		info := C.gq_format_info{format: C.gq_format(i + 1), name: (*C.char)(C.CString(name)), bits: 8, codebook_size: 256}
		if f, err := quant.Lookup(name); err == nil {
			info.bits, info.codebook_size = C.int32_t(f.Bits), C.int32_t(len(f.Codebook))
		}
		list = append(list, info)
	}
	return list
})

// formatName checks a format's number.
func formatName(format C.gq_format) (string, error) {
	if format < 1 || int(format) > len(formats()) {
		return "", invalid("format is %d; want 1 to %d", int32(format), len(formats()))
	}
	return C.GoString(formats()[format-1].name), nil
}

// formatNumber is the number of a core format.
func formatNumber(f *quant.Format) C.gq_format {
	return C.gq_format(1 + slices.IndexFunc(formats(), func(info C.gq_format_info) bool { return C.GoString(info.name) == f.Name }))
}

//export go_gq_format_count
func go_gq_format_count(count *C.int32_t) C.gq_status {
	return guarded("gq_format_count", func() error {
		if count == nil {
			return invalid("count is NULL")
		}
		*count = C.int32_t(len(formats()))
		return nil
	})
}

//export go_gq_format_get_info
func go_gq_format_get_info(format C.gq_format, info *C.gq_format_info) C.gq_status {
	return guarded("gq_format_get_info", func() error {
		if _, err := formatName(format); err != nil {
			return err
		}
		f := formats()[format-1]
		return fill("info", info, &f)
	})
}

//export go_gq_format_by_name
func go_gq_format_by_name(name *C.gq_const_char, format *C.gq_format) C.gq_status {
	return guarded("gq_format_by_name", func() error {
		if format == nil {
			return invalid("format is NULL")
		}
		*format = 0
		wanted, err := text("name", name)
		if err != nil {
			return err
		}
		for _, f := range formats() {
			if C.GoString(f.name) == wanted {
				*format = f.format
				return nil
			}
		}
		return notFound("no format is called %q", wanted)
	})
}

// buildInfo is the text of gq_build_info.
func buildInfo() *C.char {
	text, err := json.Marshal(map[string]any{
		"version": version, "go": runtime.Version(), "cpu": kernel.Level(), "cpu_levels": kernel.Levels(), "cuda": cuda.Architectures(),
	})
	if err != nil {
		panic(err)
	}
	return C.CString(string(text))
}
