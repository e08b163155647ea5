package globs

import (
	"slices"
	"strings"
	"testing"
)

func TestGlobsMatchAcrossDotsAndSlashes(t *testing.T) {
	for _, c := range []struct {
		patterns []string
		name     string
		want     string
	}{
		{[]string{"*.norm*,*.embed*"}, "blocks.0.norm1.weight", "*.norm*"},
		{[]string{"*.norm*,*.embed*"}, "model.embed_tokens.weight", "*.embed*"},
		{[]string{"*.norm*,*.embed*"}, "norm.weight", ""},
		{[]string{"blocks.[01].*"}, "blocks.1.q.weight", "blocks.[01].*"},
		{[]string{"blocks.[01].*"}, "blocks.2.q.weight", ""},
		{[]string{"*.{q,k}.weight , *.v.weight"}, "a.k.weight", "*.{q,k}.weight"},
		{[]string{"*.{q,k}.weight , *.v.weight"}, "a.v.weight", "*.v.weight"},
		{[]string{"*.q.weight", "a.*"}, "a.q.weight", "*.q.weight"},
		{[]string{"encoder*kernel"}, "encoder/block_0/kernel", "encoder*kernel"},
		{[]string{"?.weight"}, "ab.weight", ""},
	} {
		g, err := New(c.patterns)
		if err != nil {
			t.Fatal(err)
		}
		if got := g.Match(c.name); got != c.want {
			t.Errorf("%v on %q: %q, want %q", c.patterns, c.name, got, c.want)
		}
	}
	if _, err := New([]string{"blocks.[0"}); err == nil || !strings.Contains(err.Error(), "blocks.[0") {
		t.Errorf("malformed pattern: %v", err)
	}
}

func TestUnusedPatternNamesTheNearest(t *testing.T) {
	names := []string{"blocks.0.norm1.weight", "blocks.0.attn.q.weight", "model.embed_tokens.weight"}
	g, err := New([]string{"*.nrom1*,*.q.*"})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		g.Match(n)
	}
	warnings := g.Warnings("exclude", names)
	if len(warnings) != 1 || !strings.Contains(warnings[0], "*.nrom1*") {
		t.Fatalf("warnings %q", warnings)
	}
	if near := nearest("*.nrom1*", names); !slices.Equal(near[:1], []string{"blocks.0.norm1.weight"}) {
		t.Errorf("nearest names %q", near)
	}
	if near := nearest("*.embed*", names); !slices.Equal(near[:1], []string{"model.embed_tokens.weight"}) {
		t.Errorf("nearest names %q", near)
	}
}
