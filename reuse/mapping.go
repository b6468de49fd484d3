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
func mappings(old, new string, oldRefs, newRefs []string) [][]Replacement {
	oldRefs, newRefs = without(oldRefs, newRefs, old), without(newRefs, oldRefs, new)
	if !all(oldRefs, newRefs) {
		return nil
	}
	found := groups(&oldRefs, &newRefs)
	if len(oldRefs)+len(newRefs) > 0 {
		return nil
	}
	ways := [][]Replacement{{{old, new}}}
	for _, g := range found {
		var longer [][]Replacement
		for _, order := range orders(g.new, maxTries) {
			for _, way := range ways {
				way = slices.Clone(way)
				for i := range order {
					way = append(way, Replacement{g.old[i], order[i]})
				}
				longer = append(longer, way)
			}
		}
		ways = longer[:min(len(longer), maxTries)]
	}
	return ways
}

// Replacements returns what has to be replaced in an old item to make it more like a new one: the
// hash of the item itself, and those of references of which it can be told by their names, or else
// by their names without digits, which one takes the place of which. All are names of store items.
func Replacements(old, new string, oldRefs, newRefs []string) []Replacement {
	oldRefs, newRefs = without(oldRefs, newRefs, old), without(newRefs, oldRefs, new)
	if !all([]string{old, new}, oldRefs, newRefs) {
		return nil
	}
	var list []Replacement
	seen := map[string]bool{}
	for _, g := range append(groups(&oldRefs, &newRefs), group{[]string{old}, []string{new}}) {
		for i := range g.old {
			r := Replacement{g.old[i][:HashLength], g.new[i][:HashLength]}
			if !seen[r.Old] && r.Old != r.New {
				seen[r.Old] = true
				list = append(list, r)
			}
		}
	}
	return list
}

// without returns refs less those that are in others and the item itself, in order.
func without(refs, others []string, itself string) []string {
	rest := slices.DeleteFunc(slices.Clone(refs), func(r string) bool { return r == itself || slices.Contains(others, r) })
	slices.Sort(rest)
	return slices.Compact(rest)
}

// all reports whether all are names of store items.
func all(lists ...[]string) bool {
	return !slices.ContainsFunc(slices.Concat(lists...), func(name string) bool { return narinfo.CheckStoreName(name) != nil })
}

// groups takes out of both lists what belongs together by name, or else by name without digits.
func groups(old, new *[]string) []group {
	same := byName(old, new, func(name string) string { return name })
	return append(same, byName(old, new, withoutDigits)...)
}

// byName takes out of both lists the references of which there are as many in one as in the other
// with the same key, which follows from what comes after the hash.
func byName(old, new *[]string, key func(name string) string) []group {
	found := map[string]*group{}
	var keys []string
	of := func(ref string) *group {
		k := key(ref[HashLength:])
		if found[k] == nil {
			found[k] = &group{}
			keys = append(keys, k)
		}
		return found[k]
	}
	for _, ref := range *old {
		g := of(ref)
		g.old = append(g.old, ref)
	}
	for _, ref := range *new {
		g := of(ref)
		g.new = append(g.new, ref)
	}
	*old, *new = nil, nil
	var whole []group
	for _, k := range keys {
		if g := found[k]; len(g.old) == len(g.new) {
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
