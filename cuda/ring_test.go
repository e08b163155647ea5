package cuda

import (
	"bytes"
	"testing"
)

// Batches cover every byte of every piece once, in order, and fit into a slot each.
func TestBatches(t *testing.T) {
	sizes := []int64{0, 1, slotBytes - 1, 5, 3*slotBytes + 7, 63, 64, 65, slotBytes, 2}
	pieces := make([]Piece, len(sizes))
	for i, n := range sizes {
		pieces[i].Bytes = n
	}
	done := make([]int64, len(sizes))
	last := 0
	for _, batch := range batches(pieces) {
		used := int64(0)
		for _, g := range batch {
			i := 0
			for &pieces[i] != g.piece {
				i++
			}
			if i < last || g.at != done[i] || g.bytes <= 0 {
				t.Fatalf("segment of piece %d at %d of %d bytes, after %d of piece %d", i, g.at, g.bytes, done[i], last)
			}
			last = i
			done[i] += g.bytes
			used += ceilDiv(g.bytes, slotAlign) * slotAlign
		}
		if len(batch) == 0 || used > slotBytes {
			t.Errorf("a batch of %d segments takes %d bytes of a slot", len(batch), used)
		}
	}
	for i, n := range sizes {
		if done[i] != n {
			t.Errorf("%d of the %d bytes of piece %d", done[i], n, i)
		}
	}
}

func TestBytes(t *testing.T) {
	read := Bytes([]byte("abcdef"))
	p := make([]byte, 3)
	if err := read(p, 2); err != nil || !bytes.Equal(p, []byte("cde")) {
		t.Errorf("%q, %v", p, err)
	}
	if err := read(p, 4); err == nil {
		t.Error("3 bytes of 2")
	}
}

func TestParse(t *testing.T) {
	for name, want := range map[string]int{"cuda": 0, "cuda:0": 0, "cuda:12": 12} {
		if got, err := Parse(name); got != want || err != nil {
			t.Errorf("%s is %d, %v", name, got, err)
		}
	}
	for _, name := range []string{"", "cpu", "cuda:", "cuda:-1", "cuda:x", "cuda:1 ", "cuda0", "CUDA", "mps"} {
		if got, err := Parse(name); err == nil {
			t.Errorf("%q is %d", name, got)
		}
	}
}
