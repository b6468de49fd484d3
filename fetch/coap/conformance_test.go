// SPDX-License-Identifier: GPL-3.0-or-later

package coap_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

// testServer is a server that can be restarted at the same address.
type testServer struct {
	tb      testing.TB
	network string
	address string
	tls     *tls.Config
	access  coapserver.Access
	config  coapserver.Config

	mu     sync.Mutex
	server *coapserver.Server
	conns  map[net.Conn]struct{}
	group  sync.WaitGroup
}

// startServer starts a server of a store at a path, by default the well-known one.
func startServer(tb testing.TB, network string, store fetch.Source, access coapserver.Access, path ...string) *testServer {
	s := &testServer{tb: tb, network: network, access: access, conns: make(map[net.Conn]struct{})}
	switch network {
	case "unix":
		s.address = filepath.Join(tb.TempDir(), "s")
	case "tls":
		s.address, s.tls = testhelp.FreeAddress(), testTLS(tb, "coap")
	case "wss":
		s.address, s.tls = testhelp.FreeAddress(), testTLS(tb)
	default:
		s.address = testhelp.FreeAddress()
	}
	s.config.Path, s.config.Source = path, store
	s.config.Sink, _ = store.(coapserver.Sink)
	s.config.Datagram.AckTimeout = 50 * time.Millisecond
	s.start()
	tb.Cleanup(s.stop)
	return s
}

// recorder takes note of the connections of a listener.
type recorder struct {
	net.Listener
	server *testServer
}

func (r recorder) Accept() (net.Conn, error) {
	conn, err := r.Listener.Accept()
	if err == nil {
		r.server.mu.Lock()
		r.server.conns[conn] = struct{}{}
		r.server.mu.Unlock()
	}
	return conn, err
}

func (s *testServer) start() {
	server := coapserver.New(s.config)
	s.server = server
	if s.network == "udp" {
		conn, err := net.ListenPacket("udp", s.address)
		must(s.tb, err)
		s.group.Go(func() { server.ServePacket(conn, s.access) })
		return
	}
	network := s.network
	if network != "unix" {
		network = "tcp"
	}
	listener, err := net.Listen(network, s.address)
	must(s.tb, err)
	if s.tls != nil {
		listener = tls.NewListener(listener, s.tls)
	}
	if s.network == "ws" || s.network == "wss" {
		s.group.Go(func() { server.ServeWebSocket(recorder{listener, s}, s.access) })
		return
	}
	s.group.Go(func() { server.Serve(recorder{listener, s}, s.access) })
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
		conn.Close()
		delete(s.conns, conn)
	}
}

// url returns the URL of the store.
func (s *testServer) url() string {
	schemes := map[string]string{"unix": "coap+unix", "tcp": "coap+tcp", "tls": "coaps+tcp", "ws": "coap+ws", "wss": "coaps+ws", "udp": "coap"}
	return schemes[s.network] + "://" + escape(s.address) + "/" + strings.Join(s.config.Path, "/")
}

// escape writes the path of a socket as the authority of a URL.
func escape(path string) string { return strings.ReplaceAll(path, "/", "%2F") }

// testTLS returns the configuration of a server that wants its clients to ask for these protocols.
func testTLS(tb testing.TB, protocols ...string) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{testhelp.Certificate()},
		NextProtos:   protocols,
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			if !slices.Equal(hello.SupportedProtos, protocols) {
				tb.Errorf("the client offers the protocols %q", hello.SupportedProtos)
			}
			return nil, nil
		},
	}
}

func mustOpen(tb testing.TB, url string, options coap.Options) *coap.Store {
	store, err := coap.Open(url, options)
	must(tb, err)
	return store
}

var readWrite = coapserver.Access{Get: true, Put: true}

func TestConformance(t *testing.T) {
	for _, network := range []string{"unix", "tcp", "tls", "ws", "wss", "udp"} {
		t.Run(network, func(t *testing.T) {
			sourcetest.Test(t, func(t *testing.T, backend *sourcetest.Backend) sourcetest.Fixture {
				options := coap.Options{DialTimeout: time.Minute}
				store := backend.Open(64)
				t.Cleanup(func() { store.Close() })
				options.Datagram.AckTimeout = 50 * time.Millisecond
				server := startServer(t, network, store, readWrite, "hidden-away")
				readOnly := startServer(t, network, store, coapserver.Access{Get: true})
				fixture := sourcetest.Fixture{
					Source:   mustOpen(t, server.url(), options),
					ReadOnly: mustOpen(t, readOnly.url(), options),
					Restart:  server.restart,
					Secret:   "hidden-away",
					Held:     4,
				}
				if network != "udp" {
					fixture.Break = server.breakConnections
				}
				return fixture
			})
		})
	}
}

var _ fetch.Store = (*coap.Store)(nil)

// TestDocument gets a document, whole.
func TestDocument(t *testing.T) {
	text := bytes.Repeat([]byte("text"), 5000)
	server := &testServer{tb: t, network: "unix", address: filepath.Join(t.TempDir(), "s"), conns: make(map[net.Conn]struct{})}
	server.access = coapserver.Access{Document: true}
	server.config.Document = coapserver.Document{Path: []string{"a", "text"}, Text: func() []byte { return text }}
	server.start()
	defer server.stop()
	store := mustOpen(t, server.url(), coap.Options{})
	defer store.Close()
	if got, err := store.Document(t.Context(), "a", "text"); err != nil || !bytes.Equal(got, text) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if _, err := store.Document(t.Context(), "other"); !errors.Is(err, eris.ErrNotFound) {
		t.Errorf("error is %v", err)
	}
}
