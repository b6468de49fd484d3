// SPDX-License-Identifier: GPL-3.0-or-later

// Package local is what stores in local files have in common: URLs, calls that can be given up although reading and writing
// files cannot ([Calls]), and commits that many callers share ([Commits]).
package local

import (
	"context"
	"errors"
	"sync"
	"time"
)

// ErrClosed is returned by [Calls.Do] after [Calls.Close].
var ErrClosed = errors.New("store is closed")

// patience is how long Close waits for calls that are under way. A file system may let them hang for ever.
const patience = time.Second

// Calls runs file operations on goroutines of their own, so that whoever waits for them can stop waiting: a read from a
// network file system whose server is gone, or from a medium that is wearing out, may take minutes or for ever. It is safe
// for concurrent use.
type Calls struct {
	slots chan struct{}
	done  chan struct{} // closed by Close

	mu      sync.Mutex
	running int
	closed  bool
	idle    chan struct{} // closed when closed is true and running is 0
	release func()
}

// NewCalls returns Calls that run at most limit operations at a time. Release is called once, when all operations have come
// to an end after Close; it lets go of what they use.
func NewCalls(limit int, release func()) *Calls {
	return &Calls{
		slots:   make(chan struct{}, limit),
		done:    make(chan struct{}),
		idle:    make(chan struct{}),
		release: release,
	}
}

// Do runs an operation, then its end, and returns their error. The end, which may be nil, is not among those whose number is
// limited; it is for waiting for others.
//
// If ctx is done or Close is called before that, Do returns the cause of ctx or [ErrClosed] at once. Unless finished is true,
// the operation may still be going on then, so it must not use memory that the caller uses otherwise.
func (c *Calls) Do(ctx context.Context, operation, end func() error) (finished bool, err error) {
	select {
	case <-ctx.Done():
		return true, context.Cause(ctx)
	case <-c.done:
		return true, ErrClosed
	case c.slots <- struct{}{}:
	}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		<-c.slots
		return true, ErrClosed
	}
	c.running++
	c.mu.Unlock()
	result := make(chan error, 1)
	go func() {
		err := operation()
		<-c.slots
		if err == nil && end != nil {
			err = end()
		}
		result <- err
		c.finish()
	}()
	select {
	case err := <-result:
		return true, err
	case <-ctx.Done():
		return false, context.Cause(ctx)
	case <-c.done:
		return false, ErrClosed
	}
}

func (c *Calls) finish() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.running--
	if c.closed && c.running == 0 {
		c.release()
		close(c.idle)
	}
}

// Close makes all calls of Do return and waits until their operations have come to an end, at most a second. It reports
// whether they have. Further calls do nothing.
func (c *Calls) Close() bool {
	c.mu.Lock()
	if !c.closed {
		c.closed = true
		close(c.done)
		if c.running == 0 {
			c.release()
			close(c.idle)
		}
	}
	c.mu.Unlock()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-c.idle:
		return true
	case <-timer.C:
		return false
	}
}

// Commits makes what several goroutines have written durable by one operation. It is safe for concurrent use.
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

// Do returns the error of a commit that began after Do was called. Callers that come while a commit is going on share the
// next one.
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
