package quant

import (
	"math"
	"strings"
	"testing"

	"github.com/gquant/gquant/core/dtype"
)

func TestJSON(t *testing.T) {
	s := &State{Format: &nf4, Shape: []int64{96, 128}, Blocksize: 64, DType: dtype.BF16}
	if got, want := string(s.JSON()), `{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [96, 128]}`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	s.Shape, s.Nested = nil, &Nested{Blocksize: 256, DType: dtype.F32, Offset: 0.08708445727825165}
	want := `{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": null, "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.08708445727825165}`
	if got := string(s.JSON()); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// What Python 3.11's json.dumps(float(x)) gives.
func TestPythonFloats(t *testing.T) {
	for _, c := range []struct {
		value float64
		want  string
	}{
		{0, "0.0"}, {math.Copysign(0, -1), "-0.0"}, {1, "1.0"}, {-1, "-1.0"}, {100, "100.0"}, {0.1, "0.1"},
		{float64(float32(0.1)), "0.10000000149011612"},
		{1e15, "1000000000000000.0"}, {9999999999999998, "9999999999999998.0"}, {1e16, "1e+16"}, {12345678901234567890, "1.2345678901234567e+19"},
		{1e-4, "0.0001"}, {0.00012345, "0.00012345"}, {9.999e-5, "9.999e-05"}, {1e-5, "1e-05"}, {-1.5e-7, "-1.5e-07"},
		{1e100, "1e+100"}, {1e-100, "1e-100"}, {5e-324, "5e-324"}, {math.MaxFloat64, "1.7976931348623157e+308"},
		{math.MaxFloat32, "3.4028234663852886e+38"}, {-0x1p-126, "-1.1754943508222875e-38"}, {0x1p-149, "1.401298464324817e-45"},
		{math.NaN(), "NaN"}, {math.Inf(1), "Infinity"}, {math.Inf(-1), "-Infinity"},
	} {
		if got := string(appendPythonFloat(nil, c.value)); got != c.want {
			t.Errorf("%g: %s, want %s", c.value, got, c.want)
		}
	}
}

const (
	plain  = `{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [96, 128]}`
	nested = `{"quant_type": "fp4", "blocksize": 128, "dtype": "float32", "shape": [4], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 1.4999999621068127e-05}`
)

func TestParseJSON(t *testing.T) {
	for _, text := range []string{
		plain, nested,
		strings.Replace(plain, "[96, 128]", "null", 1),
		strings.Replace(plain, "[96, 128]", "[]", 1),
		strings.Replace(plain, "[96, 128]", "[3, 0, 7]", 1),
		strings.Replace(nested, "1.4999999621068127e-05", "NaN", 1),
		strings.Replace(nested, "1.4999999621068127e-05", "Infinity", 1),
		strings.Replace(nested, "1.4999999621068127e-05", "-Infinity", 1),
		strings.Replace(nested, "1.4999999621068127e-05", "-0.0", 1),
	} {
		s, err := ParseJSON([]byte(text))
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got := string(s.JSON()); got != text {
			t.Errorf("read %s, wrote %s", text, got)
		}
		if s.Codebook == nil || s.Packed != nil || s.Absmax != nil {
			t.Errorf("%s: tensors %v", text, s)
		}
	}
	// Other writers' spaces, order and escapes are JSON all the same.
	s, err := ParseJSON([]byte("\n{\"shape\" :[ 96,128 ],\"dtype\":\"bfloat16\",\t\"blocksize\":64,\"quant\\u005ftype\":\"nf4\"}\r\n "))
	if err != nil || string(s.JSON()) != plain {
		t.Errorf("%v %v", s, err)
	}
}

func TestParseJSONRefuses(t *testing.T) {
	replace := func(text, old, new string) string {
		if !strings.Contains(text, old) {
			t.Fatalf("%s is not in %s", old, text)
		}
		return strings.Replace(text, old, new, 1)
	}
	for name, c := range map[string]struct{ text, message string }{
		"empty":              {"", "ends"},
		"no object":          {"[1]", "object"},
		"cut":                {plain[:len(plain)-1], "ends"},
		"cut in a string":    {plain[:10], "value"},
		"text behind":        {plain + "x", "end of the text"},
		"two objects":        {plain + plain, "end of the text"},
		"unknown key":        {replace(plain, "}", `, "offset": 1}`), "unknown key"},
		"key twice":          {replace(plain, "}", `, "blocksize": 64}`), "twice"},
		"key twice, escaped": {replace(plain, "}", `, "\u0062locksize": 128}`), "twice"},
		"missing":            {replace(plain, `"blocksize": 64, `, ""), `"blocksize" is missing`},
		"missing shape":      {replace(plain, `, "shape": [96, 128]`, ""), `"shape" is missing`},
		"number as key":      {replace(plain, `"blocksize"`, "1"), "key"},
		"null as key":        {replace(plain, `"blocksize"`, "null"), "key"},
		"no colon":           {replace(plain, ":", ""), "colon"},
		"no comma":           {replace(plain, ",", ""), "comma"},
		"comma at the end":   {replace(plain, "}", ",}"), "value"},
		"format":             {replace(plain, "nf4", "nf5"), "nf5"},
		"int8":               {replace(plain, "nf4", "int8"), "int8"},
		"format type":        {replace(plain, `"nf4"`, "4"), "string"},
		"blocksize":          {replace(plain, "64", "65"), "65"},
		"blocksize type":     {replace(plain, "64", `"64"`), "64"},
		"blocksize float":    {replace(plain, "64", "64.0"), "64.0"},
		"blocksize large":    {replace(plain, "64", "18446744073709551680"), "want one of"},
		"blocksize sign":     {replace(plain, "64", "+64"), "value"},
		"dtype":              {replace(plain, "bfloat16", "int8"), "int8"},
		"dtype null":         {replace(plain, `"bfloat16"`, "null"), "string"},
		"negative shape":     {replace(plain, "96", "-96"), "negative"},
		"float in shape":     {replace(plain, "96", "96.5"), "integers"},
		"string in shape":    {replace(plain, "96", `"96"`), "integers"},
		"null in shape":      {replace(plain, "96", "null"), "integers"},
		"list in shape":      {replace(plain, "96", "[96]"), "value"},
		"object as shape":    {replace(plain, "[96, 128]", "{}"), "value"},
		"number as shape":    {replace(plain, "[96, 128]", "96"), "integers"},
		"shape too large":    {replace(plain, "96", "4611686018427387904"), "large"},
		"shape overflows":    {replace(plain, "96", "18446744073709551616"), "integers"},
		"nan outside":        {replace(plain, "64", "NaN"), "want one of"},
		"infinities":         {replace(nested, "1.4999999621068127e-05", "+Infinity"), "value"},
		"offset type":        {replace(nested, "1.4999999621068127e-05", `"1"`), "number"},
		"offset too large":   {replace(nested, "1.4999999621068127e-05", "1e39"), "float32"},
		"offset null":        {replace(nested, "1.4999999621068127e-05", "null"), "number"},
		"nested incomplete":  {replace(nested, `"nested_blocksize": 256, `, ""), "missing"},
		"nested blocksize":   {replace(nested, "256", "0"), "want one of"},
		"nested dtype":       {replace(nested, `"nested_dtype": "float32"`, `"nested_dtype": "float16"`), "float16"},
		"UTF-8":              {replace(plain, "nf4", "nf\xff"), "UTF-8"},
		"byte order mark":    {"\ufeff" + plain, "object"},
	} {
		s, err := ParseJSON([]byte(c.text))
		if err == nil {
			t.Errorf("%s: %s was read as %s", name, c.text, s.JSON())
		} else if !strings.Contains(err.Error(), c.message) {
			t.Errorf("%s: the error %q does not mention %q", name, err, c.message)
		}
	}
}

// Whatever is read can be written, and is then read the same.
func FuzzStateJSON(f *testing.F) {
	f.Add([]byte(plain))
	f.Add([]byte(nested))
	f.Add([]byte(strings.Replace(nested, "1.4999999621068127e-05", "-Infinity", 1)))
	f.Add([]byte(`{"a": "\"", "b": [1, "]"]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := ParseJSON(text)
		if err != nil {
			return
		}
		first := s.JSON()
		again, err := ParseJSON(first)
		if err != nil {
			t.Fatalf("%q was read but not what was written for it, %s: %v", text, first, err)
		}
		if second := again.JSON(); string(second) != string(first) {
			t.Fatalf("%s became %s", first, second)
		}
		s.Check()
	})
}
