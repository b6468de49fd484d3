// SPDX-License-Identifier: GPL-3.0-or-later

// Package coap gets and puts ERIS blocks by CoAP (https://eris.codeberg.page/eer/coap.xml): over
// Unix sockets, TCP, TLS and WebSockets (RFC 8323) and over UDP (RFC 7252 and RFC 7959). Start with
// [Open].
//
// On a stream there are many requests under way; answers come in any order, and a block is one
// message. The more requests are started, the better the connection is used; none has a goroutine,
// and thousands are fine.
package coap

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/turns"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// leastPuts and mostPuts are how many blocks of 32 KiB are put at a time by UDP, at first and at
// most. Each such transfer has a socket, hence an address, of its own, because some servers tell
// transfers apart by where they come from; and one part of each is under way.
const leastPuts, mostPuts = 4, 16

// Store is an ERIS store that is reached by CoAP. It implements [fetch.Store]. It is safe for
// concurrent use.
//
// Errors of its requests wrap [eris.ErrNotFound] if the store does not have the block or may not be
// used, and [*eris.BlockError] if it gave something of another size. Any other says that it gave
// another answer, or that the connection has failed; it may do better the next time.
type Store struct {
	url      storeurl.URL
	name     string
	options  Options
	blocks   *wire.Requests
	have     *wire.Requests // for questions what the store has
	turns    *turns.Turns   // of blocks that are put
	pool     *sync.Pool     // of memory for messages
	ctx      context.Context
	cancel   context.CancelFunc
	main     *link
	parts    chan *link  // for a block that is put in parts: one such transfer on each at a time
	spare    chan *link  // by UDP, what is not in use of that at present
	crowded  atomic.Bool // by UDP, the server has dropped a block of which only some parts had come
	links    []*link
	received atomic.Int64 // bytes of responses; by UDP, of blocks that come in parts
}

var _ fetch.Store = (*Store)(nil)

// Open returns the store at the given URL, which is one of coap+unix, coap+tcp, coaps+tcp, coap+ws,
// coaps+ws and coap; see https://eris.codeberg.page/eer/coap.xml. An empty path stands for
// .well-known/eris. A query "?get", "?put" or "?get&put" restricts what the store is used for.
//
// Open makes no connection: the first request does, in the background; and after a failure, later
// ones do so again, ever less often. The Store must be closed.
//
// The path of the URL may be a secret; neither errors nor [Store.String] show it.
func Open(url string, options Options) (*Store, error) {
	u, err := storeurl.ParseScheme(url, "coap+unix", "coap+tcp", "coaps+tcp", "coap+ws", "coaps+ws", "coap")
	if err != nil {
		return nil, err
	}
	s := newStore(u, u.String(), options)
	if u.Scheme != "coap" {
		s.parts = make(chan *link, 1)
		s.parts <- s.main
		return s, nil
	}
	s.parts, s.spare = make(chan *link, mostPuts), make(chan *link, mostPuts-leastPuts)
	for range leastPuts {
		s.parts <- s.newLink()
	}
	for range cap(s.spare) {
		s.spare <- s.newLink()
	}
	return s, nil
}

func newStore(u storeurl.URL, name string, options Options) *Store {
	s := &Store{url: u, name: name, options: options.withDefaults(), pool: wire.NewPool()}
	s.blocks = wire.NewRequests(u.Segments)
	s.blocks.HopLimit = options.HopLimit
	s.have = wire.NewDocument(append(slices.Clone(u.Segments), wire.HaveSegment))
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.turns = turns.New(s.ctx)
	s.main = s.newLink()
	return s
}

// OfConnection returns the store of the peer of a connection on a stream that somebody else has
// made and runs: requests fail once it is over. The store is the well-known one, is only read,
// answers from what it has itself (see [Options.HopLimit]), and is called by the name. It must be
// closed, which does not end the connection.
func OfConnection(conn *wire.Conn, name string) *Store {
	s := newStore(storeurl.URL{Scheme: "coap+tcp", Get: true, Segments: wire.WellKnownPath()}, name, Options{HopLimit: 1})
	s.main.closed = true // it makes no other
	s.main.present = conn
	return s
}

// String returns the scheme and the host or socket of the store.
func (s *Store) String() string { return s.name }

// AsksHave reports whether requests with Have are understood. What of a question does not fit into
// a message that the peer takes is left without an answer.
func (s *Store) AsksHave() bool { return s.url.Get }

// Progress returns how many bytes have come of what was requested, also of blocks that are not
// whole.
func (s *Store) Progress() int64 { return s.received.Load() }

// Renew ends the present connection, if that is the store's: what is under way, and what comes, is
// requested on another one.
func (s *Store) Renew() {
	s.main.mu.Lock()
	c, given := s.main.present, s.main.closed
	s.main.mu.Unlock()
	if c != nil && !given {
		c.Close(errRenewed)
	}
}

// Start implements [fetch.Source]. If the connection fails, the request is made once more on a new
// one.
func (s *Store) Start(r *fetch.Request) {
	q, ok := r.Held.(*request)
	if !ok || q.store != s {
		q = newRequest(s)
		r.Held = q
	}
	q.start(r)
}

// Cancel implements [fetch.Source].
func (s *Store) Cancel(r *fetch.Request) {
	if q, ok := r.Held.(*request); ok && q.store == s {
		q.cancel()
	}
}

// Close implements [fetch.Source]. The peer is told, if that does not take long: half a second at
// most.
func (s *Store) Close() error {
	s.cancel()
	for _, l := range s.links {
		l.close()
	}
	return nil
}

// Document gets a text of at most 32 KiB that a server has at a path, segment by segment, beside
// its store.
func (s *Store) Document(ctx context.Context, path ...string) ([]byte, error) {
	x := &wire.Exchange{Store: wire.NewDocument(path), Dst: make([]byte, eris.BlockSize32KiB)}
	c, err := s.main.get()
	if err == nil {
		err = s.do(ctx, c, x)
	}
	if err == nil {
		err = getError(x)
	}
	if err == nil && (x.Response.Block2.Present || x.Length > len(x.Dst)) {
		err = errBlockwise
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	return x.Dst[:x.Length], nil
}

// responseError returns the error for an answer of the peer that says neither that it has the block
// nor that it does not: that it is overloaded, for example. It may do better later.
func responseError(x *wire.Exchange) error {
	if text := x.Text(); text != "" {
		return fmt.Errorf("peer answers %d.%02d: %q", x.Code>>5, x.Code&31, text)
	}
	return fmt.Errorf("peer answers %d.%02d", x.Code>>5, x.Code&31)
}

var (
	errUnusable  = errors.New("response has an option that is not understood")
	errBlockwise = errors.New("block-wise transfer went wrong")
	errSlow      = errors.New("block takes too long in parts")
)

// blockError is an error of a store about a block. As a block that is missing makes one, it has no
// words until somebody reads it.
type blockError struct {
	store *Store
	err   error
}

func (e *blockError) Error() string { return e.store.name + ": " + e.err.Error() }

func (e *blockError) Unwrap() error { return e.err }
