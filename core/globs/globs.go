// Package globs matches tensor names against lists of patterns, and remembers which patterns matched nothing.
package globs

import (
	"fmt"
	"slices"
	"sort"
	"strings"

	"github.com/agnivade/levenshtein"
	"github.com/bmatcuk/doublestar/v4"
)

// Set is a list of patterns. In a pattern "*" stands for any run of characters, "?" for one, and "[…]" and "{a,b}"
// mean what they do in a shell.
type Set struct {
	patterns []string
	used     []bool
}

// New takes patterns or comma-separated lists of them.
func New(lists []string) (*Set, error) {
	g := &Set{}
	for _, list := range lists {
		for _, p := range splitList(list) {
			if !doublestar.ValidatePattern(flat(p)) {
				return nil, fmt.Errorf("pattern %q is malformed", p)
			}
			g.patterns = append(g.patterns, p)
		}
	}
	g.used = make([]bool, len(g.patterns))
	return g, nil
}

// splitList cuts at commas outside braces.
func splitList(list string) []string {
	var parts []string
	depth, start := 0, 0
	for i, r := range list {
		switch r {
		case '{':
			depth++
		case '}':
			depth--
		case ',':
			if depth == 0 {
				parts = append(parts, list[start:i])
				start = i + 1
			}
		}
	}
	parts = append(parts, list[start:])
	for i := range parts {
		parts[i] = strings.TrimSpace(parts[i])
	}
	return slices.DeleteFunc(parts, func(p string) bool { return p == "" })
}

// flat hides slashes from the matcher, for which "*" ends at one: in a tensor name it is a letter like others.
func flat(s string) string { return strings.ReplaceAll(s, "/", "\x00") }

// Match gives the first pattern that matches a name; "" if none does.
func (g *Set) Match(name string) string {
	found := ""
	for i, p := range g.patterns {
		if ok, _ := doublestar.Match(flat(p), flat(name)); ok {
			g.used[i] = true
			if found == "" {
				found = p
			}
		}
	}
	return found
}

// Empty says whether there is no pattern.
func (g *Set) Empty() bool { return len(g.patterns) == 0 }

// Warnings names every pattern that matched nothing so far, with the names nearest to it. flag is what the user calls
// the list.
func (g *Set) Warnings(flag string, names []string) []string {
	var out []string
	for i, p := range g.patterns {
		if !g.used[i] {
			w := fmt.Sprintf("--%s pattern %q matches no tensor", flag, p)
			if near := nearest(p, names); len(near) > 0 {
				w += "; nearest names: " + strings.Join(near, ", ")
			}
			out = append(out, w)
		}
	}
	return out
}

// nearest ranks names by how close one of their dotted components comes to the pattern without its wildcards.
func nearest(pattern string, names []string) []string {
	core := strings.ToLower(strings.Trim(strings.NewReplacer("*", "", "?", "").Replace(pattern), "."))
	if core == "" {
		return nil
	}
	type candidate struct {
		name     string
		distance int
	}
	width := strings.Count(core, ".") + 1
	var all []candidate
	for _, name := range names {
		words := strings.Split(strings.ToLower(name), ".")
		best := levenshtein.ComputeDistance(core, strings.ToLower(name))
		for i := 0; i+width <= len(words); i++ {
			part := strings.Join(words[i:i+width], ".")
			if strings.Contains(part, core) {
				best = 0
			}
			best = min(best, levenshtein.ComputeDistance(core, part))
		}
		all = append(all, candidate{name, best})
	}
	sort.SliceStable(all, func(i, j int) bool { return all[i].distance < all[j].distance })
	var out []string
	for _, c := range all[:min(3, len(all))] {
		out = append(out, c.name)
	}
	return out
}
