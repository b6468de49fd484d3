// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"net"
	"runtime"
	"slices"
	"sync"
	"time"
)

const (
	// chunkSize is the size in bytes of the pieces of memory in which messages wait to be sent.
	chunkSize = 1 << 17
	// maxWrite is the most bytes that are written at a time, but for one piece more. It is also how
	// many must get through within the timeout.
	maxWrite = 1 << 18
	// maxWritePieces is the most pieces of memory that are written at a time.
	maxWritePieces = 64
)

// queue holds what is to be sent on a stream, and sends it in batches, so that many small messages
// go out in one system call, and large ones without being copied. One goroutine must be in run. All
// other methods need the lock of the connection.
type queue struct {
	mu      *sync.Mutex
	conn    net.Conn // needed by run
	timeout time.Duration
	onRoom  func()     // called when bytes have been written, and after the end
	pool    *sync.Pool // of *chunk

	wake   sync.Cond
	closed bool
	err    error

	waiting  []piece
	room     []byte // of the last chunk of those in waiting
	bytes    int    // not written yet
	moved    int64  // bytes written in all
	deadline time.Time
	vector   [maxWritePieces][]byte
	buffers  net.Buffers
}

type chunk [chunkSize]byte

// piece is bytes to be sent: in a chunk, or in memory that is somebody else's until release is
// called.
type piece struct {
	bytes   []byte
	chunk   *chunk // of which this is the first piece; nil for others
	release func() // may be nil
}

// NewPool returns a pool of memory for messages, to be shared by the connections of one owner.
func NewPool() *sync.Pool {
	return &sync.Pool{New: func() any { return new(chunk) }}
}

// append appends a copy of what is to be sent.
func (q *queue) append(b []byte) {
	if q.err != nil {
		return
	}
	q.bytes += len(b)
	for len(b) > 0 {
		if len(q.room) == 0 {
			c := q.pool.Get().(*chunk)
			q.room = c[halfPage:]
			q.waiting = append(q.waiting, piece{bytes: q.room[:0], chunk: c})
		}
		last := &q.waiting[len(q.waiting)-1]
		if cap(last.bytes)-len(last.bytes) != len(q.room) { // the room is not behind it
			q.waiting = append(q.waiting, piece{bytes: q.room[:0]})
			last = &q.waiting[len(q.waiting)-1]
		}
		n := copy(q.room, b)
		last.bytes = last.bytes[:len(last.bytes)+n]
		q.room, b = q.room[n:], b[n:]
	}
	q.wake.Signal()
}

// refer appends what is to be sent, which must not change until release is called, with the lock
// held.
func (q *queue) refer(b []byte, release func()) {
	if q.err != nil {
		if release != nil {
			release()
		}
		return
	}
	q.bytes += len(b)
	q.waiting = append(q.waiting, piece{bytes: slices.Clip(b), release: release})
	q.wake.Signal()
}

// close lets run return once everything has been written.
func (q *queue) close() {
	q.closed = true
	q.wake.Signal()
}

// fail drops all that has not been written and lets run return. It does not interrupt a write that
// is under way: closing the connection does.
func (q *queue) fail(err error) {
	if q.err != nil {
		return
	}
	q.err = err
	q.free(q.waiting)
	q.waiting, q.room = nil, nil
	q.wake.Signal()
	q.onRoom()
}

// free gives back memory.
func (q *queue) free(pieces []piece) {
	for _, p := range pieces {
		q.bytes -= len(p.bytes)
		if p.release != nil {
			p.release()
		}
		if p.chunk != nil {
			q.pool.Put(p.chunk)
		}
	}
	clear(pieces)
}

// run writes until close or fail is called or a write fails, and returns the error, nil after
// close. It takes the lock itself. Whenever as many bytes as are written at a time cannot be
// written within the timeout, it gives up.
func (q *queue) run() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	var writing []piece
	for {
		for len(q.waiting) == 0 && q.err == nil && !q.closed {
			q.wake.Wait()
			// Whoever sends the first message may be about to send more, and others with it: let
			// them, so that one write does for all.
			q.mu.Unlock()
			runtime.Gosched()
			q.mu.Lock()
		}
		if q.err != nil {
			return q.err
		}
		if len(q.waiting) == 0 {
			return nil
		}
		writing, q.waiting, q.room = q.waiting, writing[:0], nil
		q.mu.Unlock()
		err := q.write(writing)
		q.mu.Lock()
		if err != nil {
			q.fail(err)
		}
		for _, p := range writing {
			q.moved += int64(len(p.bytes))
		}
		q.free(writing)
		q.onRoom()
	}
}

// write writes all pieces.
func (q *queue) write(pieces []piece) error {
	for len(pieces) > 0 {
		count, size := 0, 0
		for count < min(len(pieces), maxWritePieces) && size < maxWrite {
			q.vector[count] = pieces[count].bytes
			size += len(pieces[count].bytes)
			count++
		}
		pieces = pieces[count:]
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
