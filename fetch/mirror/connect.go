// SPDX-License-Identifier: GPL-3.0-or-later

package mirror

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/proxy"
)

const (
	// maxHeader bounds the header of a response, in bytes.
	maxHeader = 256 << 10
	// maxInterim bounds the interim (1xx) responses before a response.
	maxInterim = 5
	// readBuffer is the size of the buffer of a connection, in bytes.
	readBuffer = 64 << 10
)

var (
	errHeader  = fmt.Errorf("response header is longer than %d bytes", maxHeader)
	errInterim = errors.New("too many interim responses")
)

// newTransport returns what nars are requested with.
func (c *Client) newTransport() *http.Transport {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	return &http.Transport{
		Protocols: &protocols,
		Proxy: func(r *http.Request) (*url.URL, error) {
			return proxy.For(r.URL.Scheme, r.URL.Hostname(), r.URL.Port(), c.o.Getenv)
		},
		OnProxyConnectResponse: func(_ context.Context, via *url.URL, _ *http.Request, r *http.Response) error {
			return refusal(via, r)
		},
		DialContext:            c.o.Dial,
		TLSClientConfig:        c.tls.Clone(),
		TLSHandshakeTimeout:    2 * c.o.ConnectTimeout,
		DisableCompression:     true,
		MaxIdleConns:           max(32, c.o.NarConnections),
		MaxIdleConnsPerHost:    c.o.NarConnections,
		MaxConnsPerHost:        c.o.NarConnections,
		IdleConnTimeout:        idleTime,
		MaxResponseHeaderBytes: maxHeader,
		ReadBufferSize:         readBuffer,
	}
}

// refusal returns why the response of a proxy to a request to connect is no connection, or nil.
func refusal(via *url.URL, r *http.Response) error {
	if r.StatusCode/100 == 2 {
		return nil
	}
	return fmt.Errorf("proxy %s answered %.100q to a request to connect", via.Host, r.Status)
}

// A connection carries pipelined requests to one server.
type connection struct {
	net   net.Conn
	r     *bufio.Reader
	proxy *url.URL // what plain HTTP requests are sent to instead of the server

	timeout time.Duration // of silence
	due     time.Time     // when the whole response is due
	header  int           // bytes that may still be read for a header; negative outside of headers
	write   chan struct{} // is closed when the last write is over; nil before the first
	stop    func() bool   // ends what closes the connection together with its context
}

// connect makes a connection to the server, through a proxy if there is one for it. It is closed
// when ctx ends.
func (p *peer) connect(ctx context.Context) (*connection, error) {
	c, l := p.c, p.location
	address := l.address()
	via, err := proxy.For(l.scheme, l.host, l.port, c.o.Getenv)
	if err != nil {
		return nil, err
	}
	if via != nil {
		address = net.JoinHostPort(via.Hostname(), cmp.Or(via.Port(), "80"))
	}
	raw, err := c.o.Dial(ctx, "tcp", address)
	if err != nil {
		return nil, dialError(err)
	}
	conn := &connection{net: raw, header: -1}
	if l.scheme == "http" {
		conn.proxy = via
	} else if conn.net, err = c.secure(ctx, raw, l, via); err != nil {
		raw.Close()
		return nil, shortened(err)
	}
	conn.r = bufio.NewReaderSize(conn, readBuffer)
	conn.stop = context.AfterFunc(ctx, func() { raw.Close() })
	return conn, nil
}

func (c *connection) close() {
	c.stop()
	c.net.Close()
	if c.write != nil {
		<-c.write
	}
}

// secure makes a TLS connection of one to the server or to a proxy.
func (c *Client) secure(ctx context.Context, raw net.Conn, l *location, via *url.URL) (net.Conn, error) {
	timeout := 2 * c.o.ConnectTimeout
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no connection within %v", timeout))
	defer cancel()
	defer context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })()
	var err error
	if via != nil {
		err = tunnel(raw, l.address(), via)
	}
	config := c.tls.Clone()
	config.ServerName, _, _ = strings.Cut(l.host, "%")
	conn := tls.Client(raw, config)
	if err == nil {
		err = conn.HandshakeContext(ctx)
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return conn, err
}

// tunnel asks a proxy to connect to an address (RFC 9110, section 9.3.6).
func tunnel(conn net.Conn, to string, via *url.URL) error {
	_, err := io.WriteString(conn, "CONNECT "+to+" HTTP/1.1\r\nHost: "+to+"\r\n"+proxyAuthorization(via)+"\r\n")
	if err != nil {
		return err
	}
	// Byte by byte: what follows the header belongs to the tunnel.
	r := bufio.NewReaderSize(io.LimitReader(oneByte{conn}, maxHeader), 16)
	for range maxInterim {
		response, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
		if err != nil {
			return fmt.Errorf("proxy %s: %w", via.Host, shortened(err))
		}
		if response.StatusCode >= 200 {
			return refusal(via, response)
		}
	}
	return fmt.Errorf("proxy %s: %w", via.Host, errInterim)
}

type oneByte struct{ r io.Reader }

func (o oneByte) Read(p []byte) (int, error) { return o.r.Read(p[:min(1, len(p))]) }

// dialError says in a few words why there is no connection.
func dialError(err error) error {
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		if inner := dns.Unwrap(); inner != nil {
			return fmt.Errorf("host name lookup: %w", dialError(inner))
		}
		return fmt.Errorf("host name lookup: %s", dns.Err)
	}
	op, ok := errors.AsType[*net.OpError](err)
	if !ok || op.Err == nil {
		return shortened(err)
	}
	err = op.Err
	if call, ok := errors.AsType[*os.SyscallError](err); ok {
		err = call.Err
	}
	if op.Addr != nil {
		return fmt.Errorf("connecting to %s: %w", op.Addr, err)
	}
	return err
}

// proxyAuthorization is the header line that a proxy with user information in its URL wants, or
// nothing.
func proxyAuthorization(via *url.URL) string {
	if via == nil || via.User == nil {
		return ""
	}
	return "Proxy-Authorization: " + basic(via.User) + "\r\n"
}

// basic is a value of RFC 7617.
func basic(user *url.Userinfo) string {
	password, _ := user.Password()
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password))
}

// request is a request for the URL l on this connection.
func (c *connection) request(l *location) string {
	host, target := l.hostField(), l.target
	if c.proxy != nil {
		target = "http://" + host + target
	}
	text := "GET " + target + " HTTP/1.1\r\nHost: " + host + "\r\nUser-Agent: " + userAgent +
		"\r\nAccept-Encoding: identity\r\n"
	if l.user != nil {
		text += "Authorization: " + basic(l.user) + "\r\n"
	}
	return text + proxyAuthorization(c.proxy) + "\r\n"
}

// send writes requests without waiting for that: a server may not read more before we have read
// what it has written. Silence ends the connection; all else that goes wrong is noticed when what
// the server has said before has been read. Only one write may be under way.
func (c *connection) send(requests []byte, timeout time.Duration) {
	done := make(chan struct{})
	c.write = done
	go func() {
		defer close(done)
		c.net.SetWriteDeadline(time.Now().Add(timeout))
		if _, err := c.net.Write(requests); errors.Is(err, os.ErrDeadlineExceeded) {
			c.net.Close()
		}
	}()
}

// sending reports whether a write is under way.
func (c *connection) sending() bool {
	select {
	case <-c.write:
		return false
	default:
		return c.write != nil
	}
}

// Read reads from the network, for the buffer: within the time that the server has, and no more
// than a header may have while one is read.
func (c *connection) Read(p []byte) (int, error) {
	if c.header == 0 {
		return 0, errHeader
	}
	if c.header > 0 {
		p = p[:min(len(p), c.header)]
	}
	due := time.Now().Add(c.timeout)
	if c.due.Before(due) {
		due = c.due
	}
	c.net.SetReadDeadline(due) // if it cannot be set, the connection is closed
	n, err := c.net.Read(p)
	if c.header > 0 {
		c.header -= n
	}
	return n, err
}

// response reads the header of the next response; the server may be silent for timeout, and take
// three times that for all of it.
func (c *connection) response(timeout time.Duration) (*http.Response, error) {
	c.timeout, c.due = timeout, time.Now().Add(3*timeout)
	defer func() { c.header = -1 }()
	for range maxInterim {
		// What the buffer holds already is part of the header too, but is less than the bound.
		c.header = maxHeader
		response, err := http.ReadResponse(c.r, nil)
		if err != nil {
			return nil, shortened(err)
		}
		if response.StatusCode >= 200 {
			return response, nil
		}
	}
	return nil, errInterim
}
