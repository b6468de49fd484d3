// SPDX-License-Identifier: GPL-3.0-or-later

// Package httpserver serves ERIS blocks over HTTP, at /uri-res/N2R?urn:blake2b:REFERENCE (RFC 2169, section 3.1;
// https://eris.codeberg.page/eer/http.xml). Start with [New].
//
// Blocks are all that is served: no read capability is decoded, because then the server would see the contents, and the
// client could not check them. HTTP/1.1 and HTTP/2 without TLS ("h2c", by prior knowledge) are spoken; TLS is for a proxy.
//
// Whoever can connect is believed nothing: headers, bodies, waiting times, connections and memory are bounded.
package httpserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
)

// Path is where blocks are served.
const Path = "/uri-res/N2R"

// A Sink takes blocks. Put returns nil only once the block is stored as durably as it ever will be. It must not keep the
// memory of the block. It is called by many goroutines at a time. An error that wraps fetch.ErrReadOnly is answered by 403,
// any other by 500.
type Sink interface {
	Put(ctx context.Context, ref eris.Reference, block []byte) error
}

// Access is what clients of one listener may do. HEAD goes with GET.
type Access struct {
	Get, Put bool
}

// Config says what a [Server] serves, and within which bounds. Zero fields stand for the defaults.
type Config struct {
	// Blocks is where blocks come from; nil if none can be had. It is asked for blocks of any size (0), and called by many
	// goroutines at a time.
	Blocks eris.Blocks
	// Sink is where blocks go; nil if none are taken.
	Sink Sink

	// MaxConnections is the most connections at a time per listener, of which one host may have half (see package
	// internal/admission); further ones are closed at once. Default 256.
	MaxConnections int
	// MaxRequests is the most requests at a time in all, each of which needs 32 KiB; further ones are answered by 503.
	// Default 4096.
	MaxRequests int64
	// HeaderTimeout is how long the header of a request may take. Default 30 s.
	HeaderTimeout time.Duration
	// RequestTimeout is how long a request may take to come and its answer to go, each. Default 60 s.
	RequestTimeout time.Duration
	// IdleTimeout is for how long a connection may wait for a next request. Default 2 min.
	IdleTimeout time.Duration
	// Log, if not nil, is given the errors of stores, at most about one per second. It must be safe for concurrent use.
	Log func(err error)
}

const (
	// maxHeader is how long the header of a request may be, in bytes.
	maxHeader = 16 << 10
	// maxStreams is the most requests at a time on one connection of HTTP/2.
	maxStreams = 128
)

func (c Config) withDefaults() Config {
	setDefault(&c.MaxConnections, 256)
	setDefault(&c.MaxRequests, 4096)
	setDefault(&c.HeaderTimeout, 30*time.Second)
	setDefault(&c.RequestTimeout, time.Minute)
	setDefault(&c.IdleTimeout, 2*time.Minute)
	if c.Log == nil {
		c.Log = func(error) {}
	}
	return c
}

func setDefault[T ~int | ~int64](field *T, value T) {
	if *field <= 0 {
		*field = value
	}
}

// Server serves blocks. Its methods are safe for concurrent use.
type Server struct {
	config   Config
	requests *semaphore.Weighted
	memory   sync.Pool // of *[32769]byte
	lastLog  atomic.Int64
	gates    admission.Gates

	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	mu       sync.Mutex
	closing  bool
	servers  map[*http.Server]struct{}
	services sync.WaitGroup // calls of Serve
}

// New returns a Server.
func New(config Config) *Server {
	s := &Server{config: config.withDefaults(), servers: make(map[*http.Server]struct{})}
	s.requests = semaphore.NewWeighted(s.config.MaxRequests)
	s.memory.New = func() any { return new([eris.BlockSize32KiB + 1]byte) }
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// ErrServerClosed is what Serve returns after Shutdown or Close.
var ErrServerClosed = errors.New("server is closed")

// Serve accepts connections and serves them, until the listener fails or the server is closed. It closes the listener.
func (s *Server) Serve(listener net.Listener, access Access) error {
	server := &http.Server{
		Handler:           s.Handler(access),
		ReadHeaderTimeout: s.config.HeaderTimeout,
		ReadTimeout:       s.config.RequestTimeout,
		WriteTimeout:      2 * s.config.RequestTimeout, // net/http counts it from the end of the header
		IdleTimeout:       s.config.IdleTimeout,
		MaxHeaderBytes:    maxHeader,
		// What goes wrong between a client and net/http is the client's business.
		ErrorLog:    log.New(io.Discard, "", 0),
		BaseContext: func(net.Listener) context.Context { return s.ctx },
		Protocols:   new(http.Protocols),
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams:          maxStreams,
			MaxReceiveBufferPerStream:     64 << 10,
			MaxReceiveBufferPerConnection: 1 << 20,
			SendPingTimeout:               30 * time.Second,
			WriteByteTimeout:              s.config.RequestTimeout,
		},
	}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		listener.Close()
		return ErrServerClosed
	}
	s.servers[server] = struct{}{}
	s.services.Add(1)
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.servers, server)
		s.mu.Unlock()
		s.services.Done()
	}()
	err := server.Serve(s.gates.New(s.config.MaxConnections).Listener(listener))
	if errors.Is(err, http.ErrServerClosed) {
		return ErrServerClosed
	}
	server.Close()
	return err
}

// Stats is what a [Server] does at the moment, and what it has done.
type Stats struct {
	Connections int64 // at the moment
	Accepted    int64 // connections that Serve has accepted
	TurnedAway  int64 // connections that it has closed because there were too many
}

// Stats returns the statistics.
func (s *Server) Stats() Stats {
	of := s.gates.Stats()
	return Stats{of.Open, of.Accepted, of.TurnedAway}
}

// Shutdown stops accepting connections and waits until all requests have been answered. When the context ends before that,
// it closes everything as Close does, and returns the cause.
func (s *Server) Shutdown(ctx context.Context) error {
	var group sync.WaitGroup
	for _, server := range s.stop() {
		group.Go(func() { _ = server.Shutdown(ctx) })
	}
	group.Wait()
	err := context.Cause(ctx)
	s.Close()
	return err
}

// Close closes all listeners and connections at once, and waits until all calls of Serve have returned.
func (s *Server) Close() error {
	s.cancel()
	for _, server := range s.stop() {
		server.Close()
	}
	s.services.Wait()
	// Handlers whose connections were closed may not have come to their end: all of them have when all places are free.
	_ = s.requests.Acquire(context.Background(), s.config.MaxRequests)
	s.requests.Release(s.config.MaxRequests)
	return nil
}

func (s *Server) stop() []*http.Server {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closing = true
	var servers []*http.Server
	for server := range s.servers {
		servers = append(servers, server)
	}
	return servers
}

// Handler returns what answers requests, for use in another server; the time-outs are then that server's.
func (s *Server) Handler(access Access) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !s.requests.TryAcquire(1) {
			w.Header().Set("Retry-After", "1")
			refuse(w, http.StatusServiceUnavailable, "too many requests at a time")
			return
		}
		defer s.requests.Release(1)
		memory := s.memory.Get().(*[eris.BlockSize32KiB + 1]byte)
		defer s.memory.Put(memory)
		switch r.Method {
		case http.MethodGet, http.MethodHead:
			s.get(w, r, access, memory[:0])
		case http.MethodPut:
			s.put(w, r, access, memory[:])
		default:
			w.Header().Set("Allow", "GET, HEAD, PUT")
			refuse(w, http.StatusMethodNotAllowed, "method is not known here")
		}
	})
}

// refuse answers with a status other than 200, and a text for people.
func refuse(w http.ResponseWriter, status int, text string) {
	header := w.Header()
	header.Set("Content-Type", "text/plain; charset=utf-8")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Content-Length", strconv.Itoa(len(text)+1))
	w.WriteHeader(status)
	_, _ = io.WriteString(w, text+"\n")
}

// Errors of parseQuery.
var (
	errCapability = errors.New("this server has blocks only, and decodes nothing")
	errQuery      = errors.New("query is not urn:blake2b: and a reference")
	errNoQuery    = errors.New("query has no reference")
)

// maxQuery is the greatest length in bytes of a query that is looked at: the URN of a read capability, the longest of the
// URNs that are understood, with every character percent-encoded.
const maxQuery = 3 * 115

// parseQuery reads the reference of a block from the query of a URL: the bare URN, without the name of a parameter.
// Characters may be percent-encoded. It returns errNoQuery if the query is empty or ends behind "urn:blake2b:",
// errCapability for the URN of a read capability, and errQuery for anything else.
func parseQuery(query string) (eris.Reference, error) {
	if len(query) > maxQuery {
		return eris.Reference{}, errQuery
	}
	urn, err := url.PathUnescape(query)
	switch {
	case err != nil:
		return eris.Reference{}, errQuery
	case urn == "" || strings.EqualFold(urn, "urn:blake2b:"):
		return eris.Reference{}, errNoQuery
	case len(urn) >= len("urn:eris:") && strings.EqualFold(urn[:len("urn:eris:")], "urn:eris:"):
		return eris.Reference{}, errCapability
	}
	ref, err := eris.ParseReferenceURN(urn)
	if err != nil {
		return eris.Reference{}, errQuery
	}
	return ref, nil
}

// refuseQuery answers to a query that parseQuery returned an error for.
func refuseQuery(w http.ResponseWriter, err error) {
	status := http.StatusBadRequest
	if err == errCapability {
		status = http.StatusForbidden
	}
	refuse(w, status, err.Error())
}

// get answers a GET or HEAD. The memory has room for a block.
func (s *Server) get(w http.ResponseWriter, r *http.Request, access Access, memory []byte) {
	if r.URL.Path != Path {
		refuse(w, http.StatusNotFound, "there is nothing here but "+Path)
		return
	}
	if !access.Get || s.config.Blocks == nil {
		refuse(w, http.StatusForbidden, "blocks are not to be had here")
		return
	}
	ref, err := parseQuery(r.URL.RawQuery)
	if err != nil {
		refuseQuery(w, err)
		return
	}
	block, err := s.config.Blocks.Get(r.Context(), ref, 0, memory)
	var wrong *eris.BlockError
	switch {
	case errors.Is(err, eris.ErrNotFound), errors.As(err, &wrong):
		refuse(w, http.StatusNotFound, "block is not here")
		return
	case r.Context().Err() != nil:
		refuse(w, http.StatusServiceUnavailable, "server is closing")
		return
	case err != nil:
		s.log(fmt.Errorf("getting a block: %w", err))
		refuse(w, http.StatusInternalServerError, "block cannot be read")
		return
	}
	header := w.Header()
	// A block never changes, so its reference is all there is to know of its version.
	header.Set("Etag", `"`+ref.String()+`"`)
	header.Set("Cache-Control", "public, max-age=31536000, immutable")
	if matches(r.Header.Get("If-None-Match"), ref) {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	header.Set("Content-Type", "application/octet-stream")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Content-Length", strconv.Itoa(len(block)))
	// net/http drops the body of the answer to HEAD.
	_, _ = w.Write(block)
}

// matches tells whether a header If-None-Match (RFC 9110, section 13.1.2) has the block's entity tag, or is "*".
func matches(header string, ref eris.Reference) bool {
	for tag := range strings.SplitSeq(header, ",") {
		tag = strings.Trim(tag, " \t")
		if tag == "*" {
			return true
		}
		if text, ok := strings.CutPrefix(strings.TrimPrefix(tag, "W/"), `"`); ok && text == ref.String()+`"` {
			return true
		}
	}
	return false
}

// put answers a PUT. The memory has one byte more than the largest block.
func (s *Server) put(w http.ResponseWriter, r *http.Request, access Access, memory []byte) {
	if r.URL.Path != Path || !access.Put || s.config.Sink == nil {
		refuse(w, http.StatusForbidden, "blocks cannot be stored here")
		return
	}
	named, err := parseQuery(r.URL.RawQuery)
	anyBlock := err == errNoQuery
	if err != nil && !anyBlock {
		refuseQuery(w, err)
		return
	}
	block, err := readBlock(r.Body, memory)
	if err != nil {
		refuse(w, http.StatusBadRequest, err.Error())
		return
	}
	ref := eris.Sum(block)
	if !anyBlock && ref != named {
		refuse(w, http.StatusBadRequest, "body is not the block of that reference")
		return
	}
	err = s.config.Sink.Put(r.Context(), ref, block)
	switch {
	case err == nil:
	case errors.Is(err, fetch.ErrReadOnly):
		refuse(w, http.StatusForbidden, "blocks cannot be stored here")
		return
	case r.Context().Err() != nil:
		refuse(w, http.StatusServiceUnavailable, "server is closing")
		return
	default:
		s.log(fmt.Errorf("storing a block: %w", err))
		refuse(w, http.StatusInternalServerError, "block cannot be stored")
		return
	}
	header := w.Header()
	header.Set("Content-Location", Path+"?"+ref.URN())
	header.Set("Content-Length", "0")
	w.WriteHeader(http.StatusOK)
}

// readBlock reads all of a body into memory, which has one byte more than the largest block.
func readBlock(body io.Reader, memory []byte) ([]byte, error) {
	// io.ReadFull could not tell a body that is cut off from one that is short.
	n := 0
	for {
		m, err := body.Read(memory[n:])
		n += m
		switch {
		case n == len(memory):
			return nil, errors.New("body is longer than a block")
		case err == io.EOF && !eris.BlockSize(n).Valid():
			return nil, fmt.Errorf("%d bytes are no block, which has 1024 or 32768", n)
		case err == io.EOF:
			return memory[:n], nil
		case err != nil:
			return nil, errors.New("body cannot be read")
		}
	}
}

// log hands an error to the log, unless there was one just now.
func (s *Server) log(err error) {
	now, last := time.Now().Unix(), s.lastLog.Load()
	if now != last && s.lastLog.CompareAndSwap(last, now) {
		s.config.Log(err)
	}
}
