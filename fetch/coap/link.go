// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"sync"
	"syscall"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/backoff"
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/dial"
)

const (
	// minRest is how long no connection is tried after the first that failed, about; each further
	// time is twice as long, up to what [turns.Turns.MaxRest] says.
	minRest = 100 * time.Millisecond
	// maxRestWait is how long requests wait for the end of that time; if it is longer, they fail.
	maxRestWait = time.Second
)

// connection brings requests to the peer, and answers back: a [wire.Conn] or a [wire.Endpoint].
// Requests wait in it until it is made.
type connection interface {
	Start(x *wire.Exchange) bool
	Cancel(x *wire.Exchange)
	State() (answered bool, err error)
	Run() error
	Release(grace time.Duration, err error)
	Close(err error)
}

// link makes a connection when it is needed, and again when that has failed.
type link struct {
	store *Store
	group sync.WaitGroup

	mu      sync.Mutex
	present connection // nil if there is none
	closed  bool       // there will be no other connection
	backoff backoff.Backoff
	err     error // why the last connection is over
}

var errRenewed = errors.New("the connection is given up for another one")

// dialError says that no connection could be made.
type dialError struct{ error }

func (e *dialError) Unwrap() error { return e.error }

func (s *Store) newLink() *link {
	l := &link{store: s, backoff: backoff.Backoff{Min: minRest}}
	s.links = append(s.links, l)
	return l
}

// get returns the present connection, or a new one if that is over. It does not wait.
func (l *link) get() (connection, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c := l.present; c != nil {
		if _, err := c.State(); err == nil {
			return c, nil
		}
		l.retire(c)
	}
	rest := l.backoff.Rest(time.Now())
	switch {
	case l.closed:
		return nil, fetch.ErrClosed
	case rest > maxRestWait:
		return nil, fmt.Errorf("not tried again for %v: %w", rest.Round(time.Second), l.err)
	}
	c := l.store.newConnection(func() (net.Conn, error) {
		conn, err := l.dial(rest)
		if err != nil {
			return nil, &dialError{err}
		}
		return conn, nil
	})
	l.present = c
	// Also when the peer lets it end, and there is another one.
	stop := context.AfterFunc(l.store.ctx, func() { c.Release(0, fetch.ErrClosed) })
	l.group.Go(func() {
		_ = c.Run()
		stop()
		l.mu.Lock()
		defer l.mu.Unlock()
		l.retire(c)
	})
	return c, nil
}

// retire takes note that a connection is over. The lock must be held.
func (l *link) retire(c connection) {
	if l.present != c {
		return
	}
	l.present = nil
	answered, err := c.State()
	if answered {
		l.backoff.Succeed()
		return
	}
	l.err = err
	l.backoff.Max = l.store.turns.MaxRest()
	l.backoff.Fail(time.Now(), 0)
}

// dial makes what a connection needs, after the given time.
func (l *link) dial(rest time.Duration) (net.Conn, error) {
	select {
	case <-time.After(rest):
	case <-l.store.ctx.Done():
		return nil, fetch.ErrClosed
	}
	conn, err := dial.Within(l.store.ctx, l.store.options.DialTimeout, l.store.dial)
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

// close waits until all connections have ended. The context of the store must be over.
func (l *link) close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.group.Wait()
}
