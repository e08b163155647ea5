package quant

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/gquant/gquant/core/dtype"
)

// The text that bitsandbytes stores beside 4-bit codes, for example
//
//	{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [96, 128], "nested_blocksize": 256,
//	 "nested_dtype": "float32", "nested_offset": 0.08708445727825165}
//
// in one line; the last three only when the statistics are nested. (functional.py QuantState.as_dict, written by
// Python's json.dumps)

// JSON is the state's text, byte for byte what Python writes.
func (s *State) JSON() []byte {
	b := fmt.Appendf(nil, `{"quant_type": "%s", "blocksize": %d, "dtype": "%s", "shape": `, s.Format.Name, s.Blocksize, s.DType.Torch())
	if s.Shape == nil {
		b = append(b, "null"...)
	} else {
		b = append(b, '[')
		for i, dim := range s.Shape {
			if i > 0 {
				b = append(b, ", "...)
			}
			b = strconv.AppendInt(b, dim, 10)
		}
		b = append(b, ']')
	}
	if n := s.Nested; n != nil {
		b = fmt.Appendf(b, `, "nested_blocksize": %d, "nested_dtype": "%s", "nested_offset": `, n.Blocksize, n.DType.Torch())
		b = appendPythonFloat(b, float64(n.Offset))
	}
	return append(b, '}')
}

// appendPythonFloat writes f as Python's json.dumps does: the shortest digits that read back as f, with an exponent
// of two digits or more below 1e-4 and from 1e16 on.
func appendPythonFloat(b []byte, f float64) []byte {
	switch {
	case f != f:
		return append(b, "NaN"...)
	case math.IsInf(f, 1):
		return append(b, "Infinity"...)
	case math.IsInf(f, -1):
		return append(b, "-Infinity"...)
	}
	if magnitude := math.Abs(f); magnitude != 0 && (magnitude < 1e-4 || magnitude >= 1e16) {
		return strconv.AppendFloat(b, f, 'e', -1, 64)
	}
	text := strconv.FormatFloat(f, 'f', -1, 64)
	b = append(b, text...)
	if !strings.Contains(text, ".") {
		b = append(b, ".0"...)
	}
	return b
}

// ParseJSON reads the text of a state. The result has no tensors. Keys that bitsandbytes does not write, missing
// keys, keys that occur twice and values it could not have written are errors.
func ParseJSON(text []byte) (*State, error) {
	s, err := parseJSON(text)
	if err != nil {
		return nil, fmt.Errorf("quant_state: %w", err)
	}
	return s, nil
}

func parseJSON(text []byte) (*State, error) {
	fields, err := parseObject(text)
	if err != nil {
		return nil, err
	}
	s := &State{}
	if s.Format, err = fields.format("quant_type"); err != nil {
		return nil, err
	}
	s.Codebook = s.Format.Codebook
	if s.Blocksize, err = fields.blocksize("blocksize"); err != nil {
		return nil, err
	}
	if s.DType, err = fields.dtype("dtype"); err != nil {
		return nil, err
	}
	if s.Shape, err = fields.shape("shape"); err != nil {
		return nil, err
	}
	if fields.has("nested_blocksize") || fields.has("nested_dtype") || fields.has("nested_offset") {
		n := &Nested{}
		if n.Blocksize, err = fields.blocksize("nested_blocksize"); err != nil {
			return nil, err
		}
		if n.DType, err = fields.dtype("nested_dtype"); err != nil {
			return nil, err
		}
		if n.DType != dtype.F32 {
			return nil, fmt.Errorf("nested_dtype is %q; only \"float32\" is known", n.DType.Torch())
		}
		if n.Offset, err = fields.offset("nested_offset"); err != nil {
			return nil, err
		}
		s.Nested = n
	}
	for key := range fields {
		if !slices.Contains(stateKeys, key) {
			return nil, fmt.Errorf("unknown key %q", key)
		}
	}
	return s, nil
}

var stateKeys = []string{"quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"}

// fields are the members of a JSON object: the text of each value.
type fields map[string]string

func (f fields) has(key string) bool { _, ok := f[key]; return ok }

func (f fields) text(key string) (string, error) {
	if !f.has(key) {
		return "", fmt.Errorf("key %q is missing", key)
	}
	var value any
	json.Unmarshal([]byte(f[key]), &value)
	if s, ok := value.(string); ok {
		return s, nil
	}
	return "", fmt.Errorf("%s is %s; want a string", key, f[key])
}

func (f fields) format(key string) (*Format, error) {
	name, err := f.text(key)
	if err != nil {
		return nil, err
	}
	if format, err := Lookup(name); err == nil && format.Bits == 4 {
		return format, nil
	}
	return nil, fmt.Errorf("%s is %q; nf4 and fp4 are known", key, name)
}

func (f fields) dtype(key string) (dtype.DType, error) {
	name, err := f.text(key)
	if err != nil {
		return 0, err
	}
	switch d, _ := dtype.FromTorch(name); d {
	case dtype.F32, dtype.F16, dtype.BF16:
		return d, nil
	}
	return 0, fmt.Errorf("%s is %q; float32, float16 and bfloat16 are known", key, name)
}

func (f fields) blocksize(key string) (int, error) {
	if !f.has(key) {
		return 0, fmt.Errorf("key %q is missing", key)
	}
	n, err := strconv.Atoi(f[key])
	if err != nil || !slices.Contains(Blocksizes(), n) {
		return 0, fmt.Errorf("%s is %s; want one of %v", key, f[key], Blocksizes())
	}
	return n, nil
}

func (f fields) shape(key string) ([]int64, error) {
	if !f.has(key) {
		return nil, fmt.Errorf("key %q is missing", key)
	}
	var shape []int64
	if err := json.Unmarshal([]byte(f[key]), &shape); err != nil {
		return nil, fmt.Errorf("%s is %s; want a list of integers or null", key, f[key])
	}
	if strings.Contains(f[key], "null") && f[key] != "null" { // encoding/json reads [null] as [0]
		return nil, fmt.Errorf("%s is %s; want a list of integers or null", key, f[key])
	}
	if _, err := elements(shape); err != nil {
		return nil, err
	}
	return shape, nil
}

// offset is a number, or what Python writes for those that JSON does not have.
func (f fields) offset(key string) (float32, error) {
	if !f.has(key) {
		return 0, fmt.Errorf("key %q is missing", key)
	}
	switch f[key] {
	case "NaN":
		return float32(math.NaN()), nil
	case "Infinity":
		return float32(math.Inf(1)), nil
	case "-Infinity":
		return float32(math.Inf(-1)), nil
	}
	var value any
	json.Unmarshal([]byte(f[key]), &value)
	if v, ok := value.(float64); ok && math.Abs(v) <= math.MaxFloat32 {
		return float32(v), nil
	}
	return 0, fmt.Errorf("%s is %s; want a float32 number", key, f[key])
}

// parseObject splits a JSON object into the texts of its members. encoding/json would not do: it lets keys occur twice and
// does not know Python's NaN and Infinity. It judges each value, though.
func parseObject(text []byte) (fields, error) {
	if !utf8.Valid(text) {
		return nil, errors.New("not UTF-8")
	}
	p := &scanner{text: string(text)}
	members := fields{}
	if !p.next('{') {
		return nil, p.unexpected("an object")
	}
	for more := !p.next('}'); more; {
		raw, err := p.value()
		if err != nil {
			return nil, err
		}
		var key string
		if raw[0] != '"' || json.Unmarshal([]byte(raw), &key) != nil {
			return nil, fmt.Errorf("%s stands where a key belongs", raw)
		}
		if members.has(key) {
			return nil, fmt.Errorf("key %q occurs twice", key)
		}
		if !p.next(':') {
			return nil, p.unexpected("a colon")
		}
		if members[key], err = p.value(); err != nil {
			return nil, err
		}
		if more = p.next(','); !more && !p.next('}') {
			return nil, p.unexpected("a comma or the end of the object")
		}
	}
	if p.space(); p.at < len(p.text) {
		return nil, p.unexpected("the end of the text")
	}
	return members, nil
}

// scanner walks through the text of a flat object.
type scanner struct {
	text string
	at   int
}

func (p *scanner) space() {
	for p.at < len(p.text) && strings.IndexByte(" \t\r\n", p.text[p.at]) >= 0 {
		p.at++
	}
}

// next steps over c if it comes next.
func (p *scanner) next(c byte) bool {
	if p.space(); p.at == len(p.text) || p.text[p.at] != c {
		return false
	}
	p.at++
	return true
}

// value takes a string, a number, a list without lists in it, or a word.
func (p *scanner) value() (string, error) {
	p.space()
	start, rest := p.at, p.text[p.at:]
	length := 0
	switch {
	case strings.HasPrefix(rest, `"`):
		for length = 1; length < len(rest) && rest[length] != '"'; length++ {
			if rest[length] == '\\' {
				length++
			}
		}
		length = min(length+1, len(rest))
	case strings.HasPrefix(rest, "["):
		length = strings.IndexByte(rest, ']') + 1
	default:
		if length = strings.IndexAny(rest, ",:}] \t\r\n"); length < 0 {
			length = len(rest)
		}
	}
	raw := rest[:length]
	if !json.Valid([]byte(raw)) && raw != "NaN" && raw != "Infinity" && raw != "-Infinity" {
		return "", p.unexpected("a value")
	}
	p.at = start + length
	return raw, nil
}

func (p *scanner) unexpected(want string) error {
	if p.at >= len(p.text) {
		return fmt.Errorf("the text ends where %s is expected", want)
	}
	return fmt.Errorf("%q at byte %d, where %s is expected", p.text[p.at:min(p.at+20, len(p.text))], p.at, want)
}
