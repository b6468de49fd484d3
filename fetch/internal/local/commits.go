// SPDX-License-Identifier: GPL-3.0-or-later

package local

import "sync"

// Commits makes what several goroutines have written durable by one operation. It is safe for
// concurrent use.
type Commits struct {
	commit func() error
	turn   chan struct{} // has room if no commit is going on

	mu   sync.Mutex
	next *round // those who wait for the commit that has not begun; nil if nobody does
}

type round struct {
	done chan struct{}
	err  error
}

// NewCommits returns Commits that call commit, never twice at a time.
func NewCommits(commit func() error) *Commits {
	return &Commits{commit: commit, turn: make(chan struct{}, 1)}
}

// Do returns the error of a commit that began after Do was called. Callers that come while a commit
// is going on share the next one.
func (c *Commits) Do() error {
	c.mu.Lock()
	r := c.next
	leads := r == nil
	if leads {
		r = &round{done: make(chan struct{})}
		c.next = r
	}
	c.mu.Unlock()
	if !leads {
		<-r.done
		return r.err
	}
	c.turn <- struct{}{}
	c.mu.Lock()
	c.next = nil
	c.mu.Unlock()
	r.err = c.commit()
	<-c.turn
	close(r.done)
	return r.err
}
