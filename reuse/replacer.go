// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"io"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// HashLength is the number of characters of the hash in the name of a store item.
const HashLength = hashLen

// A Replacement is the hash of an old item and that of a new one which takes its place, of
// [HashLength] characters each.
type Replacement struct{ Old, New string }

// Replacements returns what has to be replaced in an old item to make it more like a new one: the
// hash of the item itself, and those of references of which it can be told by their names, or else
// by their names without digits, which one takes the place of which. All are names of store items.
func Replacements(old, new string, oldRefs, newRefs []string) []Replacement {
	oldRefs, newRefs = without(oldRefs, newRefs, old), without(newRefs, oldRefs, new)
	if !all([]string{old, new}, oldRefs, newRefs) {
		return nil
	}
	groups := byName(&oldRefs, &newRefs, func(name string) string { return name })
	groups = append(groups, byName(&oldRefs, &newRefs, withoutDigits)...)
	groups = append(groups, group{[]string{old}, []string{new}})
	var list []Replacement
	seen := map[string]bool{}
	for _, g := range groups {
		for i := range g.old {
			r := Replacement{g.old[i][:hashLen], g.new[i][:hashLen]}
			if !seen[r.Old] && r.Old != r.New {
				seen[r.Old] = true
				list = append(list, r)
			}
		}
	}
	return list
}

// A Replacer replaces hashes, and nothing that follows them. A hash may be written in bytes, in the
// characters of UTF-16, or in those of UTF-32, as when an old item is made a new one. Of those that
// overlap the first one counts. It is safe for concurrent use.
type Replacer struct {
	table *table
	pool  nar.Pool
}

// NewReplacer returns a replacer. The old hashes must differ from each other.
func NewReplacer(list []Replacement) *Replacer {
	pairs := make([]pair, len(list))
	for i, r := range list {
		pairs[i] = pair{r.Old, r.New}
	}
	return &Replacer{table: newTable(pairs)}
}

// None reports whether there is nothing to replace.
func (r *Replacer) None() bool { return len(r.table.pairs) == 0 }

// Replace replaces the hashes that are whole in b.
func (r *Replacer) Replace(b []byte) {
	if !r.None() {
		r.table.rewrite(b, len(b))
	}
}

// Contents returns the first size bytes of a file, with all hashes replaced, piece by piece. A file
// that has become shorter is an error.
func (r *Replacer) Contents(f io.ReaderAt, size int64) nar.Feeder {
	return replaced{&stream{table: r.table, pool: &r.pool, file: f, size: size, piece: nar.PieceSize}}
}

type replaced struct{ *stream }

// Next implements [nar.Feeder].
func (r replaced) Next() (nar.Chunk, error) { return r.next() }
