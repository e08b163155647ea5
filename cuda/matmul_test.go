package cuda

import (
	"testing"

	"github.com/gquant/gquant/core/dtype"
)

// A division leaves nothing out and uses nothing twice, whatever the workspace; with the best one slabs are as large as they are said to be.
func TestSlabs(t *testing.T) {
	var ampere, hopper Device
	ampere.about.major, hopper.about.major = 8, 9
	for _, d := range []*Device{&ampere, &hopper} {
		for _, n := range []int64{1, 127, 128, 129, 1000, 4096, 14336, 152064} {
			for _, k := range []int64{1, 33, 3072, 14336} {
				for _, of := range []dtype.DType{dtype.BF16, dtype.F32} {
					l := Linear{DType: of, M: 65, N: n, K: k}
					row := uint64(k) * uint64(of.Bits()/8)
					all := uint64(n) * row
					least, best := d.MatmulWorkspace(l)
					own := d.libraryBytes()
					if most := max(uint64(2*slabBytes), 256*row) + slabStep*row + workspaceStep; best-own > most || best-own < min(all, slabBytes) {
						t.Errorf("[%d, %d]: slabs of %d bytes", n, k, best-own)
					}
					for _, bytes := range []uint64{least, least + 1, least + 4096, (least + best) / 2, best - 1, best, best + 100, all + own, 1 << 40} {
						if bytes < least {
							continue
						}
						s := d.slabs(l, bytes)
						switch {
						case s.rows < 1 || s.rows > n || s.rows < n && s.rows%slabStep != 0:
							t.Errorf("[%d, %d] in %d bytes: slabs of %d rows", n, k, bytes, s.rows)
						case uint64(s.rows)*row > bytes || uint64(s.rows)*row > s.at || s.library > 0 && s.at+s.library > bytes || s.at%workspaceStep != 0:
							t.Errorf("[%d, %d] in %d bytes: %+v", n, k, bytes, s)
						case bytes >= best && (s.library != own || uint64(s.rows)*row < min(all, slabBytes)):
							t.Errorf("[%d, %d] in the best workspace: %+v", n, k, s)
						case bytes >= all+own+workspaceStep && s.rows != n:
							t.Errorf("[%d, %d] in %d bytes: not in one piece but %+v", n, k, bytes, s)
						}
					}
				}
			}
		}
	}
}
