// SPDX-License-Identifier: GPL-3.0-or-later

// Package httpserver serves ERIS blocks over HTTP, at /uri-res/N2R?urn:blake2b:REFERENCE (RFC 2169,
// section 3.1; https://eris.codeberg.page/eer/http.xml). Start with [New].
//
// Blocks are all that is served: no read capability is decoded, because then the server would see
// the contents, and the client could not check them. HTTP/1.1 and HTTP/2 without TLS ("h2c", by
// prior knowledge) are spoken; TLS is for a proxy.
//
// Whoever can connect is believed nothing: headers, bodies, waiting times, connections and memory
// are bounded.
package httpserver

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
)

// Path is where blocks are served, and HavePath where the server says which ones it has, if its
// source is a [fetch.Haver] (docs/formats.md).
const (
	Path     = "/uri-res/N2R"
	HavePath = "/.well-known/eris/have"
)

// Access is what clients of one listener may do. HEAD goes with GET.
type Access struct {
	Get, Put bool
	// Relay, if not nil, returns where blocks come from for a client, instead of the Source of the
	// Config: see [fetch/relay.Relay.For], whose arguments it is given. It is called for each
	// request, and must not wait.
	Relay func(client string, hops int) fetch.Source
	// Hosts are names of the server, besides the address that is connected to, and localhost on
	// this machine, whose pages may have browsers put blocks.
	Hosts []string
}

// Config says what a [Server] serves, and within which bounds. Zero fields stand for the defaults.
type Config struct {
	// Source is where blocks come from; nil if none can be had. Since clients do not say which size
	// a block has, it is asked for either if need be.
	Source fetch.Source
	// Sink is where blocks go, as [fetch.Store] has it; nil if none are taken. It must not keep the
	// memory of a block. An error that wraps [fetch.ErrReadOnly] is answered by 403, any other by
	// 500.
	Sink eris.Sink

	// MaxConnections is the most connections at a time per listener: see [admission.New].
	// Default 256.
	MaxConnections int
	// MaxRequests is the most requests at a time in all, each of which needs 32 KiB, and of which
	// one host may have half; further ones are answered by 503. Default 4096.
	MaxRequests int
	// RequestTimeout is how long a request may take to come, its header at most 30 s, and its
	// answer to go. Default 60 s.
	RequestTimeout time.Duration
	// Wrap, if not nil, returns a handler that has h answer requests, and logs them for example.
	Wrap func(h http.Handler) http.Handler
	// Log, if not nil, is given the errors of stores, at most about one per second, and told when
	// connections are turned away. It must be safe for concurrent use, and not wait.
	Log func(err error)
}

// maxStreams is the most requests at a time on one connection of HTTP/2.
const maxStreams = 128

// Server serves blocks. Its methods are safe for concurrent use.
type Server struct {
	config   Config
	requests *admission.Slots
	memory   sync.Pool // of *[32769]byte
	seldom   admission.Seldom
	counts   admission.Counts

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	closed sync.Once
}

// New returns a Server.
func New(config Config) *Server {
	config.MaxConnections = cmp.Or(config.MaxConnections, 256)
	config.MaxRequests = cmp.Or(config.MaxRequests, 4096)
	config.RequestTimeout = cmp.Or(config.RequestTimeout, time.Minute)
	if config.Log == nil {
		config.Log = func(error) {}
	}
	s := &Server{config: config, requests: admission.NewSlots(config.MaxRequests)}
	s.memory.New = func() any { return new([eris.BlockSize32KiB + 1]byte) }
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Serve accepts connections and serves them, until the listener fails, or ctx is done and what has
// been requested by then is answered: see [admission.Gate.Serve]. It closes the listener.
func (s *Server) Serve(ctx context.Context, listener net.Listener, access Access) error {
	gate := admission.New(s.config.MaxConnections, listener, &s.counts, s.config.Log)
	handler := s.Handler(access)
	if s.config.Wrap != nil {
		handler = s.config.Wrap(handler)
	}
	server := gate.Server(handler)
	server.ReadHeaderTimeout = min(server.ReadHeaderTimeout, s.config.RequestTimeout)
	server.ReadTimeout = s.config.RequestTimeout
	server.WriteTimeout = 2 * s.config.RequestTimeout // net/http counts it from the end of the header
	server.BaseContext = func(net.Listener) context.Context { return s.ctx }
	server.HTTP2 = &http.HTTP2Config{
		MaxConcurrentStreams:          maxStreams,
		MaxReceiveBufferPerStream:     64 << 10,
		MaxReceiveBufferPerConnection: 1 << 20,
		SendPingTimeout:               30 * time.Second,
		WriteByteTimeout:              s.config.RequestTimeout,
	}
	server.Protocols = new(http.Protocols)
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	return gate.Serve(ctx, server)
}

// Stats returns the statistics of connections.
func (s *Server) Stats() admission.Stats { return s.counts.Stats() }

// Close ends what is still under way, and waits for it. No requests may come any more.
func (s *Server) Close() {
	s.closed.Do(func() {
		s.cancel()
		// Handlers whose connections were closed may not have come to their end: all of them have when
		// nobody else has a slot.
		for range s.config.MaxRequests {
			_, _ = s.requests.Acquire(context.Background(), "")
		}
	})
}

// A refusal is an answer without a block.
type refusal struct {
	status int
	text   string
}

// Handler returns what answers requests, for servers that serve other things too: they bound
// connections and times themselves. The server must be closed after them.
func (s *Server) Handler(access Access) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if refused := s.answer(w, r, access); refused != nil {
			http.Error(w, refused.text, refused.status)
		}
	})
}

func (s *Server) answer(w http.ResponseWriter, r *http.Request, access Access) *refusal {
	release := s.requests.TryAcquire(r.RemoteAddr)
	if release == nil {
		w.Header().Set("Retry-After", "1")
		return &refusal{http.StatusServiceUnavailable, "too many requests at a time"}
	}
	defer release()
	memory := s.memory.Get().(*[eris.BlockSize32KiB + 1]byte)
	defer s.memory.Put(memory)
	switch {
	case r.Method == http.MethodGet, r.Method == http.MethodHead:
		return s.get(w, r, access, memory[:0])
	case r.Method == http.MethodPut:
		return s.put(w, r, access, memory[:])
	case r.Method == http.MethodPost && r.URL.Path == HavePath:
		return s.have(w, r, access, memory[:fetch.MaxHave*fetch.HavePrefix+1])
	}
	w.Header().Set("Allow", "GET, HEAD, PUT")
	return &refusal{http.StatusMethodNotAllowed, "method is not known here"}
}

// maxQuery is the greatest length in bytes of a query that is looked at: the URN of a read
// capability, the longest of the URNs that are understood, with every character percent-encoded.
const maxQuery = 3 * 115

// parseQuery reads the reference of a block from the query of a URL: the bare URN, without the name
// of a parameter. Characters may be percent-encoded. None is given if the query is empty or ends
// behind "urn:blake2b:".
func parseQuery(query string) (ref eris.Reference, given bool, refused *refusal) {
	wrong := &refusal{http.StatusBadRequest, "query is not urn:blake2b: and a reference"}
	if len(query) > maxQuery {
		return ref, false, wrong
	}
	urn, err := url.PathUnescape(query)
	if err != nil {
		return ref, false, wrong
	}
	scheme := strings.ToLower(urn)
	switch {
	case urn == "" || scheme == "urn:blake2b:":
		return ref, false, nil
	case strings.HasPrefix(scheme, "urn:eris:"):
		return ref, false, &refusal{http.StatusForbidden, "this server has blocks only, and decodes nothing"}
	}
	if ref, err = eris.ParseReferenceURN(urn); err != nil {
		return ref, false, wrong
	}
	return ref, true, nil
}

// get answers a GET or HEAD. The memory has room for a block.
func (s *Server) get(w http.ResponseWriter, r *http.Request, access Access, memory []byte) *refusal {
	if r.URL.Path != Path {
		return &refusal{http.StatusNotFound, "there is nothing here but " + Path}
	}
	if !access.Get || s.config.Source == nil {
		return &refusal{http.StatusForbidden, "blocks are not to be had here"}
	}
	ref, given, refused := parseQuery(r.URL.RawQuery)
	if refused != nil {
		return refused
	}
	if !given {
		return &refusal{http.StatusBadRequest, "query has no reference"}
	}
	source := s.config.Source
	if access.Relay != nil {
		source = access.Relay(admission.Host(r.RemoteAddr), hops(r))
	}
	block, err := fetch.Get(r.Context(), source, ref, eris.BlockSize32KiB, memory)
	if fetch.Lacks(err) && !errors.Is(err, fetch.ErrUnanswered) {
		block, err = fetch.Get(r.Context(), source, ref, eris.BlockSize1KiB, memory)
	}
	switch {
	case fetch.Lacks(err):
		if access.Relay != nil {
			w.Header().Set("Cache-Control", "no-store") // somebody else may have it the next time
		}
		return &refusal{http.StatusNotFound, "block is not here"}
	case err != nil:
		return s.fault(r, fmt.Errorf("getting a block: %w", err), "block cannot be read")
	}
	header := w.Header()
	// A block never changes, so its reference is all there is to know of its version.
	header.Set("Etag", `"`+ref.String()+`"`)
	header.Set("Cache-Control", "public, max-age=31536000, immutable")
	header.Set("Content-Type", "application/octet-stream")
	header.Set("X-Content-Type-Options", "nosniff")
	if tags := r.Header["If-None-Match"]; tags != nil {
		r.Header = http.Header{"If-None-Match": tags} // blocks go whole
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(block))
		return nil
	}
	header.Set("Content-Length", strconv.Itoa(len(block)))
	// net/http drops the body of the answer to HEAD.
	_, _ = w.Write(block)
	return nil
}

// have answers a POST, which asks which blocks are here. The memory has one byte more than the
// longest question.
func (s *Server) have(w http.ResponseWriter, r *http.Request, access Access, memory []byte) *refusal {
	store, ok := s.config.Source.(fetch.Haver)
	if !ok {
		return &refusal{http.StatusNotFound, "nobody knows here what there is"}
	}
	if !access.Get {
		return &refusal{http.StatusForbidden, "blocks are not to be had here"}
	}
	n, err := io.ReadFull(r.Body, memory)
	answer, ok := []byte(nil), false
	if err == io.ErrUnexpectedEOF { // it is no longer than it may be
		answer, ok = fetch.AnswerHave(store, memory[:n])
	}
	if !ok {
		return &refusal{http.StatusBadRequest, "body is no question"}
	}
	header := w.Header()
	header.Set("Content-Type", "application/octet-stream")
	header.Set("Cache-Control", "no-store")
	header.Set("Content-Length", strconv.Itoa(len(answer)))
	_, _ = w.Write(answer)
	return nil
}

// hops returns through how many servers a request may go, this one among them; 0 if it does not
// say. The header Max-Forwards has how many after this one (RFC 9110, section 7.6.2).
func hops(r *http.Request) int {
	text := r.Header.Get("Max-Forwards")
	if text == "" {
		return 0
	}
	n, err := strconv.ParseUint(text, 10, 8)
	if err != nil {
		return 1 // somebody bounds it
	}
	return int(n) + 1
}

// fault refuses a request because the store failed, and logs that; unless the client has gone or
// the server is being closed.
func (s *Server) fault(r *http.Request, err error, text string) *refusal {
	if r.Context().Err() != nil {
		return &refusal{http.StatusServiceUnavailable, "server is closing"}
	}
	s.seldom.Log(s.config.Log, err)
	return &refusal{http.StatusInternalServerError, text}
}

// put answers a PUT. The memory has one byte more than the largest block.
func (s *Server) put(w http.ResponseWriter, r *http.Request, access Access, memory []byte) *refusal {
	readOnly := &refusal{http.StatusForbidden, "blocks cannot be stored here"}
	if r.URL.Path != Path || !access.Put || s.config.Sink == nil || !admission.FromPageHere(r, access.Hosts) {
		return readOnly
	}
	named, given, refused := parseQuery(r.URL.RawQuery)
	if refused != nil {
		return refused
	}
	block, err := readBlock(r.Body, memory)
	if err != nil {
		return &refusal{http.StatusBadRequest, err.Error()}
	}
	ref := eris.Sum(block)
	if given && ref != named {
		return &refusal{http.StatusBadRequest, "body is not the block of that reference"}
	}
	if err := s.config.Sink(r.Context(), ref, block); errors.Is(err, fetch.ErrReadOnly) {
		return readOnly
	} else if err != nil {
		return s.fault(r, fmt.Errorf("storing a block: %w", err), "block cannot be stored")
	}
	w.Header().Set("Content-Location", Path+"?"+ref.URN())
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusOK)
	return nil
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
