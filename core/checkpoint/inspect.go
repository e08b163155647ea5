package checkpoint

// Inspection is what a model holds, for people and programs.
type Inspection struct {
	Path     string            `json:"path"`
	Files    []string          `json:"files"`
	Metadata map[string]string `json:"metadata"`
	Layers   []InspectedLayer  `json:"layers"`
	Tensors  []InspectedTensor `json:"tensors"` // that belong to no layer
	Bytes    int64             `json:"bytes"`
}

// InspectedLayer is a quantized layer.
type InspectedLayer struct {
	Name       string  `json:"name"`
	Format     string  `json:"format"`
	Convention string  `json:"convention"`
	Shape      []int64 `json:"shape"`
	Blocksize  int     `json:"blocksize"`
	Nested     bool    `json:"nested"`
	DType      string  `json:"dtype"` // what it was quantized from
	Storage    string  `json:"storage"`
	Bytes      int64   `json:"bytes"`
}

// InspectedTensor is a tensor as stored.
type InspectedTensor struct {
	Name  string  `json:"name"`
	DType string  `json:"dtype"`
	Shape []int64 `json:"shape"`
	Bytes int64   `json:"bytes"`
}

// Inspect lists the model.
func (m *Model) Inspect() *Inspection {
	info := &Inspection{Path: m.Path(), Files: []string{}, Metadata: m.Metadata(), Layers: []InspectedLayer{}, Tensors: []InspectedTensor{}}
	for _, f := range m.Files() {
		info.Files = append(info.Files, f.Path())
	}
	for _, l := range m.Layers {
		s := &l.State
		info.Layers = append(info.Layers, InspectedLayer{l.Name, s.Format.Name, l.Convention, s.Shape, s.Blocksize, l.Nested, s.DType.String(), l.Parts[Packed].DType.String(), l.Bytes()})
		info.Bytes += l.Bytes()
	}
	for _, e := range m.Plain {
		info.Tensors = append(info.Tensors, InspectedTensor{e.Name, e.DType.String(), e.Shape, e.Bytes()})
		info.Bytes += e.Bytes()
	}
	return info
}
