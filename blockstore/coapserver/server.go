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
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// A Sink takes blocks. Put returns nil only once the block is stored as durably as it ever will be:
// the client is then told so. It must not keep the memory of the block. It is called by many
// goroutines at a time. An error that wraps fetch.ErrReadOnly is answered by 4.05, any other by
// 5.00.
type Sink interface {
	Put(ctx context.Context, ref eris.Reference, block []byte) error
}

// A BatchSink is a [Sink] that can take many blocks at once, which it may make durable together.
// Refs and blocks have the same length. An error says that none of them may be taken as stored.
// Blocks that come on streams are put by this method.
type BatchSink interface {
	Sink
	PutBatch(ctx context.Context, refs []eris.Reference, blocks [][]byte) error
}

// Resource is a store at one path.
type Resource struct {
	// Path is the path of the store as in its URL, for example ".well-known/eris", which is also
	// meant by "". The resource "blocks" below it is served; and "have", which says which blocks
	// there are (docs/formats.md), if the Source is a [fetch.Haver].
	Path string
	// Source is where blocks come from; nil if none can be had. Requests are cancelled when their
	// clients are gone. If a client does not say which size it wants, which every client known
	// does, it is requested in both. The server does not close it.
	Source fetch.Source
	// Sink is where blocks go; nil if none are taken.
	Sink Sink
}

// Document is a text at one path.
type Document struct {
	// Path is the path of the document as in a URL. It must be none of those of stores, nor the
	// "blocks" of one.
	Path string
	// Format is the Content-Format (RFC 7252, section 12.3), for example 50 for JSON.
	Format uint16
	// Text returns the text, of at most 32 KiB. It must not wait, and is called by many goroutines
	// at a time.
	Text func() []byte
}

// Access is what clients of one listener may do.
type Access struct {
	Get, Put bool
	// Relay, if not nil, returns where blocks come from for a client, instead of the Source of a
	// resource: see [fetch/relay.Relay.For], whose arguments it is given. It is called for each
	// request, and must not wait.
	Relay func(client string, hops int) fetch.Source
	// Connected, if not nil, is told of each connection on a stream, over which the client, whose
	// host is as for Relay, may be asked for blocks; 64 at a time, further requests wait. What it
	// returns is called when the connection has ended.
	Connected func(conn *coap.Conn, client string) (ended func())
	// KeepAlive, if positive, is how often clients on streams are sent a Ping, so that their
	// connections are kept though idle.
	KeepAlive time.Duration
	// Documents permits to get documents.
	Documents bool
	// Hosts are names by which browsers may know the server on WebSockets, besides the address that
	// they connect to, and localhost on this machine.
	Hosts []string
}

// Config says what a [Server] serves, and within which bounds. Zero fields stand for the defaults.
type Config struct {
	Resources []Resource
	Documents []Document

	// MaxConnections is the most connections at a time per listener, of which one host may have
	// half (see package internal/admission). Where there are more, the one that has been idle the
	// longest is closed, or the new one if all are busy. Default 256.
	MaxConnections int
	// MaxPutBytes bounds the memory for blocks that are being stored: per connection, and for all
	// but a first 256 KiB of each connection together. Defaults 16 MiB and 256 MiB.
	MaxPutBytes, MaxTotalPutBytes int64
	// MaxAnswerBytes bounds the memory for answers that the client has not taken yet, in the same
	// way. Defaults 16 MiB and 256 MiB.
	MaxAnswerBytes, MaxTotalAnswerBytes int64
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

	// Datagram is for ServePacket.
	Datagram DatagramConfig
}

// DatagramConfig bounds what is done for clients that come by UDP. Zero fields stand for the
// defaults.
type DatagramConfig struct {
	// Workers is how many requests are served at a time; more are left in the buffer of the kernel,
	// and dropped when that is full; clients then ask again. Default 64.
	Workers int
	// AckDelay is after what time a request is acknowledged apart from its answer. Default 1 s; it
	// must be below the 2 s after which clients ask again.
	AckDelay time.Duration
	// AckTimeout is how long the first copy of an answer that goes apart waits to be acknowledged;
	// each of four further waits is twice as long. Default 2 s (RFC 7252, section 4.8).
	AckTimeout time.Duration
}

func (c Config) withDefaults() Config {
	c.MaxConnections = cmp.Or(c.MaxConnections, 256)
	c.MaxPutBytes = cmp.Or(c.MaxPutBytes, 16<<20)
	c.MaxTotalPutBytes = cmp.Or(c.MaxTotalPutBytes, 256<<20)
	c.MaxAnswerBytes = cmp.Or(c.MaxAnswerBytes, 16<<20)
	c.MaxTotalAnswerBytes = cmp.Or(c.MaxTotalAnswerBytes, 256<<20)
	c.MaxGets = cmp.Or(c.MaxGets, 32)
	c.IdleTimeout = cmp.Or(c.IdleTimeout, 10*time.Minute)
	c.MessageTimeout = cmp.Or(c.MessageTimeout, time.Minute)
	c.Datagram.Workers = cmp.Or(c.Datagram.Workers, 64)
	c.Datagram.AckDelay = cmp.Or(c.Datagram.AckDelay, time.Second)
	c.Datagram.AckTimeout = cmp.Or(c.Datagram.AckTimeout, 2*time.Second)
	if c.Log == nil {
		c.Log = func(error) {}
	}
	return c
}

// Server serves blocks. Its methods are safe for concurrent use.
type Server struct {
	config  Config
	paths   *coap.Paths
	pool    *sync.Pool // of memory for answers
	batches sync.Pool  // of *batch
	lookups sync.Pool  // of *lookup
	recent  recent

	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	putBytes    atomic.Int64 // in batches beyond the first of each connection
	answerBytes atomic.Int64 // as last counted by the connections
	lastLog     atomic.Int64
	gates       admission.Gates

	mu       sync.Mutex
	closing  bool
	closers  map[closer]struct{} // listeners and packet connections
	conns    map[*conn]struct{}
	services sync.WaitGroup // calls of Serve, ServePacket and ServeConn
}

type closer interface{ Close() error }

// ErrServerClosed is what Serve, ServePacket and ServeConn return after Shutdown or Close.
var ErrServerClosed = errors.New("server is closed")

// New returns a Server. It returns an error if a path is not valid, occurs twice, or there are more
// than 64 in all, those of stores counted twice.
func New(config Config) (*Server, error) {
	s := &Server{
		config:  config.withDefaults(),
		pool:    coap.NewPool(),
		closers: make(map[closer]struct{}),
		conns:   make(map[*conn]struct{}),
	}
	var stores, documents [][]string
	for _, resource := range config.Resources {
		path, err := storeurl.ParsePath(resource.Path)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(stores, func(other []string) bool { return slices.Equal(other, path) }) {
			return nil, errors.New("two resources have the same store path")
		}
		stores = append(stores, path)
	}
	for _, document := range config.Documents {
		path, err := storeurl.ParsePath(document.Path)
		if err != nil {
			return nil, err
		}
		documents = append(documents, path)
	}
	for _, path := range stores {
		documents = append(documents, append(slices.Clone(path), coap.HaveSegment))
	}
	var err error
	if s.paths, err = coap.NewPaths(stores, documents); err != nil {
		return nil, err
	}
	s.batches.New = func() any { return new(batch) }
	s.lookups.New = newLookup
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// Serve accepts connections and serves them, until the listener fails or the server is closed. It
// closes the listener. For TLS, the listener must be one of crypto/tls, with the protocol "coap"
// (RFC 8323, section 8.2).
func (s *Server) Serve(listener net.Listener, access Access) error {
	if !s.begin(listener) {
		listener.Close()
		return ErrServerClosed
	}
	defer s.done(listener)
	gate := s.gates.New(s.config.MaxConnections, listener, s.config.Log)
	defer gate.Wait()
	for wait := time.Millisecond; ; {
		conn, err := listener.Accept()
		if err != nil {
			if s.isClosing() {
				return ErrServerClosed
			}
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			// Mostly too many open files: others will close theirs.
			s.log(fmt.Errorf("accepting a connection: %w", err))
			select {
			case <-time.After(wait):
			case <-s.ctx.Done():
			}
			wait = min(2*wait, time.Second)
			continue
		}
		wait = time.Millisecond
		if leave, ok := gate.Enter(conn); ok {
			go func() {
				defer leave()
				_ = s.serveConn(conn, access, func(idle bool) { gate.SetIdle(conn, idle) })
			}()
		}
	}
}

// Stats returns the statistics of connections: of all that are open, also by ServeConn, and of
// those that Serve and ServeWebSocket have accepted.
func (s *Server) Stats() admission.Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	stats := s.gates.Stats()
	stats.Connections = int64(len(s.conns))
	return stats
}

// ServeConn serves one connection until it ends, and closes it. It returns nil, or
// [ErrServerClosed] without having served.
func (s *Server) ServeConn(conn net.Conn, access Access) error {
	return s.serveConn(conn, access, func(bool) {})
}

// serveConn is ServeConn. Idle is told when the connection begins, and ceases, to have nothing
// under way; it must not wait.
func (s *Server) serveConn(netConn net.Conn, access Access, idle func(bool)) error {
	if secure, ok := netConn.(*tls.Conn); ok {
		ctx, cancel := context.WithTimeout(s.ctx, handshakeTimeout)
		err := secure.HandshakeContext(ctx)
		cancel()
		if err != nil {
			netConn.Close()
			return nil
		}
	}
	c := newConn(s, netConn, access, idle)
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		netConn.Close()
		return ErrServerClosed
	}
	s.conns[c] = struct{}{}
	s.services.Add(1)
	s.mu.Unlock()
	defer s.services.Done()
	c.serve()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	return nil
}

func (s *Server) begin(c closer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.closers[c] = struct{}{}
	s.services.Add(1)
	return true
}

func (s *Server) done(c closer) {
	c.Close()
	s.mu.Lock()
	delete(s.closers, c)
	s.mu.Unlock()
	s.services.Done()
}

func (s *Server) isClosing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closing
}

// Shutdown stops accepting connections and requests by UDP, and tells the clients of all
// connections that they are to end (Release). It answers what they still ask and waits until they
// have closed, which they get two seconds for, and until everything is answered. When the context
// ends before that, it closes everything as Close does, and returns the cause.
func (s *Server) Shutdown(ctx context.Context) error {
	for _, c := range s.stop() {
		c.peer.Release(releaseGrace, ErrServerClosed)
	}
	finished := make(chan struct{})
	go func() {
		s.services.Wait()
		close(finished)
	}()
	select {
	case <-finished:
		s.cancel()
		return nil
	case <-ctx.Done():
		s.Close()
		<-finished
		return context.Cause(ctx)
	}
}

// Close closes all listeners and connections at once and waits until all calls of Serve,
// ServePacket and ServeConn, and of stores, have returned; the contexts of the latter end.
func (s *Server) Close() error {
	conns := s.stop()
	s.cancel()
	for _, c := range conns {
		c.peer.Close(ErrServerClosed)
	}
	s.services.Wait()
	return nil
}

// stop closes the listeners and returns the connections.
func (s *Server) stop() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closing = true
	for c := range s.closers {
		if packets, ok := c.(net.PacketConn); ok {
			// What is being served can still be answered; the socket is closed afterwards.
			packets.SetReadDeadline(time.Unix(1, 0))
		} else {
			c.Close()
		}
	}
	var conns []*conn
	for c := range s.conns {
		conns = append(conns, c)
	}
	return conns
}

// log hands an error to the log, unless there was one just now.
func (s *Server) log(err error) {
	now, last := time.Now().Unix(), s.lastLog.Load()
	if now != last && s.lastLog.CompareAndSwap(last, now) {
		s.config.Log(err)
	}
}
