// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"slices"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// maxTries is how often at most it is tried to make one item, with one old item or another and one
// table or another.
const maxTries = 4

// A group is references of the old and of the new item that may belong together in any order.
type group struct{ old, new []string }

// mappings returns what may have to be replaced to make the new item of the old one: itself, and
// each reference that is not in both by one of the same name, else by one of a name that differs in
// digits only. Where several have the same name there are several ways, of which it returns the
// first few. It returns none if a reference has no counterpart: what is found in the contents would
// be another set of references then.
func mappings(old, new string, oldRefs, newRefs []string) [][]pair {
	oldRefs, newRefs = without(oldRefs, newRefs, old), without(newRefs, oldRefs, new)
	if !all(oldRefs, newRefs) {
		return nil
	}
	groups := byName(&oldRefs, &newRefs, func(name string) string { return name })
	groups = append(groups, byName(&oldRefs, &newRefs, withoutDigits)...)
	if len(oldRefs)+len(newRefs) > 0 {
		return nil
	}
	ways := [][]pair{{{old, new}}}
	for _, g := range groups {
		var longer [][]pair
		for _, order := range orders(g.new, maxTries) {
			for _, way := range ways {
				way = slices.Clone(way)
				for i := range order {
					way = append(way, pair{g.old[i], order[i]})
				}
				longer = append(longer, way)
			}
		}
		ways = longer[:min(len(longer), maxTries)]
	}
	return ways
}

// some returns what can be replaced where not all references have a counterpart.
func some(old, new string, oldRefs, newRefs []string) []pair {
	var pairs []pair
	for _, r := range Replacements(old, new, oldRefs, newRefs) {
		pairs = append(pairs, pair{r.Old, r.New})
	}
	return pairs
}

// without returns refs less those that are in others and the item itself, in order.
func without(refs, others []string, itself string) []string {
	var rest []string
	for _, r := range refs {
		if r != itself && !slices.Contains(others, r) {
			rest = append(rest, r)
		}
	}
	slices.Sort(rest)
	return slices.Compact(rest)
}

// all reports whether all are names of store items.
func all(lists ...[]string) bool {
	for _, list := range lists {
		for _, name := range list {
			if narinfo.CheckStoreName(name) != nil {
				return false
			}
		}
	}
	return true
}

// byName takes out of both lists the references of which there are as many in one as in the other
// with the same key, which follows from what comes after the hash.
func byName(old, new *[]string, key func(name string) string) []group {
	groups := map[string]*group{}
	var keys []string
	add := func(list []string, to func(*group) *[]string) {
		for _, ref := range list {
			k := key(ref[hashLen:])
			if groups[k] == nil {
				groups[k] = &group{}
				keys = append(keys, k)
			}
			l := to(groups[k])
			*l = append(*l, ref)
		}
	}
	add(*old, func(g *group) *[]string { return &g.old })
	add(*new, func(g *group) *[]string { return &g.new })
	*old, *new = nil, nil
	var whole []group
	for _, k := range keys {
		if g := groups[k]; len(g.old) == len(g.new) {
			whole = append(whole, *g)
		} else {
			*old, *new = append(*old, g.old...), append(*new, g.new...)
		}
	}
	return whole
}

// withoutDigits is a name with all of its digits alike.
func withoutDigits(name string) string {
	return strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return '0'
		}
		return r
	}, name)
}

// orders returns the orders of list, limit at most, the given one first.
func orders(list []string, limit int) [][]string {
	if len(list) < 2 {
		return [][]string{list}
	}
	var all [][]string
	for i := range list {
		rest := slices.Delete(slices.Clone(list), i, i+1)
		for _, order := range orders(rest, limit) {
			if all = append(all, append([]string{list[i]}, order...)); len(all) == limit {
				return all
			}
		}
	}
	return all
}
