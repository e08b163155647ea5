package cuda

import (
	"bytes"
	"cmp"
	"embed"
	"encoding/json"
	"fmt"
	"io/fs"
	"math"
	"os"
)

// Way is how a linear layer is computed.
type Way struct {
	Rows   int64  `json:"rows"`             // up to so many rows of x
	Kernel string `json:"kernel"`           // "few", "tile", "hopper", or "decode": decode the weight and multiply by a BLAS
	Tokens int64  `json:"tokens,omitempty"` // of a tile, where the kernel has several
	Tall   int64  `json:"tall,omitempty"`   // rows of the weight in a tile, where they are not the usual ones
	Deal   int    `json:"deal,omitempty"`   // waves of tiles, the last of them not full, that are dealt out by k
	Split  int64  `json:"split,omitempty"`  // CTAs of a cluster that share the k of a tile
}

// String names the way, without its number of rows.
func (w Way) String() string {
	s := w.Kernel
	for _, part := range []struct {
		format string
		n      int64
	}{{", %d tokens", w.Tokens}, {", %d rows of the weight", w.Tall}, {", %d waves dealt out", int64(w.Deal)}, {", split by %d", w.Split}} {
		if part.n != 0 {
			s += fmt.Sprintf(part.format, part.n)
		}
	}
	return s
}

// Tuned is what was fastest for a weight of N rows of K elements, by rows of x. Beyond the last one it is "decode".
type Tuned struct {
	N    int64 `json:"n"`
	K    int64 `json:"k"`
	Ways []Way `json:"ways"`
}

// Table says how linear layers are computed on an architecture. `gquant tune` measures one.
type Table struct {
	Device string  `json:"device"`
	Shapes []Tuned `json:"shapes"`
}

// The tables of the architectures that were measured, and default.json for the others.
//
//go:embed tune/*.json
var tables embed.FS

// TuneVariable names the environment variable with the path of a table that is used instead.
const TuneVariable = "GQUANT_TUNE"

// findTable reads the table for a device: what was measured on one of its name, else on one of its architecture.
func findTable(major, minor int, device string) (*Table, error) {
	arch := fmt.Sprintf("tune/sm_%d%d", major, minor)
	names, err := fs.Glob(tables, arch+"*.json")
	if err != nil {
		return nil, err
	}
	name := "tune/default.json"
	for _, n := range names {
		text, err := tables.ReadFile(n)
		if err != nil {
			return nil, err
		}
		t, err := readTable(text, n)
		if err != nil {
			return nil, err
		}
		if n == arch+".json" && name == "tune/default.json" || t.Device == device {
			name = n
		}
	}
	text, err := tables.ReadFile(name)
	if err != nil {
		return nil, err
	}
	if path := os.Getenv(TuneVariable); path != "" {
		name = TuneVariable + "=" + path
		if text, err = os.ReadFile(path); err != nil {
			return nil, fmt.Errorf("%s: %w", TuneVariable, err)
		}
	}
	return readTable(text, name)
}

// readTable reads a table that came from a place of this name.
func readTable(text []byte, name string) (*Table, error) {
	t, d := new(Table), json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(t); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return t, t.check(name)
}

func (t *Table) check(name string) error {
	if len(t.Shapes) == 0 {
		return fmt.Errorf("%s: there are no shapes", name)
	}
	for _, s := range t.Shapes {
		if s.N <= 0 || s.K <= 0 {
			return fmt.Errorf("%s: a shape is %d×%d", name, s.N, s.K)
		}
		for i, w := range s.Ways {
			if linearKernels[w.Kernel] == nil && w.Kernel != "decode" {
				return fmt.Errorf("%s: %d×%d, up to %d rows: there is no kernel %q", name, s.N, s.K, w.Rows, w.Kernel)
			}
			if w.Kernel == "hopper" && findHopperTile(w) < 0 {
				return fmt.Errorf("%s: %d×%d, up to %d rows: there is no kernel for tiles of %d tokens and %d rows of the weight", name, s.N, s.K, w.Rows, w.Tokens, cmp.Or(w.Tall, usualRows))
			}
			if w.Deal < 0 {
				return fmt.Errorf("%s: %d×%d, up to %d rows: deal is %d", name, s.N, s.K, w.Rows, w.Deal)
			}
			if w.Split < 0 || w.Split > maxCluster {
				return fmt.Errorf("%s: %d×%d, up to %d rows: split is %d", name, s.N, s.K, w.Rows, w.Split)
			}
			least := int64(0)
			if i > 0 {
				least = s.Ways[i-1].Rows
			}
			if w.Rows <= least {
				return fmt.Errorf("%s: %d×%d: up to %d rows comes behind up to %d", name, s.N, s.K, w.Rows, least)
			}
		}
	}
	return nil
}

// lookup finds the way of the shape that is nearest by the ratios of its sides.
func (t *Table) lookup(n, k, m int64) Way {
	best, least := &t.Shapes[0], math.Inf(1)
	logN, logK := math.Log2(float64(n)), math.Log2(float64(k))
	for i := range t.Shapes {
		s := &t.Shapes[i]
		if d := math.Abs(logN-math.Log2(float64(s.N))) + math.Abs(logK-math.Log2(float64(s.K))); d < least {
			best, least = s, d
		}
	}
	for _, w := range best.Ways {
		if m <= w.Rows {
			return w
		}
	}
	return Way{Kernel: "decode"}
}
