// SPDX-License-Identifier: GPL-3.0-or-later

// Package content reads what read capabilities of ERIS denote, from a [fetch.Source] of blocks. A
// [Sequence] reads many contents, in an order known beforehand, through one window of requests;
// [Open] makes an [io.Reader] of a sequence of one.
//
// # Trust
//
// The source must verify: every block that it delivers is the one with the reference that was
// requested. The pool (package fetch/pool) does that, since it is the pool that goes elsewhere when
// a block is wrong; readers hash no leaf again. Here every internal node is checked against its key
// and for the shape that an encoder gives it, and no content may be longer than the limit its
// reader sets. A source of blocks can therefore withhold content, but neither alter it, nor make
// the reader work or store without bound.
//
// A read capability whose level is 0 does not authenticate its own key: if the key is wrong, the
// result is noise, which the padding gives away in most cases but not in all. Capabilities must
// come from a place that is authenticated, or what was decoded must be checked by other means.
//
// # Errors
//
// Two kinds of failure ask for different answers, and can be told apart:
//
//   - a block cannot be had: what is returned wraps the error of the source, [eris.ErrNotFound] if
//     it does not have the block.
//   - the content itself is at fault: [*Error]. No source can help.
//
// Besides, there is the cause of a context that has ended.
package content

import (
	"sync/atomic"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// The window where none is given.
const (
	defaultRequests = 256
	defaultBytes    = 16 << 20
)

// Want is one content that a Sequence is to read.
type Want struct {
	Capability eris.ReadCapability
	Limit      int64 // greatest acceptable length in bytes
	// NearKeys are the keys of the leaves of what may be the same content and is on this machine,
	// or of the first of them. Near reads that at an offset; it returns how many bytes there are,
	// fewer than p has only at the end. A leaf that has the key is not requested; what Near reads
	// for it is not hashed again. Near must not wait long, and be safe for concurrent use.
	NearKeys []eris.Key
	Near     func(p []byte, offset int64) (n int, err error)
	Origin   any // where what named it has come from, as in [fetch.Request]; nil if nobody knows
}

// Info tells which content the leaves to come belong to.
type Info struct {
	Index      int // its place in the sequence, from 0 on
	Capability eris.ReadCapability
	Size       int64 // in bytes
}

// Leaf is a part of a content: a whole block but for the last, which is shorter and may be empty.
// Whoever gets it releases it once, and once more for each call of Retain, from any goroutine.
type Leaf struct {
	Bytes []byte // its only holder may change them; nobody may append to them

	users   atomic.Int32
	fetcher *fetcher
	buffer  *buffer // in which it is
}

// Retain asks for one more call of Release.
func (l *Leaf) Retain() { l.users.Add(1) }

// Release gives the memory of the part back, if nobody else holds it. Its bytes must not be used
// any more.
func (l *Leaf) Release() {
	if l.users.Add(-1) == 0 {
		l.fetcher.release(l.buffer)
	}
}
