// SPDX-License-Identifier: GPL-3.0-or-later

package cache_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net"
	"sync"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/cache"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
)

// nothing is a store without blocks.
type nothing struct{}

func (nothing) Get(context.Context, eris.Reference, eris.BlockSize, []byte) ([]byte, error) {
	return nil, eris.ErrNotFound
}

// server serves blocks, without taking any, on a port that stays the same.
type server struct {
	t       *testing.T
	blocks  eris.Blocks
	address string
	server  *coapserver.Server
	group   sync.WaitGroup
}

func startServer(t *testing.T, blocks eris.Blocks) *server {
	s := &server{t: t, blocks: blocks, address: "127.0.0.1:0"}
	s.start()
	t.Cleanup(s.stop)
	return s
}

func (s *server) start() {
	var err error
	if s.server, err = coapserver.New(coapserver.Config{Resources: []coapserver.Resource{{Blocks: s.blocks}}, MaxGets: 256}); err != nil {
		s.t.Fatal(err)
	}
	listener, err := net.Listen("tcp", s.address)
	if err != nil {
		s.t.Fatal(err)
	}
	s.address = listener.Addr().String()
	s.group.Go(func() { s.server.Serve(listener, coapserver.Access{Get: true}) })
}

func (s *server) stop() {
	s.server.Close()
	s.group.Wait()
}

func (s *server) open() fetch.Store {
	source, err := coap.Open("coap+tcp://"+s.address, coap.Options{})
	if err != nil {
		s.t.Fatal(err)
	}
	return source
}

// through is a source made of a store and what is behind it.
type through struct {
	*cache.StoreCache
	close func() error
}

func (through) String() string { return "through" }
func (s through) Close() error { return s.close() }

// TestConformance runs the suite of sources over a store that has nothing and takes nothing, with the blocks behind it.
func TestConformance(t *testing.T) {
	sourcetest.Test(t, func(t *testing.T, backend *sourcetest.Backend) sourcetest.Fixture {
		near, far := startServer(t, nothing{}), startServer(t, backend)
		store, source := near.open(), far.open()
		p := pool.New([]fetch.Source{source}, pool.Options{})
		c := cache.ThroughStore(store, p, nil)
		return sourcetest.Fixture{
			Source: through{c, func() error {
				store.Close()
				source.Close()
				c.Close()
				return p.Close()
			}},
			Restart: far.restart,
			Bans:    true,
			Held:    4, // until more is known
		}
	})
}

// blocks is a store in memory, which counts.
type blocks struct {
	mu    sync.Mutex
	of    map[eris.Reference][]byte
	gets  int
	spoil bool // answers are wrong
}

func newBlocks() *blocks { return &blocks{of: map[eris.Reference][]byte{}} }

func (b *blocks) Get(_ context.Context, ref eris.Reference, size eris.BlockSize, _ []byte) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.gets++
	block, ok := b.of[ref]
	if !ok || len(block) != int(size) {
		return nil, eris.ErrNotFound
	}
	if b.spoil {
		block = bytes.Clone(block)
		block[0] ^= 1
	}
	return block, nil
}

func (b *blocks) Put(_ context.Context, ref eris.Reference, block []byte) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.of[ref] = bytes.Clone(block)
	return nil
}

// TestThroughStoreStarted reads a content whose blocks are in a store, behind it, or here and there, without a goroutine for each;
// and one from a store that lies.
func TestThroughStoreStarted(t *testing.T) {
	content := make([]byte, 3e6)
	rand.NewChaCha8([32]byte{1}).Read(content)
	for _, v := range []struct {
		name  string
		every int // n-th block is in the store; 0: none
		spoil bool
	}{{"all", 1, false}, {"none", 0, false}, {"half", 2, false}, {"lies", 1, true}} {
		t.Run(v.name, func(t *testing.T) {
			near, far := newBlocks(), newBlocks()
			c, err := eris.Encode(t.Context(), bytes.NewReader(content), far, eris.EncodeOptions{BlockSize: eris.BlockSize1KiB})
			if err != nil {
				t.Fatal(err)
			}
			n := 0
			for ref, block := range far.of {
				if n++; v.every > 0 && n%v.every == 0 {
					near.of[ref] = block
				}
			}
			near.spoil = v.spoil
			store, source := startServer(t, near).open(), startServer(t, far).open()
			defer store.Close()
			defer source.Close()
			p := pool.New([]fetch.Source{source}, pool.Options{})
			defer p.Close()
			faults := 0
			through := cache.ThroughStore(store, p, func(error) { faults++ })
			defer through.Close()
			if !through.Starts() {
				t.Error("requests need goroutines")
			}
			reader, err := eris.Open(t.Context(), through, c, int64(len(content)), eris.Window{})
			if err != nil {
				t.Fatal(err)
			}
			var got bytes.Buffer
			if _, err := reader.WriteTo(t.Context(), &got); err != nil || !bytes.Equal(got.Bytes(), content) {
				t.Fatalf("%d bytes, other ones or %v", got.Len(), err)
			}
			if v.spoil != (faults > 0) {
				t.Errorf("%d faults", faults)
			}
			near.mu.Lock()
			defer near.mu.Unlock()
			far.mu.Lock()
			defer far.mu.Unlock()
			t.Logf("%d blocks, %d of them in the store; %d and %d requests", len(far.of), len(near.of), near.gets, far.gets)
			missing := len(far.of) - len(near.of)
			if !v.spoil && far.gets != missing || v.spoil && far.gets != len(far.of) {
				t.Errorf("%d requests for what is not in the store, of which there are %d", far.gets, missing)
			}
		})
	}
}

func (s *server) restart() {
	s.stop()
	s.start()
}
