package safetensors

import (
	"bytes"
	"encoding/json"
	"io"
)

// walkStd takes the tokens from encoding/json. It is compiled into every build, because the tests compare the
// back ends with each other.
func walkStd(b []byte, v visitor) error {
	if !json.Valid(b) {
		return errSyntax
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	// Decoder.Token does not tell keys from strings. open holds, for each open container, '[' in an array and in
	// an object '{' where a key is next and ':' where its value is.
	var open []byte
	for {
		t, err := dec.Token()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return errSyntax
		}
		top := len(open) - 1
		if t == json.Delim('}') || t == json.Delim(']') {
			open = open[:top]
			end := objectEnd
			if t == json.Delim(']') {
				end = arrayEnd
			}
			if err := v.token(end, ""); err != nil {
				return err
			}
			continue
		}
		isKey := top >= 0 && open[top] == '{'
		if isKey {
			open[top] = ':'
		} else if top >= 0 && open[top] == ':' {
			open[top] = '{'
		}
		k, s := literal, ""
		switch t := t.(type) {
		case json.Delim:
			k = objectBegin
			if t == '[' {
				k = arrayBegin
			}
			open = append(open, byte(t))
		case string:
			k, s = text, t
			if isKey {
				k = key
			}
		case json.Number:
			k, s = number, string(t)
		}
		if err := v.token(k, s); err != nil {
			return err
		}
	}
}
