// SPDX-License-Identifier: GPL-3.0-or-later

// Package coapserver serves ERIS blocks by CoAP (https://eris.codeberg.page/eer/coap.xml): on
// streams, that is Unix sockets, TCP, TLS and what else yields a net.Conn (RFC 8323), and in
// datagrams (RFC 7252 and RFC 7959). Start with [New].
//
// A connection may have thousands of requests under way. Blocks to be stored are handed to the
// store in batches, several at a time, and each is answered once its batch is stored; when too much
// is under way, the connection is not read any further, so that the client has to wait. No request
// that was read stays without an answer while the connection lasts.
//
// Whoever can connect is believed nothing: every message, every buffer, every wait is bounded, per
// connection and for the whole server.
package coapserver

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// A Sink takes blocks. PutBatch returns nil only once all of them are stored as durably as they
// ever will be: the clients are then told so. Refs and blocks have the same length. It must not
// keep the memory of blocks. It is called by many goroutines at a time. An error that wraps
// fetch.ErrReadOnly is answered by 4.05, any other by 5.00.
type Sink interface {
	PutBatch(ctx context.Context, refs []eris.Reference, blocks [][]byte) error
}

// Document is a text at one path.
type Document struct {
	// Path is the path of the document, segment by segment.
	Path []string
	// Format is the Content-Format (RFC 7252, section 12.3), for example 50 for JSON.
	Format message.MediaType
	// Text returns the text, of at most 32 KiB. It must not wait, and is called by many goroutines
	// at a time.
	Text func() []byte
}

// Access is what clients of one listener may do.
type Access struct {
	Get, Put bool
	// Relay, if not nil, returns where blocks come from for a client, instead of the Source of the
	// Config: see [fetch/relay.Relay.For], whose arguments it is given. It is called for each
	// request, and must not wait.
	Relay func(client string, hops int) fetch.Source
	// Connected, if not nil, is told of each connection on a stream, over which the client, whose
	// host is as for Relay, may be asked for blocks; 64 at a time, further requests wait. What it
	// returns is called when the connection has ended.
	Connected func(conn *coap.Conn, client string) (ended func())
	// KeepAlive, if positive, is how often clients on streams are sent a Ping, so that their
	// connections are kept though idle.
	KeepAlive time.Duration
	// Document permits to get the document.
	Document bool
	// Hosts are names by which browsers may know the server on WebSockets, besides the address that
	// they connect to, and localhost on this machine.
	Hosts []string
}

// Config says what a [Server] serves, and within which bounds. Zero fields stand for the defaults.
type Config struct {
	// Path is the path of the store, segment by segment; nil stands for that of the well-known one.
	Path []string
	// Source is where blocks come from; nil if none can be had. Requests are cancelled when their
	// clients are gone. If a client does not say which size it wants, which every client known
	// does, it is requested in both. Which blocks there are is said if the Source is a
	// [fetch.Haver] (docs/formats.md). The server does not close it.
	Source fetch.Source
	// Sink is where blocks go; nil if none are taken.
	Sink Sink
	// Document is what else there is, unless it has no path.
	Document Document

	// MaxConnections is the most connections at a time per listener: see [admission.New].
	// Default 256.
	MaxConnections int
	// MaxBytes and MaxTotalBytes bound the memory for blocks that are being stored, and as much for
	// answers that clients have not taken yet: per connection, and for all but a first 256 KiB of
	// each connection together. Defaults 16 MiB and 128 MiB.
	MaxBytes, MaxTotalBytes int64
	// MaxGets is the most blocks that are looked up at a time for a connection, and eight times
	// that where others are asked for them, which takes longer; each needs 32 KiB. Default 32.
	MaxGets int
	// IdleTimeout is for how long a connection may send no message. Default 10 min.
	IdleTimeout time.Duration
	// MessageTimeout is how long the receipt of one message, or of 4 KiB of a large one, may take
	// once it has begun, and how long the client may take to receive 256 KiB. Default 60 s.
	MessageTimeout time.Duration
	// Log, if not nil, is given the errors of stores, at most about one per second. It must be safe
	// for concurrent use.
	Log func(err error)
	// Requested, if not nil, is told what has been answered to a request for a block, or to store
	// one: to which client, as in [admission.Host], and by which code. It must be safe for
	// concurrent use.
	Requested func(client, method string, ref eris.Reference, code string)

	// Datagram is for ServePacket, of which Workers are 64 by default.
	Datagram coap.EndpointConfig
}

func (c Config) withDefaults() Config {
	if c.Path == nil {
		c.Path = coap.WellKnownPath()
	}
	c.Path = slices.Clip(c.Path)
	c.MaxConnections = cmp.Or(c.MaxConnections, 256)
	c.MaxBytes = cmp.Or(c.MaxBytes, 16<<20)
	c.MaxTotalBytes = cmp.Or(c.MaxTotalBytes, 128<<20)
	c.MaxGets = cmp.Or(c.MaxGets, 32)
	c.IdleTimeout = cmp.Or(c.IdleTimeout, 10*time.Minute)
	c.MessageTimeout = cmp.Or(c.MessageTimeout, time.Minute)
	c.Datagram.Workers = cmp.Or(c.Datagram.Workers, 64)
	if c.Log == nil {
		c.Log = func(error) {}
	}
	return c
}

// Server serves blocks. Its methods are safe for concurrent use.
type Server struct {
	config  Config
	paths   coap.Paths
	pool    *sync.Pool // of memory for answers
	batches sync.Pool  // of *batch
	lookups sync.Pool  // of *lookup

	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	putBytes    atomic.Int64 // in batches beyond the first of each connection
	answerBytes atomic.Int64 // as last counted by the connections
	connections atomic.Int64
	seldom      admission.Seldom
	counts      admission.Counts

	mu       sync.Mutex
	stopping context.Context // ends when nothing more is accepted
	stop     context.CancelFunc
	services sync.WaitGroup // calls of Serve, ServePacket and ServeConn
}

// Resources, by the index of their paths.
const (
	blocksResource = iota
	haveResource
	documentResource
)

var errServerClosed = errors.New("server is closed")

// New returns a Server.
func New(config Config) *Server {
	s := &Server{config: config.withDefaults(), pool: coap.NewPool()}
	s.paths = coap.Paths{append(s.config.Path, coap.BlocksSegment), append(s.config.Path, coap.HaveSegment)}
	if config.Document.Path != nil {
		s.paths = append(s.paths, config.Document.Path)
	}
	s.batches.New = func() any { return new(batch) }
	s.lookups.New = newLookup
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.stopping, s.stop = context.WithCancel(context.Background())
	return s
}

// Serve accepts connections and serves them, until the listener fails, or until Shutdown or Close:
// then it returns nil. It closes the listener. For TLS, the listener must be one of crypto/tls,
// with the protocol "coap" (RFC 8323, section 8.2).
func (s *Server) Serve(listener net.Listener, access Access) error {
	defer listener.Close()
	if !s.begin() {
		return nil
	}
	defer s.services.Done()
	defer context.AfterFunc(s.stopping, func() { listener.Close() })()
	gate := admission.New(s.config.MaxConnections, listener, &s.counts, s.config.Log)
	defer gate.Wait()
	for {
		conn, err := gate.Accept()
		if err != nil {
			if s.stopping.Err() != nil {
				return nil
			}
			return err
		}
		c := conn.(*admission.Conn)
		c.SetIdle(true) // before more come than are served yet, for which others would make room
		go func() {
			defer c.Close()
			s.serveConn(c.Conn, access, c.SetIdle)
		}()
	}
}

// Stats returns the statistics of connections: of all that are open, also by ServeConn, and of
// those that Serve and ServeWebSocket have accepted.
func (s *Server) Stats() admission.Stats {
	stats := s.counts.Stats()
	stats.Connections = s.connections.Load()
	return stats
}

// ServeConn serves one connection until it ends, or the server is closed, and closes it.
func (s *Server) ServeConn(conn net.Conn, access Access) {
	s.serveConn(conn, access, func(bool) {})
}

// serveConn is ServeConn. Idle is told when the connection ceases, and begins again, to have
// nothing under way, as it has at first; it must not wait.
func (s *Server) serveConn(netConn net.Conn, access Access, idle func(bool)) {
	if secure, ok := netConn.(*tls.Conn); ok {
		ctx, cancel := context.WithTimeout(s.ctx, handshakeTimeout)
		err := secure.HandshakeContext(ctx)
		cancel()
		if err != nil {
			netConn.Close()
			return
		}
	}
	c := newConn(s, netConn, access, idle)
	if !s.begin() {
		netConn.Close()
		return
	}
	defer s.services.Done()
	defer context.AfterFunc(s.stopping, func() { c.peer.Release(releaseGrace, errServerClosed) })()
	defer context.AfterFunc(s.ctx, func() { c.peer.Close(errServerClosed) })()
	s.connections.Add(1)
	defer s.connections.Add(-1)
	c.serve()
}

// begin reports whether the server still serves. If it does, it waits until services are done.
func (s *Server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping.Err() != nil {
		return false
	}
	s.services.Add(1)
	return true
}

// stopAccepting has nothing more accepted.
func (s *Server) stopAccepting() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop()
}

// Shutdown stops accepting connections and requests by UDP, and tells the clients of all
// connections that they are to end (Release). It answers what they still ask and waits until they
// have closed, which they get two seconds for, and until everything is answered. When the context
// ends before that, it closes everything as Close does, and returns the cause.
func (s *Server) Shutdown(ctx context.Context) error {
	s.stopAccepting()
	defer context.AfterFunc(ctx, s.cancel)()
	s.services.Wait()
	s.cancel()
	return context.Cause(ctx)
}

// Close closes all listeners and connections at once and waits until all calls of Serve,
// ServePacket and ServeConn, and of stores, have returned; the contexts of the latter end.
func (s *Server) Close() {
	s.stopAccepting() // first, so that what ends by it is no failure
	s.cancel()
	s.services.Wait()
}

// log hands an error to the log, unless there was one just now.
func (s *Server) log(err error) { s.seldom.Log(s.config.Log, err) }
