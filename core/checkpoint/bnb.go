package checkpoint

import (
	"fmt"
	"strings"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/quant"
	"github.com/gquant/gquant/core/safetensors"
)

// bitsandbytes' names. Linear4bit writes, beside the codes in W = "<module>.weight", the tensors W.absmax,
// W.quant_map, W.nested_absmax, W.nested_quant_map and W.quant_state.bitsandbytes__nf4 (or __fp4);
// Linear8bitLt writes <module>.SCB and <module>.weight_format beside <module>.weight. GPTQModel stores the
// same tensors as module buffers, whose names cannot hold a dot: <module>.weight_absmax, …,
// <module>.weight_quant_state and <module>.weight_scb.
// (bitsandbytes 0.50 functional.py QuantState and nn/modules.py; gptqmodel nn_modules/qlinear/bitsandbytes.py)
const (
	bitsandbytes = "bitsandbytes"
	gptqmodel    = "gptqmodel"

	stateMarker     = ".quant_state.bitsandbytes__"
	gptqStateMarker = "weight_quant_state"
	gptqScaleMarker = "weight_scb"

	formatInt8 = "int8"
)

// detect reads the layer that the tensor marks, if it marks one: the state tensor of a 4-bit layer and the
// scale tensor of an 8-bit one are its markers.
func detect(set *safetensors.Set, marker safetensors.Entry) (*Layer, error) {
	name := marker.Name
	if weight, format, ok := strings.Cut(name, stateMarker); ok {
		return layer4bit(set, marker, bitsandbytes, weight, ".", format)
	}
	if module, ok := cutLast(name, gptqStateMarker); ok {
		return layer4bit(set, marker, gptqmodel, module+"weight", "_", "")
	}
	if module, ok := cutLast(name, string(RowAbsmax)); ok {
		return layer8bit(set, marker, bitsandbytes, module)
	}
	if module, ok := cutLast(name, gptqScaleMarker); ok {
		return layer8bit(set, marker, gptqmodel, module)
	}
	return nil, nil
}

// cutLast splits "a.b.last" into "a.b." when the last component is the given one.
func cutLast(name, last string) (module string, ok bool) {
	module, ok = strings.CutSuffix(name, last)
	return module, ok && (module == "" || strings.HasSuffix(module, "."))
}

func layer4bit(set *safetensors.Set, marker safetensors.Entry, convention, weight, separator, format string) (*Layer, error) {
	text := make([]byte, marker.Bytes())
	if err := marker.Read(text, 0); err != nil {
		return nil, err
	}
	state, err := quant.ParseJSON(text)
	if err != nil {
		return nil, fmt.Errorf("tensor %q: %w", marker.Name, err)
	}
	if format != "" && state.Format.Name != format {
		return nil, fmt.Errorf("tensor %q holds the state of format %q", marker.Name, state.Format.Name)
	}
	packed, ok := set.Find(weight)
	if !ok {
		return nil, fmt.Errorf("tensor %q describes a layer whose codes %q are missing", marker.Name, weight)
	}
	l := &Layer{Name: weight, Convention: convention, State: *state, Parts: map[Part]safetensors.Entry{Packed: packed, QuantState: marker}}
	if state.Shape == nil { // "shape": null; without a shape the layer is a row of all codes
		l.State.Shape = []int64{2 * packed.Bytes()}
	}
	for _, part := range []Part{Absmax, QuantMap, NestedAbsmax, NestedQuantMap} {
		if e, ok := set.Find(weight + separator + string(part)); ok {
			l.Parts[part] = e
		}
	}
	if e, ok := set.Find(comfyName(weight)); ok {
		l.Parts[ComfyQuant] = e
	}
	_, l.Nested = l.Parts[NestedAbsmax]
	return l, nil
}

func layer8bit(set *safetensors.Set, marker safetensors.Entry, convention, module string) (*Layer, error) {
	packed, ok := set.Find(module + "weight")
	if !ok {
		return nil, fmt.Errorf("tensor %q describes a layer whose codes %q are missing", marker.Name, module+"weight")
	}
	if packed.DType != dtype.I8 || len(packed.Shape) != 2 || packed.Shape[1] == 0 {
		return nil, fmt.Errorf("tensor %q is %s %v; the layer that %q describes needs a matrix of I8 codes", packed.Name, packed.DType, packed.Shape, marker.Name)
	}
	format, err := quant.Lookup(formatInt8)
	if err != nil {
		return nil, err
	}
	l := &Layer{
		Name:       packed.Name,
		Convention: convention,
		// bitsandbytes casts the weight to float16 before it quantizes the rows, whatever the weight was.
		State: quant.State{Format: format, Shape: packed.Shape, Blocksize: int(packed.Shape[1]), DType: dtype.F16},
		Parts: map[Part]safetensors.Entry{Packed: packed, RowAbsmax: marker},
	}
	if e, ok := set.Find(module + string(WeightFormat)); ok {
		l.Parts[WeightFormat] = e
		code := []byte{0}
		if e.Bytes() != 1 {
			return nil, fmt.Errorf("tensor %q is %s %v; want one byte", e.Name, e.DType, e.Shape)
		}
		if err := e.Read(code, 0); err != nil {
			return nil, err
		}
		if code[0] != 0 {
			return nil, fmt.Errorf("tensor %q is %d: only the row-major layout (0) can be read; col32, col_turing and col_ampere are of old bitsandbytes releases", e.Name, code[0])
		}
	}
	return l, nil
}
