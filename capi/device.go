package main

// #include "types.h"
import "C"

import (
	"unsafe"

	"github.com/gquant/gquant/cuda"
)

//export go_gq_device_count
func go_gq_device_count(count *C.int32_t) C.gq_status {
	return guarded("gq_device_count", func() error {
		if count == nil {
			return invalid("count is NULL")
		}
		*count = C.int32_t(cuda.Count())
		return nil
	})
}

//export go_gq_device_get_info
func go_gq_device_get_info(ordinal C.int32_t, info *C.gq_device_info) C.gq_status {
	return guarded("gq_device_get_info", func() error {
		if info == nil {
			return invalid("info is NULL")
		}
		d, err := cuda.Describe(int(ordinal))
		if err != nil {
			return err
		}
		known := C.gq_device_info{
			major: C.int32_t(d.Major), minor: C.int32_t(d.Minor), multiprocessors: C.int32_t(d.Multiprocessors),
			driver_version: C.int32_t(d.Driver), memory_bytes: C.uint64_t(d.Memory),
		}
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&known.name[0])), len(known.name)-1), d.Name)
		return fill("info", info, &known)
	})
}

//export go_gq_device_prepare
func go_gq_device_prepare(ordinal C.int32_t) C.gq_status {
	return guarded("gq_device_prepare", func() error {
		d, err := cuda.Open(int(ordinal))
		if err != nil {
			return err
		}
		return d.Prepare()
	})
}
