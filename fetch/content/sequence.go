// SPDX-License-Identifier: GPL-3.0-or-later

package content

import (
	"context"
	"io"
	"iter"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// Sequence reads many contents in an order known beforehand, as if they were one: requests for the
// blocks of contents to come are made while earlier ones are being handed out, within one
// [fetch.Window]. The length of a content is known before its first byte. Contents may be of any
// mix of lengths and block sizes; thousands of short ones go as fast as a long one.
//
// How it goes: the right-most path of every content is fetched first, some way ahead, and tells its
// length; the left-most path is fetched at the same time, so that it takes one round trip per
// level, and one more, to come to the first leaf. Other leaves are then requested strictly in
// order, so that a full window always holds what is needed next. Internal nodes are requested one
// window ahead of their leaves, their parents two windows, and so on, so that no leaf has to wait
// for its parent. As many goroutines as there are processors decrypt and check; results wait in
// their places until it is their turn.
//
// Its methods must not be called by several goroutines at a time; to end it from elsewhere, end its
// context. It must be closed.
type Sequence struct {
	fetcher *fetcher
	stop    func()

	current *content // nil when all its leaves have been handed out
	ready   []slot   // leaves that have been taken from the fetcher, a part of batch
	batch   [readyBatch]slot
}

// readyBatch is how many leaves are taken from the fetcher at a time.
const readyBatch = 64

// NewSequence starts to read the wanted contents in their order. The iterator is advanced some
// hundred contents ahead of need, during calls of Next and Leaf, and must not wait long; a content
// that is not to be read must not be in it. Total is the greatest acceptable sum of the lengths in
// bytes.
//
// The source must verify its blocks, as the pool does: leaves are not hashed again.
//
// The window bounds the requests in flight, and by its Bytes the memory for blocks that were
// requested and not yet released, decrypted or on their way: half of it for leaves in order, half
// for the right-most and left-most paths of contents to come. Besides it there are, for a content
// of level 2 or more, internal nodes a little ahead of the leaves: for every 16 (or 512, by block
// size) leaves in flight one, and a few per level. It need not be large: twice as many bytes as
// come in one round trip. Zero fields stand for 256 requests and 16 MiB.
//
// The context ends everything that goes on.
func NewSequence(ctx context.Context, source fetch.Source, wants iter.Seq[Want], total int64, window fetch.Window) *Sequence {
	s := &Sequence{fetcher: newFetcher(ctx, source, total, window)}
	s.fetcher.next, s.stop = iter.Pull(wants)
	return s
}

// Next goes to the next content, passing over what is left of the present one, and waits until its
// length is known. It returns io.EOF after the last.
//
// The first failure of any content ends the whole sequence, even if it is one of a content to come:
// all requests in flight are cancelled, and Next and Leaf return the error as soon as what was
// ready has been handed out. Errors are those of the package comment, or the cause of the context.
func (s *Sequence) Next() (Info, error) {
	for s.current != nil {
		leaf, err := s.Leaf()
		if err == io.EOF {
			break
		}
		if err != nil {
			return Info{}, err
		}
		leaf.Release()
	}
	var c *content
	if len(s.ready) > 0 {
		c = s.ready[0].content
	} else {
		var err error
		if c, err = s.fetcher.waitContent(); err != nil {
			return Info{}, err
		}
	}
	s.current = c
	return Info{Index: c.index, Capability: c.shape.capability, Size: c.length}, nil
}

// Leaf waits for the next part of the present content and returns it; the caller must release it,
// in any order and from any goroutine. It returns io.EOF after the last part. A caller may hold
// several parts, but those it holds take room in the window. Other errors are those of Next.
func (s *Sequence) Leaf() (*Leaf, error) {
	if s.current == nil {
		return nil, io.EOF
	}
	if len(s.ready) == 0 {
		var err error
		if s.ready, err = s.fetcher.waitLeaves(s.batch[:0]); err != nil {
			return nil, err
		}
	}
	next := s.ready[0]
	s.ready = s.ready[1:]
	if next.last {
		s.current = nil
	}
	leaf := &next.buffer.leaf
	leaf.Bytes, leaf.fetcher, leaf.buffer = next.bytes, s.fetcher, next.buffer
	leaf.users.Store(1)
	return leaf, nil
}

// Close cancels all requests in flight and waits for them, which is quick even if the source is
// silent. Next and Leaf then return errors. It always returns nil.
func (s *Sequence) Close() error {
	s.fetcher.close()
	s.stop()
	return nil
}
