// SPDX-License-Identifier: GPL-3.0-or-later

// Package httpclient is what the stores that are reached by HTTP have in common: a [Store], and the
// requests of its [Client], bounded in number, time and size, with rests after failures. What a
// server sends is not trusted. Start with [New].
package httpclient

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/klauspost/compress/gzip"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/proxy"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/turns"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/backoff"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/dial"
)

// Store is a store that is reached by HTTP, which the packages of such stores embed. It is
// [fetch.Store] but for Put.
type Store struct {
	*fetch.Workers
	*Client
}

// PutBlock is Put, where takes says that the store takes blocks from us, and put makes the request
// by [Client.Do].
func (s *Store) PutBlock(ctx context.Context, takes bool, ref eris.Reference, block []byte, put func() error) error {
	err := fetch.ErrReadOnly
	switch {
	case !eris.BlockSize(len(block)).Valid():
		err = eris.ErrBlockSize
	case takes:
		err = s.Retry(ctx, put)
	}
	if err != nil {
		return fmt.Errorf("%v: block %v: %w", s, ref, err)
	}
	return nil
}

// Close ends all requests and connections.
func (s *Store) Close() error {
	s.Workers.Close()
	s.Client.Close()
	return nil
}

// Options says how a [Client] behaves. All fields must be set but Verify, Cleartext and Getenv.
type Options struct {
	Connections    int                 // the most connections to one host; further requests wait for one
	ConnectTimeout time.Duration       // to resolve and connect, and again to shake hands
	Timeout        time.Duration       // from when a request has a connection until the header of the response
	BodyTimeout    time.Duration       // from then until the end of the response
	IdleTimeout    time.Duration       // for how long a connection without requests is kept
	Verify         bool                // certificates
	Cleartext      bool                // HTTP/2 without TLS, and nothing else
	Getenv         func(string) string // for the variables of package proxy; nil stands for os.Getenv
}

// Client makes requests to one store. It is safe for concurrent use.
type Client struct {
	options   Options
	transport *http.Transport
	received  atomic.Int64
	ctx       context.Context // ends with Close
	cancel    context.CancelCauseFunc

	// Where HTTP/2 is possible, requests wait for the first connection: they shall not make as many
	// as there may be only to find that one is enough.
	known atomic.Bool   // there has been a connection
	first chan struct{} // has room if nobody makes it

	turns *turns.Turns

	mu    sync.Mutex
	conns context.Context // of the connections, ends with them
	drop  context.CancelFunc
}

const (
	maxHeader = 64 << 10
	// maxRest is how much of a body that nobody wants is read, so that the connection can be used
	// again.
	maxRest = 40 << 10
)

var (
	// ErrSilent is wrapped by errors of requests that were sent, but had no response in time.
	ErrSilent  = errors.New("server has not answered")
	errLookup  = errors.New("host name lookup: no answer")
	errConnect = errors.New("no connection")
	errUnsent  = errors.New("the request could not be sent")
	errNotHTTP = errors.New("the answer is not HTTP")
	errEncoded = errors.New("server sends blocks in an encoding that was not asked for")
)

// New returns a client for a store at base. It must be closed.
func New(base *url.URL, o Options) *Client {
	if o.Getenv == nil {
		o.Getenv = os.Getenv
	}
	c := &Client{options: o, first: make(chan struct{}, 1)}
	c.known.Store(base.Scheme == "http" && !o.Cleartext)
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	c.conns, c.drop = context.WithCancel(c.ctx)
	c.turns = turns.New(c.ctx)
	var protocols http.Protocols
	protocols.SetHTTP1(!o.Cleartext)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(o.Cleartext)
	c.transport = &http.Transport{
		Proxy: func(r *http.Request) (*url.URL, error) {
			return proxy.For(r.URL.Scheme, r.URL.Hostname(), r.URL.Port(), o.Getenv)
		},
		DialContext:            c.dial,
		TLSClientConfig:        &tls.Config{InsecureSkipVerify: !o.Verify, ClientSessionCache: tls.NewLRUClientSessionCache(o.Connections)},
		TLSHandshakeTimeout:    o.ConnectTimeout,
		DisableCompression:     true,
		MaxConnsPerHost:        o.Connections,
		MaxIdleConnsPerHost:    o.Connections,
		IdleConnTimeout:        o.IdleTimeout,
		MaxResponseHeaderBytes: maxHeader,
		ReadBufferSize:         16 << 10,
		WriteBufferSize:        16 << 10,
		Protocols:              &protocols,
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: o.Timeout / 2, PingTimeout: o.Timeout / 2, WriteByteTimeout: o.Timeout},
	}
	return c
}

// Header returns the header that every request must begin with. It is not changed by the client.
func Header() http.Header {
	return http.Header{
		"User-Agent":      {"guix-substitute-eris"},
		"Accept-Encoding": {"identity"}, // blocks do not compress
		// Whatever we request may be requested twice, so that a connection which the server has
		// closed meanwhile is not an error. No such field is sent if it has no value (net/http,
		// Transport).
		"Idempotency-Key": nil,
	}
}

// Progress returns how many bytes have come, also of blocks that are not whole.
func (c *Client) Progress() int64 { return c.received.Load() }

// conn is a connection that is closed when the client is.
type conn struct {
	net.Conn
	client *Client
	stop   func() bool
}

// Read reads from the connection, and counts.
func (c *conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.client.received.Add(int64(n))
	return n, err
}

// Close closes the connection.
func (c *conn) Close() error {
	c.stop()
	return c.Conn.Close()
}

// dial connects. The transport may go on with that when nobody waits for it any more, but not when
// the client is closed.
func (c *Client) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if e, ok := ctx.Value(exchangeKey{}).(*exchange); ok {
		e.dialed.Store(new(time.Now()))
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	var timeout net.Error
	inner, err := dial.With(&net.Dialer{KeepAlive: 30 * time.Second, Timeout: c.options.ConnectTimeout})(ctx, network, address)
	switch {
	case err == nil:
		c.mu.Lock()
		defer c.mu.Unlock()
		return &conn{inner, c, context.AfterFunc(c.conns, func() { inner.Close() })}, nil
	case errors.As(err, &timeout) && timeout.Timeout() && errors.As(err, new(*net.DNSError)):
		return nil, fmt.Errorf("%w within %v", errLookup, c.options.ConnectTimeout)
	case errors.As(err, &timeout) && timeout.Timeout():
		return nil, fmt.Errorf("%w within %v", errConnect, c.options.ConnectTimeout)
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%w; is a server running there?", syscall.ECONNREFUSED)
	}
	return nil, err
}

// Renew has further requests go over new connections; what is under way fails.
func (c *Client) Renew() {
	c.transport.CloseIdleConnections()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop()
	c.conns, c.drop = context.WithCancel(c.ctx)
}

// Close ends all requests and connections.
func (c *Client) Close() {
	c.cancel(fetch.ErrClosed)
	c.transport.CloseIdleConnections()
}

// Retry calls f, which makes a request by [Client.Do], again when the server was busy, or the
// connection was lost; see [turns.Turns.Retry].
func (c *Client) Retry(ctx context.Context, f func() error) error { return c.turns.Retry(ctx, f) }

// unreachable has the server rest for the longer the longer it took to connect, so that a host that
// does not answer takes a small part of the time; but not if it has answered lately.
func (c *Client) unreachable(err error, took time.Duration) {
	if c.turns.Lately() {
		took = 0
	}
	c.turns.Fail(err, 6*took)
}

// Do makes a request, whose body is what its GetBody returns, and has the response handled, the
// body of which is decoded, and closed when handle returns. No redirection is followed. After a
// connection could not be made, calls fail at once for a time that gets longer with each such
// failure.
//
// Errors are those of handle; a [*fetch.BusyError] if the server is busy; the cause of ctx; errors
// that wrap [ErrSilent]; and failures of the connection, which wrap a [*turns.LostError] where no
// answer of the server has come. None of them quotes the URL or the server.
func (c *Client) Do(ctx context.Context, request *http.Request, handle func(r *http.Response) error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := c.turns.Resting(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.ctx, func() { cancel(fetch.ErrClosed) })()
	pass, err := c.enter(ctx)
	if err != nil {
		return err
	}
	defer pass()
	e := exchange{client: c, pass: pass, began: time.Now()}
	e.timer = time.AfterFunc(time.Hour, func() { cancel(ErrSilent) })
	defer e.timer.Stop()
	err = e.run(ctx, request, handle)
	switch cause := context.Cause(ctx); {
	case err == nil || cause == nil:
		return err
	case cause == ErrSilent && e.answered:
		return e.silent()
	case cause == ErrSilent:
		return &turns.LostError{Err: e.silent()}
	default:
		return cause
	}
}

// enter waits until there is a connection, or this request is the one to make it. Pass must be
// called when that has been done.
func (c *Client) enter(ctx context.Context) (pass func(), err error) {
	if c.known.Load() {
		return func() {}, nil
	}
	select {
	case c.first <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	pass = sync.OnceFunc(func() { <-c.first })
	if c.known.Load() {
		pass()
		return pass, nil
	}
	if err := c.turns.Resting(); err != nil { // which may have begun meanwhile
		pass()
		return nil, err
	}
	return pass, nil
}

// exchange is one request and its response.
type exchange struct {
	client    *Client
	pass      func()
	timer     *time.Timer
	began     time.Time
	dialed    atomic.Pointer[time.Time] // when it began to connect, which may wait for other requests
	connected atomic.Bool
	wrote     atomic.Bool
	answered  bool
}

type exchangeKey struct{}

func (e *exchange) run(ctx context.Context, request *http.Request, handle func(r *http.Response) error) error {
	c := e.client
	request = request.WithContext(httptrace.WithClientTrace(context.WithValue(ctx, exchangeKey{}, e), &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) {
			e.connected.Store(true)
			e.timer.Reset(c.options.Timeout)
			c.known.Store(true)
			e.pass()
		},
		WroteRequest: func(info httptrace.WroteRequestInfo) { e.wrote.Store(info.Err == nil) },
	}))
	if request.GetBody != nil {
		body, err := request.GetBody()
		if err != nil {
			return err
		}
		request.Body = &upload{body, e}
	}
	r, err := c.transport.RoundTrip(request)
	if err != nil {
		err = &turns.LostError{Err: plain(err), Again: e.connected.Load()}
		if !e.connected.Load() && ctx.Err() == nil {
			var took time.Duration
			if began := e.dialed.Load(); began != nil {
				took = time.Since(*began)
			}
			c.unreachable(err, took)
		}
		return err
	}
	if r.StatusCode == http.StatusSwitchingProtocols {
		r.Body.Close() // it is the connection, of which no end of a context is the end
		return &StatusError{Code: r.StatusCode}
	}
	e.answered = true
	e.timer.Reset(c.options.BodyTimeout)
	defer func() {
		io.CopyN(io.Discard, r.Body, maxRest)
		r.Body.Close()
	}()
	if busy := busyError(r); busy != nil {
		if busy.After > 0 {
			busy.After = c.turns.Fail(busy, busy.After)
		}
		return busy
	}
	// What is between us and the server has not got its answer, if it says so.
	away := r.StatusCode == http.StatusBadGateway || r.StatusCode == http.StatusGatewayTimeout
	if !away {
		c.turns.Succeed()
	}
	if err := decode(r); err != nil {
		return err
	}
	err = handle(r)
	if away && err != nil {
		err = &turns.LostError{Err: err}
	}
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, new(*net.OpError)) {
		// What cuts one off, after so many bytes perhaps, is about to do so with those that are
		// idle: each would be one more failure in a row.
		c.transport.CloseIdleConnections()
	}
	return err
}

// upload is the body of a request, which may take as long as it goes on.
type upload struct {
	io.ReadCloser
	exchange *exchange
}

func (u *upload) Read(p []byte) (int, error) {
	u.exchange.timer.Reset(u.exchange.client.options.Timeout)
	return u.ReadCloser.Read(p)
}

func (e *exchange) silent() error {
	took := time.Since(e.began).Round(time.Millisecond)
	if !e.wrote.Load() {
		return fmt.Errorf("%w within %v", errUnsent, took)
	}
	if e.answered {
		return fmt.Errorf("the answer takes more than %v", took)
	}
	return fmt.Errorf("%w for %v", ErrSilent, took)
}

// plain replaces an error that quotes the server, which may write what it likes, also what is
// secret in our URL.
func plain(err error) error {
	text := err.Error()
	// net/http has no error for what comes before anything was requested.
	unasked := strings.Contains(text, "readLoopPeekFailLocked: %!w(<nil>)")
	if len(text) > 300 || unasked || strings.Contains(text, "malformed") {
		return errNotHTTP
	}
	return err
}

// StatusError is an answer that says neither that the server has the block nor that it does not.
type StatusError struct {
	Code int    // the HTTP status
	Text string // what the server says, shortened, not to be trusted; empty if that was not read
}

// Error returns the status and the text.
func (e *StatusError) Error() string {
	text := strings.TrimSpace(fmt.Sprintf("server answers %d %s", e.Code, http.StatusText(e.Code)))
	if e.Text != "" {
		text += fmt.Sprintf(": %.200q", e.Text)
	}
	return text
}

// busyError returns the error of a server that is busy, or nil.
func busyError(r *http.Response) *fetch.BusyError {
	if r.StatusCode != http.StatusTooManyRequests && r.StatusCode != http.StatusServiceUnavailable {
		return nil
	}
	after := backoff.RetryAfter(r.Header.Get("Retry-After"), time.Now())
	return &fetch.BusyError{After: min(after, turns.LongestRest), Err: &StatusError{Code: r.StatusCode}}
}

// decode undoes what a proxy has done that did not heed what was asked for.
func decode(r *http.Response) error {
	switch strings.ToLower(r.Header.Get("Content-Encoding")) {
	case "", "identity", "aws-chunked": // the last is left over from how it was uploaded
		return nil
	case "gzip", "x-gzip":
	default:
		return errEncoded
	}
	in, err := gzip.NewReader(io.LimitReader(r.Body, maxRest))
	if err != nil {
		return errEncoded
	}
	in.Multistream(false)
	r.Body = struct {
		io.Reader
		io.Closer
	}{in, r.Body}
	r.ContentLength, r.Uncompressed = -1, true
	return nil
}

// ReadBlock reads the block that a response brings to dst, whose capacity must suffice. The error
// is an [eris.BlockError] if it does not have the size. What is cut off by the connection is not
// held against the server.
func ReadBlock(r *http.Response, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	wrong := func(length int) error { return &eris.BlockError{Reference: ref, Length: length, Want: size} }
	if r.ContentLength >= 0 && r.ContentLength != int64(size) {
		return nil, wrong(int(min(r.ContentLength, 1<<30)))
	}
	block := dst[:size]
	n, err := readFull(r.Body, block)
	if err == io.EOF {
		if r.ContentLength < 0 && !r.Uncompressed && r.ProtoMajor == 1 && len(r.TransferEncoding) == 0 {
			return nil, io.ErrUnexpectedEOF // the end of the body is that of the connection, for whatever reason
		}
		return nil, wrong(n)
	}
	if err != nil {
		return nil, err
	}
	// To see the end of a body in chunks is also what makes the connection fit for the next
	// request.
	var more [1]byte
	switch n, err := readFull(r.Body, more[:]); {
	case n > 0:
		return nil, wrong(int(size) + 1)
	case err != io.EOF:
		return nil, err
	}
	return block, nil
}

// readFull is [io.ReadFull], but returns [io.EOF] for every body that is whole and too short, to
// tell it from one that was cut off.
func readFull(r io.Reader, p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var read int
		read, err = r.Read(p[n:])
		n += read
	}
	if n == len(p) {
		err = nil
	}
	return n, err
}
