package checkpoint

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/quant"
)

// Space for texts is kept before their content is known: no offset may need more.
func TestLongestTexts(t *testing.T) {
	format, err := quant.Lookup("nf4")
	if err != nil {
		t.Fatal(err)
	}
	target := Target{Format: format, Blocksize: 64, Nested: true, Storage: dtype.U8, Convention: comfy}
	s := target.Longest([]int64{4096, 4096}, dtype.BF16)
	longest, longestComfy := len(s.JSON()), len(ComfyJSON("a.weight", s))
	r := rand.New(rand.NewPCG(3, 4))
	reached := false
	tries := 1_000_000
	if testing.Short() {
		tries = 100_000
	}
	for i := range tries {
		bits := r.Uint32()
		if i%2 == 0 { // half of them where decimal forms have no exponent
			bits = math.Float32bits(float32(math.Pow(10, 12*r.Float64()-7))) ^ r.Uint32()&0x800000ff
		}
		s.Nested.Offset = math.Float32frombits(bits)
		n, c := len(s.JSON()), len(ComfyJSON("a.weight", s))
		if n > longest || c > longestComfy {
			t.Fatalf("offset %v: %d and %d bytes, kept are %d and %d", s.Nested.Offset, n, c, longest, longestComfy)
		}
		reached = reached || n == longest
	}
	if !reached {
		t.Error("no offset came near the longest text: the test looks at the wrong ones")
	}
}
