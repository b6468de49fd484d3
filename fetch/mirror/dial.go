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
)

// A connection carries requests to one server, one after the other.
type connection struct {
	server string
	net    net.Conn
	r      *bufio.Reader
	limit  *headerLimit // below r
	reused bool         // it has carried a request before
	proxy  *url.URL     // what plain HTTP requests are sent to instead of the server
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

// connect returns a connection to the server of u, one that is at hand if
// possible. With fresh it is a new one.
func (c *Client) connect(ctx context.Context, u *url.URL, fresh bool) (*connection, error) {
	server := serverOf(u)
	if err := c.downError(server); err != nil {
		return nil, err
	}
	if !fresh {
		if conn := c.pool.get(server); conn != nil {
			return conn, nil
		}
	}
	dialContext, cancel := context.WithTimeout(ctx, c.o.ConnectTimeout)
	defer cancel()
	conn, err := c.dial(dialContext, u)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if dialContext.Err() != nil {
			err = fmt.Errorf("no connection within %v", c.o.ConnectTimeout)
		}
		return nil, c.setDown(server, err)
	}
	limit := &headerLimit{net: conn.net, left: -1}
	conn.server, conn.limit, conn.r = server, limit, bufio.NewReaderSize(limit, 64<<10)
	return conn, nil
}

func (c *Client) dial(ctx context.Context, u *url.URL) (*connection, error) {
	conn := &connection{}
	to := address(u)
	proxy, err := c.proxyFor(u)
	if err != nil {
		return nil, err
	}
	if proxy != nil {
		to = address(proxy)
	}
	dialer := net.Dialer{KeepAlive: 30 * time.Second}
	conn.net, err = dialer.DialContext(ctx, "tcp", to)
	if err != nil {
		return nil, dialError(err)
	}
	stop := context.AfterFunc(ctx, func() { conn.net.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	switch {
	case proxy != nil && u.Scheme == "http":
		conn.proxy = proxy
	case proxy != nil:
		err = tunnel(conn.net, u, proxy)
	}
	if err == nil && u.Scheme == "https" {
		config := c.tls.Clone()
		config.ServerName = u.Hostname()
		secure := tls.Client(conn.net, config)
		err = secure.HandshakeContext(ctx)
		conn.net = secure
	}
	if err != nil {
		conn.net.Close()
		return nil, err
	}
	return conn, nil
}

// dialError says in a few words why there is no connection.
func dialError(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Err != nil {
		var dns *net.DNSError
		if errors.As(op.Err, &dns) {
			return fmt.Errorf("host name lookup: %s", dns.Err)
		}
		if op.Addr != nil {
			return fmt.Errorf("connecting to %s: %w", op.Addr, op.Err)
		}
		return op.Err
	}
	return err
}

// proxyFor returns the proxy for requests to u, or nil. The variables are those
// that Guix obeys (guix/build/download.scm: open-connection-for-uri), and
// no_proxy: a comma-separated list of host names that also stand for their
// subdomains, addresses, networks in CIDR notation, or "*".
func (c *Client) proxyFor(u *url.URL) (*url.URL, error) {
	name := u.Scheme + "_proxy"
	value := c.o.Getenv(name)
	if value == "" || c.exempt(u) {
		return nil, nil
	}
	if !strings.Contains(value, "://") {
		value = "http://" + value
	}
	proxy, err := url.Parse(value)
	if err != nil || proxy.Scheme != "http" || proxy.Hostname() == "" {
		return nil, fmt.Errorf("%s: only http:// proxies are supported", name)
	}
	return proxy, nil
}

func (c *Client) exempt(u *url.URL) bool {
	host := strings.ToLower(u.Hostname())
	address, notAddress := netip.ParseAddr(host)
	for entry := range strings.SplitSeq(c.o.Getenv("no_proxy"), ",") {
		entry = strings.ToLower(strings.TrimSpace(entry))
		if h, port, err := net.SplitHostPort(entry); err == nil {
			if port != u.Port() {
				continue
			}
			entry = h
		}
		entry = strings.TrimPrefix(entry, ".")
		if entry == "" {
			continue
		}
		if entry == "*" || entry == host || strings.HasSuffix(host, "."+entry) {
			return true
		}
		if network, err := netip.ParsePrefix(entry); err == nil && notAddress == nil && network.Contains(address) {
			return true
		}
	}
	return false
}

// proxyAuthorization is the header line that a proxy with user information in its
// URL wants, or nothing.
func proxyAuthorization(proxy *url.URL) string {
	if proxy == nil || proxy.User == nil {
		return ""
	}
	return "Proxy-Authorization: " + basic(proxy.User) + "\r\n"
}

// basic is a value of RFC 7617.
func basic(user *url.Userinfo) string {
	password, _ := user.Password()
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password))
}

// tunnel asks a proxy to connect to the host of u (RFC 9110, section 9.3.6).
func tunnel(conn net.Conn, u, proxy *url.URL) error {
	to := address(u)
	_, err := io.WriteString(conn, "CONNECT "+to+" HTTP/1.1\r\nHost: "+to+"\r\n"+proxyAuthorization(proxy)+"\r\n")
	if err != nil {
		return err
	}
	// Byte by byte: what follows the header belongs to the tunnel.
	r := bufio.NewReaderSize(io.LimitReader(oneByte{conn}, maxHeader), 16)
	response, err := http.ReadResponse(r, &http.Request{Method: "CONNECT"})
	if err != nil {
		return fmt.Errorf("proxy %s: %w", proxy.Host, err)
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("proxy %s answered %q to a request to connect", proxy.Host, response.Status)
	}
	return nil
}

type oneByte struct{ r io.Reader }

func (o oneByte) Read(p []byte) (int, error) { return o.r.Read(p[:min(1, len(p))]) }

// requestLine begins a request for u: its first line and the Host field. The
// target is sent as it stands in the URL.
func (c *connection) requestLine(u *url.URL) string {
	target := u.EscapedPath()
	if target == "" {
		target = "/"
	}
	if u.RawQuery != "" || u.ForceQuery {
		target += "?" + strings.ReplaceAll(u.RawQuery, " ", "%20")
	}
	if c.proxy != nil {
		target = "http://" + u.Host + target
	}
	return "GET " + target + " HTTP/1.1\r\nHost: " + u.Host + "\r\n" + proxyAuthorization(c.proxy)
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
			return nil, err
		}
		if response.StatusCode >= 200 {
			return response, nil
		}
	}
	return nil, errors.New("too many interim responses")
}

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

func (p *pool) get(server string) *connection {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := len(p.idle) - 1; i >= 0; i-- {
		conn := p.idle[i]
		if conn.server != server {
			continue
		}
		p.idle = append(p.idle[:i], p.idle[i+1:]...)
		if time.Since(conn.idle) > idleTime {
			conn.net.Close()
			continue
		}
		conn.reused = true
		return conn
	}
	return nil
}

func (p *pool) put(conn *connection) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || conn.r.Buffered() > 0 {
		conn.net.Close()
		return
	}
	if len(p.idle) == maxIdle {
		p.idle[0].net.Close()
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
		conn.net.Close()
	}
	p.idle = nil
}
