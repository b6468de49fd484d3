// SPDX-License-Identifier: GPL-3.0-or-later

// Package mirror fetches narinfos and nars from substitute servers: over HTTP
// and HTTPS, and from directories named by file: URLs. It gives their bytes and
// knows nothing of what they mean; nothing that comes from here is trusted. Start
// with [NewClient].
//
// HTTP is HTTP/1.1 on connections that are kept and shared by all requests of a
// [Client]. Narinfos are asked for in pipelines on several connections at once,
// so that many of them cost about one round trip (Guix, guix/http-client.scm:
// http-multiple-get, pipelines on one).
//
// Certificates of servers are not verified, as in Guix,
// guix/scripts/substitute.scm: open-connection-for-uri/cached. Narinfos are
// signed and nars are hashed, so a certificate would add no integrity, while the
// bad clock of a freshly booted machine would take substitutes away.
package mirror

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"time"
)

// Options say how a [Client] works. The zero value of each is a default.
type Options struct {
	// MaxConnections bounds the connections to one server that ask for narinfos
	// at the same time; 16 by default.
	MaxConnections int
	// ConnectTimeout bounds the time to resolve, connect and shake hands;
	// 5 seconds by default (Guix, guix/scripts/substitute.scm: %fetch-timeout).
	ConnectTimeout time.Duration
	// NarinfoTimeout bounds the time for which a server may be silent while it owes
	// narinfos; 10 seconds by default. A whole answer may take three times that.
	NarinfoTimeout time.Duration
	// NarTimeout bounds the time for which a server may be silent while it owes a
	// nar, which it may compress on the fly; 60 seconds by default.
	NarTimeout time.Duration
	// SlowAfter is the time after which OnSlow is called for a nar whose headers
	// have not come; 5 seconds by default.
	SlowAfter time.Duration
	// OnSlow is called with the host of a slow server, from any goroutine.
	OnSlow func(host string)
	// OnRedirect is called with the URL that a nar request was redirected to.
	OnRedirect func(url string)
	// UserAgent names the program to servers.
	UserAgent string
	// Getenv looks up the variables http_proxy, https_proxy and no_proxy; nil is
	// no proxy.
	Getenv func(string) string
}

// A Client fetches from any number of servers. It is safe for concurrent use.
// Close releases its connections.
type Client struct {
	o    Options
	tls  *tls.Config
	pool pool

	mu    sync.Mutex
	down  map[string]error // by server: why it is not asked again
	plain map[string]bool  // servers that do not take pipelines
}

// NewClient returns a client.
func NewClient(o Options) *Client {
	if o.MaxConnections == 0 {
		o.MaxConnections = 16
	}
	if o.ConnectTimeout == 0 {
		o.ConnectTimeout = 5 * time.Second
	}
	if o.NarinfoTimeout == 0 {
		o.NarinfoTimeout = 10 * time.Second
	}
	if o.NarTimeout == 0 {
		o.NarTimeout = time.Minute
	}
	if o.SlowAfter == 0 {
		o.SlowAfter = 5 * time.Second
	}
	if o.UserAgent == "" {
		o.UserAgent = "guix-substitute-eris"
	}
	if o.Getenv == nil {
		o.Getenv = func(string) string { return "" }
	}
	return &Client{
		o: o,
		tls: &tls.Config{
			InsecureSkipVerify: true, // see the package comment
			MinVersion:         tls.VersionTLS10,
			NextProtos:         []string{"http/1.1"},
			ClientSessionCache: tls.NewLRUClientSessionCache(64),
		},
		down:  map[string]error{},
		plain: map[string]bool{},
	}
}

// Close closes the idle connections.
func (c *Client) Close() { c.pool.close() }

// ErrUnsupportedScheme is returned for URLs whose scheme is not http, https or
// file.
var ErrUnsupportedScheme = errors.New("unsupported URL scheme")

// A ServerError says that a server could not be reached, broke off, or was
// silent for too long, as opposed to an answer of the server. Unreachable servers
// are not tried again for the life of the client, whose calls then return an
// equal error at once.
type ServerError struct {
	// Server is the scheme, host and port of the server.
	Server string
	// Err is what went wrong.
	Err error
}

func (e *ServerError) Error() string { return e.Server + ": " + e.Err.Error() }

// Unwrap returns what went wrong.
func (e *ServerError) Unwrap() error { return e.Err }

// Down returns why the server of the URL is not asked any more, or nil.
func (c *Client) Down(rawURL string) error {
	u, err := parse(rawURL)
	if err != nil || u.Scheme == "file" {
		return nil
	}
	return c.downError(serverOf(u))
}

func (c *Client) downError(server string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.down[server]; err != nil {
		return &ServerError{server, err}
	}
	return nil
}

// maxServers bounds what is remembered of servers: redirects may name any
// number of them.
const maxServers = 1000

func (c *Client) setDown(server string, err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.down) < maxServers {
		c.down[server] = err
	}
	return &ServerError{server, err}
}

// parse parses a server's URL or that of a nar.
func parse(raw string) (*url.URL, error) {
	u, err := url.Parse(raw)
	if err != nil {
		var e *url.Error
		if errors.As(err, &e) {
			err = e.Err
		}
		return nil, fmt.Errorf("invalid URL %.300q: %w", raw, err)
	}
	switch u.Scheme = strings.ToLower(u.Scheme); u.Scheme {
	case "http", "https":
		if u.Hostname() == "" {
			return nil, fmt.Errorf("invalid URL %.300q: no host", raw)
		}
	case "file":
	default:
		return nil, fmt.Errorf("%w in %.300q", ErrUnsupportedScheme, raw)
	}
	return u, nil
}

// CheckURL returns an error that says why rawURL cannot be the URL of a server
// or of a nar, or nil. Schemes other than http, https and file are
// [ErrUnsupportedScheme].
func CheckURL(rawURL string) error {
	_, err := parse(rawURL)
	return err
}

// IsLocal tells whether rawURL is a file: URL, for which no network is used.
func IsLocal(rawURL string) bool {
	u, err := parse(rawURL)
	return err == nil && u.Scheme == "file"
}

// serverOf identifies a server: connections to one are not used for another.
func serverOf(u *url.URL) string { return u.Scheme + "://" + address(u) }

// address is the host and port to connect to.
func address(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = "80"
		if u.Scheme == "https" {
			port = "443"
		}
	}
	host := strings.ToLower(u.Hostname())
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	return host + ":" + port
}

// causeOf prefers the reason of a cancelled context over what its cancellation
// did to a connection.
func causeOf(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}
