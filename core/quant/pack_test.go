package quant

import (
	"bytes"
	"strings"
	"testing"
)

func TestPack4(t *testing.T) {
	codes := []byte{1, 2, 3, 4, 15}
	for order, want := range map[NibbleOrder][]byte{HighFirst: {0x12, 0x34, 0xf0}, LowFirst: {0x21, 0x43, 0x0f}} {
		packed := make([]byte, 3)
		if err := Pack4(packed, codes, order); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(packed, want) {
			t.Errorf("order %d: %x, want %x", order, packed, want)
		}
		back := make([]byte, 5)
		if err := Unpack4(back, packed, order); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(back, codes) {
			t.Errorf("order %d: back %v", order, back)
		}
	}
}

// Every byte is a pair of codes in both orders, and the two orders are each other's swap.
func TestUnpack4EveryByte(t *testing.T) {
	packed := make([]byte, 256)
	for i := range packed {
		packed[i] = byte(i)
	}
	high, low, again := make([]byte, 512), make([]byte, 512), make([]byte, 256)
	for order, codes := range map[NibbleOrder][]byte{HighFirst: high, LowFirst: low} {
		if err := Unpack4(codes, packed, order); err != nil {
			t.Fatal(err)
		}
		if err := Pack4(again, codes, order); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(again, packed) {
			t.Errorf("order %d does not come back", order)
		}
	}
	for i := 0; i < 512; i += 2 {
		if high[i] != packed[i/2]>>4 || high[i+1] != packed[i/2]&15 || low[i] != high[i+1] || low[i+1] != high[i] {
			t.Fatalf("byte %02x: %v and %v", packed[i/2], high[i:i+2], low[i:i+2])
		}
	}
}

func TestPack4Errors(t *testing.T) {
	packed := []byte{7, 7}
	for want, err := range map[string]error{
		"code 16 of element 2": Pack4(packed, []byte{1, 2, 16}, HighFirst),
		"are 1 bytes":          Pack4(packed, []byte{1, 2}, HighFirst),
		"are 3 bytes":          Unpack4(make([]byte, 5), packed, LowFirst),
		"nibble order 2":       Unpack4(make([]byte, 4), packed, 2),
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %s", err, want)
		}
	}
	if !bytes.Equal(packed, []byte{7, 7}) {
		t.Errorf("a refused call wrote %v", packed)
	}
}
