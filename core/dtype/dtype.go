// Package dtype names the element types that a safetensors file can hold and converts their scalars.
//
// The 22 names, their widths and their order are those of the safetensors format; the order, called
// "increasing alignment" there, decides where a writer places a tensor. Numbers are little-endian.
package dtype

import "fmt"

// DType is one element type. The zero value is no type.
type DType uint8

// The types in safetensors' own order.
const (
	Bool DType = iota + 1
	F4
	F6E2M3
	F6E3M2
	U8
	I8
	F8E5M2
	F8E4M3
	F8E8M0
	F8E4M3FNUZ
	F8E5M2FNUZ
	I16
	U16
	F16
	BF16
	I32
	U32
	F32
	C64
	F64
	I64
	U64
)

// table holds, per type: the name in a safetensors header, the bits of one element, and the name that
// torch prints after "torch." ("" where torch has no such type).
var table = [...]struct {
	name  string
	bits  int
	torch string
}{
	Bool:       {"BOOL", 8, "bool"},
	F4:         {"F4", 4, "float4_e2m1fn_x2"},
	F6E2M3:     {"F6_E2M3", 6, ""},
	F6E3M2:     {"F6_E3M2", 6, ""},
	U8:         {"U8", 8, "uint8"},
	I8:         {"I8", 8, "int8"},
	F8E5M2:     {"F8_E5M2", 8, "float8_e5m2"},
	F8E4M3:     {"F8_E4M3", 8, "float8_e4m3fn"},
	F8E8M0:     {"F8_E8M0", 8, "float8_e8m0fnu"},
	F8E4M3FNUZ: {"F8_E4M3FNUZ", 8, "float8_e4m3fnuz"},
	F8E5M2FNUZ: {"F8_E5M2FNUZ", 8, "float8_e5m2fnuz"},
	I16:        {"I16", 16, "int16"},
	U16:        {"U16", 16, "uint16"},
	F16:        {"F16", 16, "float16"},
	BF16:       {"BF16", 16, "bfloat16"},
	I32:        {"I32", 32, "int32"},
	U32:        {"U32", 32, "uint32"},
	F32:        {"F32", 32, "float32"},
	C64:        {"C64", 64, "complex64"},
	F64:        {"F64", 64, "float64"},
	I64:        {"I64", 64, "int64"},
	U64:        {"U64", 64, "uint64"},
}

var byName, byTorch = index()

func index() (name, torch map[string]DType) {
	name, torch = map[string]DType{}, map[string]DType{}
	for d := Bool; d <= U64; d++ {
		name[table[d].name] = d
		if t := table[d].torch; t != "" {
			torch[t] = d
		}
	}
	return name, torch
}

// All lists the types in safetensors' order.
func All() []DType {
	all := make([]DType, 0, int(U64))
	for d := Bool; d <= U64; d++ {
		all = append(all, d)
	}
	return all
}

// Parse gives the type of a safetensors header name such as "BF16". Case matters.
func Parse(name string) (DType, error) {
	if d, ok := byName[name]; ok {
		return d, nil
	}
	return 0, fmt.Errorf("unknown dtype %q", name)
}

// FromTorch gives the type of a torch name without its "torch." prefix, such as "bfloat16".
func FromTorch(name string) (DType, error) {
	if d, ok := byTorch[name]; ok {
		return d, nil
	}
	return 0, fmt.Errorf("unknown torch dtype %q", name)
}

// String is the name in a safetensors header, such as "BF16".
func (d DType) String() string {
	if !d.Valid() {
		return fmt.Sprintf("dtype(%d)", uint8(d))
	}
	return table[d].name
}

// Torch is the name that torch gives the type, without "torch."; "" where it has none.
func (d DType) Torch() string {
	if !d.Valid() {
		return ""
	}
	return table[d].torch
}

// Valid says whether d is one of the 22 types.
func (d DType) Valid() bool { return d >= Bool && d <= U64 }

// Bits is the size of one element in bits: 4, 6, 8, 16, 32 or 64; 0 for an invalid type.
func (d DType) Bits() int {
	if !d.Valid() {
		return 0
	}
	return table[d].bits
}

// Float says whether the type holds real floating-point numbers (complex C64 is not one).
func (d DType) Float() bool {
	switch d {
	case F4, F6E2M3, F6E3M2, F8E5M2, F8E4M3, F8E8M0, F8E4M3FNUZ, F8E5M2FNUZ, F16, BF16, F32, F64:
		return true
	}
	return false
}
