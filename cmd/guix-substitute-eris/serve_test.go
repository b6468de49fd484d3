// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
)

// serveTest starts a block store in a directory of its own, which the test can use for other things
// as well.
func serveTest(t *testing.T, directory string, args ...string) *process {
	t.Helper()
	log := filepath.Join(directory, "log")
	s, err := startServe(directory, log, os.Environ(), append([]string{"--directory=blocks", "--socket=s"}, args...)...)
	if err != nil {
		text, _ := os.ReadFile(log)
		t.Fatalf("%v\n%s", err, text)
	}
	t.Cleanup(s.end)
	return s
}

// client returns a client of the block store, over a kind of URLs.
func (s *process) client(t *testing.T, kind string) *coap.Store {
	t.Helper()
	store, err := coap.Open(s.urls[kind], coap.Options{})
	must(t, err)
	t.Cleanup(func() { store.Close() })
	return store
}

// noise returns bytes that look random, and are the same for the same seed.
func noise(seed uint64, size int) []byte {
	var key [32]byte
	binary.BigEndian.PutUint64(key[:], seed)
	b := make([]byte, size)
	rand.NewChaCha8(key).Read(b)
	return b
}

func noiseBlock(i int) []byte {
	if i%8 == 0 {
		return noise(uint64(i), int(eris.BlockSize32KiB))
	}
	return noise(uint64(i), int(eris.BlockSize1KiB))
}

// puts are blocks that clients put as fast as they can.
type puts struct {
	mu           sync.Mutex
	next         int
	acknowledged []int
}

// until has clients put blocks, ends the server when so many are acknowledged in all, and waits
// until all clients have noticed that.
func (p *puts) until(t *testing.T, s *process, acknowledged int, end func()) {
	store := s.client(t, "UNIX")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var group sync.WaitGroup
	put := func() bool {
		p.mu.Lock()
		i := p.next
		p.next++
		p.mu.Unlock()
		block := noiseBlock(i)
		if store.Put(ctx, eris.Sum(block), block) != nil {
			return false
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.acknowledged = append(p.acknowledged, i)
		if len(p.acknowledged) == acknowledged {
			group.Go(func() {
				end()
				cancel() // nobody else will answer
			})
		}
		return true
	}
	for range 128 {
		group.Go(func() {
			for put() {
			}
		})
	}
	group.Wait()
}

// check checks that a block store has all that was acknowledged.
func (p *puts) check(t *testing.T, s *process) {
	t.Helper()
	store := s.client(t, "UNIX")
	for _, i := range p.acknowledged {
		want := noiseBlock(i)
		got, err := fetch.Get(t.Context(), store, eris.Sum(want), eris.BlockSize(len(want)), nil)
		if err != nil || string(got) != string(want) {
			t.Errorf("block %d was acknowledged: %v", i, err)
		}
	}
}

// TestServeKilled kills a block store again and again while blocks are being put into it. No block
// that it has acknowledged is lost.
func TestServeKilled(t *testing.T) {
	directory := t.TempDir()
	random := rand.New(rand.NewPCG(1, 2))
	var p puts
	n := kills(t, 5)
	for range n {
		server := serveTest(t, directory)
		p.until(t, server, len(p.acknowledged)+1+random.IntN(max(200, 7500/n)), server.kill)
	}
	server := serveTest(t, directory)
	p.check(t, server)
	if len(p.acknowledged) < 100 {
		t.Errorf("%d blocks were acknowledged", len(p.acknowledged))
	}
	must(t, server.stop())
}

// TestServeLimitsRate checks that blocks go no faster than is permitted, over all listeners
// together.
func TestServeLimitsRate(t *testing.T) {
	t.Parallel()
	const rate, blocks = 512 << 10, 12
	server := serveTest(t, t.TempDir(), "--limit-rate=512K/s", "--listen=coap+tcp://127.0.0.1:0?get&put")
	stores := []*coap.Store{server.client(t, "UNIX"), server.client(t, "TCP")}
	// What may go at once is a tenth of a second, or 32 KiB.
	least := time.Duration(blocks-2) * time.Duration(eris.BlockSize32KiB) * time.Second / rate
	var refs []eris.Reference
	for i := range blocks {
		block := noise(uint64(i), int(eris.BlockSize32KiB))
		refs = append(refs, eris.Sum(block))
		must(t, stores[0].Put(t.Context(), refs[i], block))
	}
	begin := time.Now()
	var group sync.WaitGroup
	for i, ref := range refs {
		group.Go(func() {
			if _, err := fetch.Get(t.Context(), stores[i%2], ref, eris.BlockSize32KiB, nil); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if took := time.Since(begin); took < least {
		t.Errorf("it took %v, and must take %v at least", took, least)
	}
}

// TestServeStops stops a block store while clients put as fast as they can, and others hold
// connections on which they say nothing, or not all. It ends in good order, and has what it has
// acknowledged.
func TestServeStops(t *testing.T) {
	t.Parallel() // clients get five seconds
	directory := t.TempDir()
	server := serveTest(t, directory, "--listen=coap+tcp://127.0.0.1:0", "--listen=http://127.0.0.1:0", "--listen=coap+ws://127.0.0.1:0")
	for _, kind := range []string{"TCP", "HTTP", "WS"} {
		_, address, _ := strings.Cut(server.urls[kind], "://")
		for _, text := range []string{"", "G", "GET / HTTP/1.1\r\nHost: x\r\n", "\x00\xe1\xe1\x7f"} {
			conn, err := net.Dial("tcp", address)
			must(t, err)
			defer conn.Close()
			_, err = io.WriteString(conn, text)
			must(t, err)
		}
	}
	var p puts
	p.until(t, server, 200, func() {
		if err := server.stop(); err != nil {
			t.Error(err)
		}
	})
	p.check(t, serveTest(t, directory))
}
