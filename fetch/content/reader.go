// SPDX-License-Identifier: GPL-3.0-or-later

package content

import (
	"context"
	"io"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

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
	info, err := s.Next()
	if err != nil {
		s.Close()
		return nil, err
	}
	return &Reader{sequence: s, size: info.Size}, nil
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

// fill gets the next leaf when the last one is used up.
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

// Close cancels all requests in flight and waits for them. It always returns nil.
func (r *Reader) Close() error {
	return r.sequence.Close()
}
