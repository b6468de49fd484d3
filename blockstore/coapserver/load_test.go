// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// disk is a sink that counts blocks, and takes its time.
type disk struct {
	mu   sync.Mutex
	refs map[eris.Reference]int
}

func (d *disk) PutBatch(_ context.Context, refs []eris.Reference, blocks [][]byte) error {
	time.Sleep(2 * time.Millisecond)
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, ref := range refs {
		if err := eris.Verify(ref, blocks[i]); err != nil {
			return err
		}
		d.refs[ref]++
	}
	return nil
}

// numbered returns a block that is told from all others by its number.
func numbered(block []byte, n int) eris.Reference {
	binary.LittleEndian.PutUint64(block, uint64(n))
	return eris.Sum(block)
}

// TestStoreLargeItem puts all blocks of a large item through one connection as fast as it takes
// them, in two ways: with a client that does not read a single answer before it has sent
// everything, and with one that reads all the while. Each block must be answered exactly once, and
// be there. With ERIS_BIG_TESTS=1 the item has 1 GB.
func TestStoreLargeItem(t *testing.T) {
	bytes := 16 << 20
	if os.Getenv("ERIS_BIG_TESTS") != "" {
		bytes = 1 << 30
	}
	for _, v := range []struct {
		size  eris.BlockSize
		naive bool
	}{{eris.BlockSize32KiB, true}, {eris.BlockSize32KiB, false}, {eris.BlockSize1KiB, true}, {eris.BlockSize1KiB, false}} {
		t.Run(fmt.Sprintf("%v/naive=%v", v.size, v.naive), func(t *testing.T) {
			store := &disk{refs: make(map[eris.Reference]int)}
			_, address := serveConfig(t, "unix", readWrite, coapserver.Config{Sink: store})
			before := runtime.NumGoroutine()
			c := dial(t, "unix", address, csm...)
			count := bytes / int(v.size)
			if v.size == eris.BlockSize1KiB {
				count = bytes / int(v.size) / 4
			}
			var most atomic.Int64
			sent := make(chan struct{})
			send := func() {
				defer close(sent)
				block := make([]byte, v.size)
				var b []byte
				for i := range count {
					numbered(block, i)
					b = append(b, putRequest(uint32(i), coap.Block{}, block)...)
					if len(b) > 1<<18 || i == count-1 {
						if !c.write(b) {
							t.Error("the server does not take everything")
							return
						}
						b = b[:0]
						most.Store(max(most.Load(), int64(runtime.NumGoroutine()-before)))
					}
				}
			}
			if v.naive {
				send()
			} else {
				go send()
			}
			answered := make([]bool, count)
			for range count {
				m := c.readAnswer()
				if n := int(m.Token.Value); m.Code != codes.Created || m.Token.Size == 0 || n >= count || answered[n] {
					t.Fatalf("answer %v", m.Code)
				} else {
					answered[n] = true
				}
			}
			<-sent
			block := make([]byte, v.size)
			store.mu.Lock()
			defer store.mu.Unlock()
			for i := range count {
				if store.refs[numbered(block, i)] != 1 {
					t.Fatalf("block %d is there %d times", i, store.refs[numbered(block, i)])
				}
			}
			if n := most.Load(); n > 64+10 {
				t.Errorf("%d goroutines", n)
			}
		})
	}
}

// held is a store whose calls wait.
type held struct {
	release chan struct{}
	calls   atomic.Int64
	bytes   atomic.Int64
}

func (h *held) PutBatch(ctx context.Context, _ []eris.Reference, blocks [][]byte) error {
	h.calls.Add(1)
	for _, block := range blocks {
		h.bytes.Add(int64(len(block)))
	}
	select {
	case <-h.release:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (h *held) Get(ctx context.Context, _ eris.Reference, _ eris.BlockSize, _ []byte) ([]byte, error) {
	h.calls.Add(1)
	select {
	case <-h.release:
		return nil, eris.ErrNotFound
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// source returns a source whose calls wait.
func (h *held) source(t *testing.T) fetch.Source {
	workers := fetch.NewWorkers("held:", 1<<16, h.Get)
	t.Cleanup(func() { workers.Close() })
	return workers
}

// awaitStill waits until a number has come to the least that it must be, and then until it does not
// change any more.
func awaitStill(value func() int64, least int64) int64 {
	last, still := value(), 0
	for still < 20 {
		pause()
		if n := value(); n == last && n >= least {
			still++
		} else {
			last, still = n, 0
		}
	}
	return last
}

// TestBackPressure has a store that does not answer: what a connection may have under way is
// bounded, all connections together too, each gets its share, and all is answered once the store
// goes on.
func TestBackPressure(t *testing.T) {
	store := &held{release: make(chan struct{})}
	_, address := serveConfig(t, "unix", readWrite, coapserver.Config{
		Sink:          store,
		MaxBytes:      2 << 20,
		MaxTotalBytes: 3 << 20,
	})
	const clients, count = 5, 300
	var group sync.WaitGroup
	for range clients {
		c := dial(t, "unix", address, csm...)
		group.Go(func() {
			block := make([]byte, eris.BlockSize32KiB)
			for i := range count {
				if !c.write(putRequest(uint32(i), coap.Block{}, block)) {
					t.Error("the server does not take everything")
				}
			}
		})
		group.Go(func() {
			for range count {
				c.want(codes.Created)
			}
		})
	}
	under := awaitStill(store.bytes.Load, clients*int64(eris.BlockSize32KiB))
	if most := int64(3<<20 + clients<<18); under > most {
		t.Errorf("%d bytes are being stored, at most %d are allowed", under, most)
	}
	// A connection more gets its share as well.
	c := dial(t, "unix", address, csm...)
	calls := store.calls.Load()
	c.write(putRequest(1, coap.Block{}, make([]byte, eris.BlockSize1KiB)))
	for store.calls.Load() == calls {
		pause()
	}
	close(store.release)
	group.Wait()
	c.want(codes.Created)
}

// TestManyGets requests many more blocks than are looked up at a time, of a store that does not
// answer.
func TestManyGets(t *testing.T) {
	store := &held{release: make(chan struct{})}
	_, address := serveConfig(t, "unix", readWrite, coapserver.Config{Source: store.source(t), MaxGets: 7})
	c := dial(t, "unix", address, csm...)
	const count = 20000
	ref, _ := sourcetest.NewBlock(eris.BlockSize1KiB)
	var group sync.WaitGroup
	group.Go(func() {
		for i := range count {
			c.write(getRequest(uint32(i), ref, eris.BlockSize1KiB, coap.Block{}))
		}
	})
	if n := awaitStill(store.calls.Load, 7); n != 7 {
		t.Errorf("%d calls at a time, want 7", n)
	}
	close(store.release)
	answered := make(map[uint64]bool)
	for range count {
		m := c.readAnswer()
		if m.Code != codes.NotFound || answered[m.Token.Value] {
			t.Fatalf("answer %v", m.Code)
		}
		answered[m.Token.Value] = true
	}
	group.Wait()
}

// TestManyLookups has many clients ask for much at a time, of a store that does not answer: memory
// for the answers is bounded for all of them together, each gets its share, and all is answered.
func TestManyLookups(t *testing.T) {
	store := &held{release: make(chan struct{})}
	_, address := serveConfig(t, "unix", readWrite, coapserver.Config{Source: store.source(t), MaxTotalBytes: 1 << 20})
	ref, _ := sourcetest.NewBlock(eris.BlockSize32KiB)
	const clients, count, share = 8, 100, 256 << 10
	var all [clients]*client
	for i := range all {
		all[i] = dial(t, "unix", address, csm...)
		for token := range uint32(count) {
			all[i].write(getRequest(token, ref, eris.BlockSize32KiB, coap.Block{}))
		}
	}
	under := awaitStill(store.calls.Load, clients*share/int64(eris.BlockSize32KiB)) * int64(eris.BlockSize32KiB)
	if most := int64(1<<20 + clients*(share+eris.BlockSize32KiB)); under > most {
		t.Errorf("%d bytes are being looked up, not from %d to %d", under, clients*share, most)
	}
	close(store.release)
	for _, c := range all {
		for range count {
			c.want(codes.NotFound)
		}
	}
}

// TestSlowReader has clients that ask and do not read: memory is bounded, others are served, and
// the connections end.
func TestSlowReader(t *testing.T) {
	inNetwork(t, func(t *testing.T, network *sourcetest.Network) {
		store := newMemory()
		defer store.Close()
		ref, _ := store.Add(eris.BlockSize32KiB)
		open := serveIn(t, network, coapserver.Config{
			Source:         store,
			MaxBytes:       1 << 20,
			MaxTotalBytes:  2 << 20,
			MessageTimeout: 300 * time.Millisecond,
		})
		var group sync.WaitGroup
		for range 4 {
			c := open(csm...)
			group.Go(func() {
				// The server stops to read, and then closes.
				for c.write(getRequest(1, ref, eris.BlockSize32KiB, coap.Block{})) {
				}
			})
		}
		c := open(csm...)
		for i := range 100 {
			c.write(getRequest(uint32(i), ref, eris.BlockSize32KiB, coap.Block{}))
			if m := c.readAnswer(); m.Code != codes.Content || len(m.Payload) != 32768 {
				t.Fatalf("answer %v", m.Code)
			}
		}
		group.Wait()
	})
}

// TestShutdown checks that what was asked is answered although the server is being shut down, that
// clients are told, and that what comes meanwhile is still served.
func TestShutdown(t *testing.T) {
	store := &held{release: make(chan struct{})}
	server, address := serveConfig(t, "unix", readWrite, coapserver.Config{Source: store.source(t), Sink: store})
	c, idle := dial(t, "unix", address, csm...), dial(t, "unix", address, csm...)
	idle.read()
	c.write(putRequest(1, coap.Block{}, make([]byte, eris.BlockSize1KiB)))
	for store.calls.Load() == 0 {
		pause()
	}
	done := make(chan error)
	go func() { done <- server.Shutdown(context.Background()) }()
	for _, want := range []codes.Code{codes.CSM, codes.Release} {
		if m, _ := c.read(); m.Code != want {
			t.Errorf("message %v, want %v", m.Code, want)
		}
	}
	c.write(putRequest(2, coap.Block{}, make([]byte, eris.BlockSize1KiB)))
	for conn, err := net.Dial("unix", address); err == nil; conn, err = net.Dial("unix", address) {
		conn.Close() // it ends to accept in a moment
	}
	if last := idle.awaitEnd(); last != codes.Release {
		t.Errorf("last message %v", last)
	}
	close(store.release)
	for range 2 {
		c.want(codes.Created)
	}
	c.conn.Close()
	if err := <-done; err != nil {
		t.Errorf("Shutdown: %v", err)
	}
}

// TestClose checks that everything ends although stores wait, and nobody is left behind.
func TestClose(t *testing.T) {
	before := runtime.NumGoroutine()
	store := &held{release: make(chan struct{})}
	for _, shutdown := range []bool{false, true} {
		store.calls.Store(0)
		source := store.source(t)
		server, address := serveConfig(t, "unix", readWrite, coapserver.Config{Source: source, Sink: store})
		ref, _ := sourcetest.NewBlock(eris.BlockSize1KiB)
		c := dial(t, "unix", address, csm...)
		c.write(putRequest(1, coap.Block{}, make([]byte, eris.BlockSize1KiB)))
		c.write(getRequest(2, ref, eris.BlockSize1KiB, coap.Block{}))
		for store.calls.Load() < 2 {
			pause()
		}
		if shutdown {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			if err := server.Shutdown(ctx); err == nil {
				t.Error("Shutdown does not say that it failed")
			}
			cancel()
		} else {
			server.Close()
		}
		c.awaitEnd()
		c.conn.Close()
		source.Close()
	}
	sourcetest.AwaitGoroutines(t, before)
}
