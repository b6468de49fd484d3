// SPDX-License-Identifier: GPL-3.0-or-later

// Package content reads what read capabilities of ERIS denote, from a [fetch.Source] of blocks. A
// [Sequence] reads many contents, in an order known beforehand, through one window of requests;
// [Open] makes an [io.Reader] of a sequence of one.
//
// # Trust
//
// The source must verify: every block that it delivers is the one with the reference that was
// requested. The pool (package fetch/pool) does that; readers hash no leaf again. Here every
// internal node is checked against its key and for the shape that an encoder gives it, and no
// content may be longer than the limit its reader sets. A source of blocks can therefore withhold
// content, but neither alter it, nor make the reader work or store without bound.
//
// A read capability whose level is 0 does not authenticate its own key: if the key is wrong, the
// result is noise, which the padding gives away in most cases but not in all. Capabilities must
// come from a place that is authenticated, or what was decoded must be checked by other means.
//
// # Errors
//
// A block that cannot be had is the error of the source, wrapped: [eris.ErrNotFound] if it does not
// have the block. [*Error] says that the content itself is at fault, where no source can help.
// Besides, there is the cause of a context that has ended.
package content

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"sync/atomic"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
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

// ErrTooLarge is wrapped by the [*Error] of content that is longer than the limit its reader set.
var ErrTooLarge = errors.New("content is longer than its limit")

// Error says that content cannot be decoded although every block is what its reference says: the
// read capability is wrong, the tree is not one that an encoder makes, or the content is longer
// than allowed ([ErrTooLarge]). No source of blocks can help.
type Error struct {
	Root eris.Reference // the root reference of the content's capability
	Err  error          // what is wrong
}

// Error returns a text with the root reference.
func (e *Error) Error() string {
	return fmt.Sprintf("content with root %v: %v", e.Root, e.Err)
}

// Unwrap returns Err.
func (e *Error) Unwrap() error { return e.Err }

var (
	errNodeSingle  = errors.New("root has a single reference")
	errNodePartial = errors.New("internal node is not full, but not the last of its level")
	errNodeKey     = errors.New("key of an internal node is not the hash of its content")
	errClosed      = errors.New("sequence of contents is closed")
)

// Sequence reads many contents in an order known beforehand, as if they were one: requests for the
// blocks of contents to come are made while earlier ones are being handed out, within one
// [fetch.Window]. Thousands of short ones go as fast as a long one.
//
// The right-most path of every content is fetched first, some way ahead, and tells its length; the
// left-most path at the same time, so that the first leaf is there after one round trip per level.
// Other leaves are then requested strictly in order, so that a full window always holds what is
// needed next. Internal nodes are requested one window ahead of their leaves, their parents two
// windows, and so on. As many goroutines as there are processors decrypt and check; results wait in
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

// NewSequence starts to read the wanted contents in their order, until the context ends. The
// iterator is advanced some hundred contents ahead of need, during calls of Next and Leaf, and must
// not wait long; a content that is not to be read must not be in it. Total is the greatest
// acceptable sum of the lengths in bytes. The source must verify.
//
// The window bounds the requests in flight, and by its Bytes the memory for blocks that were
// requested and not yet released, decrypted or on their way: half of it for leaves in order, half
// for the paths of contents to come. Besides it there are, for a content of level 2 or more,
// internal nodes a little ahead of the leaves: one for every 16 (or 512, by block size) of these,
// and a few per level. Zero fields stand for 256 requests and 16 MiB.
func NewSequence(ctx context.Context, source fetch.Source, wants iter.Seq[Want], total int64, window fetch.Window) *Sequence {
	s := &Sequence{fetcher: newFetcher(ctx, source, total, window)}
	s.fetcher.next, s.stop = iter.Pull(wants)
	return s
}

// Next goes to the next content, passing over what is left of the present one, and waits until its
// length is known, in bytes. It returns io.EOF after the last.
//
// The first failure of any content ends the whole sequence, even if it is one of a content to come:
// all requests in flight are cancelled, and Next and Leaf return the error as soon as what was
// ready has been handed out. Errors are those of the package comment, or the cause of the context.
func (s *Sequence) Next() (size int64, err error) {
	for s.current != nil {
		leaf, err := s.Leaf()
		if err == io.EOF {
			break
		}
		if err != nil {
			return 0, err
		}
		leaf.Release()
	}
	var c *content
	if len(s.ready) > 0 {
		c = s.ready[0].content
	} else if c, err = s.fetcher.waitContent(); err != nil {
		return 0, err
	}
	s.current = c
	return c.length, nil
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
// silent. Next and Leaf then return errors.
func (s *Sequence) Close() {
	s.fetcher.close()
	s.stop()
}

// Reader reads one content from start to end: it is a [Sequence] of one. It must not be used by
// several goroutines at a time, and must be closed.
type Reader struct {
	sequence *Sequence
	size     int64
	resumed  bool
	leaf     *Leaf
	rest     []byte // of the leaf
	origin   any
	err      error
}

// Open starts to read one content and waits until its length is known; by then the first leaf is
// there, too, or on its way. Nothing else is fetched before Read is called, so that it costs little
// to look what a content is. Limit is the greatest length in bytes that is acceptable; content that
// is longer is refused with an [*Error] that wraps [ErrTooLarge], mostly before anything is
// fetched. The source must verify, as [NewSequence] has it. The context ends everything that goes
// on, reading included.
func Open(ctx context.Context, source fetch.Source, capability eris.ReadCapability, limit int64, window fetch.Window) (*Reader, error) {
	one := func(yield func(Want) bool) { yield(Want{Capability: capability, Limit: limit}) }
	s := NewSequence(ctx, source, one, limit, window)
	s.fetcher.paused = true
	size, err := s.Next()
	if err != nil {
		s.Close()
		return nil, err
	}
	return &Reader{sequence: s, size: size}, nil
}

// Size returns the length of the content in bytes.
func (r *Reader) Size() int64 { return r.size }

// Origin returns where the last block that was read has come from, for [Want].
func (r *Reader) Origin() any { return r.origin }

// Peek returns the next n bytes without passing over them, or as many as there are until the end of
// a block or of the content: before anything has been read it is at least a kibibyte. They are
// valid until the next call of another method. Errors are those of Read, but that the content has
// ended is none.
func (r *Reader) Peek(n int) ([]byte, error) {
	if err := r.fill(); err != nil && err != io.EOF {
		return nil, err
	}
	return r.rest[:min(n, len(r.rest))], nil
}

// Read reads the next bytes of the content; all of them belong to blocks that were verified. Errors
// are those of the package comment.
func (r *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if !r.resumed {
		r.resumed = true
		r.sequence.fetcher.resume()
	}
	if err := r.fill(); err != nil {
		return 0, err
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *Reader) fill() error {
	for len(r.rest) == 0 {
		if r.leaf != nil {
			r.leaf.Release()
			r.leaf = nil
		}
		if r.err != nil {
			return r.err
		}
		if r.leaf, r.err = r.sequence.Leaf(); r.err != nil {
			return r.err
		}
		r.rest, r.origin = r.leaf.Bytes, r.leaf.buffer.origin
	}
	return nil
}

// Close cancels all requests in flight and waits for them.
func (r *Reader) Close() { r.sequence.Close() }
