// SPDX-License-Identifier: GPL-3.0-or-later

package pool_test

import (
	"errors"
	"net"
	"sync"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
)

// owner is a pool that closes its sources.
type owner struct {
	*pool.Pool
	sources []fetch.Source
}

func (o owner) Close() error {
	var errs []error
	for _, s := range o.sources {
		errs = append(errs, s.Close())
	}
	return errors.Join(append(errs, o.Pool.Close())...)
}

// server serves blocks on a port that stays the same.
type server struct {
	tb      testing.TB
	config  coapserver.Config
	address string
	server  *coapserver.Server
	group   sync.WaitGroup
}

func startServer(tb testing.TB, blocks eris.Blocks) *server {
	s := newServer(tb, blocks)
	s.address = "127.0.0.1:0"
	s.start()
	tb.Cleanup(s.stop)
	return s
}

// newServer returns a server that does not serve yet.
func newServer(tb testing.TB, blocks eris.Blocks) *server {
	s := &server{tb: tb}
	s.config.Resources = []coapserver.Resource{{Blocks: blocks}}
	s.config.MaxGets = 256
	return s
}

// start serves on the address.
func (s *server) start() {
	listener, err := net.Listen("tcp", s.address)
	if err != nil {
		s.tb.Fatal(err)
	}
	s.serve(listener)
}

func (s *server) serve(listener net.Listener) {
	var err error
	if s.server, err = coapserver.New(s.config); err != nil {
		s.tb.Fatal(err)
	}
	s.address = listener.Addr().String()
	s.group.Go(func() { s.server.Serve(listener, coapserver.Access{Get: true}) })
}

func (s *server) stop() {
	s.server.Close()
	s.group.Wait()
}

func (s *server) restart() {
	s.stop()
	s.start()
}

func open(tb testing.TB, address string, options coap.Options) fetch.Source {
	s, err := coap.Open("coap+tcp://"+address, options)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// TestConformance runs the suite of sources over a pool of one source, and of two of which one is dead.
func TestConformance(t *testing.T) {
	for name, dead := range map[string]int{"one": 0, "one of two": 1} {
		t.Run(name, func(t *testing.T) {
			sourcetest.Test(t, func(t *testing.T, backend *sourcetest.Backend) sourcetest.Fixture {
				s := startServer(t, backend)
				sources := []fetch.Source{open(t, s.address, coap.Options{})}
				for range dead {
					listener, err := net.Listen("tcp", "127.0.0.1:0")
					if err != nil {
						t.Fatal(err)
					}
					listener.Close()
					sources = append([]fetch.Source{open(t, listener.Addr().String(), coap.Options{})}, sources...)
				}
				return sourcetest.Fixture{
					Source:  owner{pool.New(sources, pool.Options{}), sources},
					Restart: s.restart,
					Bans:    true,
					Held:    4, // until more is known
				}
			})
		})
	}
}
