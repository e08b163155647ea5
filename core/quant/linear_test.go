package quant

import (
	"bytes"
	"math"
	"strings"
	"testing"

	"github.com/gquant/gquant/core/dtype"
)

// y is what float64 sums over the decoded weight give, for every format, blocksize, kind of statistics and dtype, also
// where rows start inside blocks and bytes. Threads make no difference.
func TestLinear(t *testing.T) {
	eachLevel(t, func(t *testing.T) {
		i := 0
		for _, blocksize := range Blocksizes() {
			for _, nested := range []bool{false, true} {
				for _, c := range []struct{ m, n, k int64 }{{1, 301, 512}, {3, 257, 4160}, {1, 99, 33}, {8, 777, 96}, {17, 193, 65}, {200, 99, 128}, {193, 3, 1000}} {
					if testing.Short() && i%5 > 0 {
						i++
						continue
					}
					format, d := []string{"nf4", "fp4"}[i%2], []dtype.DType{dtype.BF16, dtype.F16, dtype.F32}[i%3]
					i++
					s, _ := quantized(t, format, dtype.F32, []int64{c.n, c.k}, Options{Blocksize: blocksize, Nested: nested})
					x, bias := normal(d, c.m*c.k, 1), normal(d, c.n, 2)
					if i%4 == 0 {
						bias = nil
					}
					y := make([]byte, c.m*c.n*int64(d.Bits()/8))
					if err := s.Linear(y, x, c.m, d, bias, 1); err != nil {
						t.Fatal(err)
					}
					sameSums(t, s, y, x, c.m, d, bias)
					for _, threads := range []int{0, 2, 5} {
						other := make([]byte, len(y))
						if err := s.Linear(other, x, c.m, d, bias, threads); err != nil {
							t.Fatal(err)
						}
						if !bytes.Equal(other, y) {
							t.Errorf("%s, %v: %d threads give another result", format, c, threads)
						}
					}
				}
			}
		}
	})
}

// sameSums compares some elements of y, among them the last, with sums in float64.
func sameSums(t *testing.T, s *State, y, x []byte, m int64, d dtype.DType, bias []byte) {
	t.Helper()
	n, k, size := s.Shape[0], s.Shape[1], int64(d.Bits()/8)
	weight := make([]byte, 4*n*k)
	if err := s.DequantizeRange(weight, dtype.F32, 0, n*k, 0); err != nil {
		t.Fatal(err)
	}
	half := map[dtype.DType]float64{dtype.F32: 0x1p-24, dtype.F16: 0x1p-11, dtype.BF16: 0x1p-8}[d]
	for i := m*n - 1; i >= 0; i -= 1 + n*m/500 {
		row, column := i/n, i%n
		sum, magnitude := 0.0, 0.0
		for j := range k {
			product := float64(dtype.GetF32(x[(row*k+j)*size:], d)) * float64(dtype.GetF32(weight[4*(column*k+j):], dtype.F32))
			sum += product
			magnitude += math.Abs(product)
		}
		if bias != nil {
			sum += float64(dtype.GetF32(bias[column*size:], d))
		}
		got := float64(dtype.GetF32(y[i*size:], d))
		if bound := math.Abs(sum)*half*1.01 + (magnitude+1)*0x1p-18; !(math.Abs(got-sum) <= bound) {
			t.Fatalf("%s, shape %v, blocksize %d, nested %v, %s: y[%d][%d] is %v, want %v ± %v", s.Format.Name, s.Shape, s.Blocksize, s.Nested != nil, d, row, column, got, sum, bound)
		}
	}
}

func TestLinearErrors(t *testing.T) {
	s, _ := quantized(t, "nf4", dtype.BF16, []int64{6, 64}, Options{})
	rows, _ := quantized(t, "nf4", dtype.BF16, []int64{6, 4, 16}, Options{})
	unread := *s
	unread.Packed = nil
	codes, absmax, _, err := QuantizeRowsInt8(make([]byte, 2*6*64), dtype.F16, 6, 64, 0)
	if err != nil {
		t.Fatal(err)
	}
	int8State := &State{Format: &int8Rows, Shape: []int64{6, 64}, Blocksize: 64, DType: dtype.F16, Packed: codes, Absmax: absmax}
	x, y, bias := make([]byte, 2*2*64), make([]byte, 2*2*6), make([]byte, 2*6)
	for _, c := range []struct {
		s          *State
		y, x, bias []byte
		m          int64
		d          dtype.DType
		want       string
	}{
		{s, y, x[1:], bias, 2, dtype.BF16, "x of 2×64 elements of BF16 is 256 bytes, the buffer has 255"},
		{s, y[1:], x, bias, 2, dtype.BF16, "y of 2×6 elements of BF16 is 24 bytes, the buffer has 23"},
		{s, y, x, bias[:0], 2, dtype.BF16, "the bias of 1×6 elements of BF16 is 12 bytes, the buffer has 0"},
		{s, y, x, nil, -1, dtype.BF16, "-1 rows of x"},
		{s, y, x, nil, 1 << 62, dtype.BF16, "too large"},
		{s, y, x, nil, 2, dtype.I8, "dtype I8"},
		{rows, y, x, nil, 2, dtype.BF16, "2 dimensions, this one has shape [6 4 16]"},
		{&unread, y, x, nil, 2, dtype.BF16, "not in memory"},
		{int8State, y, x, nil, 2, dtype.F16, "format int8 has no linear layer"},
	} {
		if err := c.s.Linear(c.y, c.x, c.m, c.d, c.bias, 0); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("error %v, want %q", err, c.want)
		}
	}
	if err := s.Linear(nil, nil, 0, dtype.BF16, bias, 0); err != nil {
		t.Errorf("no rows: %v", err)
	}
	if err := s.Linear(y, x, 2, dtype.BF16, nil, 0); err != nil {
		t.Error(err)
	}
}
