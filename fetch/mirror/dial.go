// SPDX-License-Identifier: GPL-3.0-or-later

package mirror

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/proxy"
)

// A connection carries requests to one server, one after the other.
type connection struct {
	peer   *peer
	net    net.Conn
	r      *bufio.Reader
	limit  *headerLimit // below r
	reused bool         // it has carried a request before
	served int          // answers about narinfos that it has carried
	modest bool         // it is used for a modest purpose
	proxy  *location    // what plain HTTP requests are sent to instead of the server
	idle   time.Time    // since when it is in the pool
}

// maxHeader bounds the header of a response, in bytes.
const maxHeader = 256 << 10

// headerLimit makes a response that never gets to its body fail. It counts what
// is read from the network while a header is being read.
type headerLimit struct {
	net     net.Conn
	timeout time.Duration // of silence
	total   time.Time     // when the whole answer is due; zero is never
	left    int           // negative outside headers
}

var errHeader = fmt.Errorf("response header is longer than %d bytes", maxHeader)

func (l *headerLimit) Read(p []byte) (int, error) {
	if l.left == 0 {
		return 0, errHeader
	}
	if l.left > 0 {
		p = p[:min(len(p), l.left)]
	}
	due := time.Now().Add(l.timeout)
	if !l.total.IsZero() && l.total.Before(due) {
		due = l.total
	}
	if err := l.net.SetReadDeadline(due); err != nil {
		return 0, err
	}
	n, err := l.net.Read(p)
	if l.left > 0 {
		l.left -= n
	}
	return n, err
}

// A peer is a server and what this client has learnt about it.
type peer struct {
	server string
	// slots has an element for each connection that is in use or being made.
	// Others wait in the pool. As one is made only when none waits there, there
	// are never more connections in all than slots has room for.
	slots chan struct{}
	// modest has an element for each of those that are for a modest purpose, with
	// room for half as many, so that nobody else has to wait for these.
	modest chan struct{}

	mu   sync.Mutex
	open int   // connections, in use or not
	down error // why it is not asked again
	// broken is how many pipelines it has broken off soon, since one that it has
	// not.
	broken int
	// silent is how many nars in a row it has kept silent about.
	silent int
}

// peer returns what is known of a server.
func (c *Client) peer(server string) *peer {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.peers[server]
	if p == nil {
		p = &peer{
			server: server,
			slots:  make(chan struct{}, c.o.MaxConnections),
			modest: make(chan struct{}, max(1, c.o.MaxConnections/2)),
		}
		// Redirections may name any number of servers.
		if len(c.peers) < maxServers {
			c.peers[server] = p
		}
	}
	return p
}

func (p *peer) downError() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.down != nil {
		return &ServerError{p.server, p.down}
	}
	return nil
}

func (p *peer) setDown(err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = err
	return &ServerError{p.server, err}
}

// unreachable notes that a connection could not be made. A server that has others
// takes no more than those, but is there.
func (p *peer) unreachable(err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open == 0 {
		p.down = err
	}
	return &ServerError{p.server, err}
}

// pipelined notes how many answers have come on a connection, and whether it broke
// while there were more to come.
func (p *peer) pipelined(answers int, broke bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case answers >= fewRequests:
		p.broken = 0
	case broke:
		p.broken++
	}
}

// isPlain tells whether the server does not take pipelines.
func (p *peer) isPlain() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.broken >= maxBroken
}

func (p *peer) addOpen(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open += n
}

// How a connection is wanted.
type wish struct {
	fresh   bool // a new one
	patient bool // wait while the server has as many as it gets, rather than errBusy
	modest  bool // leave others for those who are in a hurry
	again   bool // the server has answered before, so that it does not count as down
}

var errBusy = errors.New("all connections are in use")

// connect returns a connection to the server of l, which must be given to release
// after use.
func (c *Client) connect(ctx context.Context, l *location, w wish) (*connection, error) {
	p := c.peer(l.server())
	if err := p.downError(); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if w.modest {
		if err := take(ctx, p.modest, w.patient); err != nil {
			return nil, err
		}
	}
	conn, err := c.connectNow(ctx, l, p, w)
	if err != nil {
		if w.modest {
			<-p.modest
		}
		return nil, err
	}
	conn.modest = w.modest
	return conn, nil
}

// take puts an element into a channel that counts.
func take(ctx context.Context, slots chan<- struct{}, patient bool) error {
	select {
	case slots <- struct{}{}:
		return nil
	default:
	}
	if !patient {
		return errBusy
	}
	select {
	case slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (c *Client) connectNow(ctx context.Context, l *location, p *peer, w wish) (*connection, error) {
	if err := take(ctx, p.slots, w.patient); err != nil {
		return nil, err
	}
	if w.fresh {
		// What waits there takes the place of a new one, and is as old as the one
		// that was no good.
		c.pool.drop(p)
	} else if conn := c.pool.get(p); conn != nil {
		return conn, nil
	}
	conn, err := c.dial(ctx, l)
	if err != nil {
		<-p.slots
		if due, ok := ctx.Deadline(); ok && !time.Now().Before(due) {
			<-ctx.Done() // the dialer may notice first
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if w.again {
			return nil, &ServerError{p.server, err}
		}
		return nil, p.unreachable(err)
	}
	p.addOpen(1)
	limit := &headerLimit{net: conn.net, left: -1}
	conn.peer, conn.limit, conn.r = p, limit, bufio.NewReaderSize(limit, 64<<10)
	return conn, nil
}

// release ends the use of a connection; reuse tells that it can be used again.
func (c *Client) release(conn *connection, reuse bool) {
	p, modest := conn.peer, conn.modest // others may have it next
	if reuse {
		c.pool.put(conn)
	} else {
		conn.close()
	}
	<-p.slots
	if modest {
		<-p.modest
	}
}

func (c *connection) close() {
	c.net.Close()
	c.peer.addOpen(-1)
}

// dial makes a connection to the server of l, through a proxy if there is one
// for it.
func (c *Client) dial(ctx context.Context, l *location) (*connection, error) {
	host, port := l.host, l.address()
	via, err := c.proxyFor(l)
	if err != nil {
		return nil, err
	}
	if via != nil {
		host, port = via.host, via.address()
	}
	port = port[strings.LastIndexByte(port, ':')+1:]
	addresses, err := c.resolve(ctx, host)
	if err != nil {
		return nil, err
	}
	raw, err := c.dialAny(ctx, addresses, port)
	if err != nil {
		return nil, err
	}
	conn := &connection{net: raw}
	if via != nil && l.scheme == "http" {
		conn.proxy = via
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeouts*c.o.ConnectTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })
	if via != nil && l.scheme == "https" {
		err = tunnel(raw, l, via)
	}
	if err == nil && l.scheme == "https" {
		config := c.tls.Clone()
		config.ServerName, _, _ = strings.Cut(l.host, "%")
		secure := tls.Client(raw, config)
		err = secure.HandshakeContext(ctx)
		conn.net = secure
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		raw.Close()
		if ctx.Err() != nil {
			return nil, fmt.Errorf("no connection within %v", handshakeTimeouts*c.o.ConnectTimeout)
		}
		return nil, shortened(err)
	}
	return conn, nil
}

const (
	// resolveTimeouts and handshakeTimeouts are how often the time to connect
	// may pass until a name is an address, and until the peer at that address has
	// shaken hands. Resolvers ask another server when the first has been silent
	// for 5 seconds.
	resolveTimeouts   = 3
	handshakeTimeouts = 2
	// maxAddresses is how many addresses of a host are tried.
	maxAddresses = 8
	// attemptDelay is the time until the next address is tried as well (RFC 8305,
	// section 5, has 250 ms).
	attemptDelay = 250 * time.Millisecond
)

// resolve returns the addresses of a host, those of the two families in turns
// (RFC 8305, section 4), at least one.
func (c *Client) resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a}, nil
	}
	timeout := resolveTimeouts * c.o.ConnectTimeout
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	found, err := c.lookup(ctx, "ip", host)
	if err != nil {
		var dns *net.DNSError
		switch {
		case ctx.Err() != nil:
			err = fmt.Errorf("no answer within %v", timeout)
		case errors.As(err, &dns):
			err = errors.New(dns.Err)
		}
		return nil, fmt.Errorf("host name lookup: %w", err)
	}
	if len(found) == 0 {
		return nil, errors.New("host name lookup: no address")
	}
	var families [2][]netip.Addr // the preferred one and the other
	for _, a := range found {
		other := 0
		if a.Unmap().Is4() != found[0].Unmap().Is4() {
			other = 1
		}
		families[other] = append(families[other], a.Unmap())
	}
	var addresses []netip.Addr
	for i := 0; len(addresses) < min(len(found), maxAddresses); i++ {
		for _, f := range families {
			if i < len(f) {
				addresses = append(addresses, f[i])
			}
		}
	}
	return addresses, nil
}

// dialAny connects to the first of the addresses that answers. Each gets the time
// to connect; the next one is tried when that before it has failed or is slow.
func (c *Client) dialAny(ctx context.Context, addresses []netip.Addr, port string) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	type result struct {
		conn net.Conn
		err  error
	}
	results := make(chan result)
	pending := 0
	defer func() {
		cancel()
		for range pending {
			if r := <-results; r.conn != nil {
				r.conn.Close()
			}
		}
	}()
	dialer := net.Dialer{Timeout: c.o.ConnectTimeout, KeepAlive: 30 * time.Second}
	slow := time.NewTicker(attemptDelay)
	defer slow.Stop()
	var first error
	for next := true; ; {
		if next && len(addresses) > 0 {
			to := net.JoinHostPort(addresses[0].String(), port)
			addresses = addresses[1:]
			pending++
			go func() {
				conn, err := dialer.DialContext(ctx, "tcp", to)
				results <- result{conn, err}
			}()
		}
		next = false
		select {
		case <-slow.C:
			next = true
		case r := <-results:
			pending--
			if r.err == nil {
				return r.conn, nil
			}
			if first == nil {
				first = dialError(r.err)
			}
			if pending == 0 && len(addresses) == 0 {
				return nil, first
			}
			next = true
		}
	}
}

// dialError says in a few words why there is no connection.
func dialError(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Err != nil {
		if op.Addr != nil {
			return fmt.Errorf("connecting to %s: %w", op.Addr, op.Err)
		}
		return op.Err
	}
	return err
}

// proxyFor returns the proxy for requests to the server of l, or nil.
func (c *Client) proxyFor(l *location) (*location, error) {
	to := l.address()
	value, err := proxy.For(l.scheme, l.host, to[strings.LastIndexByte(to, ':')+1:], c.o.Getenv)
	if err != nil || value == "" {
		return nil, err
	}
	return parse(value)
}

// proxyAuthorization is the header line that a proxy with user information in its
// URL wants, or nothing.
func proxyAuthorization(proxy *location) string {
	if proxy == nil || proxy.user == nil {
		return ""
	}
	return "Proxy-Authorization: " + basic(proxy.user) + "\r\n"
}

// basic is a value of RFC 7617.
func basic(user *url.Userinfo) string {
	password, _ := user.Password()
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password))
}

// tunnel asks a proxy to connect to the host of l (RFC 9110, section 9.3.6).
func tunnel(conn net.Conn, l, proxy *location) error {
	to := l.address()
	_, err := io.WriteString(conn, "CONNECT "+to+" HTTP/1.1\r\nHost: "+to+"\r\n"+proxyAuthorization(proxy)+"\r\n")
	if err != nil {
		return err
	}
	// Byte by byte: what follows the header belongs to the tunnel.
	r := bufio.NewReaderSize(io.LimitReader(oneByte{conn}, maxHeader), 16)
	for range maxInterim {
		response, err := http.ReadResponse(r, &http.Request{Method: "CONNECT"})
		switch {
		case err != nil:
			return fmt.Errorf("proxy %s: %w", proxy.hostField(), shortened(err))
		case response.StatusCode >= 300:
			return fmt.Errorf("proxy %s answered %.100q to a request to connect", proxy.hostField(), response.Status)
		case response.StatusCode >= 200:
			return nil
		}
	}
	return fmt.Errorf("proxy %s: %w", proxy.hostField(), errInterim)
}

type oneByte struct{ r io.Reader }

func (o oneByte) Read(p []byte) (int, error) { return o.r.Read(p[:min(1, len(p))]) }

// requestLine begins a request for a target at the server of l: its first line and
// the Host field.
func (c *connection) requestLine(l *location, target string) string {
	host := l.hostField()
	if c.proxy != nil {
		target = "http://" + host + target
	}
	return "GET " + target + " HTTP/1.1\r\nHost: " + host + "\r\n" + proxyAuthorization(c.proxy)
}

// await sets the bounds for the next answer.
func (c *connection) await(silence time.Duration, total time.Duration) {
	c.limit.timeout = silence
	c.limit.total = time.Time{}
	if total > 0 {
		c.limit.total = time.Now().Add(total)
	}
}

// maxInterim bounds the interim (1xx) responses before an answer.
const maxInterim = 5

// header reads the header of an answer.
func (c *connection) header() (*http.Response, error) {
	for range maxInterim {
		// What the buffer holds already is part of the header too, but is less
		// than the bound.
		c.limit.left = maxHeader
		response, err := http.ReadResponse(c.r, nil)
		c.limit.left = -1
		if err != nil {
			return nil, shortened(err)
		}
		if response.StatusCode >= 200 {
			return response, nil
		}
	}
	return nil, errInterim
}

var errInterim = errors.New("too many interim responses")

// A pool keeps connections for later.
type pool struct {
	mu     sync.Mutex
	idle   []*connection // the one used last is last
	closed bool
}

const (
	// maxIdle is how many connections are kept.
	maxIdle = 32
	// idleTime is for how long; servers commonly close after 60 seconds.
	idleTime = 50 * time.Second
)

func (p *pool) get(of *peer) *connection {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := len(p.idle) - 1; i >= 0; i-- {
		conn := p.idle[i]
		if conn.peer != of {
			continue
		}
		p.idle = append(p.idle[:i], p.idle[i+1:]...)
		if time.Since(conn.idle) > idleTime {
			conn.close()
			continue
		}
		conn.reused = true
		return conn
	}
	return nil
}

// drop closes the connections to a server.
func (p *pool) drop(of *peer) {
	for conn := p.get(of); conn != nil; conn = p.get(of) {
		conn.close()
	}
}

// count returns how many connections to a server there are.
func (p *pool) count(of *peer) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, conn := range p.idle {
		if conn.peer == of {
			n++
		}
	}
	return n
}

func (p *pool) put(conn *connection) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || conn.r.Buffered() > 0 {
		conn.close()
		return
	}
	if len(p.idle) == maxIdle {
		p.idle[0].close()
		p.idle = p.idle[1:]
	}
	conn.idle = time.Now()
	p.idle = append(p.idle, conn)
}

func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, conn := range p.idle {
		conn.close()
	}
	p.idle = nil
}
