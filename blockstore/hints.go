// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"hash/maphash"
	"math/bits"
	"sync/atomic"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// hints remembers where some blocks are, of a fixed number of them, so that most reads do without
// the index. They are only hints: who follows one checks what is there against the checksum of the
// location, which is bound to the reference. So it does no harm that a hint may be out of date or,
// for a moment, be made of two halves.
//
// References are told apart by a hash with a secret seed. Anybody can make a reference that has the
// checksum of another one, but nobody can make one with this hash, too.
type hints struct {
	seed maphash.Seed
	sets []hintSet
}

// hintSet is a cache line: the hints whose tags agree in some bits.
type hintSet struct {
	tags      [4]atomic.Uint64 // hashes of references
	locations [4]atomic.Uint64
}

const hintSetSize = 64

// newHints returns hints that take no more memory than given, or little.
func newHints(bytes int) *hints {
	n := max(1, bytes/hintSetSize)
	return &hints{maphash.MakeSeed(), make([]hintSet, 1<<(bits.Len(uint(n))-1))}
}

// find returns where a hint is or would be, its tag, and its number there, -1 if there is none.
func (h *hints) find(ref *eris.Reference) (set *hintSet, tag uint64, at int) {
	tag = maphash.Bytes(h.seed, ref[:])
	set = &h.sets[tag&uint64(len(h.sets)-1)]
	for i := range set.tags {
		if set.tags[i].Load() == tag {
			return set, tag, i
		}
	}
	return set, tag, -1
}

// get returns a location, if there is a hint.
func (h *hints) get(ref *eris.Reference) (location, bool) {
	set, _, at := h.find(ref)
	if at < 0 {
		return 0, false
	}
	l := set.locations[at].Load()
	return location(l), l != 0
}

// put remembers a location, in place of another hint if need be.
func (h *hints) put(ref *eris.Reference, l location) {
	set, tag, at := h.find(ref)
	if at < 0 {
		at = int(l.sum() % uint32(len(set.tags))) // any will do
		for i := range set.locations {
			if set.locations[i].Load() == 0 {
				at = i
			}
		}
	}
	set.locations[at].Store(uint64(l))
	set.tags[at].Store(tag)
}

// remove forgets a location.
func (h *hints) remove(ref *eris.Reference) {
	if set, _, at := h.find(ref); at >= 0 {
		set.locations[at].Store(0)
	}
}
