// SPDX-License-Identifier: GPL-3.0-or-later

// Package arrivals is where requests that are done wait for the goroutines that go on with them,
// some at a time, so that locks and the processor's vectors are used for many blocks at once.
package arrivals

import (
	"slices"
	"sync"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

const (
	// Batch is how many are to be taken at a time at most, and batchBytes how many bytes they may
	// have: few enough to leave some for other processors.
	Batch      = 32
	batchBytes = 256 << 10
)

// A Queue holds what is to be done. It is safe for concurrent use, and locks nothing else while it
// is locked.
type Queue[T any] struct {
	size func(T) eris.BlockSize

	mu     sync.Mutex
	wake   sync.Cond
	items  []T
	kicked bool // there is something else to do
	closed bool
}

// New returns an empty queue of things whose blocks have the given size.
func New[T any](size func(T) eris.BlockSize) *Queue[T] {
	q := &Queue[T]{size: size}
	q.wake.L = &q.mu
	return q
}

// Add has somebody take x.
func (q *Queue[T]) Add(x T) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.items = append(q.items, x)
	q.wake.Signal()
}

// Kick has somebody return from Take, even with nothing.
func (q *Queue[T]) Kick() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.kicked = true
	q.wake.Signal()
}

// Close has everybody return from Take when the queue is empty.
func (q *Queue[T]) Close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.wake.Broadcast()
}

// Take waits for something to do, and takes some of what has been added, perhaps none. It returns
// false when there will be no more.
func (q *Queue[T]) Take(batch []T) (n int, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.items) == 0 && !q.kicked {
		if q.closed {
			return 0, false
		}
		q.wake.Wait()
	}
	q.kicked = false
	for bytes := 0; n < min(len(batch), len(q.items)) && bytes < batchBytes; n++ {
		batch[n] = q.items[n]
		bytes += int(q.size(batch[n]))
	}
	q.items = slices.Delete(q.items, 0, n)
	return n, true
}
