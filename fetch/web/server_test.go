// SPDX-License-Identifier: GPL-3.0-or-later

package web_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
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
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// blocks is what a server serves.
type blocks interface {
	Get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error)
	Put(ctx context.Context, ref eris.Reference, block []byte) error
}

// testServer is a server that can be restarted at the same address.
type testServer struct {
	tb      testing.TB
	prepare func(s *httptest.Server) // its configuration
	start   func(s *httptest.Server)
	scheme  string
	address string
	made    atomic.Int32 // connections
	server  *httptest.Server
}

// startServer starts a server. The protocols are a list of http/1.1, h2 and h2c; h2 and tls have it
// speak TLS.
func startServer(tb testing.TB, handler http.Handler, protocols ...string) *testServer {
	s := &testServer{tb: tb, start: (*httptest.Server).Start, scheme: "http://", address: testhelp.FreeAddress()}
	var spoken http.Protocols
	spoken.SetHTTP1(slices.Contains(protocols, "http/1.1"))
	spoken.SetHTTP2(slices.Contains(protocols, "h2"))
	spoken.SetUnencryptedHTTP2(slices.Contains(protocols, "h2c"))
	if spoken.HTTP2() || slices.Contains(protocols, "tls") {
		s.start, s.scheme = (*httptest.Server).StartTLS, "https://"
	}
	s.prepare = func(server *httptest.Server) {
		server.EnableHTTP2 = spoken.HTTP2()
		server.Config = &http.Server{Handler: handler, Protocols: &spoken, ErrorLog: quiet, ConnState: func(_ net.Conn, state http.ConnState) {
			if state == http.StateNew {
				s.made.Add(1)
			}
		}}
	}
	s.restart()
	tb.Cleanup(s.stop)
	return s
}

// restart starts the server, and ends the one before without waiting for its handlers.
func (s *testServer) restart() {
	if s.server != nil {
		s.server.Config.Close()
	}
	listener, err := net.Listen("tcp", s.address)
	must(s.tb, err)
	s.server = &httptest.Server{Listener: listener}
	s.prepare(s.server)
	s.start(s.server)
}

func (s *testServer) stop() {
	s.server.Config.Close()
	s.server.Close()
}

func (s *testServer) url(path string) string { return s.scheme + s.address + path }

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

// newBackendSource returns what our own server serves.
func newBackendSource(tb testing.TB, backend *sourcetest.Backend) fetch.Source {
	s := fetch.NewWorkers("backend:", 64, backend.Get)
	tb.Cleanup(func() { s.Close() })
	return s
}

func mustOpen(tb testing.TB, url string, options web.Options) *web.Store {
	tb.Helper()
	// The machine may be busy.
	options.ConnectTimeout, options.Timeout = cmp.Or(options.ConnectTimeout, time.Minute), cmp.Or(options.Timeout, 5*time.Minute)
	if options.Getenv == nil {
		options.Getenv = func(string) string { return "" }
	}
	store, err := web.Open(url, options)
	must(tb, err)
	tb.Cleanup(func() { store.Close() })
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
					Break:    func() { server.server.CloseClientConnections() },
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
	for name, url := range map[string]string{"http": "http://" + listener.Addr().String(), "h2c": "http://" + listener.Addr().String() + "?h2c", "https": secure.url("")} {
		for size, refs := range refs {
			b.Run(fmt.Sprintf("%s/%v", name, size), func(b *testing.B) {
				store := mustOpen(b, url, web.Options{})
				b.SetBytes(int64(size))
				b.ReportAllocs()
				b.SetParallelism(256 / runtime.GOMAXPROCS(0))
				var next atomic.Int64
				b.RunParallel(func(p *testing.PB) {
					memory := make([]byte, 0, size)
					for p.Next() {
						if _, err := fetch.Get(b.Context(), store, refs[next.Add(1)%int64(len(refs))], size, memory); err != nil {
							b.Error(err)
						}
					}
				})
			})
		}
	}
}
