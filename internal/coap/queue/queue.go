// SPDX-License-Identifier: GPL-3.0-or-later

// Package queue sends messages on a stream in batches. Start with [New].
package queue

import (
	"errors"
	"net"
	"runtime"
	"sync"
	"time"
)

const (
	// chunkSize is the size in bytes of the pieces of memory in which messages wait to be sent.
	chunkSize = 1 << 17
	// maxWrite is the most bytes that are written at a time. It is also how many must get through
	// within the timeout.
	maxWrite = 1 << 18
	// maxWritePieces is the most pieces of memory that are written at a time.
	maxWritePieces = 128
)

var errClosed = errors.New("connection is closed")

// Queue holds what is to be sent on a stream, and sends it in batches: many small messages go out
// in one system call, and large ones without being copied. Memory for a message is reserved first,
// filled at leisure, and published when the message is complete; messages go out in the order in
// which they are published.
//
// One goroutine must be in Run. All other methods need the mutex, which is exported because it can
// guard what belongs to the connection as well, so that one hold of it does for both.
type Queue struct {
	Mu sync.Mutex

	conn    net.Conn
	timeout time.Duration
	onRoom  func()
	pool    *sync.Pool // of *chunk

	wake     sync.Cond
	sleeping bool
	closed   bool
	err      error

	current *chunk
	pieces  []piece // published
	writing []piece // in the hands of Run
	bytes   int     // reserved, published and being written
	moved   int64   // bytes written in all

	vector   [maxWritePieces][]byte
	buffers  net.Buffers
	deadline time.Time
}

// chunk is memory for messages. It is free once nothing of it is reserved, published or being
// written.
type chunk struct {
	memory [chunkSize]byte
	used   int
	live   int
}

type piece struct {
	bytes []byte
	chunk *chunk // nil if the memory is somebody else's
	last  int    // where in the chunk it ends
}

// Space is memory reserved in a Queue.
type Space struct {
	Bytes []byte
	chunk *chunk
	at    int
}

// NewPool returns a pool of memory to be shared by the queues of one owner.
func NewPool() *sync.Pool {
	return &sync.Pool{New: func() any { return new(chunk) }}
}

// New returns an empty queue. Whenever so many bytes cannot be written within the timeout as
// are written at a time, 256 KiB, Run gives up. OnRoom, unless nil, is called with the mutex held
// when bytes have been written or the queue has come to its end.
func New(conn net.Conn, pool *sync.Pool, timeout time.Duration, onRoom func()) *Queue {
	q := &Queue{conn: conn, pool: pool, timeout: timeout, onRoom: onRoom}
	q.wake.L = &q.Mu
	return q
}

// Reserve returns memory for a message of at most n bytes, which must not be above MessageSize + 1
// KiB. It must be published, be it with nothing in it.
func (q *Queue) Reserve(n int) Space {
	c := q.current
	if c == nil || len(c.memory)-c.used < n {
		if c != nil && c.live == 0 {
			c.used = 0
		} else {
			c = q.pool.Get().(*chunk)
			c.used, c.live = 0, 0
			q.current = c
		}
	}
	at := c.used
	c.used += n
	c.live += n
	q.bytes += n
	return Space{c.memory[at : at+n : at+n], c, at}
}

// Publish sends the first n bytes of what was reserved.
func (q *Queue) Publish(s Space, n int) {
	if unused := len(s.Bytes) - n; unused > 0 {
		if s.chunk.used == s.at+len(s.Bytes) {
			s.chunk.used -= unused
		}
		q.free(s.chunk, unused)
	}
	if n == 0 {
		return
	}
	if q.err != nil {
		q.free(s.chunk, n)
		return
	}
	if last := len(q.pieces) - 1; last >= 0 && q.pieces[last].chunk == s.chunk && q.pieces[last].last == s.at {
		p := &q.pieces[last]
		p.last += n
		p.bytes = s.chunk.memory[p.last-n-len(p.bytes) : p.last]
	} else {
		q.pieces = append(q.pieces, piece{s.Bytes[:n], s.chunk, s.at + n})
	}
	q.signal()
}

// PublishWith sends the first n bytes of what was reserved, and then a payload, whose memory must
// not change until it has been sent: which cannot be known, so it must never change.
func (q *Queue) PublishWith(s Space, n int, payload []byte) {
	q.Publish(s, n)
	if q.err != nil || len(payload) == 0 {
		return
	}
	q.bytes += len(payload)
	q.pieces = append(q.pieces, piece{bytes: payload})
}

// free gives back n bytes that were reserved.
func (q *Queue) free(c *chunk, n int) {
	q.bytes -= n
	c.live -= n
	if c.live > 0 {
		return
	}
	if c == q.current {
		c.used = 0
		return
	}
	q.pool.Put(c)
}

// Bytes returns how many bytes are reserved or not yet written.
func (q *Queue) Bytes() int { return q.bytes }

// Moved returns how many bytes have been written since the beginning.
func (q *Queue) Moved() int64 { return q.moved }

// Err returns why nothing can be sent any more, or nil.
func (q *Queue) Err() error {
	if q.err == nil && q.closed {
		return errClosed
	}
	return q.err
}

// Close lets Run return once all that was published has been written.
func (q *Queue) Close() {
	q.closed = true
	q.wake.Signal()
}

// Fail drops all that has not been written and lets Run return. It does not interrupt a write that
// is under way: closing the connection does.
func (q *Queue) Fail(err error) {
	if q.err != nil {
		return
	}
	q.err = err
	for i := range q.pieces {
		q.drop(&q.pieces[i])
	}
	q.pieces = nil
	q.wake.Signal()
	if q.onRoom != nil {
		q.onRoom()
	}
}

func (q *Queue) drop(p *piece) {
	if p.chunk != nil {
		q.free(p.chunk, len(p.bytes))
	} else {
		q.bytes -= len(p.bytes)
	}
	*p = piece{}
}

func (q *Queue) signal() {
	if q.sleeping {
		q.sleeping = false
		q.wake.Signal()
	}
}

// Run writes what is published until Close or Fail is called or a write fails, and returns the
// error, nil after Close. It takes the mutex itself.
func (q *Queue) Run() error {
	q.Mu.Lock()
	defer q.Mu.Unlock()
	for {
		if len(q.pieces) == 0 && q.err == nil && !q.closed {
			q.sleeping = true
			for q.sleeping && !q.closed && q.err == nil {
				q.wake.Wait()
			}
			q.sleeping = false
			// Whoever published the first message may be about to publish more, and others with it:
			// let them, so that one write does for all.
			q.Mu.Unlock()
			runtime.Gosched()
			q.Mu.Lock()
		}
		if q.err != nil {
			return q.err
		}
		if len(q.pieces) == 0 && q.closed {
			return nil
		}
		q.pieces, q.writing = q.writing[:0], q.pieces
		q.Mu.Unlock()
		err := q.write()
		q.Mu.Lock()
		if err != nil {
			q.Fail(err)
		}
		for i := range q.writing {
			if err == nil {
				q.moved += int64(len(q.writing[i].bytes))
			}
			q.drop(&q.writing[i])
		}
		if q.onRoom != nil {
			q.onRoom()
		}
	}
}

// write writes all pieces in hand.
func (q *Queue) write() error {
	for at := 0; at < len(q.writing); {
		count, size := 0, 0
		for at < len(q.writing) && count < maxWritePieces && size < maxWrite {
			b := q.writing[at].bytes
			q.vector[count] = b
			size += len(b)
			count++
			at++
		}
		if now := time.Now(); q.deadline.Sub(now) < q.timeout-q.timeout/8 {
			q.deadline = now.Add(q.timeout)
			if err := q.conn.SetWriteDeadline(q.deadline); err != nil {
				return err
			}
		}
		q.buffers = q.vector[:count]
		if _, err := q.buffers.WriteTo(q.conn); err != nil {
			return err
		}
	}
	return nil
}
