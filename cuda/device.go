package cuda

// #include <stdlib.h>
// #include "driver.h"
import "C"

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/gquant/gquant/core/quant"
)

// Device is a GPU whose primary context is held until the process ends.
type Device struct {
	Ordinal int
	context C.gq_context

	about C.struct_gq_cu_device // since it is prepared

	preparing sync.Mutex
	prepared  atomic.Bool
	modules   map[string]unsafe.Pointer // by image, as far as loaded
	functions []C.gq_function           // by kernel
	clusters  [maxCluster + 1]int64     // that run at once, by their size, of a Hopper
	tables    uint64                    // device memory: see table
	table     *Table                    // of linear layers

	workers []*ringWorker // kept for loading, guarded by loading
	library library       // for products
}

// maxDevices is more than a machine has.
const maxDevices = 64

var (
	opening sync.Mutex
	devices [maxDevices]atomic.Pointer[Device]
)

// Open gives a device; always the same for an ordinal.
func Open(ordinal int) (*Device, error) {
	if ordinal >= 0 && ordinal < maxDevices {
		if d := devices[ordinal].Load(); d != nil {
			return d, nil
		}
	}
	found, err := initialize()
	if err != nil {
		return nil, err
	}
	if ordinal < 0 || ordinal >= min(found.devices, maxDevices) {
		return nil, NoDevice{fmt.Errorf("there is no CUDA device %d; the machine has %d", ordinal, found.devices)}
	}
	opening.Lock()
	defer opening.Unlock()
	if d := devices[ordinal].Load(); d != nil {
		return d, nil
	}
	d := &Device{Ordinal: ordinal, modules: map[string]unsafe.Pointer{}, functions: make([]C.gq_function, len(kernels))}
	if err := failed(C.gq_cu_retain(C.int(ordinal), &d.context), "starting CUDA device %d", ordinal); err != nil {
		return nil, err
	}
	devices[ordinal].Store(d)
	return d, nil
}

// Parse reads the name of a device: "cuda" or "cuda:1".
func Parse(name string) (ordinal int, err error) {
	rest, ok := strings.CutPrefix(name, "cuda")
	if ok && rest == "" {
		return 0, nil
	}
	if number, hasNumber := strings.CutPrefix(rest, ":"); ok && hasNumber {
		if n, err := strconv.ParseUint(number, 10, 16); err == nil {
			return int(n), nil
		}
	}
	return 0, fmt.Errorf("device %q is not cpu, cuda or cuda:0, cuda:1 …", name)
}

// Info describes a device.
type Info struct {
	Name            string `json:"name"`
	Major           int    `json:"major"` // compute capability
	Minor           int    `json:"minor"`
	Multiprocessors int    `json:"multiprocessors"`
	Memory          uint64 `json:"memory_bytes"`
	Driver          int    `json:"driver_version"` // CUDA version that the driver supports, such as 13000
}

// Describe describes a device. It does not start it.
func Describe(ordinal int) (Info, error) {
	found, err := initialize()
	if err != nil {
		return Info{}, err
	}
	if ordinal < 0 || ordinal >= found.devices {
		return Info{}, NoDevice{fmt.Errorf("there is no CUDA device %d; the machine has %d", ordinal, found.devices)}
	}
	var d C.struct_gq_cu_device
	if err := failed(C.gq_cu_describe(C.int(ordinal), &d), "asking CUDA device %d what it is", ordinal); err != nil {
		return Info{}, err
	}
	return Info{
		Name: C.GoString(&d.name[0]), Major: int(d.major), Minor: int(d.minor), Multiprocessors: int(d.multiprocessors),
		Memory: uint64(d.memory), Driver: found.version,
	}, nil
}

// Architectures are those that the embedded kernels were compiled for, such as "sm_80"; none in a build without CUDA.
func Architectures() []string { return strings.Fields(architectures) }

// Prepare loads the kernels, unless that is done. Afterwards calls can be captured in graphs.
func (d *Device) Prepare() error {
	if d.prepared.Load() {
		return nil
	}
	d.preparing.Lock()
	defer d.preparing.Unlock()
	if d.prepared.Load() {
		return nil
	}
	if err := failed(C.gq_cu_describe(C.int(d.Ordinal), &d.about), "asking CUDA device %d what it is", d.Ordinal); err != nil {
		return err
	}
	for k, l := range kernels {
		linear := strings.HasPrefix(l.image, "linear")
		if l.name == "" || linear && !d.hasLinear() || l.image == "linear_hopper" && !d.hasHopper() {
			continue
		}
		if err := d.find(kernel(k), l); err != nil {
			return err
		}
		if linear {
			if err := failed(C.gq_cu_allow_shared(d.context, d.functions[k], d.about.shared_memory), "allowing kernel %s shared memory on CUDA device %d", l.name, d.Ordinal); err != nil {
				return err
			}
		}
	}
	if err := d.countClusters(); err != nil {
		return err
	}
	if err := d.makeTables(); err != nil {
		return err
	}
	var err error
	if d.table, err = findTable(int(d.about.major), int(d.about.minor), C.GoString(&d.about.name[0])); err != nil {
		return err
	}
	d.prepared.Store(true)
	return nil
}

// find looks a kernel up in its image, which it loads if need be.
func (d *Device) find(k kernel, l location) error {
	module, err := d.module(l.image)
	if err != nil {
		return err
	}
	text := C.CString(l.name)
	defer C.free(unsafe.Pointer(text))
	return failed(C.gq_cu_function(d.context, module, text, &d.functions[k]), "finding kernel %s on CUDA device %d", l.name, d.Ordinal)
}

// module is an image in the device.
func (d *Device) module(image string) (module unsafe.Pointer, err error) {
	if module, ok := d.modules[image]; ok {
		return module, nil
	}
	code, err := images.ReadFile("image/" + image + ".fatbin")
	if err != nil {
		return nil, err
	}
	if err := failed(C.gq_cu_load(d.context, unsafe.Pointer(unsafe.SliceData(code)), &module), "loading the kernels of %s into CUDA device %d", image, d.Ordinal); err != nil {
		if cause, ok := err.(*Error); ok && cause.Code == noBinary {
			info, _ := Describe(d.Ordinal)
			return nil, unavailable("%w: the kernels are for %s, the device is an sm_%d%d", err, strings.TrimSpace(architectures), info.Major, info.Minor)
		}
		return nil, err
	}
	d.modules[image] = module
	return module, nil
}

// table is a number of float32 among a device's tables.
type table struct{ first, count int }

// Tables of values, in device memory.
var (
	dynamicMap = table{0, 256} // the signed dynamic map
	nf4Values  = table{256, 16}
	fp4Values  = table{272, 16} // as stored in files
)

func (d *Device) address(t table) uint64 { return d.tables + 4*uint64(t.first) }

func (d *Device) makeTables() error {
	if d.tables != 0 {
		return nil
	}
	values := quant.DynamicMap()[:]
	for _, name := range []string{"nf4", "fp4"} {
		f, err := quant.Lookup(name)
		if err != nil {
			return err
		}
		values = append(values, f.Codebook...)
	}
	memory, err := d.Alloc(int64(4 * len(values)))
	if err != nil {
		return err
	}
	if err := d.upload(memory, unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(values))), 4*len(values))); err != nil {
		return joinFree(err, d, memory)
	}
	d.tables = memory
	return nil
}

// upload copies a few bytes and waits for them.
func (d *Device) upload(to uint64, bytes []byte) (err error) {
	var stream C.gq_stream
	if err := failed(C.gq_cu_new_stream(d.context, &stream), "making a stream on CUDA device %d", d.Ordinal); err != nil {
		return err
	}
	defer func() {
		if problem := failed(C.gq_cu_free_stream(d.context, stream), "ending a stream on CUDA device %d", d.Ordinal); err == nil {
			err = problem
		}
	}()
	staged := C.CBytes(bytes)
	defer C.free(staged)
	if err := failed(C.gq_cu_to_device(d.context, C.uint64_t(to), staged, C.size_t(len(bytes)), stream), "copying %d bytes to CUDA device %d", len(bytes), d.Ordinal); err != nil {
		return err
	}
	return failed(C.gq_cu_wait(d.context, stream), "copying %d bytes to CUDA device %d", len(bytes), d.Ordinal)
}

// Alloc takes device memory, which Free gives back.
func (d *Device) Alloc(bytes int64) (uint64, error) {
	var address C.uint64_t
	err := failed(C.gq_cu_alloc(d.context, C.uint64_t(max(bytes, 1)), &address), "allocating %d bytes on CUDA device %d", bytes, d.Ordinal)
	return uint64(address), err
}

// Free gives device memory back.
func (d *Device) Free(address uint64) error {
	if address == 0 {
		return nil
	}
	return failed(C.gq_cu_free(d.context, C.uint64_t(address)), "freeing memory of CUDA device %d", d.Ordinal)
}

// joinFree frees memory after an error, which it returns.
func joinFree(err error, d *Device, address uint64) error {
	if problem := d.Free(address); problem != nil {
		return fmt.Errorf("%w; then %w", err, problem)
	}
	return err
}

// Checking says whether GQUANT_CHECK=1 asks for a look at every address.
var Checking = sync.OnceValue(func() bool { return os.Getenv("GQUANT_CHECK") == "1" })

// BadAddress is an address that is no memory of the device.
type BadAddress struct{ error }

// CheckAddress says what is wrong with an address that should be memory of the device: a BadAddress, or what the driver answered.
func (d *Device) CheckAddress(name string, address uint64) error {
	var what *C.char
	var other C.int
	switch result := C.gq_cu_is_on_device(d.context, C.uint64_t(address), C.int(d.Ordinal), &what, &other); {
	case result == 1:
		return nil
	case result < 0:
		return failed(-result, "asking what %s, address %#x, is on CUDA device %d", name, address, d.Ordinal)
	case other >= 0:
		return BadAddress{fmt.Errorf("%s: %#x is memory of CUDA device %d, not of device %d", name, address, int(other), d.Ordinal)}
	default:
		return BadAddress{fmt.Errorf("%s: %#x is %s, not memory of CUDA device %d", name, address, C.GoString(what), d.Ordinal)}
	}
}
