//go:build !nosonic

package safetensors

import (
	"encoding/json"
	"unsafe"

	"github.com/bytedance/sonic"
	"github.com/bytedance/sonic/ast"
)

var walkDefault walker = walkSonic

// walkSonic takes the tokens from sonic. Preorder alone stops after the first value and accepts any text behind
// it, so Valid comes first. Preorder compiles nothing at run time, unlike sonic's decoder for structs: for one
// header per file that would cost more than it saves, and decoders that keep the last of two equal keys are no
// use here.
func walkSonic(b []byte, v visitor) error {
	if !sonic.Valid(b) {
		return errSyntax
	}
	a := &sonicAdapter{v: v}
	err := ast.Preorder(unsafe.String(unsafe.SliceData(b), len(b)), a, &ast.VisitorOptions{OnlyNumber: true})
	if err != nil && err != a.err {
		return errSyntax
	}
	return err
}

// sonicAdapter turns sonic's callbacks into tokens and remembers the visitor's error, to tell it from sonic's own.
type sonicAdapter struct {
	v   visitor
	err error
}

func (a *sonicAdapter) token(k kind, s string) error {
	a.err = a.v.token(k, s)
	return a.err
}

func (a *sonicAdapter) OnNull() error                            { return a.token(literal, "") }
func (a *sonicAdapter) OnBool(bool) error                        { return a.token(literal, "") }
func (a *sonicAdapter) OnString(s string) error                  { return a.token(text, s) }
func (a *sonicAdapter) OnInt64(_ int64, n json.Number) error     { return a.token(number, string(n)) }
func (a *sonicAdapter) OnFloat64(_ float64, n json.Number) error { return a.token(number, string(n)) }
func (a *sonicAdapter) OnObjectBegin(int) error                  { return a.token(objectBegin, "") }
func (a *sonicAdapter) OnObjectKey(s string) error               { return a.token(key, s) }
func (a *sonicAdapter) OnObjectEnd() error                       { return a.token(objectEnd, "") }
func (a *sonicAdapter) OnArrayBegin(int) error                   { return a.token(arrayBegin, "") }
func (a *sonicAdapter) OnArrayEnd() error                        { return a.token(arrayEnd, "") }
