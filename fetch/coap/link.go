// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/backoff"
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

const (
	// maxRest is the longest time for which no connection is tried after failures.
	maxRest = 30 * time.Second
	// maxRestWait is how long requests wait for the end of that time; if it is longer, they fail.
	maxRestWait = time.Second
	// maxWaiting is how many requests wait for a connection to be made.
	maxWaiting = 1 << 16
)

var errManyWaiting = errors.New("too many requests wait for a connection")

// carrier brings requests to the peer, and answers back: a [wire.Conn] or a [wire.Endpoint].
type carrier interface {
	Start(x *wire.Exchange) bool
	Cancel(x *wire.Exchange)
	State() (answered bool, err error)
}

// connection is a carrier with its two ends.
type connection struct {
	carrier
	run   func()
	close func(err error)
}

// err returns why the connection is over, nil if it is not.
func (c *connection) err() error {
	_, err := c.State()
	return err
}

// waiter waits for a connection.
type waiter interface {
	// begin uses a connection. It reports whether that is possible.
	begin(c *connection) bool
	// failed is called when there is none.
	failed(err error)
}

// link makes a connection in the background when it is needed, and again when it has failed.
type link struct {
	store   *Store
	group   sync.WaitGroup
	present atomic.Pointer[connection]

	mu      sync.Mutex
	closed  bool
	dialing bool
	waiting list.List // of waiter
	backoff backoff.Backoff
	err     error // why no connection could be made, or used, the last time
}

func (s *Store) newLink() *link {
	l := &link{store: s, backoff: backoff.Backoff{Min: s.options.minBackoff, Max: maxRest}}
	s.links = append(s.links, l)
	return l
}

// use lets a waiter have a connection, at once or when there is one. It does not wait. It returns
// where the waiter waits, nil if it does not; it may have been served all the same by then.
func (l *link) use(w waiter) *list.Element {
	for {
		c := l.present.Load()
		if c != nil && w.begin(c) {
			return nil
		}
		l.mu.Lock()
		if l.present.Load() == c {
			e, err := l.wait(w, c)
			l.mu.Unlock()
			if err != nil {
				w.failed(err)
			}
			return e
		}
		l.mu.Unlock()
	}
}

// wait makes a waiter wait for a connection, in place of one that is over, if there was one. The
// lock must be held.
func (l *link) wait(w waiter, over *connection) (*list.Element, error) {
	l.retire(over)
	rest := l.backoff.Rest(time.Now())
	switch {
	case l.closed:
		return nil, fetch.ErrClosed
	case l.waiting.Len() >= maxWaiting:
		return nil, errManyWaiting
	case !l.dialing && rest > maxRestWait:
		return nil, fmt.Errorf("not tried again for %v: %w", rest.Round(time.Second), l.err)
	}
	if !l.dialing {
		l.dialing = true
		l.group.Go(func() { l.dial(rest) })
	}
	return l.waiting.PushBack(w), nil
}

// retire takes note that a connection is over. The lock must be held.
func (l *link) retire(c *connection) {
	if c == nil || l.present.Load() != c {
		return
	}
	l.present.Store(nil)
	answered, err := c.State()
	if answered {
		l.backoff.Succeed()
		return
	}
	l.err = err
	l.backoff.Fail(time.Now(), 0)
}

// remove makes a waiter wait no longer. It reports whether it did.
func (l *link) remove(e *list.Element, w waiter) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return e != nil && e.Value != nil && l.waiting.Remove(e) == w && forget(e)
}

// forget marks an element that is in the list no longer.
func forget(e *list.Element) bool {
	e.Value = nil
	return true
}

// dial makes a connection after the given time, and then serves it.
func (l *link) dial(rest time.Duration) {
	conn, err := l.connect(rest)
	l.mu.Lock()
	l.dialing = false
	if err == nil && l.closed {
		conn.Close()
		err = fetch.ErrClosed
	}
	var c *connection
	if err == nil {
		c = l.store.connection(conn)
		l.present.Store(c)
	} else if !l.closed {
		l.err = err
		l.backoff.Fail(time.Now(), 0)
	}
	waiting := l.takeWaiting()
	l.mu.Unlock()
	for _, w := range waiting {
		switch {
		case err != nil:
			w.failed(err)
		case !w.begin(c):
			w.failed(c.err())
		}
	}
	if c == nil {
		return
	}
	c.run()
	l.mu.Lock()
	l.retire(c)
	l.mu.Unlock()
}

// takeWaiting returns all that wait, which then do so no longer. The lock must be held.
func (l *link) takeWaiting() []waiter {
	var all []waiter
	for e := l.waiting.Front(); e != nil; e = l.waiting.Front() {
		all = append(all, l.waiting.Remove(e).(waiter))
		forget(e)
	}
	return all
}

func (l *link) connect(rest time.Duration) (net.Conn, error) {
	if rest > 0 {
		timer := time.NewTimer(rest)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-l.store.ctx.Done():
			return nil, fetch.ErrClosed
		}
	}
	ctx, cancel := context.WithTimeout(l.store.ctx, l.store.options.DialTimeout)
	defer cancel()
	conn, err := l.store.dial(ctx)
	switch {
	case err == nil:
		return conn, nil
	case l.store.ctx.Err() != nil:
		return nil, fetch.ErrClosed
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("nothing listens there; is \"serve\" running, and the address right? %w", err)
	}
	return nil, fmt.Errorf("connecting: %w", err)
}

// close makes all fail that wait, and ends the connection. It does not wait.
func (l *link) close() {
	l.mu.Lock()
	l.closed = true
	waiting := l.takeWaiting()
	l.mu.Unlock()
	for _, w := range waiting {
		w.failed(fetch.ErrClosed)
	}
	if c := l.present.Load(); c != nil {
		c.close(fetch.ErrClosed)
	}
}

// await waits for a connection.
func (l *link) await(ctx context.Context) (*connection, error) {
	w := &callWaiter{done: make(chan struct{})}
	e := l.use(w)
	select {
	case <-w.done:
	case <-ctx.Done():
		if l.remove(e, w) {
			return nil, context.Cause(ctx)
		}
		<-w.done
	}
	return w.connection, w.err
}

// callWaiter is a waiter for a call that waits.
type callWaiter struct {
	done       chan struct{}
	connection *connection
	err        error
}

func (w *callWaiter) begin(c *connection) bool {
	if c.err() != nil {
		return false
	}
	w.connection = c
	close(w.done)
	return true
}

func (w *callWaiter) failed(err error) {
	w.err = err
	close(w.done)
}
