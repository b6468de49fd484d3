// SPDX-License-Identifier: GPL-3.0-or-later

// Package mirror fetches narinfos and nars from substitute servers: over HTTP
// and HTTPS, and from directories named by file: URLs. It gives their bytes and
// knows nothing of what they mean; nothing that comes from here is trusted. Start
// with [NewClient].
//
// HTTP is HTTP/1.1 on connections that are kept and shared by all requests of a
// [Client]. Narinfos are asked for in pipelines on several connections at once,
// so that many of them cost about one round trip (Guix, guix/http-client.scm:
// http-multiple-get, pipelines on one). HTTP/2 is not offered to servers: it would
// put all requests on one connection, and narinfos are many small answers, which
// pipelines carry as well.
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
	"net"
	"net/netip"
	"sync"
	"time"
)

// Options say how a [Client] works. The zero value of each is a default.
type Options struct {
	// MaxConnections bounds the connections to one server, whatever they are for;
	// 16 by default, and 256 at most.
	MaxConnections int
	// ConnectTimeout bounds the time to connect to one address of a server;
	// 5 seconds by default (Guix, guix/scripts/substitute.scm: %fetch-timeout).
	// Three times that may pass before the address is known, and twice that until
	// hands have been shaken.
	ConnectTimeout time.Duration
	// NarinfoTimeout bounds the time for which a server may be silent while it owes
	// narinfos; 10 seconds by default. A whole answer may take three times that.
	NarinfoTimeout time.Duration
	// NarTimeout bounds the time for which a server may be silent while it owes a
	// nar, which it may compress on the fly; 60 seconds by default. A server that
	// has kept silent gets half of that the next time, and so on down to an eighth.
	NarTimeout time.Duration
	// SlowAfter is the time after which OnSlow is called for a nar whose headers
	// have not come; 5 seconds by default.
	SlowAfter time.Duration
	// OnSlow is called with the host of a slow server, from any goroutine.
	OnSlow func(host string)
	// OnRedirect is called with the URL that a nar request was redirected to.
	OnRedirect func(url string)
	// ResumeDelay is the time until a nar that was cut off is resumed; it doubles
	// with each attempt. 250 milliseconds by default.
	ResumeDelay time.Duration
	// OnResume is called, by the reader of the nar at url, when what was cut off
	// after offset bytes goes on.
	OnResume func(url string, offset int64, cut error)
	// UserAgent names the program to servers.
	UserAgent string
	// Getenv looks up the variables http_proxy, https_proxy and no_proxy; nil is
	// no proxy.
	Getenv func(string) string
}

// A Client fetches from any number of servers. It is safe for concurrent use.
// Close releases its connections.
type Client struct {
	o      Options
	tls    *tls.Config
	pool   pool
	lookup func(ctx context.Context, network, host string) ([]netip.Addr, error) // of host names

	mu    sync.Mutex
	peers map[string]*peer // by server
}

// NewClient returns a client.
func NewClient(o Options) *Client {
	if o.MaxConnections <= 0 {
		o.MaxConnections = 16
	}
	o.MaxConnections = min(o.MaxConnections, maxConnections)
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
	if o.ResumeDelay == 0 {
		o.ResumeDelay = 250 * time.Millisecond
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
		lookup: net.DefaultResolver.LookupNetIP,
		peers:  map[string]*peer{},
	}
}

// Close closes the idle connections, and those in use after that.
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
	l, err := parse(rawURL)
	if err != nil || l.scheme == "file" {
		return nil
	}
	c.mu.Lock()
	p := c.peers[l.server()]
	c.mu.Unlock()
	if p == nil {
		return nil
	}
	return p.downError()
}

const (
	// maxServers bounds what is remembered of servers.
	maxServers = 1000
	// maxConnections is the most that [Options] may ask for.
	maxConnections = 256
)

// CheckURL returns an error that says why rawURL cannot be the URL of a server
// or of a nar, or nil. Schemes other than http, https and file are
// [ErrUnsupportedScheme].
func CheckURL(rawURL string) error {
	_, err := parse(rawURL)
	return err
}

// IsLocal tells whether rawURL is a file: URL, for which no network is used.
func IsLocal(rawURL string) bool {
	l, err := parse(rawURL)
	return err == nil && l.scheme == "file"
}

// causeOf prefers the reason of a cancelled context over what its cancellation
// did to a connection.
func causeOf(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}
