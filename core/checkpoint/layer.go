package checkpoint

import (
	"fmt"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/quant"
	"github.com/gquant/gquant/core/safetensors"
)

// Part is the role of one tensor of a quantized layer. Its text is the suffix that bitsandbytes gives the tensor.
type Part string

// The parts of a layer. Every layer has Packed; the others depend on its format and convention.
const (
	Packed         Part = ""                 // the codes
	Absmax         Part = "absmax"           // F32 per block, or U8 codes when nested
	QuantMap       Part = "quant_map"        // F32 [16], informational: decoding uses the format's own constants
	NestedAbsmax   Part = "nested_absmax"    // F32 per 256 absmax codes
	NestedQuantMap Part = "nested_quant_map" // F32 [256]
	QuantState     Part = "quant_state"      // U8 text: bitsandbytes' JSON
	RowAbsmax      Part = "SCB"              // F32 per row (LLM.int8)
	WeightFormat   Part = "weight_format"    // U8 [] = 0 (LLM.int8, row-major)
	ComfyQuant     Part = "comfy_quant"      // U8 text: ComfyUI's JSON
)

// Layer is one quantized tensor of an opened model: what the file says of it and where its parts are.
type Layer struct {
	Name       string      // the tensor it stands for, such as "blocks.0.attn.q.weight"
	Convention string      // how its parts are named: "bitsandbytes" or "gptqmodel"
	State      quant.State // shape, format, blocksize and source dtype; no tensors (see Load)
	Nested     bool        // absmax is itself quantized
	Parts      map[Part]safetensors.Entry
}

// Bytes is the size of all parts together.
func (l *Layer) Bytes() int64 {
	var n int64
	for _, e := range l.Parts {
		n += e.Bytes()
	}
	return n
}

// Load reads the statistics of the layer (everything but the codes) and checks that they fit together.
// The result's Packed is nil: a reader streams the codes with ReadPacked.
func (l *Layer) Load() (*quant.State, error) {
	s := l.State
	var err error
	if l.State.Format.Name == formatInt8 {
		s.Absmax, err = l.floats(RowAbsmax, s.Blocks())
		return &s, err
	}
	if _, ok := l.Parts[QuantMap]; ok {
		if s.Codebook, err = l.floats(QuantMap, 16); err != nil {
			return nil, err
		}
	}
	if !l.Nested {
		s.Absmax, err = l.floats(Absmax, s.Blocks())
		return &s, err
	}
	nested := *l.State.Nested
	nested.Codes = make([]byte, s.Blocks())
	if err := l.Parts[Absmax].Read(nested.Codes, 0); err != nil {
		return nil, err
	}
	groups := (s.Blocks() + int64(nested.Blocksize) - 1) / int64(nested.Blocksize)
	if nested.Absmax, err = l.floats(NestedAbsmax, groups); err != nil {
		return nil, err
	}
	// The stored map counts, not the one a writer would use today: builds of torch differ in its last bit.
	if _, ok := l.Parts[NestedQuantMap]; ok {
		if nested.Codebook, err = l.floats(NestedQuantMap, 256); err != nil {
			return nil, err
		}
	} else {
		m := quant.DynamicMap()
		nested.Codebook = m[:]
	}
	s.Nested = &nested
	return &s, nil
}

// ReadPacked fills p with codes from byte offset off of the packed data.
func (l *Layer) ReadPacked(p []byte, off int64) error { return l.Parts[Packed].Read(p, off) }

// check compares the parts' dtypes and sizes with the state, so that Load and ReadPacked find what they need.
func (l *Layer) check() error {
	s := &l.State
	packed := l.Parts[Packed]
	if s.Format.Name == formatInt8 {
		if err := l.checkPart(RowAbsmax, dtype.F32, s.Blocks()); err != nil {
			return err
		}
		return nil
	}
	switch packed.DType {
	case dtype.U8, dtype.I8, dtype.BF16, dtype.F16, dtype.F32:
	default:
		return fmt.Errorf("tensor %q has dtype %s; packed 4-bit codes are stored as U8, I8, BF16, F16 or F32", packed.Name, packed.DType)
	}
	// A storage type wider than a byte may leave padding behind the last code.
	if got, want := packed.Bytes(), s.PackedBytes(); got < want || got >= want+int64(packed.DType.Bits()/8) {
		return fmt.Errorf("tensor %q has %d bytes, but shape %v needs %d bytes of %s codes", packed.Name, got, s.Shape, want, s.Format.Name)
	}
	if _, ok := l.Parts[QuantMap]; ok {
		if err := l.checkPart(QuantMap, dtype.F32, 16); err != nil {
			return err
		}
	}
	if !l.Nested {
		if s.Nested != nil {
			return fmt.Errorf("layer %q has no %s tensor, but its quant_state is nested", l.Name, NestedAbsmax)
		}
		return l.checkPart(Absmax, dtype.F32, s.Blocks())
	}
	if err := l.checkPart(Absmax, dtype.U8, s.Blocks()); err != nil {
		return err
	}
	if s.Nested == nil {
		return fmt.Errorf("layer %q has quantized absmax, but its quant_state names no nested_offset and nested_blocksize", l.Name)
	}
	groups := (s.Blocks() + int64(s.Nested.Blocksize) - 1) / int64(s.Nested.Blocksize)
	if err := l.checkPart(NestedAbsmax, dtype.F32, groups); err != nil {
		return err
	}
	if _, ok := l.Parts[NestedQuantMap]; ok {
		return l.checkPart(NestedQuantMap, dtype.F32, 256)
	}
	return nil
}

func (l *Layer) checkPart(part Part, d dtype.DType, count int64) error {
	e, ok := l.Parts[part]
	if !ok {
		return fmt.Errorf("layer %q has no %s tensor", l.Name, part)
	}
	if e.DType != d || e.Elements() != count {
		return fmt.Errorf("tensor %q is %s %v, but the layer (shape %v, blocksize %d) needs %s with %d elements", e.Name, e.DType, e.Shape, l.State.Shape, l.State.Blocksize, d, count)
	}
	return nil
}

// floats reads an F32 part whole; check has seen its size.
func (l *Layer) floats(part Part, count int64) ([]float32, error) {
	raw := make([]byte, 4*count)
	if err := l.Parts[part].Read(raw, 0); err != nil {
		return nil, err
	}
	values := make([]float32, count)
	for i := range values {
		values[i] = dtype.GetF32(raw[4*i:], dtype.F32)
	}
	return values, nil
}
