// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver

import (
	"sync"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// recentBlocks is how many blocks are kept that were served in parts.
const recentBlocks = 32

// recent keeps blocks that were served in parts, so that a block that is fetched in 2048 parts of
// 16 bytes is not looked up as often.
type recent struct {
	mu      sync.Mutex
	entries [recentBlocks]recentBlock
	next    int
}

type recentBlock struct {
	ref   eris.Reference
	block []byte
}

// get appends the block to memory, and reports whether it was there.
func (r *recent) get(ref eris.Reference, memory []byte) ([]byte, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.entries {
		if e := &r.entries[i]; e.ref == ref && e.block != nil {
			return append(memory, e.block...), true
		}
	}
	return nil, false
}

// add keeps a copy of a block, in place of the oldest.
func (r *recent) add(ref eris.Reference, block []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := &r.entries[r.next]
	r.next = (r.next + 1) % recentBlocks
	*e = recentBlock{ref, append(e.block[:0], block...)}
}
