package cuda

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestTables(t *testing.T) {
	entries, err := tables.ReadDir("tune")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		text, err := tables.ReadFile("tune/" + e.Name())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := readTable(text, e.Name()); err != nil {
			t.Error(err)
		}
	}
	for device, want := range map[string]string{"NVIDIA H200": "NVIDIA H200", "NVIDIA H100 PCIe": "NVIDIA H100 80GB HBM3"} {
		if table, err := findTable(9, 0, device); err != nil || table.Device != want {
			t.Errorf("%s has the table of %v (%v)", device, table, err)
		}
	}
	for _, arch := range [][2]int{{9, 0}, {8, 6}, {99, 9}} {
		table, err := findTable(arch[0], arch[1], "")
		if err != nil {
			t.Fatal(err)
		}
		if way := table.lookup(4096, 4096, 1); way.Kernel != "few" {
			t.Errorf("sm_%d%d has %+v for one row", arch[0], arch[1], way)
		}
		if way := table.lookup(4096, 4096, 1<<30); way.Kernel != "decode" {
			t.Errorf("sm_%d%d has %+v for a billion rows", arch[0], arch[1], way)
		}
	}
}

func TestLookup(t *testing.T) {
	table, err := readTable([]byte(`{"shapes": [
		{"n": 1000, "k": 1000, "ways": [{"rows": 8, "kernel": "few"}, {"rows": 64, "kernel": "hopper", "tokens": 64, "deal": 1}]},
		{"n": 8000, "k": 1000, "ways": [{"rows": 100, "kernel": "tile"}]}]}`), "test")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		n, k, m int64
		want    Way
	}{
		{1000, 1000, 1, Way{Rows: 8, Kernel: "few"}},
		{1, 1, 8, Way{Rows: 8, Kernel: "few"}},
		{2000, 64, 9, Way{Rows: 64, Kernel: "hopper", Tokens: 64, Deal: 1}},
		{1000, 1000, 65, Way{Kernel: "decode"}},
		{3000, 1000, 65, Way{Rows: 100, Kernel: "tile"}}, // by ratios it is nearer to 8000
		{8000, 9000, 0, Way{Rows: 100, Kernel: "tile"}},
	} {
		if got := table.lookup(c.n, c.k, c.m); got != c.want {
			t.Errorf("%d×%d, %d rows: %+v, want %+v", c.n, c.k, c.m, got, c.want)
		}
	}
}

func TestTableOfVariable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "table.json")
	t.Setenv(TuneVariable, path)
	for text, want := range map[string]string{
		"":                               "no such file",
		"{":                              "unexpected EOF",
		`{"shapes": []}`:                 "no shapes",
		`{"shapes": [{"n": 0, "k": 1}]}`: "0×1",
		`{"shapes": [{"n": 1, "k": 1, "ways": [{"rows": 1, "kernel": "fast"}]}]}`:                               `no kernel "fast"`,
		`{"shapes": [{"n": 1, "k": 1, "ways": [{"rows": 2, "kernel": "few"}, {"rows": 2, "kernel": "tile"}]}]}`: "behind",
		`{"shapes": [{"n": 1, "k": 1, "ways": [{"rows": 0, "kernel": "few"}]}]}`:                                "up to 0",
		`{"shapes": [{"n": 1, "k": 1, "ways": [{"rows": 1, "kernel": "hopper", "tokens": 48}]}]}`:               "tiles of 48 tokens and 128 rows",
		`{"shapes": [{"n": 1, "k": 1, "ways": [{"rows": 1, "kernel": "hopper", "tokens": 64, "deal": -1}]}]}`:   "deal is -1",
		`{"shapes": [{"n": 1, "k": 1, "ways": [{"rows": 1, "kernel": "hopper", "tokens": 64, "split": 9}]}]}`:   "split is 9",
		`{"shapes": [{"n": 1, "k": 1, "ways": [{"rows": 1, "kernel": "hopper", "tokens": 256, "tall": 192}]}]}`: "tiles of 256 tokens and 192 rows",
		`{"shapes": [{"n": 1, "k": 1, "way": []}]}`:                                                             "unknown field",
	} {
		if text != "" {
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		_, err := findTable(9, 0, "")
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v, want %q and the path", text, err, want)
		}
		os.Remove(path)
	}
}
