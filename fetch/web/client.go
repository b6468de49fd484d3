// SPDX-License-Identifier: GPL-3.0-or-later

package web

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
	"time"

	"golang.org/x/sync/semaphore"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/proxy"
)

// Options says how a [Store] behaves. Zero fields stand for the defaults.
type Options struct {
	// Connections is the most connections to one host, each of which carries one request of HTTP/1.1 at a time; further
	// calls wait for their turn. Default 32.
	Connections int
	// Streams is the most requests by HTTP/2 at a time. There is one connection if the server allows as many on one. Default 256.
	Streams int
	// ConnectTimeout bounds the time to resolve and connect, and again that to shake hands. Default 5 s.
	ConnectTimeout time.Duration
	// Timeout is for how long a server may send nothing of an answer that it owes. A whole answer may take four times that.
	// Default 20 s.
	Timeout time.Duration
	// IdleTimeout is for how long a connection without requests is kept. Default 50 s, because servers commonly close
	// after 60 s.
	IdleTimeout time.Duration
	// TLS is the configuration for https. If it is nil, certificates are verified only if the URL asks for that.
	TLS *tls.Config
	// UserAgent names the program to servers.
	UserAgent string
	// Getenv looks up the variables http_proxy, https_proxy and no_proxy, which mean what they mean to package
	// fetch/mirror. Default os.Getenv.
	Getenv func(string) string
}

func (o Options) withDefaults() Options {
	setDefault(&o.Connections, 32)
	setDefault(&o.Streams, 256)
	setDefault(&o.ConnectTimeout, 5*time.Second)
	setDefault(&o.Timeout, 20*time.Second)
	setDefault(&o.IdleTimeout, 50*time.Second)
	if o.UserAgent == "" {
		o.UserAgent = "guix-substitute-eris"
	}
	if o.Getenv == nil {
		o.Getenv = os.Getenv
	}
	return o
}

func setDefault[T int | time.Duration](v *T, value T) {
	if *v <= 0 {
		*v = value
	}
}

// client makes the requests of one store, and bounds them.
type client struct {
	options   Options
	transport *http.Transport
	room      *semaphore.Weighted
	whole     int64         // of room
	cost      atomic.Int64  // of room, for a request; 0 as long as HTTP/2 is possible but there has been no connection
	first     chan struct{} // has room if nobody finds that out
	ctx       context.Context
	cancel    context.CancelCauseFunc

	mu     sync.Mutex
	calls  sync.WaitGroup
	closed bool
	conns  map[*trackedConn]struct{}

	// After a failure to connect, or when the server has asked for it, no request is made until then.
	until    time.Time
	err      error
	failures int
}

var errClosed = errors.New("store is closed")

func newClient(u *storeURL, o Options) *client {
	c := &client{
		options: o,
		whole:   int64(o.Connections) * int64(o.Streams),
		first:   make(chan struct{}, 1),
		conns:   make(map[*trackedConn]struct{}),
	}
	c.room = semaphore.NewWeighted(c.whole)
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	config := o.TLS
	if config == nil {
		config = &tls.Config{
			InsecureSkipVerify: !u.verify, // see the package comment
			ClientSessionCache: tls.NewLRUClientSessionCache(o.Connections),
		}
	}
	var protocols http.Protocols
	protocols.SetHTTP1(!u.cleartext)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(u.cleartext)
	c.transport = &http.Transport{
		Proxy:                  func(r *http.Request) (*url.URL, error) { return proxyFor(r.URL, o.Getenv) },
		DialContext:            c.dial,
		TLSClientConfig:        config,
		TLSHandshakeTimeout:    o.ConnectTimeout,
		DisableCompression:     true,
		MaxConnsPerHost:        o.Connections,
		MaxIdleConnsPerHost:    o.Connections,
		IdleConnTimeout:        o.IdleTimeout,
		MaxResponseHeaderBytes: maxHeader,
		ReadBufferSize:         16 << 10,
		WriteBufferSize:        16 << 10,
		Protocols:              &protocols,
		HTTP2: &http.HTTP2Config{
			SendPingTimeout:  o.Timeout / 2,
			PingTimeout:      o.Timeout / 2,
			WriteByteTimeout: o.Timeout,
		},
	}
	if u.base.Scheme == "http" && !u.cleartext {
		c.cost.Store(c.whole / int64(o.Connections))
	}
	return c
}

// maxHeader bounds the header of a response, in bytes.
const maxHeader = 64 << 10

// trackedConn is a connection that is closed when the client is.
type trackedConn struct {
	net.Conn
	client *client
}

// Close closes the connection.
func (t *trackedConn) Close() error {
	t.client.mu.Lock()
	delete(t.client.conns, t)
	t.client.mu.Unlock()
	return t.Conn.Close()
}

// dial connects. The transport may go on with that when nobody waits for it any more, but not when the client is closed.
func (c *client) dial(ctx context.Context, network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.options.ConnectTimeout, errConnect)
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	dialer := net.Dialer{KeepAlive: 30 * time.Second}
	conn, err := dialer.DialContext(ctx, network, address)
	if err != nil {
		if errors.Is(context.Cause(ctx), errConnect) {
			err = fmt.Errorf("%w within %v", errConnect, c.options.ConnectTimeout)
		}
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		conn.Close()
		return nil, errClosed
	}
	tracked := &trackedConn{conn, c}
	c.conns[tracked] = struct{}{}
	return tracked, nil
}

var errConnect = errors.New("no connection")

// close lets go of everything.
func (c *client) close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel(errClosed)
	c.calls.Wait()
	c.transport.CloseIdleConnections()
	c.mu.Lock()
	conns := c.conns
	c.conns = nil
	c.mu.Unlock()
	for conn := range conns {
		conn.Conn.Close()
	}
}

// call is a call of Get or Put.
type call struct {
	client    *client
	ctx       context.Context
	cancel    context.CancelCauseFunc
	silence   *time.Timer
	began     time.Time
	onConnect func(http2 bool) // called for the first connection, or nil
}

// call waits for its turn and runs do, with a context that ends when ctx does, when the client is closed, and when the server
// is silent for too long.
func (c *client) call(ctx context.Context, do func(*call) error) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if err := c.begin(); err != nil {
		return err
	}
	defer c.calls.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.ctx, func() { cancel(errClosed) })()
	this := &call{client: c, ctx: ctx, cancel: cancel}
	cost, passOn, err := c.enter(this)
	if err != nil {
		return err
	}
	defer passOn()
	if c.room.Acquire(ctx, cost) != nil {
		return context.Cause(ctx)
	}
	defer c.room.Release(cost)
	// It may have changed while this waited.
	if err := c.waitError(); err != nil {
		return err
	}
	this.began = time.Now()
	this.silence = time.AfterFunc(c.options.Timeout, func() { cancel(errSilent) })
	defer this.silence.Stop()
	err = do(this)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
		if err == errSilent {
			err = fmt.Errorf("%w for %v", errSilent, time.Since(this.began).Round(time.Millisecond))
		}
	}
	return err
}

var errSilent = errors.New("server has not answered")

// begin counts a call that begins.
func (c *client) begin() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return errClosed
	}
	if err := c.waitErrorLocked(); err != nil {
		return err
	}
	c.calls.Add(1)
	return nil
}

// enter returns what a request costs. Where HTTP/2 is possible, one call at a time makes a
// connection, and the others wait for it: they shall not make as many as there may be only to find that one is enough. passOn
// must be called in the end.
func (c *client) enter(this *call) (cost int64, passOn func(), err error) {
	if cost = c.cost.Load(); cost > 0 {
		return cost, func() {}, nil
	}
	select {
	case c.first <- struct{}{}:
	case <-this.ctx.Done():
		return 0, nil, context.Cause(this.ctx)
	}
	passOn = sync.OnceFunc(func() { <-c.first })
	if cost = c.cost.Load(); cost > 0 {
		passOn()
		return cost, func() {}, nil
	}
	this.onConnect = func(http2 bool) {
		if http2 {
			c.cost.Store(c.whole / int64(c.options.Streams))
		} else {
			c.cost.Store(c.whole / int64(c.options.Connections))
		}
		passOn()
	}
	return c.whole / int64(c.options.Connections), passOn, nil
}

const (
	firstPause = 100 * time.Millisecond
	maxPause   = 30 * time.Second
)

// waitError returns the error that calls get as long as no request is made.
func (c *client) waitError() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.waitErrorLocked()
}

func (c *client) waitErrorLocked() error {
	if c.err == nil {
		return nil
	}
	left := time.Until(c.until)
	if left <= 0 {
		return nil
	}
	return fmt.Errorf("not asked again for %v: %w", left.Round(time.Millisecond), c.err)
}

// pause has no request made for a while, because of an error.
func (c *client) pause(d time.Duration, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if until := time.Now().Add(d); until.After(c.until) {
		c.until, c.err = until, err
	}
}

// connectFailed has no connection tried for a while: the longer this one took, the longer, so that a host that does not
// answer takes a small part of the time.
func (c *client) connectFailed(took time.Duration, err error) {
	c.mu.Lock()
	if c.failures > 0 && time.Now().Before(c.until) {
		c.mu.Unlock()
		return // one of several that failed together
	}
	wait := maxPause
	if c.failures < 9 {
		wait = min(wait, max(firstPause<<c.failures, 6*took))
	}
	c.failures++
	c.mu.Unlock()
	c.pause(wait, err)
}

// connectWorked ends that.
func (c *client) connectWorked() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failures > 0 {
		c.failures = 0
		c.until, c.err = time.Time{}, nil
	}
}

// response is a response whose body is being read.
type response struct {
	*http.Response
	call *call
}

// roundTrip makes a request.
func (t *call) roundTrip(request *http.Request) (*response, error) {
	var connected atomic.Bool
	began := time.Now()
	trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		connected.Store(true)
		if !info.Reused {
			t.client.connectWorked()
		}
		if t.onConnect != nil {
			secure, ok := info.Conn.(*tls.Conn)
			t.onConnect(!ok || secure.ConnectionState().NegotiatedProtocol == "h2")
			t.onConnect = nil
		}
	}}
	r, err := t.client.transport.RoundTrip(request.WithContext(httptrace.WithClientTrace(t.ctx, trace)))
	if err != nil {
		err = plainError(err)
		if cause := context.Cause(t.ctx); !connected.Load() && (cause == nil || cause == errSilent) {
			t.client.connectFailed(time.Since(began), err)
		}
		return nil, err
	}
	t.progress()
	return &response{r, t}, nil
}

var errMalformed = errors.New("the answer is not HTTP")

// plainError replaces an error that quotes the server, which may write what it likes, also what is secret in our URL.
func plainError(err error) error {
	if text := err.Error(); len(text) > 300 || strings.Contains(text, "malformed") {
		return errMalformed
	}
	return err
}

// progress takes note that the server has sent something.
func (t *call) progress() {
	if left := 4*t.client.options.Timeout - time.Since(t.began); left > 0 && t.silence.Stop() {
		t.silence.Reset(min(left, t.client.options.Timeout))
	}
}

// readFull reads as many bytes as p has. It returns io.EOF if the body ends before that.
func (r *response) readFull(p []byte) (n int, err error) {
	for n < len(p) {
		read, err := r.Body.Read(p[n:])
		n += read
		if n < len(p) && err != nil {
			return n, err
		}
		if n < len(p) {
			r.call.progress()
		}
	}
	return n, nil
}

// maxRest is how much of a body that nobody wants is read, so that the connection can be used again.
const maxRest = 40 << 10

// finish closes the body.
func (r *response) finish() {
	io.CopyN(io.Discard, r.Body, maxRest)
	r.Body.Close()
}

// proxyFor returns the proxy for requests to u, or nil.
func proxyFor(u *url.URL, getenv func(string) string) (*url.URL, error) {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	value, err := proxy.For(u.Scheme, u.Hostname(), port, getenv)
	if err != nil || value == "" {
		return nil, err
	}
	return url.Parse(value)
}
