package checkpoint

import (
	"bytes"
	"encoding/json"
	"fmt"
	"sort"
	"strings"

	"github.com/gquant/gquant/core/quant"
)

// ComfyUI describes a quantized layer L (the weight's name without ".weight") by a JSON object, either in a
// U8 tensor "L.comfy_quant" or in the file header's metadata entry "_quantization_metadata", which is
// {"format_version": "1.0", "layers": {L: object}}; where both exist ComfyUI lets the header win, so they are
// always written equal. ComfyUI reads "format"; the other fields are those that convert_to_quant's roadmap
// gives 4-bit layers. (ComfyUI 0.33 comfy/utils.py convert_old_quants)
const (
	comfy            = "comfy"
	comfyMetadataKey = "_quantization_metadata"
	comfyVersion     = "1.0"
)

// comfyLayer has the fields in the order they are written.
type comfyLayer struct {
	Format        string    `json:"format"`
	Type          string    `json:"type"`
	BlockSize     int       `json:"block_size"`
	DoubleQuant   bool      `json:"double_quant"`
	QuantMap      []float64 `json:"quant_map"`
	AbsmaxShape   []int64   `json:"absmax_shape"`
	OriginalDType string    `json:"original_dtype"`
	OriginalShape []int64   `json:"original_shape"`

	NestedBlockSize int      `json:"nested_block_size,omitempty"`
	NestedOffset    *float64 `json:"nested_offset,omitempty"`
	NestedAbsmax    string   `json:"nested_absmax,omitempty"`
}

// ComfyModule is the name ComfyUI knows a weight's layer by.
func ComfyModule(weight string) string { return strings.TrimSuffix(weight, ".weight") }

func comfyName(weight string) string { return ComfyModule(weight) + "." + string(ComfyQuant) }

// ComfyJSON is ComfyUI's description of a layer.
func ComfyJSON(weight string, s *quant.State) []byte {
	c := comfyLayer{
		Format:        "bnb_" + s.Format.Name,
		Type:          s.Format.Name,
		BlockSize:     s.Blocksize,
		DoubleQuant:   s.Nested != nil,
		QuantMap:      widen(s.Format.Codebook),
		AbsmaxShape:   []int64{s.Blocks()},
		OriginalDType: s.DType.Torch(),
		OriginalShape: s.Shape,
	}
	if n := s.Nested; n != nil {
		offset := float64(n.Offset)
		c.NestedBlockSize = n.Blocksize
		c.NestedOffset = finite(offset)
		c.NestedAbsmax = weight + "." + string(NestedAbsmax)
	}
	return encodeJSON(c)
}

// finite leaves out what JSON cannot hold: the offset of a layer that is all NaN or Inf.
func finite(v float64) *float64 {
	if v-v != 0 {
		return nil
	}
	return &v
}

func widen(values []float32) []float64 {
	wide := make([]float64, len(values))
	for i, v := range values {
		wide[i] = float64(v)
	}
	return wide
}

// encodeJSON writes v without the escapes meant for HTML, which ComfyUI's readers do not need.
func encodeJSON(v any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		panic("checkpoint: " + err.Error()) // only plain structs and raw JSON come here
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// ComfyMetadata is the model's header metadata for ComfyUI: layer descriptions by module name.
type ComfyMetadata map[string]json.RawMessage

// ParseComfyMetadata reads the entry of a header's metadata; nil if there is none.
func ParseComfyMetadata(metadata map[string]string) (ComfyMetadata, error) {
	text, ok := metadata[comfyMetadataKey]
	if !ok {
		return nil, nil
	}
	var document struct {
		Layers ComfyMetadata `json:"layers"`
	}
	if err := json.Unmarshal([]byte(text), &document); err != nil {
		return nil, fmt.Errorf("header metadata %s: %w", comfyMetadataKey, err)
	}
	if document.Layers == nil {
		document.Layers = ComfyMetadata{}
	}
	return document.Layers, nil
}

// Add describes a layer.
func (c ComfyMetadata) Add(weight string, s *quant.State) {
	c[ComfyModule(weight)] = ComfyJSON(weight, s)
}

// Apply returns a copy of a header's metadata with c as its entry for ComfyUI; without the entry if c is empty.
func (c ComfyMetadata) Apply(metadata map[string]string) map[string]string {
	out := map[string]string{}
	for k, v := range metadata {
		if k != comfyMetadataKey {
			out[k] = v
		}
	}
	if len(c) > 0 {
		// encoding/json sorts map keys, so equal layers give equal bytes.
		out[comfyMetadataKey] = string(encodeJSON(struct {
			Version string        `json:"format_version"`
			Layers  ComfyMetadata `json:"layers"`
		}{comfyVersion, c}))
	}
	return out
}

// CheckComfy compares what a model says to ComfyUI, in its headers and in .comfy_quant tensors, with its
// layers. It reports every difference; a model without such descriptions has none.
func (m *Model) CheckComfy() []error {
	var problems []error
	described := ComfyMetadata{}
	for _, f := range m.Files() {
		c, err := ParseComfyMetadata(f.Header().Metadata)
		if err != nil {
			problems = append(problems, fmt.Errorf("%s: %w", f.Path(), err))
		}
		for module, object := range c {
			described[module] = object
		}
	}
	for _, l := range m.Layers {
		header, inHeader := described[ComfyModule(l.Name)]
		delete(described, ComfyModule(l.Name))
		texts := map[string][]byte{}
		if inHeader {
			texts["header metadata "+comfyMetadataKey] = header
		}
		if e, ok := l.Parts[ComfyQuant]; ok {
			text := make([]byte, e.Bytes())
			if err := e.Read(text, 0); err != nil {
				problems = append(problems, err)
				continue
			}
			texts[fmt.Sprintf("tensor %q", e.Name)] = text
		}
		for where, text := range texts {
			if err := agrees(text, l); err != nil {
				problems = append(problems, fmt.Errorf("%s: layer %q: %w", where, l.Name, err))
			}
		}
	}
	var orphans []string
	for module, object := range described {
		var c comfyLayer
		// Descriptions of other formats (float8_e4m3fn, …) belong to layers that are plain tensors here.
		if json.Unmarshal(object, &c) == nil && strings.HasPrefix(c.Format, "bnb_") {
			orphans = append(orphans, module)
		}
	}
	sort.Strings(orphans)
	for _, module := range orphans {
		problems = append(problems, fmt.Errorf("header metadata %s describes layer %q, which the model does not have", comfyMetadataKey, module))
	}
	return problems
}

// agrees says whether a description fits the layer's own state. Fields that it leaves out are not compared.
func agrees(text []byte, l *Layer) error {
	var got comfyLayer
	if err := json.Unmarshal(text, &got); err != nil {
		return err
	}
	var want comfyLayer
	if err := json.Unmarshal(ComfyJSON(l.Name, &l.State), &want); err != nil {
		return err
	}
	switch {
	case got.Format != want.Format:
		return fmt.Errorf("format is %q, the layer's quant_state says %q", got.Format, want.Format)
	case got.BlockSize != 0 && got.BlockSize != want.BlockSize:
		return fmt.Errorf("block_size is %d, the layer's quant_state says %d", got.BlockSize, want.BlockSize)
	case got.Type != "" && (got.Type != want.Type || got.DoubleQuant != want.DoubleQuant):
		return fmt.Errorf("type %q with double_quant %t, the layer has %q with %t", got.Type, got.DoubleQuant, want.Type, want.DoubleQuant)
	case got.OriginalDType != "" && got.OriginalDType != want.OriginalDType:
		return fmt.Errorf("original_dtype is %q, the layer's quant_state says %q", got.OriginalDType, want.OriginalDType)
	case got.NestedOffset != nil && want.NestedOffset != nil && *got.NestedOffset != *want.NestedOffset:
		return fmt.Errorf("nested_offset is %v, the layer's quant_state says %v", *got.NestedOffset, *want.NestedOffset)
	}
	return nil
}
