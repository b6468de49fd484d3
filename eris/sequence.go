// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"context"
	"errors"
	"io"
	"iter"
)

// Window bounds what a reader has in flight. Zero fields stand for the defaults.
type Window struct {
	// Requests is the greatest number of calls of Blocks.Get at a time, each on a goroutine of its own; the goroutines are
	// started as they are needed. Of a [Starter] it is the greatest number of requests in flight, which have none. It should be
	// at least the number of blocks that the line holds in one round trip.
	Requests int

	// Bytes bounds the memory for blocks that were asked for and not yet released, decrypted or on their way: half of it
	// for leaves in order, half for the right-most paths of contents to come. Besides it there are, for a content of level
	// 2 or more, internal nodes a little ahead of the leaves: for every 16 (or 512, by block size) leaves in flight one,
	// and a few per level. It need not be large: as many bytes as the line holds in one round trip, twice.
	Bytes int64
}

// The window where none is given.
const (
	DefaultRequests = 256
	DefaultBytes    = 16 << 20
)

// Want is one content that a Sequence is to read.
type Want struct {
	Capability ReadCapability
	Limit      int64 // greatest acceptable length in bytes
}

// Sequence reads many contents in an order known beforehand, as if they were one: requests for the blocks of contents to
// come are made while earlier ones are being handed out, within one [Window]. The length of a content is known before its
// first byte. Contents may be of any mix of lengths and block sizes; thousands of short ones go as fast as a long one.
//
// How it goes: the right-most path of every content is fetched first, some way ahead, and tells its length. Leaves are then
// asked for strictly in order, so that a full window always holds what is needed next. Internal nodes are asked for one
// window ahead of their leaves, their parents two windows, and so on, so that no leaf has to wait for its parent. A pool of
// goroutines gets, verifies and decrypts; results wait in their places until it is their turn.
//
// Its methods must not be called by several goroutines at a time; to end it from elsewhere, end its context. It must be
// closed.
type Sequence struct {
	walker *walker
	next   func() (Want, bool)
	stop   func()

	current *content // nil when all its leaves have been handed out
	ready   []slot   // leaves that have been taken from the walker, a part of batch
	batch   [readyBatch]slot
}

// readyBatch is how many leaves are taken from the walker at a time.
const readyBatch = 64

// ContentInfo tells which content the leaves to come belong to.
type ContentInfo struct {
	Index      int // its place in the sequence, from 0 on
	Capability ReadCapability
	Size       int64 // in bytes
}

// Leaf is a part of a content: a whole block but for the last, which is shorter and may be empty.
type Leaf struct {
	Bytes  []byte // the holder may change them, but not append to them, and must not use them after Release
	buffer *buffer
	walker *walker
}

var errSequenceClosed = errors.New("sequence of contents is closed")

// NewSequence starts to read the wanted contents in their order. The iterator is advanced some hundred contents ahead of
// need, during calls of Next and Leaf, and must not wait long; a content that is not to be read must not be in it. Total is
// the greatest acceptable sum of the lengths in bytes.
//
// The context ends everything that goes on.
func NewSequence(ctx context.Context, blocks Blocks, wants iter.Seq[Want], total int64, window Window) *Sequence {
	s := &Sequence{walker: newWalker(ctx, blocks, total, window)}
	s.next, s.stop = iter.Pull(wants)
	return s
}

// newSequenceOf returns a sequence of one content that is open already; it has no Next.
func newSequenceOf(ctx context.Context, c *Content) *Sequence {
	s := &Sequence{walker: newWalker(ctx, c.blocks, c.length, c.window), stop: func() {}}
	s.current = s.walker.addOpened(c)
	return s
}

// Next goes to the next content, passing over what is left of the present one, and waits until its length is known. It
// returns io.EOF after the last.
//
// The first failure of any content ends the whole sequence, even if it is one of a content to come: nothing more is asked
// for, and Next and Leaf return the error as soon as what was ready has been handed out. Errors are those of the package
// comment, or that of the context.
func (s *Sequence) Next() (ContentInfo, error) {
	for s.current != nil {
		leaf, err := s.Leaf()
		if err == io.EOF {
			break
		}
		if err != nil {
			return ContentInfo{}, err
		}
		leaf.Release()
	}
	var c *content
	if len(s.ready) > 0 {
		c = s.ready[0].content
	} else {
		var err error
		if c, err = s.walker.waitContent(s.refill); err != nil {
			return ContentInfo{}, err
		}
	}
	s.current = c
	return ContentInfo{Index: c.index, Capability: c.spine.capability, Size: c.length}, nil
}

// Leaf waits for the next part of the present content and returns it; the caller must release it, in any order and from any
// goroutine. It returns io.EOF after the last part. A caller may hold several parts, but those it holds take room in the
// window. Other errors are those of Next.
func (s *Sequence) Leaf() (Leaf, error) {
	if s.current == nil {
		return Leaf{}, io.EOF
	}
	if len(s.ready) == 0 {
		var err error
		if s.ready, err = s.walker.waitLeaves(s.batch[:0], s.refill); err != nil {
			return Leaf{}, err
		}
	}
	next := s.ready[0]
	s.ready = s.ready[1:]
	if next.last {
		s.current = nil
	}
	return Leaf{Bytes: next.bytes, buffer: next.buffer, walker: s.walker}, nil
}

// refill pulls up to n more contents from the iterator. The walker calls it without its lock.
func (s *Sequence) refill(n int) (wants []Want, ended bool) {
	for range n {
		want, ok := s.next()
		if !ok {
			return wants, true
		}
		wants = append(wants, want)
	}
	return wants, false
}

// Release gives the memory of the part back. Further calls, and calls on the zero value, do nothing; but of copies of a
// Leaf only one may be released.
func (l *Leaf) Release() {
	if l.buffer != nil {
		l.walker.release(l.buffer)
		*l = Leaf{}
	}
}

// Close cancels all requests in flight and waits for them. Next and Leaf then return errors. It always returns nil.
func (s *Sequence) Close() error {
	s.walker.close()
	s.stop()
	return nil
}
