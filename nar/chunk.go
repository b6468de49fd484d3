// SPDX-License-Identifier: GPL-3.0-or-later

package nar

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
)

// A Chunk is a piece of bytes in memory that several stages of a pipeline can look at at the same
// time and that is used again when the last of them has released it. So contents travel from a
// decompressor to a file and to a hash without being copied.
//
// Nobody may change Bytes. A Chunk is a small value; copying it does not retain it.
type Chunk struct {
	Bytes []byte
	owner Owner
}

// An Owner counts the users of a piece of memory. Both methods are safe for concurrent use.
type Owner interface {
	// Retain adds a user.
	Retain()
	// Release takes a user away. After the last one the memory is used again.
	Release()
}

// NewChunk returns a chunk with one user. With a nil owner the memory is left to the garbage
// collector.
func NewChunk(b []byte, owner Owner) Chunk { return Chunk{b, owner} }

// Retain adds a user, who must call Release too.
func (c Chunk) Retain() {
	if c.owner != nil {
		c.owner.Retain()
	}
}

// Release ends one user's use of the chunk. Each user must call it once.
func (c Chunk) Release() {
	if c.owner != nil {
		c.owner.Release()
	}
}

// A Feeder hands out a stream of bytes piece by piece. It is not safe for concurrent use.
type Feeder interface {
	// Next returns the next piece, owned by the caller, and io.EOF after the last. Any other error
	// is final.
	Next() (Chunk, error)
}

// buffer is memory that goes home when its last user has released it.
type buffer struct {
	bytes []byte
	users atomic.Int32
	home  func(*buffer) // must not wait
}

// lend returns the first n bytes of the memory, which has one user then.
func (b *buffer) lend(n int) Chunk {
	b.users.Store(1)
	return Chunk{b.bytes[:n], b}
}

func (b *buffer) Retain() { b.users.Add(1) }

func (b *buffer) Release() {
	if b.users.Add(-1) == 0 {
		b.home(b)
	}
}

// A ReadAhead is a [Feeder] that reads from an io.Reader in a goroutine of its own, so that what is
// behind the reader (a decompressor, a network) works while the consumer does. Its memory is
// bounded: when all of its buffers are in use it waits until one is released.
type ReadAhead struct {
	pieces chan piece
	stop   context.CancelFunc
	failed error
}

type piece struct {
	chunk Chunk
	err   error
}

// NewReadAhead starts reading from r, in count buffers of size bytes. It stops at the first error
// of r, which io.EOF is too, when ctx is done, or at Close. Nothing of the first whole bytes waits
// for what follows them.
func NewReadAhead(ctx context.Context, r io.Reader, count, size int, whole uint64) *ReadAhead {
	ctx, stop := context.WithCancel(ctx)
	a := &ReadAhead{pieces: make(chan piece, count+1), stop: stop} // has room for all, and an error
	go a.read(ctx, r, count, size, whole)
	return a
}

func (a *ReadAhead) read(ctx context.Context, r io.Reader, count, size int, whole uint64) {
	defer close(a.pieces)
	free := make(chan *buffer, count) // has room for all
	home := func(b *buffer) { free <- b }
	made, come := 0, uint64(0)
	var failed error
	for failed == nil {
		var b *buffer
		select {
		case b = <-free:
		default:
			if made < count {
				b = &buffer{bytes: make([]byte, size), home: home}
				made++
				break
			}
			select {
			case b = <-free:
			case <-ctx.Done():
				a.pieces <- piece{err: ctx.Err()}
				return
			}
		}
		n := 0
		// Fill the buffer, but do not let a consumer wait that has nothing else to do.
		for n < size && failed == nil && (n == 0 || len(a.pieces) > 0 && come != whole) {
			var m int
			m, failed = r.Read(b.bytes[n:])
			n += m
			come += uint64(m)
			if ctx.Err() != nil {
				failed = ctx.Err()
			}
		}
		if n > 0 {
			a.pieces <- piece{chunk: b.lend(n)}
		}
	}
	a.pieces <- piece{err: failed}
}

// Next implements [Feeder].
func (a *ReadAhead) Next() (Chunk, error) {
	if a.failed != nil {
		return Chunk{}, a.failed
	}
	p, ok := <-a.pieces
	if !ok {
		p.err = context.Canceled
	}
	a.failed = p.err
	return p.chunk, p.err
}

// Close stops reading and waits for the goroutine to end, which it does as soon as a call of the
// reader that is under way returns: a caller that has a reader that may block for long must make it
// return first. Chunks that were handed out stay valid.
func (a *ReadAhead) Close() {
	a.stop()
	for range a.pieces { // until it has ended; the memory goes with it
	}
}

// PieceSize is how much of a file is read at once, in bytes.
const PieceSize = 128 << 10

// A Pool has memory for pieces of contents, which is used again, because to clear it and to return
// it to the system costs as much as to hash it. The zero Pool is ready for use; it is safe for
// concurrent use.
type Pool struct{ free sync.Pool }

// Get returns a chunk of [PieceSize] bytes of any value, with one user, who may change it as long
// as there is no other.
func (p *Pool) Get() Chunk {
	b, _ := p.free.Get().(*buffer)
	if b == nil {
		b = &buffer{bytes: make([]byte, PieceSize), home: func(b *buffer) { p.free.Put(b) }}
	}
	return b.lend(PieceSize)
}
