package safetensors

import (
	"bytes"
	"encoding/json"
	"errors"
)

// kind is what a JSON token is.
type kind uint8

const (
	objectBegin kind = iota
	objectEnd
	arrayBegin
	arrayEnd
	key
	text
	number
	literal // true, false or null
)

func (k kind) String() string {
	return [...]string{"an object", "the end of an object", "an array", "the end of an array", "a key", "a string",
		"a number", "true, false or null"}[k]
}

// visitor receives the tokens of a JSON text in order. s is the decoded text of a key or string and the digits of
// a number as written; it may alias the input, so what is kept must be cloned. An error ends the walk.
type visitor interface {
	token(k kind, s string) error
}

// walker is a JSON back end: it checks that all of b is one JSON value and then calls v for each token. It
// returns v's error unchanged, or errSyntax. b has passed prescan.
type walker func(b []byte, v visitor) error

var errSyntax = errors.New("not JSON")

// walkJSON checks that b is one JSON object and hands its tokens to v.
func walkJSON(b []byte, walk walker, v visitor) error {
	if err := prescan(b); err != nil {
		return err
	}
	// Besides being right this keeps sonic inside b: it takes "n", "nu", "t" … for whole literals if the bytes
	// behind the slice complete them, which they can only in a text of one to three bytes (sonic 1.15.5).
	if first := bytes.TrimLeft(b, " \t\r\n"); len(first) == 0 || first[0] != '{' {
		return problem("not a JSON object")
	}
	err := walk(b, v)
	if err != errSyntax {
		return err
	}
	// Only encoding/json says where an error is, so it words the error whichever back end saw it.
	var raw json.RawMessage
	var syntax *json.SyntaxError
	if errors.As(json.Unmarshal(b, &raw), &syntax) {
		return problemAt(int(syntax.Offset), "not valid JSON: %s", syntax)
	}
	return problem("not valid JSON")
}
