package kernel

import (
	"bytes"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/gquant/gquant/core/dtype"
)

var threeTypes = []dtype.DType{dtype.BF16, dtype.F16, dtype.F32}

// layer is a linear layer of random codes and scales and normally distributed x and bias; a third have no bias.
func layer(random *rand.Rand, cb Codebook, d dtype.DType, m, n, k, blocksize int) *Layer4 {
	l := &Layer4{
		Codebook: cb, Packed: randomBytes(random, (n*k+1)/2), Absmax: make([]float32, (n*k+blocksize-1)/blocksize), Blocksize: blocksize,
		Rows: n, K: k, DType: d, M: m, X: normal(d, m*k, random.Uint64()), Stride: n,
	}
	for i := range l.Absmax {
		l.Absmax[i] = float32(math.Exp(random.NormFloat64()))
	}
	if random.IntN(3) > 0 {
		l.Bias = normal(d, n, random.Uint64())
	}
	l.Y = make([]byte, m*n*d.Bits()/8)
	return l
}

// weight is the layer's weight, decoded as dtype d.
func (l *Layer4) weight(d dtype.DType) []float32 {
	n := l.Rows * l.K
	raw := make([]byte, n*d.Bits()/8)
	Dequantize4Ref(l.Codebook, l.Packed, l.Absmax, n, l.Blocksize, raw, d)
	return widen(raw, d)
}

func widen(raw []byte, d dtype.DType) []float32 {
	values := make([]float32, len(raw)*8/d.Bits())
	for i := range values {
		values[i] = dtype.GetF32(raw[i*d.Bits()/8:], d)
	}
	return values
}

func (l *Layer4) y(m, n int) float32 {
	return dtype.GetF32(l.Y[(m*l.Stride+n)*l.DType.Bits()/8:], l.DType)
}

// step is the distance between the numbers of a type around 1.
func step(d dtype.DType) float64 {
	return map[dtype.DType]float64{dtype.F32: 0x1p-23, dtype.F16: 0x1p-10, dtype.BF16: 0x1p-7}[d]
}

// within compares y with the sums in float64. An element may be wrong by half a step of its type, and by what float32
// sums of 1024 elements on at least 4 lanes, and then of those sums, can be wrong by.
func within(t *testing.T, l *Layer4) {
	t.Helper()
	weight, x := l.weight(dtype.F32), widen(l.X, l.DType)
	for m := range l.M {
		for n := range l.Rows {
			sum, magnitude := 0.0, 0.0
			row := weight[n*l.K:]
			for k, x := range x[m*l.K : (m+1)*l.K] {
				product := float64(x) * float64(row[k])
				sum += product
				magnitude += math.Abs(product)
			}
			if l.Bias != nil {
				bias := float64(dtype.GetF32(l.Bias[n*l.DType.Bits()/8:], l.DType))
				sum += bias
				magnitude += math.Abs(bias)
			}
			additions := float64(min(l.K, 1024)/2 + l.K/1024 + 8)
			bound := math.Abs(sum)*step(l.DType)/2 + magnitude*additions*0x1p-24
			if l.DType == dtype.F16 {
				bound += 0x1p-25 // half a step of subnormal numbers
			}
			if got := float64(l.y(m, n)); !(math.Abs(got-sum) <= bound*1.01) {
				t.Fatalf("codebook %d, %s, M %d, N %d, K %d, blocksize %d: y[%d][%d] is %v, want %v ± %v",
					l.Codebook, l.DType, l.M, l.Rows, l.K, l.Blocksize, m, n, got, sum, bound)
			}
		}
	}
}

func TestLinear4Shapes(t *testing.T) {
	eachLevel(t, func(t *testing.T, k kernels) {
		random := rand.New(rand.NewPCG(1, 2))
		blocksizes := []int{32, 64, 128, 256, 512, 1024, 2048, 4096}
		i := 0
		try := func(m, n, columns int) {
			for range 2 {
				if i++; testing.Short() && i%4 > 0 {
					continue
				}
				l := layer(random, Codebook(i/4%2), threeTypes[i%3], m, n, columns, blocksizes[i/3%8])
				k.linear4(l)
				within(t, l)
			}
		}
		for _, columns := range []int{1, 7, 32, 33, 63, 64, 65, 96, 1000, 1024, 1056, 2112} {
			for m := 1; m <= 17; m++ {
				try(m, 1+random.IntN(21), columns)
			}
			try(193, 5, columns) // more than a batch
			try(9, 97, columns)  // more than a panel
			try(2, 99, columns)
		}
		for _, l := range []*Layer4{
			layer(random, NF4, dtype.F16, 3, 7, 4096+64, 4096), layer(random, FP4, dtype.F32, 11, 7, 4096+32, 2048),
			layer(random, NF4, dtype.BF16, 1, 3, 8192, 64), layer(random, FP4, dtype.BF16, 70, 9, 5000, 512),
		} {
			k.linear4(l)
			within(t, l)
		}
	})
}

// No rows of x, no rows of the weight, or no elements in them.
func TestLinear4Empty(t *testing.T) {
	eachLevel(t, func(t *testing.T, k kernels) {
		random := rand.New(rand.NewPCG(3, 4))
		k.linear4(layer(random, NF4, dtype.BF16, 0, 5, 64, 64))
		k.linear4(layer(random, NF4, dtype.BF16, 5, 0, 64, 64))
		for _, m := range []int{1, 9} {
			l := layer(random, NF4, dtype.BF16, m, 3, 0, 64)
			l.Bias = normal(dtype.BF16, 3, 1)
			k.linear4(l)
			if !bytes.Equal(l.Y, bytes.Repeat(l.Bias, m)) {
				t.Errorf("%d rows without elements: %x, want the bias %x", m, l.Y, l.Bias)
			}
		}
	})
}

// With rows of the identity as x, y is the weight itself.
func TestLinear4Identity(t *testing.T) {
	eachLevel(t, func(t *testing.T, k kernels) {
		random := rand.New(rand.NewPCG(5, 6))
		for _, d := range threeTypes {
			for _, columns := range []int{33, 64, 1056} {
				for _, m := range []int{1, 4, 8, 33} {
					l := layer(random, Codebook(m%2), d, m, 37, columns, 64)
					l.Bias = nil
					clear(l.X)
					ones := make([]int, m)
					for i := range ones {
						ones[i] = random.IntN(columns)
						dtype.PutF32(l.X[(i*columns+ones[i])*d.Bits()/8:], d, 1)
					}
					k.linear4(l)
					weight := l.weight(d)
					for i, one := range ones {
						for n := range l.Rows {
							if got, want := l.y(i, n), weight[n*columns+one]; got != want {
								t.Fatalf("%s, %d rows of x, K %d: y[%d][%d] is %v, want %v", d, m, columns, i, n, got, want)
							}
						}
					}
				}
			}
		}
	})
}

// A row of y does not depend on the other rows of x, nor on which rows of the weight a call has. Whatever lies behind and
// before the buffers stays as it was.
func TestLinear4PartsAreEqual(t *testing.T) {
	eachLevel(t, func(t *testing.T, k kernels) {
		random := rand.New(rand.NewPCG(7, 8))
		for i, columns := range []int{64, 96, 1056, 33, 1001} {
			d := threeTypes[i%3]
			size := d.Bits() / 8
			all := layer(random, NF4, d, 21, 103, columns, 64)
			k.linear4(all)
			for _, m := range []int{1, 2, 3, 4, 5, 6, 7, 8, 9, 13} {
				first, row := random.IntN(all.M-m+1), random.IntN(60)
				rows := 1 + random.IntN(all.Rows-row)
				part := *all
				part.First, part.Rows, part.M, part.Stride = row, rows, m, rows+3
				part.Absmax = all.Absmax[row*columns/64:]
				part.X = all.X[first*columns*size:]
				if all.Bias != nil {
					part.Bias = all.Bias[row*size:]
				}
				y := guarded((m*part.Stride - 3) * size)
				part.Y = y.bytes()
				for j := range part.Y {
					part.Y[j] = guardByte
				}
				k.linear4(&part)
				for j := range m {
					got, want := part.Y[j*part.Stride*size:], all.Y[((first+j)*all.Stride+row)*size:]
					if !bytes.Equal(got[:rows*size], want[:rows*size]) {
						t.Errorf("%s, K %d: row %d of %d differs from the same row among %d", d, columns, j, m, all.M)
					}
					if j < m-1 && !bytes.Equal(got[rows*size:(rows+3)*size], bytes.Repeat([]byte{guardByte}, 3*size)) {
						t.Errorf("%s, K %d: wrote between rows of y", d, columns)
					}
				}
				if !y.intact() {
					t.Errorf("%s, K %d: wrote beyond y", d, columns)
				}
			}
		}
	})
}

// NaN and Inf of x reach their own row of y, those of a block's scale the rows of W in the block; finite sums too large for
// the type become infinite.
func TestLinear4Nonfinite(t *testing.T) {
	nan, inf := float32(math.NaN()), float32(math.Inf(1))
	eachLevel(t, func(t *testing.T, k kernels) {
		random := rand.New(rand.NewPCG(9, 10))
		for _, d := range threeTypes {
			for _, m := range []int{2, 8, 19} {
				for _, columns := range []int{64, 65} {
					l := layer(random, NF4, d, m, 18, columns, 64)
					l.Packed = bytes.Repeat([]byte{0xff}, len(l.Packed)) // all of the weight is positive
					dtype.PutF32(l.X, d, nan)
					dtype.PutF32(l.X[(columns+1)*d.Bits()/8:], d, inf)
					k.linear4(l)
					want := make([]byte, 4)
					dtype.PutF32(want, d, math.Float32frombits(0x7fffffff))
					for n := range l.Rows {
						if y := l.Y[n*d.Bits()/8:][:d.Bits()/8]; l.y(0, n) == l.y(0, n) || (!bytes.Equal(y, want[:len(y)]) && t.Name() != "TestLinear4Nonfinite/reference") {
							t.Fatalf("%s: y[0][%d] is %x, want NaN", d, n, y)
						}
						if l.y(1, n) != inf {
							t.Fatalf("%s: y[1][%d] is %v, want +Inf", d, n, l.y(1, n))
						}
						for i := 2; i < m; i++ {
							if y := l.y(i, n); y-y != 0 {
								t.Fatalf("%s: y[%d][%d] is %v", d, i, n, y)
							}
						}
					}
					l = layer(random, NF4, d, m, 18, 64, 64)
					l.Absmax[3] = nan
					k.linear4(l)
					for n := range l.Rows {
						if y := l.y(m-1, n); (y != y) != (n == 3) {
							t.Fatalf("%s: y[%d][%d] is %v", d, m-1, n, y)
						}
					}
				}
			}
		}
		l := layer(random, NF4, dtype.F16, 1, 1, 64, 64)
		l.Packed, l.Bias, l.Absmax[0] = bytes.Repeat([]byte{0xff}, 32), nil, 3000
		for i := range 64 {
			dtype.PutF32(l.X[2*i:], dtype.F16, 1)
		}
		if k.linear4(l); l.y(0, 0) != inf {
			t.Errorf("64 · 3000 as float16 is %v", l.y(0, 0))
		}
	})
}

// The mean error is not larger than that of the usual way: the weight rounded to the dtype, then sums, even exact ones.
func TestLinear4IsAsExactAsDecoding(t *testing.T) {
	eachLevel(t, func(t *testing.T, k kernels) {
		random := rand.New(rand.NewPCG(11, 12))
		for _, d := range threeTypes {
			for _, m := range []int{1, 16} {
				l := layer(random, NF4, d, m, 24, 4096, 64)
				l.Bias = nil
				k.linear4(l)
				exact, rounded, x := l.weight(dtype.F32), l.weight(d), widen(l.X, d)
				ours, usual := 0.0, 0.0
				for i := range m {
					for n := range l.Rows {
						sum, other, plain := 0.0, 0.0, float32(0)
						for j, x := range x[i*l.K : (i+1)*l.K] {
							sum += float64(x) * float64(exact[n*l.K+j])
							other += float64(x) * float64(rounded[n*l.K+j])
							plain += float32(x * rounded[n*l.K+j])
						}
						if d == dtype.F32 {
							other = float64(plain) // weights are not rounded, so sums are
						}
						var narrow [4]byte
						dtype.PutF32(narrow[:], d, float32(other))
						ours += math.Pow(float64(l.y(i, n))-sum, 2)
						usual += math.Pow(float64(dtype.GetF32(narrow[:], d))-sum, 2)
					}
				}
				if ours > usual {
					t.Errorf("%s, %d rows: squared error %g, decoding first %g", d, m, ours, usual)
				}
			}
		}
	})
}

func TestAbsmax(t *testing.T) {
	random := rand.New(rand.NewPCG(13, 14))
	for _, n := range []int{0, 1, 255, 256, 257, 1000} {
		codes, nested := randomBytes(random, n), scales(random, n/256+1)
		want := make([]float32, n)
		AbsmaxRef(testTable(), codes, nested, 256, 0.125, want)
		eachLevel(t, func(t *testing.T, k kernels) {
			got := make([]float32, n+1)
			got[n] = 7
			if k.absmax(testTable(), codes, nested, 256, 0.125, got); !bytes.Equal(raw(got[:n]), raw(want)) || got[n] != 7 {
				t.Errorf("%d absmax: %v, want %v", n, got, want)
			}
		})
	}
}

// Buffers that are too short panic before anything is written.
func TestLinear4ShortBuffers(t *testing.T) {
	random := rand.New(rand.NewPCG(15, 16))
	for name, shorten := range map[string]func(l *Layer4){
		"packed":    func(l *Layer4) { l.Packed = l.Packed[1:] },
		"absmax":    func(l *Layer4) { l.Absmax = l.Absmax[1:] },
		"x":         func(l *Layer4) { l.X = l.X[1:] },
		"bias":      func(l *Layer4) { l.Bias = make([]byte, 1) },
		"y":         func(l *Layer4) { l.Y = l.Y[1:] },
		"stride":    func(l *Layer4) { l.Stride = 2 },
		"blocksize": func(l *Layer4) { l.Blocksize = 96 },
		"first":     func(l *Layer4) { l.First = 1 },
		"dtype":     func(l *Layer4) { l.DType = dtype.I16 },
		"negative":  func(l *Layer4) { l.M = -1 },
		"huge":      func(l *Layer4) { l.M = 1 << 50 },
	} {
		l := layer(random, NF4, dtype.BF16, 2, 3, 64, 64)
		shorten(l)
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			compiled.linear4(l)
		}()
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("scratch: no panic")
			}
		}()
		Linear4(layer(random, NF4, dtype.BF16, 2, 3, 64, 64), make([]float32, Linear4Scratch(2, 64)-1))
	}()
}
