// SPDX-License-Identifier: GPL-3.0-or-later

// Package ipfs gets ERIS blocks from IPFS and puts them there. Each encrypted block is one block of IPFS, named by [CID]. Start
// with [Open].
//
// There are two ways to a node, and both are HTTP. A trustless gateway answers GET /ipfs/CID?format=raw with the block
// (https://specs.ipfs.tech/http-gateways/trustless-gateway/), and takes none. The RPC of Kubo, the usual daemon, answers POST
// /api/v0/block/get and /api/v0/block/put (https://docs.ipfs.tech/reference/kubo/rpc/); whoever can reach it governs the node,
// so it is for one's own.
//
// A node that does not have a block looks for it all over the network, and may never stop. So a block counts as missing, for
// now, when there is no answer after [Options.Timeout].
//
// Nobody is believed: blocks are verified, bodies are read no further than they can be right, connections are bounded.
package ipfs

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"sync"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// Options says how a [Store] behaves. Zero fields stand for the defaults.
type Options struct {
	// Timeout is how long the node may look for a block, and how long it may take to store one. Default 20 s.
	Timeout time.Duration
	// BodyTimeout is how long a block may take once the node has begun to answer. Default 30 s.
	BodyTimeout time.Duration
	// Connections is the most requests at a time; further ones wait. Over HTTP/1 each is a connection. Default 32.
	Connections int
	// TLS is the configuration for ipfs+https. If it is nil, certificates are verified only if the URL has a user name or
	// password to be kept from others: blocks are verified by their references, so that whoever is in between can withhold
	// them, and see what is asked for, but no more.
	TLS *tls.Config

	// firstBackoff is how long no connection is tried after the first that failed.
	firstBackoff time.Duration
}

const (
	dialTimeout = 5 * time.Second
	idleTimeout = 90 * time.Second
	maxHeader   = 64 << 10
	// maxText is how many bytes of a message of the node are read.
	maxText     = 1 << 10
	lastBackoff = 30 * time.Second
)

var (
	errClosed  = errors.New("store is closed")
	errSize    = errors.New("block size is neither 1 KiB nor 32 KiB")
	errSlow    = errors.New("the answer takes too long")
	errLooking = errors.New("the node has not found it in time")
)

// Store is an IPFS node. It implements [fetch.Store]. It is safe for concurrent use.
type Store struct {
	node    node
	options Options
	client  *http.Client
	slots   chan struct{}
	group   sync.WaitGroup  // of calls
	ctx     context.Context // ends with Close
	cancel  context.CancelCauseFunc

	// oldPut says that the daemon is of before Kubo 0.11 (2021), which had no cid-codec.
	oldPut atomic.Bool

	mu     sync.Mutex
	closed bool
	// When connections fail, none is tried until then, ever later.
	down     time.Time
	downErr  error
	failures int
}

var (
	_ fetch.Store         = (*Store)(nil)
	_ eris.VerifiedBlocks = (*Store)(nil)
)

// Open returns the store at a URL: ipfs+http://host:port or ipfs+https://host:port, with the path before "/ipfs/" or
// "/api/v0/" if there is one. Elements of the query: "gateway" or "rpc" says what is spoken to; without them it is the RPC if
// the port is 5001, where Kubo has it, or the path ends in /api/v0, and a gateway otherwise. "get" and "put" restrict what the
// store is used for. A user name and password are sent as the RPC wants them (Basic).
//
// Open makes no connection. The Store must be closed. The path and the user name may be secrets; neither errors nor
// [Store.String] show them.
func Open(url string, options Options) (*Store, error) {
	node, err := parseNode(url)
	if err != nil {
		return nil, fmt.Errorf("store URL: %w", err)
	}
	for _, field := range []struct {
		duration *time.Duration
		value    time.Duration
	}{
		{&options.Timeout, 20 * time.Second},
		{&options.BodyTimeout, 30 * time.Second},
		{&options.firstBackoff, 100 * time.Millisecond},
	} {
		if *field.duration <= 0 {
			*field.duration = field.value
		}
	}
	if options.Connections <= 0 {
		options.Connections = 32
	}
	secure := &tls.Config{InsecureSkipVerify: node.user == nil}
	if options.TLS != nil {
		secure = options.TLS.Clone()
	}
	s := &Store{node: node, options: options, slots: make(chan struct{}, options.Connections)}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	s.client = &http.Client{
		Transport: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			DialContext:            (&net.Dialer{Timeout: dialTimeout}).DialContext,
			TLSClientConfig:        secure,
			TLSHandshakeTimeout:    dialTimeout,
			DisableCompression:     true, // blocks are as good as random
			ForceAttemptHTTP2:      true,
			MaxConnsPerHost:        options.Connections,
			MaxIdleConnsPerHost:    options.Connections,
			IdleConnTimeout:        idleTimeout,
			MaxResponseHeaderBytes: maxHeader,
		},
		// Wherever a node wants to send us, blocks would come over a connection made for each alone, or from a host that
		// nobody has configured.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return s, nil
}

// String returns the scheme and the host.
func (s *Store) String() string { return s.node.String() }

// Verified implements [eris.VerifiedBlocks].
func (s *Store) Verified() {}

// Close ends all calls and closes all connections.
func (s *Store) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel(errClosed)
	s.group.Wait()
	s.client.CloseIdleConnections()
	return nil
}

// A ResponseError is an answer of the node that says nothing about the block: that it asks for patience, for example, or that
// there is no such service.
type ResponseError struct {
	Status int    // for example 429
	Text   string // what the node says, shortened, not to be trusted
}

// Error returns the status and the text.
func (e *ResponseError) Error() string {
	status := fmt.Sprintf("node answers %d %s", e.Status, http.StatusText(e.Status))
	if e.Text == "" {
		return status
	}
	return fmt.Sprintf("%s: %.200q", status, e.Text)
}

func (s *Store) error(ref eris.Reference, err error) error {
	return fmt.Errorf("%v: block %v: %w", s, ref, err)
}

// Get implements [eris.Blocks]. The error wraps eris.ErrNotFound if the node does not have the block, does not find it within
// Options.Timeout, or may not be asked; *eris.BlockError if it gave other bytes; *ResponseError if it gave another answer; or is
// the cause of ctx. Any other is a failure of the connection.
func (s *Store) Get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	if !size.Valid() {
		return nil, s.error(ref, errSize)
	}
	if !s.node.get {
		return nil, s.error(ref, eris.ErrNotFound)
	}
	if cap(dst) < int(size) {
		dst = make([]byte, 0, size)
	}
	block := dst[:size]
	err := s.do(ctx, s.node.getRequest(ref, s.options.Timeout), func(response *http.Response) error {
		if response.StatusCode != http.StatusOK {
			return s.node.getError(response)
		}
		return readBlock(ref, block, response)
	})
	if errors.Is(err, errLooking) {
		err = fmt.Errorf("%w: %w (%v)", eris.ErrNotFound, errLooking, s.options.Timeout)
	}
	if err != nil {
		return nil, s.error(ref, err)
	}
	return block, nil
}

// readBlock fills and verifies block. A body that was cut short by the connection is not held against the node.
func readBlock(ref eris.Reference, block []byte, response *http.Response) error {
	wrong := &eris.BlockError{Reference: ref, Want: eris.BlockSize(len(block))}
	if length := response.ContentLength; length >= 0 && length != int64(len(block)) {
		wrong.Length = int(min(length, 1<<30))
		return wrong
	}
	n := 0
	for n < len(block) {
		m, err := response.Body.Read(block[n:])
		n += m
		if err == io.EOF && n < len(block) {
			if response.ContentLength < 0 && response.ProtoMajor == 1 && len(response.TransferEncoding) == 0 {
				return io.ErrUnexpectedEOF // the end of the connection is the end of the body
			}
			wrong.Length = n
			return wrong
		}
		if err != nil && err != io.EOF {
			return err
		}
	}
	// To see the end of a body in chunks is also what makes the connection fit for the next request.
	var more [1]byte
	if n, err := io.ReadFull(response.Body, more[:]); n > 0 {
		wrong.Length = len(block) + 1
		return wrong
	} else if err != io.EOF {
		return err
	}
	return eris.Verify(ref, block)
}

// Put implements [fetch.Store]: it returns nil once the node has answered that it has stored and pinned the block. Errors wrap
// fetch.ErrReadOnly if the node, or a gateway, takes no blocks from us; else they are those of Get, but for those of its
// blocks.
func (s *Store) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	if !eris.BlockSize(len(block)).Valid() {
		return s.error(ref, errSize)
	}
	if !s.node.put || !s.node.rpc {
		return s.error(ref, fetch.ErrReadOnly)
	}
	if err := eris.Verify(ref, block); err != nil {
		return fmt.Errorf("%v: %w", s, err)
	}
	old := s.oldPut.Load()
	err := s.putAs(ctx, ref, block, old)
	if !old && errors.Is(err, errOtherName) {
		if err = s.putAs(ctx, ref, block, true); err == nil {
			s.oldPut.Store(true)
		}
	}
	if err != nil {
		return s.error(ref, err)
	}
	return nil
}

func (s *Store) putAs(ctx context.Context, ref eris.Reference, block []byte, old bool) error {
	return s.do(ctx, s.node.putRequest(block, old), func(response *http.Response) error {
		return putResult(ref, response)
	})
}

// do makes one exchange. Errors are the cause of ctx, those of take, errLooking if the request was sent but there was no
// answer in time, and failures of the connection.
func (s *Store) do(ctx context.Context, ask requestMaker, take func(*http.Response) error) error {
	s.mu.Lock()
	err := s.present()
	if err == nil {
		s.group.Add(1)
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	defer s.group.Done()
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-s.ctx.Done():
		return errClosed
	}
	err = s.exchange(ctx, ask, take)
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil && s.ctx.Err() != nil {
		return errClosed
	}
	return err
}

// present returns why no request is made at present, or nil. The lock must be held.
func (s *Store) present() error {
	if s.closed {
		return errClosed
	}
	if left := time.Until(s.down); left > 0 {
		return fmt.Errorf("not tried again for %v: %w", left.Round(time.Millisecond), s.downErr)
	}
	return nil
}

// connected takes note of whether a connection could be made.
func (s *Store) connected(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.down, s.downErr, s.failures = time.Time{}, nil, 0
		return
	}
	if time.Now().Before(s.down) {
		return // others have failed at the same time: that counts as one
	}
	wait := lastBackoff
	if s.failures < 9 {
		wait = min(wait, s.options.firstBackoff<<s.failures)
	}
	s.failures++
	s.down, s.downErr = time.Now().Add(wait), err
}

func (s *Store) exchange(ctx context.Context, ask requestMaker, take func(*http.Response) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(s.ctx, func() { cancel(errClosed) })()
	var connected, wrote atomic.Bool
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) {
			connected.Store(true)
			s.connected(nil)
		},
		WroteRequest: func(info httptrace.WroteRequestInfo) { wrote.Store(info.Err == nil) },
	})
	request, err := ask(ctx)
	if err != nil {
		return err
	}
	// The daemon is told to stop looking after Timeout, so it may say so itself a little later.
	looking := time.AfterFunc(s.options.Timeout+s.options.Timeout/8, func() { cancel(errLooking) })
	response, err := s.client.Do(request)
	looking.Stop()
	if err != nil {
		if cause := context.Cause(ctx); cause == errLooking && !wrote.Load() {
			err = fmt.Errorf("the request could not be sent within %v", s.options.Timeout)
		} else if cause != nil {
			return cause
		}
		err = failure(err)
		if !connected.Load() {
			s.connected(err)
		}
		return err
	}
	defer response.Body.Close()
	reading := time.AfterFunc(s.options.BodyTimeout, func() { cancel(errSlow) })
	defer reading.Stop()
	err = take(response)
	if err != nil && context.Cause(ctx) == errSlow {
		return errSlow
	}
	return err
}
