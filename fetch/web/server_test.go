// SPDX-License-Identifier: GPL-3.0-or-later

package web_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/httpserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/web"
)

// blocks is what a server serves.
type blocks interface {
	Get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error)
	Put(ctx context.Context, ref eris.Reference, block []byte) error
}

// testServer is a server that can be restarted at the same address.
type testServer struct {
	tb        testing.TB
	handler   http.Handler
	tls       *tls.Config
	protocols http.Protocols
	address   string // set by the first start

	mu     sync.Mutex
	server *http.Server
	conns  map[net.Conn]http.ConnState
	made   int // connections
	group  sync.WaitGroup
}

// startServer starts a server. The protocols are a list of http/1.1, h2 and h2c; h2 and tls have it
// speak TLS.
func startServer(tb testing.TB, handler http.Handler, protocols ...string) *testServer {
	s := &testServer{tb: tb, handler: handler, address: "127.0.0.1:0", conns: make(map[net.Conn]http.ConnState)}
	for _, p := range protocols {
		switch p {
		case "http/1.1":
			s.protocols.SetHTTP1(true)
		case "h2":
			s.protocols.SetHTTP2(true)
			s.tls = testTLS(tb)
		case "tls":
			s.tls = testTLS(tb)
		case "h2c":
			s.protocols.SetUnencryptedHTTP2(true)
		default:
			tb.Fatal(p)
		}
	}
	s.start()
	tb.Cleanup(s.stop)
	return s
}

func (s *testServer) start() {
	listener, err := net.Listen("tcp", s.address)
	if err != nil {
		s.tb.Fatal(err)
	}
	s.address = listener.Addr().String()
	server := &http.Server{
		Handler: s.handler, Protocols: &s.protocols, TLSConfig: s.tls,
		ErrorLog: quiet,
		ConnState: func(conn net.Conn, state http.ConnState) {
			s.mu.Lock()
			defer s.mu.Unlock()
			if state == http.StateNew {
				s.made++
			}
			if s.conns[conn] = state; state == http.StateClosed {
				delete(s.conns, conn)
			}
		},
	}
	s.mu.Lock()
	s.server = server
	s.mu.Unlock()
	s.group.Go(func() {
		if s.tls != nil {
			server.ServeTLS(listener, "", "")
		} else {
			server.Serve(listener)
		}
	})
}

func (s *testServer) stop() {
	s.server.Close()
	s.group.Wait()
}

func (s *testServer) restart() {
	s.stop()
	s.start()
}

// breakConnections closes all connections without any ado.
func (s *testServer) breakConnections() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for conn := range s.conns {
		if t, ok := conn.(*tls.Conn); ok {
			conn = t.NetConn()
		}
		conn.Close()
	}
}

// connections returns how many connections there have been.
func (s *testServer) connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.made
}

func (s *testServer) url(path string) string {
	if s.tls != nil {
		return "https://" + s.address + path
	}
	return "http://" + s.address + path
}

func testTLS(tb testing.TB) *tls.Config {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(tb, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	must(tb, err)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{certificate}, PrivateKey: key}}}
}

// serve serves blocks at a base path in the ways of both kinds of stores.
func serve(base string, store blocks, writable bool) http.Handler {
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, r *http.Request, ref eris.Reference, err error) {
		if err != nil {
			http.NotFound(w, r)
			return
		}
		if r.Method == http.MethodPut {
			put(w, r, ref, store, writable)
			return
		}
		block, err := store.Get(r.Context(), ref, 0, nil)
		switch {
		case errors.Is(err, eris.ErrNotFound):
			http.NotFound(w, r)
		case err != nil:
			http.Error(w, "failed", http.StatusInternalServerError)
		default:
			w.Header().Set("Content-Type", "application/octet-stream")
			w.Write(block)
		}
	}
	mux.HandleFunc(base+"/uri-res/N2R", func(w http.ResponseWriter, r *http.Request) {
		ref, err := eris.ParseReferenceURN(r.URL.RawQuery)
		answer(w, r, ref, err)
	})
	mux.HandleFunc("POST "+base+"/.well-known/eris/have", func(w http.ResponseWriter, r *http.Request) {
		question, err := io.ReadAll(r.Body)
		haver, ok := store.(fetch.Haver)
		if err != nil || !ok {
			http.NotFound(w, r)
			return
		}
		answer, ok := fetch.AnswerHave(haver, question)
		if !ok {
			http.Error(w, "no question", http.StatusBadRequest)
		}
		w.Write(answer)
	})
	mux.HandleFunc(base+"/flat/{name}", func(w http.ResponseWriter, r *http.Request) {
		ref, err := eris.ParseReference(r.PathValue("name"))
		answer(w, r, ref, err)
	})
	mux.HandleFunc(base+"/sharded/{shard}/{name}", func(w http.ResponseWriter, r *http.Request) {
		ref, err := eris.ParseReference(r.PathValue("name"))
		if err == nil && !strings.HasPrefix(ref.String(), r.PathValue("shard")) {
			err = eris.ErrNotFound
		}
		answer(w, r, ref, err)
	})
	return mux
}

func put(w http.ResponseWriter, r *http.Request, ref eris.Reference, store blocks, writable bool) {
	if !writable {
		http.Error(w, "no", http.StatusMethodNotAllowed)
		return
	}
	block, err := io.ReadAll(io.LimitReader(r.Body, int64(eris.BlockSize32KiB)+1))
	if err != nil || eris.Verify(ref, block) != nil {
		http.Error(w, "wrong", http.StatusBadRequest)
		return
	}
	if err := store.Put(r.Context(), ref, block); err != nil {
		http.Error(w, "failed", http.StatusInternalServerError)
		return
	}
	w.WriteHeader(http.StatusCreated)
}

// backendSource is what our own server serves.
type backendSource struct{ *fetch.Workers }

func newBackendSource(tb testing.TB, backend *sourcetest.Backend) fetch.Source {
	s := backendSource{fetch.NewWorkers(64, backend.Get)}
	tb.Cleanup(func() { s.Close() })
	return s
}

func (backendSource) String() string { return "backend" }

func mustOpen(tb testing.TB, url string, options web.Options) *web.Store {
	tb.Helper()
	if options.Getenv == nil {
		options.Getenv = func(string) string { return "" }
	}
	store, err := web.Open(url, options)
	must(tb, err)
	return store
}

var quiet = log.New(io.Discard, "", 0)

const secretPath = "/hidden-away"

func TestConformance(t *testing.T) {
	for _, test := range []struct {
		name, path string
		protocols  []string
	}{
		{"HTTP1", "", []string{"http/1.1"}},
		{"HTTP2", "", []string{"http/1.1", "h2"}},
		{"TLS", "", []string{"http/1.1", "tls"}},
		{"Cleartext", "?h2c", []string{"h2c"}},
		{"Flat", "/flat/?static", []string{"http/1.1"}},
		{"Sharded", "/sharded?static&layout=sharded", []string{"http/1.1", "h2"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			sourcetest.Test(t, func(t *testing.T, backend *sourcetest.Backend) sourcetest.Fixture {
				server := startServer(t, serve(secretPath, backend, true), test.protocols...)
				readOnly := startServer(t, serve("", backend, false), test.protocols...)
				return sourcetest.Fixture{
					Source:   mustOpen(t, server.url(secretPath+test.path), web.Options{}),
					ReadOnly: mustOpen(t, readOnly.url(test.path), web.Options{}),
					Restart:  server.restart,
					Break:    server.breakConnections,
					Secret:   secretPath,
					Held:     20,
				}
			})
		})
	}
}

// BenchmarkGet gets blocks from our own server in the same process, 256 calls at a time.
func BenchmarkGet(b *testing.B) {
	backend := sourcetest.NewBackend()
	refs := map[eris.BlockSize][]eris.Reference{}
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		for i := range byte(200) {
			ref, block := newBlock(size, i)
			backend.Set(ref, block)
			refs[size] = append(refs[size], ref)
		}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(b, err)
	server := httpserver.New(httpserver.Config{Source: newBackendSource(b, backend)})
	var serving sync.WaitGroup
	serving.Go(func() { server.Serve(b.Context(), listener, httpserver.Access{Get: true}) })
	b.Cleanup(serving.Wait)
	secure := startServer(b, serve("", backend, false), "http/1.1", "h2")
	for _, url := range []string{"http://" + listener.Addr().String(), "http://" + listener.Addr().String() + "?h2c", secure.url("")} {
		for size, refs := range refs {
			name := url[:strings.Index(url, ":")]
			if strings.HasSuffix(url, "?h2c") {
				name = "h2c"
			}
			b.Run(fmt.Sprintf("%s/%v", name, size), func(b *testing.B) {
				store := mustOpen(b, url, web.Options{})
				defer store.Close()
				b.SetBytes(int64(size))
				b.ReportAllocs()
				var next atomic.Int64
				var group sync.WaitGroup
				for range 256 {
					group.Go(func() {
						memory := make([]byte, 0, size)
						for n := next.Add(1); n <= int64(b.N); n = next.Add(1) {
							if _, err := fetch.Get(b.Context(), store, refs[n%int64(len(refs))], size, memory); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				group.Wait()
			})
		}
	}
}
