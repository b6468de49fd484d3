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

func (h *hints) find(ref *eris.Reference) (*hintSet, uint64) {
	tag := maphash.Bytes(h.seed, ref[:])
	return &h.sets[tag&uint64(len(h.sets)-1)], tag
}

// get returns a location, if there is a hint.
func (h *hints) get(ref *eris.Reference) (location, bool) {
	set, tag := h.find(ref)
	for i := range set.tags {
		if set.tags[i].Load() == tag {
			if l := set.locations[i].Load(); l != 0 {
				return location(l), true
			}
		}
	}
	return 0, false
}

// put remembers a location, in place of another hint if need be.
func (h *hints) put(ref *eris.Reference, l location) {
	set, tag := h.find(ref)
	free := -1
	for i := range set.tags {
		switch {
		case set.tags[i].Load() == tag:
			set.locations[i].Store(uint64(l))
			return
		case free < 0 && set.locations[i].Load() == 0:
			free = i
		}
	}
	if free < 0 {
		free = int(l.sum() % uint32(len(set.tags))) // any will do
	}
	set.locations[free].Store(uint64(l))
	set.tags[free].Store(tag)
}

// remove forgets a location.
func (h *hints) remove(ref *eris.Reference) {
	set, tag := h.find(ref)
	for i := range set.tags {
		if set.tags[i].Load() == tag {
			set.locations[i].Store(0)
		}
	}
}
