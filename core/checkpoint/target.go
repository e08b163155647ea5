package checkpoint

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/quant"
	"github.com/gquant/gquant/core/safetensors"
)

// Target says how layers are quantized and named in a file that is being written.
type Target struct {
	Format     *quant.Format
	Blocksize  int         // elements per absmax
	Nested     bool        // quantize absmax too
	Storage    dtype.DType // dtype that the packed codes are labelled with: U8, I8, BF16, F16 or F32
	Convention string      // "bitsandbytes", or "comfy" for .comfy_quant tensors as well
}

// Conventions lists the values of Target.Convention.
func Conventions() []string { return []string{bitsandbytes, comfy} }

// Storages maps the names that users give storage dtypes to Target.Storage.
var Storages = map[string]dtype.DType{
	"uint8": dtype.U8, "int8": dtype.I8, "bf16": dtype.BF16, "f16": dtype.F16, "f32": dtype.F32,
}

// Output is one tensor of a layer to be written.
type Output struct {
	Part Part
	Spec safetensors.Spec
}

// Longest describes the layer to be, without tensors. Its texts are the longest that the finished layer can have.
func (t Target) Longest(shape []int64, source dtype.DType) *quant.State {
	s := &quant.State{Format: t.Format, Shape: shape, Blocksize: t.Blocksize, DType: source}
	if t.Nested {
		s.Nested = &quant.Nested{Blocksize: quant.NestedBlocksize, DType: dtype.F32, Offset: longestOffset}
	}
	return s
}

// longestOffset is a float32 whose decimal forms are as long as any: 17 digits and sign, with an exponent of two
// digits in Python's JSON, and with six leading zeros in ours, which has no exponent down to 1e-6.
const longestOffset = -1.0000001111620804e-06

// Outputs lists the tensors that the weight becomes. Texts are Late: they may end shorter than their Spec says.
func (t Target) Outputs(weight string, shape []int64, source dtype.DType) []Output {
	s := t.Longest(shape, source)
	item := int64(t.Storage.Bits() / 8)
	spec := func(part Part, name string, d dtype.DType, shape ...int64) Output {
		return Output{part, safetensors.Spec{Name: name, DType: d, Shape: shape}}
	}
	own := func(part Part, d dtype.DType, shape ...int64) Output {
		return spec(part, weight+"."+string(part), d, shape...)
	}
	outputs := []Output{spec(Packed, weight, t.Storage, (s.PackedBytes()+item-1)/item, 1)}
	if t.Nested {
		groups := (s.Blocks() + quant.NestedBlocksize - 1) / quant.NestedBlocksize
		outputs = append(outputs, own(Absmax, dtype.U8, s.Blocks()), own(NestedAbsmax, dtype.F32, groups), own(NestedQuantMap, dtype.F32, 256))
	} else {
		outputs = append(outputs, own(Absmax, dtype.F32, s.Blocks()))
	}
	outputs = append(outputs, own(QuantMap, dtype.F32, 16))
	text := spec(QuantState, weight+stateMarker+t.Format.Name, dtype.U8, int64(len(s.JSON())))
	text.Spec.Late = t.Nested
	outputs = append(outputs, text)
	if t.Convention == comfy {
		text := spec(ComfyQuant, comfyName(weight), dtype.U8, int64(len(ComfyJSON(weight, s))))
		text.Spec.Late = t.Nested
		outputs = append(outputs, text)
	}
	return outputs
}

// Encode gives the bytes of one statistics part of a finished layer; not of Packed, which is streamed.
func Encode(part Part, weight string, s *quant.State) ([]byte, error) {
	switch part {
	case Absmax:
		if s.Nested != nil {
			return s.Nested.Codes, nil
		}
		return floatBytes(s.Absmax), nil
	case QuantMap:
		return floatBytes(s.Format.Codebook), nil
	case NestedAbsmax:
		return floatBytes(s.Nested.Absmax), nil
	case NestedQuantMap:
		return floatBytes(s.Nested.Codebook), nil
	case QuantState:
		return s.JSON(), nil
	case ComfyQuant:
		return ComfyJSON(weight, s), nil
	}
	return nil, fmt.Errorf("layer %q: no bytes for part %q", weight, part)
}

func floatBytes(values []float32) []byte {
	raw := make([]byte, 0, 4*len(values))
	for _, v := range values {
		raw = binary.LittleEndian.AppendUint32(raw, math.Float32bits(v))
	}
	return raw
}
