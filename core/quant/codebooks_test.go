package quant

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"testing"
)

// tests/vectors/codebooks.json is what bitsandbytes' Python builds.
func TestCodebooks(t *testing.T) {
	text, err := os.ReadFile("../../tests/vectors/codebooks.json")
	if err != nil {
		t.Fatal(err)
	}
	var cases []struct {
		Map                      string
		Signed, Zero             bool
		Bits, Exponent, Mantissa int
		Values                   string
	}
	if err := json.Unmarshal(text, &cases); err != nil {
		t.Fatal(err)
	}
	if len(cases) != 36 {
		t.Fatalf("%d codebooks", len(cases))
	}
	for _, c := range cases {
		name := fmt.Sprintf("%s signed %t, %d bits, zero %t, e%dm%d", c.Map, c.Signed, c.Bits, c.Zero, c.Exponent, c.Mantissa)
		var got *[256]float32
		var err error
		switch {
		case c.Map == "dynamic" && c.Signed:
			got = DynamicMap()
		case c.Map == "dynamic":
			got = UnsignedDynamicMap()
		case c.Map == "linear":
			got, err = LinearMap(c.Signed, c.Bits, c.Zero)
		case c.Map == "fp8":
			got, err = FP8Map(c.Signed, c.Exponent, c.Mantissa)
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		want, err := hex.DecodeString(c.Values)
		if err != nil || len(want) != 4*256 {
			t.Fatalf("%s: %d bytes, %v", name, len(want), err)
		}
		for i, v := range got {
			w := uint32(want[4*i])<<24 | uint32(want[4*i+1])<<16 | uint32(want[4*i+2])<<8 | uint32(want[4*i+3])
			if math.Float32bits(v) != w {
				t.Errorf("%s: value %d is %x, want %x", name, i, math.Float32bits(v), w)
				break
			}
		}
	}
}

func TestCodebooksRefuse(t *testing.T) {
	for _, bits := range []int{-1, 0, 9} {
		if _, err := LinearMap(true, bits, true); err == nil {
			t.Errorf("a linear map of %d bits", bits)
		}
	}
	for _, c := range [][2]int{{0, 4}, {4, 4}, {-1, 3}, {3, -1}, {9, 0}} {
		if _, err := FP8Map(true, c[0], c[1]); err == nil {
			t.Errorf("a float of %d exponent and %d mantissa bits", c[0], c[1])
		}
	}
}
