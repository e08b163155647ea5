package quant

import "fmt"

// NibbleOrder says which element of a pair lies in the high nibble of their byte.
type NibbleOrder int

// The orders in use.
const (
	HighFirst NibbleOrder = iota // element 2i: bitsandbytes, NVFP4
	LowFirst                     // element 2i+1: comfy-kitchen's INT4
)

// Pack4 packs codes of 4 bits, one per byte, into packed, which has ⌈len(codes)/2⌉ bytes. The last nibble after an odd
// number of codes is 0. It fails at a code above 15 and leaves packed as it was.
func Pack4(packed, codes []byte, order NibbleOrder) error {
	if err := checkPack(packed, codes, order); err != nil {
		return err
	}
	for i, c := range codes {
		if c > 15 {
			return fmt.Errorf("code %d of element %d does not fit 4 bits", c, i)
		}
	}
	pair := func(even, odd byte) byte {
		if order == LowFirst {
			even, odd = odd, even
		}
		return even<<4 | odd
	}
	for i := range len(codes) / 2 {
		packed[i] = pair(codes[2*i], codes[2*i+1])
	}
	if n := len(codes); n%2 == 1 {
		packed[n/2] = pair(codes[n-1], 0)
	}
	return nil
}

// Unpack4 is the way back from Pack4.
func Unpack4(codes, packed []byte, order NibbleOrder) error {
	if err := checkPack(packed, codes, order); err != nil {
		return err
	}
	// The element in the high nibble of byte i is 2i, or 2i+1.
	high := int(order)
	for i, b := range packed {
		if h := 2*i + high; h < len(codes) {
			codes[h] = b >> 4
		}
		if l := 2*i + 1 - high; l < len(codes) {
			codes[l] = b & 15
		}
	}
	return nil
}

func checkPack(packed, codes []byte, order NibbleOrder) error {
	if order != HighFirst && order != LowFirst {
		return fmt.Errorf("nibble order %d is neither %d (high first) nor %d (low first)", order, HighFirst, LowFirst)
	}
	if want := (len(codes) + 1) / 2; len(packed) != want {
		return fmt.Errorf("%d codes of 4 bits are %d bytes, the buffer has %d", len(codes), want, len(packed))
	}
	return nil
}
