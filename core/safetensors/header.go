package safetensors

import (
	"cmp"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/gquant/gquant/core/dtype"
)

const (
	// maxHeader is the Rust library's limit on a header, for reading and for writing.
	maxHeader = 100_000_000
	// maxEntries bounds the tensors and metadata keys of one header, so that 100 MB of JSON cannot make gigabytes
	// of maps.
	maxEntries = 4 << 20

	metadataKey = "__metadata__"
)

// Header is a checked header. It is read-only and shares no memory with the bytes it was parsed from.
type Header struct {
	// Tensors in the order of their data: by (Begin, End), equal ranges (empty tensors) as listed in the JSON.
	Tensors []Tensor
	// Metadata is the "__metadata__" object; nil if the header has none.
	Metadata map[string]string

	index map[string]int // name → place in Tensors
}

// Find returns the tensor of that name, or nil.
func (h *Header) Find(name string) *Tensor {
	if i, ok := h.index[name]; ok {
		return &h.Tensors[i]
	}
	return nil
}

// ParseHeader parses the JSON of a header, without its length prefix, for a file whose data section has dataBytes
// bytes. Errors about its content are of type *FormatError.
func ParseHeader(b []byte, dataBytes uint64) (*Header, error) {
	return parseHeader(b, dataBytes, walkDefault)
}

func parseHeader(b []byte, dataBytes uint64, walk walker) (*Header, error) {
	if len(b) > maxHeader {
		return nil, problem("the header has %d bytes, expected at most %d", len(b), maxHeader)
	}
	if dataBytes > math.MaxInt64 {
		return nil, problem("the data section has %d bytes, more than a file can have", dataBytes)
	}
	p := headerParser{dataBytes: dataBytes, header: &Header{index: map[string]int{}}}
	if err := walkJSON(b, walk, &p); err != nil {
		return nil, err
	}
	if err := p.header.arrange(dataBytes); err != nil {
		return nil, err
	}
	return p.header, nil
}

// place is where in a header's grammar the parser stands: what the next token belongs to.
type place uint8

const (
	inFile place = iota
	inHeader
	atMetadata
	inMetadata
	atMetadataValue
	atTensor
	inTensor
	atDType
	atShape
	inShape
	atOffsets
	inOffsets
)

// Bits of headerParser.fields.
const (
	hasDType = 1 << iota
	hasShape
	hasOffsets
)

// headerParser is the state machine that turns tokens into a Header. The grammar is so small that each place
// allows one or two kinds of token.
type headerParser struct {
	header    *Header
	dataBytes uint64

	place   place
	name    string // of the tensor being read
	metaKey string // of the metadata value being read
	fields  uint8  // which fields the tensor has so far
	dtype   dtype.DType
	shape   []int64
	offsets []uint64
}

func (p *headerParser) token(k kind, s string) error {
	switch {
	case p.place == inFile && k == objectBegin:
		p.place = inHeader
	case p.place == inHeader && k == key:
		return p.openEntry(s)
	case p.place == inHeader && k == objectEnd: // the last token: nothing can follow it in valid JSON

	case p.place == atMetadata && k == objectBegin:
		p.header.Metadata = map[string]string{}
		p.place = inMetadata
	case p.place == inMetadata && k == key:
		return p.openMetadata(s)
	case p.place == atMetadataValue && k == text:
		p.header.Metadata[p.metaKey] = strings.Clone(s)
		p.place = inMetadata
	case p.place == inMetadata && k == objectEnd:
		p.place = inHeader

	case p.place == atTensor && k == objectBegin:
		p.fields, p.shape, p.offsets = 0, []int64{}, p.offsets[:0]
		p.place = inTensor
	case p.place == inTensor && k == key:
		return p.openField(s)
	case p.place == atDType && k == text:
		d, err := dtype.Parse(s)
		if err != nil {
			return p.wrong("dtype", "%s is not a dtype of the format", quote(s))
		}
		p.dtype = d
		p.place = inTensor
	case p.place == atShape && k == arrayBegin:
		p.place = inShape
	case p.place == inShape && k == number:
		return p.addDim(s)
	case p.place == atOffsets && k == arrayBegin:
		p.place = inOffsets
	case p.place == inOffsets && k == number:
		return p.addOffset(s)
	case (p.place == inShape || p.place == inOffsets) && k == arrayEnd:
		p.place = inTensor
	case p.place == inTensor && k == objectEnd:
		return p.closeTensor()

	default:
		return p.unexpected(k, s)
	}
	return nil
}

// wrong is an error about a field of the current tensor, or with field "" about the tensor as a whole.
func (p *headerParser) wrong(field, format string, args ...any) error {
	e := problem(format, args...)
	e.Tensor, e.Field = p.name, field
	return e
}

// unexpected is the error for a token of the wrong kind.
func (p *headerParser) unexpected(k kind, s string) error {
	got := k.String()
	switch k {
	case text:
		got = "the string " + quote(s)
	case number:
		got = "the number " + quote(s)
	}
	switch p.place {
	case atMetadata:
		return problem("%s is %s, expected an object", metadataKey, got)
	case atMetadataValue:
		return problem("%s: the value of %s is %s, expected a string", metadataKey, quote(p.metaKey), got)
	case atDType:
		return p.wrong("dtype", "got %s, expected a string", got)
	case atShape:
		return p.wrong("shape", "got %s, expected an array", got)
	case inShape:
		return p.wrong("shape", "dimension %d is %s, expected a whole number", len(p.shape), got)
	case atOffsets:
		return p.wrong("data_offsets", "got %s, expected an array", got)
	case inOffsets:
		return p.wrong("data_offsets", "element %d is %s, expected a whole number", len(p.offsets), got)
	}
	return problem("the value of %s is %s, expected an object with dtype, shape and data_offsets", quote(p.name), got)
}

func (p *headerParser) count() error {
	if len(p.header.Tensors)+len(p.header.Metadata) >= maxEntries {
		return problem("more than %d entries", maxEntries)
	}
	return nil
}

func (p *headerParser) openEntry(s string) error {
	if s == metadataKey {
		if p.header.Metadata != nil {
			return problem("%s occurs twice", metadataKey)
		}
		p.place = atMetadata
		return nil
	}
	if hasControl(s) {
		return problem("the tensor name %s has a control character", quote(s))
	}
	p.name = strings.Clone(s)
	if _, dup := p.header.index[p.name]; dup {
		return p.wrong("", "the name %s occurs twice", quote(p.name))
	}
	p.header.index[p.name] = len(p.header.Tensors)
	p.place = atTensor
	return p.count()
}

func (p *headerParser) openMetadata(s string) error {
	p.metaKey = strings.Clone(s)
	if _, dup := p.header.Metadata[p.metaKey]; dup {
		return problem("%s: the key %s occurs twice", metadataKey, quote(p.metaKey))
	}
	p.place = atMetadataValue
	return p.count()
}

func (p *headerParser) openField(s string) error {
	var field uint8
	switch s {
	case "dtype":
		field, p.place = hasDType, atDType
	case "shape":
		field, p.place = hasShape, atShape
	case "data_offsets":
		field, p.place = hasOffsets, atOffsets
	default:
		return p.wrong("", "unknown field %s, expected dtype, shape and data_offsets", quote(s))
	}
	if p.fields&field != 0 {
		return p.wrong(s, "the field occurs twice")
	}
	p.fields |= field
	return nil
}

func (p *headerParser) addDim(s string) error {
	n, ok := parseUint(s)
	switch {
	case !ok || n > maxDim:
		return p.wrong("shape", "dimension %d is %s, expected a whole number from 0 to 2^48", len(p.shape), quote(s))
	case len(p.shape) == maxRank:
		return p.wrong("shape", "more than %d dimensions", maxRank)
	}
	p.shape = append(p.shape, int64(n))
	return nil
}

func (p *headerParser) addOffset(s string) error {
	n, ok := parseUint(s)
	switch {
	case !ok:
		return p.wrong("data_offsets", "element %d is %s, expected a whole number below 2^64", len(p.offsets), quote(s))
	case len(p.offsets) == 2:
		return p.wrong("data_offsets", "more than 2 elements, expected [begin, end]")
	}
	p.offsets = append(p.offsets, n)
	return nil
}

// parseUint reads digits; no sign, fraction or exponent.
func parseUint(s string) (uint64, bool) {
	n, err := strconv.ParseUint(s, 10, 64)
	return n, err == nil
}

func (p *headerParser) closeTensor() error {
	switch missing := ^p.fields; {
	case missing&hasDType != 0:
		return p.wrong("dtype", "the field is missing")
	case missing&hasShape != 0:
		return p.wrong("shape", "the field is missing")
	case missing&hasOffsets != 0:
		return p.wrong("data_offsets", "the field is missing")
	case len(p.offsets) != 2:
		return p.wrong("data_offsets", "%d elements, expected [begin, end]", len(p.offsets))
	}
	begin, end := p.offsets[0], p.offsets[1]
	if begin > end {
		return p.wrong("data_offsets", "begin %d is after end %d", begin, end)
	}
	if end > p.dataBytes {
		return p.wrong("data_offsets", "the tensor ends at byte %d, but the file has only %d bytes of data", end, p.dataBytes)
	}
	size, err := SizeOf(p.dtype, p.shape)
	if err != nil {
		return p.wrong("shape", "%s", err)
	}
	if end-begin != uint64(size) {
		return p.wrong("data_offsets", "[%d, %d] is %d bytes, but %s %v needs %d", begin, end, end-begin, p.dtype, p.shape, size)
	}
	p.header.Tensors = append(p.header.Tensors, Tensor{p.name, p.dtype, p.shape, int64(begin), int64(end)})
	p.place = inHeader
	return nil
}

// arrange sorts the tensors by their place in the data section and checks that they cover it exactly.
func (h *Header) arrange(dataBytes uint64) error {
	slices.SortStableFunc(h.Tensors, func(a, b Tensor) int {
		return cmp.Or(cmp.Compare(a.Begin, b.Begin), cmp.Compare(a.End, b.End))
	})
	end, last := int64(0), "the start of the data"
	for i := range h.Tensors {
		t := &h.Tensors[i]
		if t.Begin != end {
			what := "leaves a gap after"
			if t.Begin < end {
				what = "overlaps"
			}
			e := problem("begin is %d, expected %d: it %s %s", t.Begin, end, what, last)
			e.Tensor, e.Field = t.Name, "data_offsets"
			return e
		}
		end, last = t.End, quote(t.Name)
		h.index[t.Name] = i
	}
	if uint64(end) != dataBytes {
		return problem("the tensors need %d bytes, but the file has %d bytes of data", end, dataBytes)
	}
	return nil
}

// hasControl finds characters that must not reach C strings, terminals and file names by way of a tensor's name.
func hasControl(s string) bool { return strings.ContainsFunc(s, unicode.IsControl) }
