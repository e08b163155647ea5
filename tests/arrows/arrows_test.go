// Package arrows holds the test that keeps the drawing of the architecture true: which package may import which,
// and where C is allowed.
package arrows

import (
	"encoding/json"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/gquant/gquant/"

// allowed lists what each package of the product may import from this module; nothing else. A new package needs
// a line here, and with it a thought about where it stands.
var allowed = map[string][]string{
	"core/dtype":       {},
	"core/safetensors": {"core/dtype"},
	"core/globs":       {},
	"core/kernel":      {"core/dtype"},
	"core/quant":       {"core/kernel", "core/dtype"},
	"core/checkpoint":  {"core/quant", "core/safetensors", "core/dtype"},
	"core/convert":     {"core/checkpoint", "core/globs", "core/quant", "core/safetensors", "core/dtype"},
	"core/verify":      {"core/checkpoint", "core/safetensors", "core/dtype"},
	"cuda":             {"core/quant", "core/dtype"},
	"capi":             {"cuda", "core/convert", "core/verify", "core/checkpoint", "core/globs", "core/quant", "core/kernel", "core/safetensors", "core/dtype"},
	"cmd/gquant":       {"cuda", "core/convert", "core/verify", "core/checkpoint", "core/quant", "core/kernel", "core/safetensors", "core/dtype"},
}

// mayUseC are the packages that may import "C".
var mayUseC = []string{"capi", "core/kernel", "cuda"}

type goPackage struct {
	ImportPath string
	Imports    []string
	CgoFiles   []string
}

func TestImportsPointOneWay(t *testing.T) {
	command := exec.Command("go", "list", "-json=ImportPath,Imports,CgoFiles", module+"core/...", module+"cuda", module+"capi", module+"cmd/...")
	text, err := command.Output()
	if err != nil {
		t.Fatalf("%v: %v", command, err)
	}
	seen := 0
	for d := json.NewDecoder(strings.NewReader(string(text))); ; {
		var p goPackage
		if err := d.Decode(&p); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		seen++
		name := strings.TrimPrefix(p.ImportPath, module)
		may, known := allowed[name]
		if !known {
			t.Errorf("package %s has no place in the drawing", name)
		}
		for _, i := range p.Imports {
			if other, ours := strings.CutPrefix(i, module); ours && !slices.Contains(may, other) {
				t.Errorf("%s imports %s", name, other)
			}
		}
		if len(p.CgoFiles) > 0 && !slices.Contains(mayUseC, name) {
			t.Errorf("%s uses cgo: %v", name, p.CgoFiles)
		}
	}
	if seen != len(allowed) {
		t.Errorf("%d packages found, the drawing has %d", seen, len(allowed))
	}
}
