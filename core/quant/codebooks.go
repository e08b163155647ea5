package quant

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"sync"
)

// The 8-bit codebooks that bitsandbytes can build (functional.py create_…_map), bit for bit. Each is an ascending table of
// 256 values from −1 or 0 to 1; with fewer bits, the rest is zeros in its middle.

// DynamicMap is the signed dynamic map that nested statistics use: for each of seven powers of ten, evenly spaced
// fractions, the more the larger the power. It has no −1. The caller may change the table.
func DynamicMap() *[256]float32 {
	table := *dynamicSigned()
	return &table
}

var dynamicSigned = sync.OnceValue(func() *[256]float32 { return dynamicMap(true) })

// UnsignedDynamicMap is the dynamic map without negative numbers and with twice the fractions.
func UnsignedDynamicMap() *[256]float32 { return dynamicMap(false) }

func dynamicMap(signed bool) *[256]float32 {
	const exponents = 7
	values := []float32{0, 1}
	for i := range exponents {
		fractions := 1 << i
		if !signed {
			fractions *= 2
		}
		// Python computes the power in double precision, torch multiplies with it as float32.
		power := float32(powerOfTen(i - (exponents - 1)))
		boundaries := linspace(0.1, 1, fractions+1)
		for k := range fractions {
			mean := (boundaries[k] + boundaries[k+1]) / 2
			values = append(values, power*mean)
			if signed {
				values = append(values, -power*mean)
			}
		}
	}
	slices.Sort(values)
	return (*[256]float32)(values)
}

// powerOfTen is 10^e as a double, for e from −6 to 0.
func powerOfTen(e int) float64 {
	return [...]float64{1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1}[e+6]
}

// linspace is torch.linspace in float32: steps are counted from both ends to the middle, each number by one fused
// multiply-add. Without it, 21 of the 128 positive values of the dynamic map would be 1 ulp off.
func linspace(from, to float32, steps int) []float32 {
	values := make([]float32, steps)
	if steps == 1 {
		values[0] = from
		return values
	}
	step := (to - from) / float32(steps-1)
	for i := range values {
		if i < steps/2 {
			values[i] = fma(step, float32(i), from)
		} else {
			values[i] = fma(-step, float32(steps-1-i), to)
		}
	}
	return values
}

// fma is x·y + z rounded once. The product is exact as a float64; if the sum is not, its last bit is set so that the second
// rounding cannot fall on a tie (Boldo and Melquiond, "rounding to odd").
func fma(x, y, z float32) float32 {
	product, addend := float64(x)*float64(y), float64(z)
	sum := product + addend
	// Knuth's two-sum: the exact error of the addition.
	t := sum - product
	lost := (product - (sum - t)) + (addend - t)
	if lost != 0 && math.Float64bits(sum)&1 == 0 {
		if (lost > 0) == (sum > 0) {
			sum = math.Float64frombits(math.Float64bits(sum) + 1)
		} else {
			sum = math.Float64frombits(math.Float64bits(sum) - 1)
		}
	}
	return float32(sum)
}

// LinearMap spaces 2^bits numbers evenly (bits up to 8), with zero among them if it is signed and addZero, or bits are
// fewer than 8.
func LinearMap(signed bool, bits int, addZero bool) (*[256]float32, error) {
	if bits < 1 || bits > 8 {
		return nil, fmt.Errorf("a linear map has 1 to 8 bits, not %d", bits)
	}
	from, count := float32(0), 1<<bits
	if signed {
		from = -1
		if addZero || bits < 8 {
			count--
		}
	}
	values := linspace(from, 1, count)
	var table [256]float32
	half := count / 2
	copy(table[:], values[:half])
	copy(table[256-(count-half):], values[half:])
	return &table, nil
}

// FP8Map are the numbers of a small float with the given exponent and mantissa bits, and a sign bit if signed, divided by
// the largest of them. bitsandbytes' larger exponents are smaller numbers; only the order of the table follows from that.
func FP8Map(signed bool, exponentBits, mantissaBits int) (*[256]float32, error) {
	bits := exponentBits + mantissaBits
	if signed {
		bits++
	}
	if exponentBits < 1 || mantissaBits < 0 || exponentBits > 8 || mantissaBits > 8 || bits > 8 {
		return nil, fmt.Errorf("a small float has up to 8 bits, not %d exponent and %d mantissa bits", exponentBits, mantissaBits)
	}
	var values []float64
	bias := 1 << (exponentBits - 1)
	for exponent := range 1 << exponentBits {
		for mantissa := range 1 << mantissaBits {
			fraction := math.Ldexp(float64(mantissa), -mantissaBits)
			value := math.Ldexp(1+fraction, bias+1-exponent)
			if exponent == 0 {
				value = math.Ldexp(fraction, -bias)
			}
			values = append(values, value)
			if signed {
				values = append(values, -value)
			}
		}
	}
	values = append(values, make([]float64, 256-len(values))...)
	slices.SortStableFunc(values, cmp.Compare) // the order of 0 and −0 is bitsandbytes'
	var table [256]float32
	for i, v := range values {
		table[i] = float32(v) / float32(values[255])
	}
	return &table, nil
}
