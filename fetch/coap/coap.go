// SPDX-License-Identifier: GPL-3.0-or-later

// Package coap gets and puts ERIS blocks by CoAP (https://eris.codeberg.page/eer/coap.xml): over Unix sockets, TCP, TLS and
// WebSockets (RFC 8323) and over UDP (RFC 7252 and RFC 7959). Start with [Open].
//
// On a stream there are many requests in flight; answers come in any order, and a block is one message. The more calls are
// made at a time, the better the connection is used: each is a goroutine that waits, and thousands are fine. A call does
// not start goroutines and, when all goes well, allocates nothing. Requests that are started ([Store.Start]) have no goroutine.
package coap

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// Store is an ERIS store that is reached by CoAP. It implements [fetch.Store]. It is safe for concurrent use.
type Store struct {
	url      wire.StoreURL
	name     string
	options  Options
	requests *wire.Requests
	calls    sync.Pool // of *call
	carrier  carrier
}

var _ fetch.Store = (*Store)(nil)

// carrier brings requests to the peer and answers back.
type carrier interface {
	// get makes the request that the call describes, and its dst is where the block goes. It returns the length of what was
	// received in all, which may be more than dst holds.
	get(ctx context.Context, c *call) (length int, err error)
	put(ctx context.Context, c *call) error
	close() error
}

// Open returns the store at the given URL, which is one of coap+unix, coap+tcp, coaps+tcp, coap+ws, coaps+ws and coap; see
// https://eris.codeberg.page/eer/coap.xml. An empty path stands for .well-known/eris. A query "?get", "?put" or "?get&put" restricts what the store is used for.
//
// Open makes no connection: the first Get or Put does, and after a failure, later ones do so again, ever less often. The
// Store must be closed.
//
// The path of the URL may be a secret; neither errors nor [Store.String] show it.
func Open(url string, options Options) (*Store, error) {
	u, err := wire.ParseURL(url)
	if err != nil {
		return nil, err
	}
	s := &Store{url: u, name: u.String(), options: options.withDefaults()}
	s.requests = wire.NewRequests(u.Path, options.RawReferences)
	s.calls.New = func() any { return &call{wake: make(chan struct{}, 1)} }
	switch {
	case options.Dial != nil || u.Scheme == "coap+unix" || u.Scheme == "coap+tcp" || u.Scheme == "coaps+tcp" || u.WebSocket():
		s.carrier = newStream(s)
	case u.Scheme == "coap":
		s.carrier = newDatagrams(s)
	default:
		return nil, fmt.Errorf("store URL: scheme %s is not supported", u.Scheme)
	}
	return s, nil
}

// String returns the scheme and the host or socket of the store.
func (s *Store) String() string { return s.name }

// Close ends all connections and waits until they have come to their end, at most a second. Calls that are under way fail.
func (s *Store) Close() error { return s.carrier.close() }

// ResponseError is an answer of the peer that says neither that it has the block nor that it does not: that it is
// overloaded, for example. It may do better later.
type ResponseError struct {
	Code codes.Code // for example 5.03
	Text string     // up to 64 bytes for people, not to be trusted
}

// Error returns the code and the text.
func (e *ResponseError) Error() string {
	if e.Text == "" {
		return fmt.Sprintf("peer answers %s", wire.CodeText(e.Code))
	}
	return fmt.Sprintf("peer answers %s: %q", wire.CodeText(e.Code), e.Text)
}

// blockError is an error about a block.
type blockError struct {
	store *Store
	ref   eris.Reference
	err   error
}

func (e *blockError) Error() string {
	return fmt.Sprintf("%s: block %v: %v", e.store.name, e.ref, e.err)
}

func (e *blockError) Unwrap() error { return e.err }

var errNoDst = errors.New("block size is neither 1 KiB nor 32 KiB")

// Get implements [eris.Blocks]. It makes one request. If the connection fails meanwhile, it makes one more on a new one.
//
// The error wraps eris.ErrNotFound if the store does not have the block or may not be asked; *eris.BlockError if it gave
// other bytes; *ResponseError if it gave another answer; or is the cause of ctx. Any other is a failure of the connection,
// which may be over the next time.
func (s *Store) Get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	if !size.Valid() {
		return nil, &blockError{s, ref, errNoDst}
	}
	if !s.url.Get {
		return nil, &blockError{s, ref, eris.ErrNotFound}
	}
	if cap(dst) < int(size) {
		dst = make([]byte, 0, size)
	}
	c := s.calls.Get().(*call)
	c.ref, c.size, c.dst = ref, size, dst[:size]
	length, err := s.carrier.get(ctx, c)
	s.recycle(c)
	block := dst[:size]
	switch {
	case err != nil:
		if cause := context.Cause(ctx); cause != nil && errors.Is(err, cause) {
			return nil, err
		}
		return nil, &blockError{s, ref, err}
	case length != int(size):
		err = &eris.BlockError{Reference: ref, Length: length, Want: size}
	case !s.options.Unverified:
		err = eris.Verify(ref, block)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	return block, nil
}

// Put implements [fetch.Store]: it returns nil once the server has answered that it has the block. The reference is not sent,
// servers compute it; it is for messages.
//
// The error wraps fetch.ErrReadOnly if the store takes no blocks from us; otherwise errors are those of Get, but for those
// of its blocks.
func (s *Store) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	if !eris.BlockSize(len(block)).Valid() {
		return &blockError{s, ref, errNoDst}
	}
	if !s.url.Put {
		return &blockError{s, ref, fetch.ErrReadOnly}
	}
	c := s.calls.Get().(*call)
	c.ref, c.payload = ref, block
	err := s.carrier.put(ctx, c)
	s.recycle(c)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && errors.Is(err, cause) {
			return err
		}
		return &blockError{s, ref, err}
	}
	return nil
}

func (s *Store) recycle(c *call) {
	wake := c.wake
	*c = call{wake: wake}
	s.calls.Put(c)
}

// getError returns what the answer to a GET means, nil if it has a payload to look at.
func getError(c *call) error {
	switch {
	case c.response.Unusable:
		return errUnusable
	case c.code == codes.Content:
		return nil
	case c.code == codes.NotFound:
		return eris.ErrNotFound
	}
	return &ResponseError{c.code, c.text()}
}

// putError returns what the last answer to a PUT means.
func putError(c *call) error {
	switch c.code {
	case codes.Created, codes.Changed:
		return nil
	case codes.MethodNotAllowed, codes.NotFound, codes.Forbidden, codes.Unauthorized:
		return fmt.Errorf("%w: %w", fetch.ErrReadOnly, &ResponseError{c.code, c.text()})
	}
	return &ResponseError{c.code, c.text()}
}

// backoff says when a connection may be tried again.
type backoff struct {
	first    time.Duration
	failures int
	until    time.Time
	err      error // the last failure
}

const (
	lastBackoff = 30 * time.Second
	// patience is how long a call waits for the time when a connection may be tried again, before it fails.
	patience = time.Second
)

func (b *backoff) worked() { *b = backoff{first: b.first} }

func (b *backoff) failed(err error) {
	wait := lastBackoff
	if b.failures < 9 {
		wait = min(wait, b.first<<b.failures)
	}
	b.failures++
	b.err = err
	b.until = time.Now().Add(wait)
}

// wait waits until a connection may be tried, unless that is far off.
func (b *backoff) wait() (time.Duration, error) {
	left := time.Until(b.until)
	if left > patience {
		return 0, fmt.Errorf("not tried again for %v: %w", left.Round(time.Second), b.err)
	}
	return left, nil
}
