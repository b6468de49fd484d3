// SPDX-License-Identifier: GPL-3.0-or-later

package nar

import (
	"context"
	"crypto/sha256"
	"hash"
	"sync"
)

// A Hasher computes the NarHash of a tree from its nodes, in a goroutine of its own if there is
// much to hash: SHA-256 is what limits a large file once decompression and writing run beside it.
// Its methods must be called from one goroutine: Walk, Contents while that is under way, and Finish
// in any case.
//
// What it hashes is handed over in order, as chunks of contents and as runs of the bytes between
// them. Small contents are copied into those runs, which saves a hand-over.
type Hasher struct {
	ctx    context.Context
	framer Framer
	size   uint64
	pool   Pool
	frame  Chunk      // what is not handed over yet
	pieces chan Chunk // nil as long as there is no goroutine
	done   sync.WaitGroup
	state  hash.Hash
}

const (
	// frameFull is the length in bytes of a run that is handed over. There is room for a node and
	// more in a chunk above it.
	frameFull = PieceSize / 2
	hashQueue = 16
	// alone is the length in bytes of an archive up to which there is no goroutine: two hand-overs
	// cost as much as the hash.
	alone = 64 << 10
	// smallPiece is the length in bytes of contents below which they are copied.
	smallPiece = 4 << 10
)

// NewHasher starts a hasher. When ctx is done its methods return the error of ctx.
func NewHasher(ctx context.Context) *Hasher { return &Hasher{ctx: ctx, state: sha256.New()} }

// start starts the goroutine.
func (h *Hasher) start() {
	h.pieces = make(chan Chunk, hashQueue)
	h.done.Go(func() {
		for c := range h.pieces {
			h.state.Write(c.Bytes)
			c.Release()
		}
	})
}

// Size is the length of the archive so far, in bytes.
func (h *Hasher) Size() uint64 { return h.size }

// Walk hashes a tree but for contents. It calls f for each node, as [Walk] does, which has those of
// a Regular hashed by Contents.
func (h *Hasher) Walk(nodes Nodes, f func(n Node) error) error {
	return Walk(nodes, func(n Node) error {
		err := h.extend(func(frame []byte) []byte { return h.framer.AppendNode(frame, n) })
		if err == nil {
			err = f(n)
		}
		if err == nil && n.Kind == Regular {
			err = h.extend(h.framer.AppendContentsEnd)
		}
		if err == nil { // cmp.Or would take memory for each node
			err = h.ctx.Err()
		}
		return err
	})
}

// Contents hashes the next piece of the contents of a Regular. The caller still owns c; the hasher
// retains it for as long as it needs it.
func (h *Hasher) Contents(c Chunk) error {
	if len(c.Bytes) < smallPiece {
		return h.extend(func(frame []byte) []byte { return append(frame, c.Bytes...) })
	}
	h.size += uint64(len(c.Bytes))
	if err := h.push(); err != nil {
		return err
	}
	c.Retain()
	return h.send(c)
}

// Finish ends the goroutine and returns the hash. It means nothing after an error.
func (h *Hasher) Finish() (sum [sha256.Size]byte) {
	h.ctx = context.Background() // what is left is taken soon, and the hash must not lack it
	h.push()
	if h.pieces != nil {
		close(h.pieces)
		h.done.Wait()
	}
	h.state.Sum(sum[:0])
	return sum
}

// extend hashes what is appended to the framing bytes, which are handed over when there are many.
func (h *Hasher) extend(appendTo func([]byte) []byte) error {
	if h.frame.Bytes == nil && h.size > alone { // a short archive takes what it needs
		h.frame = h.pool.Get()
		h.frame.Bytes = h.frame.Bytes[:0]
	}
	before := len(h.frame.Bytes)
	h.frame.Bytes = appendTo(h.frame.Bytes)
	h.size += uint64(len(h.frame.Bytes) - before)
	if len(h.frame.Bytes) < frameFull {
		return nil
	}
	return h.push()
}

// push hands the framing bytes over.
func (h *Hasher) push() error {
	c := h.frame
	if c.Bytes == nil {
		return nil
	}
	h.frame = Chunk{}
	return h.send(c)
}

// send hashes what it takes over.
func (h *Hasher) send(c Chunk) error {
	if h.size <= alone {
		h.state.Write(c.Bytes)
		c.Release()
		return nil
	}
	if h.pieces == nil {
		h.start()
	}
	select {
	case h.pieces <- c:
		return nil
	case <-h.ctx.Done():
		c.Release()
		return h.ctx.Err()
	}
}
