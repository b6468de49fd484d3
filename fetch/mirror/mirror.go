// SPDX-License-Identifier: GPL-3.0-or-later

// Package mirror fetches narinfos and nars from substitute servers: over HTTP and HTTPS, and from
// directories named by file: URLs. It gives their bytes and knows nothing of what they mean;
// nothing that comes from here is trusted. Start with [NewClient].
//
// It speaks HTTP/1.1. Nars go through net/http. Narinfos are requested in pipelines, which net/http
// does not have, so that many of them cost about one round trip (Guix, guix/http-client.scm:
// http-multiple-get): on one connection, and on more of them only while that makes it faster.
// Connections that nobody uses are closed after a second, because some servers have few workers
// that stay with a connection. HTTP/2 is not offered to servers: narinfos are many small responses,
// which pipelines carry as well.
//
// Certificates of servers are not verified, as in Guix, guix/scripts/substitute.scm:
// open-connection-for-uri/cached. Narinfos are signed and nars are hashed, so a certificate would
// add no integrity, while the bad clock of a freshly booted machine would take substitutes away.
package mirror

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/backoff"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/dial"
)

// DefaultConnections is how many connections there are to one server at most, if [Options] does not
// say it.
const DefaultConnections = 32

// userAgent names the program to servers.
const userAgent = "guix-substitute-eris"

// Options say how a [Client] works. The zero value of each is a default.
type Options struct {
	// MaxConnections bounds the connections to one server, for narinfos and for nars, at least one
	// each; 32 by default, and 256 at most.
	MaxConnections int
	// NarConnections is how many of these are for nars; half of them, rounded up, by default.
	NarConnections int
	// ConnectTimeout is 5 seconds by default (Guix, guix/scripts/substitute.scm: %fetch-timeout).
	// Twice that may pass until the name of a server has been looked up and all of its addresses
	// have been tried, and as much again until a secure connection stands.
	ConnectTimeout time.Duration
	// NarinfoTimeout bounds the time for which a server may be silent while it owes narinfos; 10
	// seconds by default. A whole response may take three times that.
	NarinfoTimeout time.Duration
	// NarTimeout bounds the time until the header of a nar, which the server may compress on the
	// fly; 60 seconds by default. A server that has kept silent gets half of that the next time,
	// and so on down to an eighth. A third of it bounds silence in the middle of a nar. Where
	// silence is not usual, a twentieth is enough for one more request on another connection.
	NarTimeout time.Duration
	// ResumeDelay is the time until a nar that was cut off is requested again; it doubles with each
	// attempt. 250 milliseconds by default.
	ResumeDelay time.Duration
	// Note tells people that a nar is slow to come, is redirected, or goes on after it was cut off.
	// It is called from any goroutine; nil tells nobody.
	Note func(format string, a ...any)
	// PublicFiles, if not nil, are the URLs of servers that somebody has named who may not read all
	// that this process can. Then a local file is used only if it is below the directory of a file:
	// URL among them, is regular, may be read by everybody, and is not reached through a symbolic
	// link below that directory. Otherwise it is an [fs.ErrNotExist], whether it exists or not.
	PublicFiles []string
	// Dial connects to an address, as [net.Dialer] does; nil does it over the network.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Getenv looks up the variables http_proxy, https_proxy and no_proxy; nil is no proxy.
	Getenv func(string) string
}

// A Client fetches from any number of servers. It is safe for concurrent use. Close releases its
// connections.
type Client struct {
	o         Options
	tls       *tls.Config
	transport *http.Transport // of nars
	closing   atomic.Bool     // whether the last one came over a connection of its own

	ctx     context.Context // of all pipelines
	cancel  context.CancelFunc
	workers sync.WaitGroup // of pipelines

	mu    sync.Mutex
	peers map[string]*peer // by server
}

// NewClient returns a client.
func NewClient(o Options) *Client {
	o.MaxConnections = min(cmp.Or(max(0, o.MaxConnections), DefaultConnections), maxConnections)
	o.NarConnections = cmp.Or(o.NarConnections, o.MaxConnections-o.MaxConnections/2)
	o.NarConnections = min(o.NarConnections, max(1, o.MaxConnections-1))
	o.ConnectTimeout = cmp.Or(o.ConnectTimeout, 5*time.Second)
	o.NarinfoTimeout = cmp.Or(o.NarinfoTimeout, 10*time.Second)
	o.NarTimeout = cmp.Or(o.NarTimeout, time.Minute)
	o.ResumeDelay = cmp.Or(o.ResumeDelay, 250*time.Millisecond)
	if o.Note == nil {
		o.Note = func(string, ...any) {}
	}
	if o.Getenv == nil {
		o.Getenv = func(string) string { return "" }
	}
	if o.Dial == nil {
		o.Dial = dial.With(&net.Dialer{Timeout: 2 * o.ConnectTimeout, KeepAlive: 30 * time.Second})
	}
	c := &Client{
		o: o,
		tls: &tls.Config{
			InsecureSkipVerify: true, // see the package comment
			MinVersion:         tls.VersionTLS10,
			ClientSessionCache: tls.NewLRUClientSessionCache(64),
		},
		peers: map[string]*peer{},
	}
	// Old servers have none of the ciphers that are offered by default.
	for _, suite := range slices.Concat(tls.CipherSuites(), tls.InsecureCipherSuites()) {
		c.tls.CipherSuites = append(c.tls.CipherSuites, suite.ID)
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.transport = c.newTransport()
	return c
}

// Close ends all calls of Narinfos, and closes the connections that no nar uses.
func (c *Client) Close() {
	c.cancel()
	c.workers.Wait()
	c.transport.CloseIdleConnections()
}

// Closing reports whether the server that has sent the last nar closed the connection after it.
// Such servers are small, and have a short queue of connections: what finds it full waits for a
// second and more, until TCP tries again.
func (c *Client) Closing() bool { return c.closing.Load() }

// ErrUnsupportedScheme is returned for URLs whose scheme is not http, https or file.
var ErrUnsupportedScheme = errors.New("unsupported URL scheme")

// A ServerError says that a server could not be reached, broke off, or was silent for too long, as
// opposed to a response of the server. A server that could not be reached, or has been silent or
// broken from the start, rests: for a second first, and a minute at most. Calls return an equal
// error at once until that is over.
type ServerError struct {
	// Server is the scheme, host and port of the server.
	Server string
	// Err is what went wrong. It wraps [os.ErrDeadlineExceeded] if that is silence.
	Err error
	// Rest is how long the server rests, 0 if it does not, and Failures how often in a row that has
	// begun.
	Rest     time.Duration
	Failures int
}

func (e *ServerError) Error() string { return e.Server + ": " + e.Err.Error() }

// Unwrap returns what went wrong.
func (e *ServerError) Unwrap() error { return e.Err }

// Down returns why the server of the URL rests, or nil if it does not.
func (c *Client) Down(rawURL string) error {
	l, err := parse(rawURL)
	if err != nil || l.scheme == "file" {
		return nil
	}
	return c.peer(l).resting()
}

const (
	// maxServers bounds what is remembered of servers, of which redirections may name any number.
	maxServers = 256
	// maxConnections is the most that [Options] may ask for.
	maxConnections = 256
	// leastRest and mostRest bound the rest of a server that could not be reached. So many times it
	// is short, because lines and servers that are away for seconds may soon be so again.
	leastRest  = time.Second
	mostRest   = time.Minute
	shortRests = 3
	// idleTime is after how long a connection that nobody uses is closed.
	idleTime = time.Second
)

// CheckURL returns an error that says why rawURL cannot be the URL of a server or of a nar, or nil.
// Schemes other than http, https and file are [ErrUnsupportedScheme].
func CheckURL(rawURL string) error {
	_, err := parse(rawURL)
	return err
}

// IsLocal reports whether rawURL is a file: URL, for which no network is used.
func IsLocal(rawURL string) bool { return LocalDirectories(rawURL) != nil }

// A peer is a server and what this client has learnt about it.
type peer struct {
	c        *Client
	location *location // of any of its URLs
	server   string

	mu   sync.Mutex
	rest backoff.Backoff
	down error // why it rests
	// silent is how many nars in a row it has kept silent about.
	silent int
	// longest is how long the header of a nar takes when it takes long.
	longest time.Duration
	pipelines
}

// peer returns what is known of the server of l.
func (c *Client) peer(l *location) *peer {
	server := l.server()
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.peers[server]
	if p == nil {
		p = &peer{
			c: c, location: l, server: l.shown(),
			rest:      backoff.Backoff{Min: leastRest, Max: mostRest},
			pipelines: newPipelines(max(1, c.o.MaxConnections-c.o.NarConnections)),
		}
		if len(c.peers) < maxServers {
			c.peers[server] = p
		}
	}
	return p
}

// hasRoom reports whether narinfos may be redirected to a location: each server takes a connection.
func (c *Client) hasRoom(l *location) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.peers[l.server()] != nil || len(c.peers) < maxServers
}

// resting returns why the server rests, or nil.
func (p *peer) resting() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.restingLocked()
}

func (p *peer) restingLocked() error {
	if p.down == nil || p.rest.Rest(time.Now()) == 0 {
		return nil
	}
	return &ServerError{p.server, p.down, p.rest.Rest(time.Now()), p.rest.Failures()}
}

// fail makes the server rest, and returns the error that says so. The caller holds the lock.
func (p *peer) fail(err error) error {
	p.down = err
	p.rest.Max = min(mostRest, leastRest<<max(0, min(p.rest.Failures(), 10)-shortRests))
	rest := p.rest.Fail(time.Now(), 0)
	return &ServerError{p.server, err, rest, p.rest.Failures()}
}

// reached notes that the server has responded to a request for a nar after some time.
func (p *peer) reached(took time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.longest = max(took, p.longest-p.longest/8)
	p.rest.Succeed()
	p.down, p.silent = nil, 0
}
