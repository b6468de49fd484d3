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
	seed  maphash.Seed
	slots []hint // by the hash
}

// hint says where the block is whose reference has the hash.
type hint struct{ hash, location atomic.Uint64 }

const hintSize = 16

// newHints returns hints that take no more memory than given, or little.
func newHints(bytes int) *hints {
	n := max(1, bytes/hintSize)
	return &hints{maphash.MakeSeed(), make([]hint, 1<<(bits.Len(uint(n))-1))}
}

// find returns where a hint is or would be, and its hash.
func (h *hints) find(ref *eris.Reference) (*hint, uint64) {
	hash := maphash.Bytes(h.seed, ref[:])
	return &h.slots[hash&uint64(len(h.slots)-1)], hash
}

// get returns a location, if there is a hint.
func (h *hints) get(ref *eris.Reference) (location, bool) {
	hint, hash := h.find(ref)
	l := hint.location.Load()
	return location(l), l != 0 && hint.hash.Load() == hash
}

// put remembers a location, in place of another hint if need be.
func (h *hints) put(ref *eris.Reference, l location) {
	hint, hash := h.find(ref)
	hint.location.Store(uint64(l))
	hint.hash.Store(hash)
}

// remove forgets a location.
func (h *hints) remove(ref *eris.Reference) {
	if hint, hash := h.find(ref); hint.hash.Load() == hash {
		hint.location.Store(0)
	}
}
