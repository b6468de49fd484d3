// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/serving"
)

// serveTest starts a block store in a directory of its own, which the test can use for other things
// as well.
func serveTest(t *testing.T, directory string, args ...string) *blockServer {
	t.Helper()
	log := filepath.Join(directory, "log")
	s, err := startBlockServer(directory, log, os.Environ(), append([]string{"--directory=blocks", "--socket=s"}, args...)...)
	if err != nil {
		text, _ := os.ReadFile(log)
		t.Fatalf("%v\n%s", err, text)
	}
	t.Cleanup(s.end)
	return s
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

// TestServeKilled kills a block store again and again while blocks are being put into it. No block
// that it has acknowledged is lost.
func TestServeKilled(t *testing.T) {
	directory := t.TempDir()
	random := rand.New(rand.NewPCG(1, 2))
	acknowledged := map[int]bool{}
	next := 0
	n := kills(t, 5)
	for range n {
		server := serveTest(t, directory)
		store, err := coap.Open(server.urls["UNIX"], coap.Options{})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var (
			group sync.WaitGroup
			mu    sync.Mutex
		)
		killAt := len(acknowledged) + 1 + random.IntN(max(200, 7500/n))
		for range 256 {
			group.Go(func() {
				for {
					mu.Lock()
					i := next
					next++
					mu.Unlock()
					block := noiseBlock(i)
					if err := store.Put(ctx, eris.Sum(block), block); err != nil {
						return
					}
					mu.Lock()
					acknowledged[i] = true
					if len(acknowledged) == killAt {
						server.cmd.Process.Kill()
						cancel() // nobody else will answer
					}
					mu.Unlock()
				}
			})
		}
		group.Wait()
		cancel()
		server.kill()
		store.Close()
	}
	server := serveTest(t, directory)
	store, err := coap.Open(server.urls["UNIX"], coap.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	for i := range acknowledged {
		want := noiseBlock(i)
		got, err := fetch.Get(t.Context(), store, eris.Sum(want), eris.BlockSize(len(want)), nil)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("block %d was acknowledged: %v", i, err)
		}
	}
	if len(acknowledged) < 100 {
		t.Errorf("%d blocks were acknowledged", len(acknowledged))
	}
	if err := server.stop(); err != nil {
		t.Error(err)
	}
}

// TestServeLargeItem has an item encoded into a block store, as fast as that takes it, and decoded
// again: no block is lost. With ERIS_BIG_TESTS the item has 1 GB.
func TestServeLargeItem(t *testing.T) {
	size := int64(48 << 20)
	if os.Getenv("ERIS_BIG_TESTS") != "" {
		size = 1e9
	}
	directory := t.TempDir()
	server := serveTest(t, directory)
	item, copied := filepath.Join(directory, "item"), filepath.Join(directory, "copy")
	f, err := os.Create(item)
	if err != nil {
		t.Fatal(err)
	}
	for chunk := int64(0); size > 0; chunk++ {
		b := noise(uint64(chunk), int(min(size, 4<<20)))
		if _, err := f.Write(b); err != nil {
			t.Fatal(err)
		}
		size -= int64(len(b))
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	command := func(args ...string) []byte {
		t.Helper()
		out, err := exec.Command("guix-substitute-eris", args...).Output()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, exit.Stderr)
		} else if err != nil {
			t.Fatal(err)
		}
		return out
	}
	var result encodeResult
	if err := json.Unmarshal(command("encode", "--json", "--store="+server.urls["UNIX"], item), &result); err != nil {
		t.Fatal(err)
	}
	stats, err := serving.AskStatistics(filepath.Join(directory, "s"))
	if err != nil {
		t.Fatal(err)
	}
	if held := stats.Blocks.Count1KiB + stats.Blocks.Count32KiB; held != result.Blocks || stats.Put.Failed != 0 {
		t.Errorf("%d blocks were put, and the store has %d: %+v", result.Blocks, held, stats)
	}
	command("decode", "--store="+server.urls["UNIX"], result.URN, copied)
	if err := sameFile(item, copied); err != nil {
		t.Error(err)
	}
	if err := server.stop(); err != nil {
		t.Error(err)
	}
}

func sameFile(a, b string) error {
	f, err := os.Open(a)
	if err != nil {
		return err
	}
	defer f.Close()
	g, err := os.Open(b)
	if err != nil {
		return err
	}
	defer g.Close()
	p, q := make([]byte, 1<<20), make([]byte, 1<<20)
	for {
		n, err := io.ReadFull(f, p)
		m, err2 := io.ReadFull(g, q)
		if !bytes.Equal(p[:n], q[:m]) {
			return errors.New("the files differ")
		}
		if err != nil || err2 != nil {
			if n == m && err == err2 && (err == io.EOF || err == io.ErrUnexpectedEOF) {
				return nil
			}
			return errors.Join(err, err2)
		}
	}
}

// TestServeEvicts keeps a block store within its limit, and has it forget what was not used, rather
// than what was.
func TestServeEvicts(t *testing.T) {
	directory := t.TempDir()
	server := serveTest(t, directory, "--max-size=4MiB")
	store, err := coap.Open(server.urls["UNIX"], coap.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	put := func(i int) eris.Reference {
		block := noise(uint64(i), int(eris.BlockSize1KiB))
		ref := eris.Sum(block)
		if err := store.Put(t.Context(), ref, block); err != nil {
			t.Error(err)
		}
		return ref
	}
	first := put(0)
	var (
		next  atomic.Int64
		group sync.WaitGroup
	)
	// A store knows to the second when a block was used. In each second, half of what it holds is
	// replaced: by what is put in the same second, none of what is needed any more has to go.
	for second := 1; second <= 4; second++ {
		for begin := time.Now().Unix(); time.Now().Unix() == begin; {
			time.Sleep(10 * time.Millisecond)
		}
		for range 32 {
			group.Go(func() {
				for {
					// It is in use all the time.
					if _, err := fetch.Get(t.Context(), store, first, eris.BlockSize1KiB, nil); err != nil {
						t.Errorf("after %d blocks: %v", next.Load(), err)
						return
					}
					for range 16 {
						i := int(next.Add(1))
						if i > second*2<<10 {
							return
						}
						put(i)
					}
				}
			})
		}
		group.Wait()
		next.Store(int64(second * 2 << 10))
	}
	stats, err := serving.AskStatistics(filepath.Join(directory, "s"))
	if err != nil {
		t.Fatal(err)
	}
	if stats.Blocks.Bytes > 4<<20 || stats.Blocks.Bytes < 2<<20 || stats.Evicted == 0 || stats.Put.Failed != 0 {
		t.Errorf("%+v", stats)
	}
	if _, err := fetch.Get(t.Context(), store, put(16<<10), eris.BlockSize1KiB, nil); err != nil {
		t.Errorf("the last block: %v", err)
	}
	if err := server.stop(); err != nil {
		t.Error(err)
	}
}

// TestServeLimitsRate checks that bytes come and go no faster than is permitted, over all listeners
// together.
func TestServeLimitsRate(t *testing.T) {
	const rate, blocks = 256 << 10, 16
	server := serveTest(t, t.TempDir(), "--limit-rate=256K/s", "--listen=coap+tcp://127.0.0.1:0?get&put")
	// What may go at once is 32 KiB, and the kernel's buffers have some more on their way.
	least := time.Duration(blocks-4) * time.Duration(eris.BlockSize32KiB) * time.Second / rate
	each := func(what string, f func(store *coap.Store, block []byte) error) {
		t.Helper()
		begin := time.Now()
		var group sync.WaitGroup
		for i, kind := range []string{"UNIX", "TCP"} {
			store, err := coap.Open(server.urls[kind], coap.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer store.Close()
			for j := range blocks / 2 {
				group.Go(func() {
					if err := f(store, noise(uint64(i*blocks+j), int(eris.BlockSize32KiB))); err != nil {
						t.Errorf("%s: %v", what, err)
					}
				})
			}
		}
		group.Wait()
		if took := time.Since(begin); took < least {
			t.Errorf("%s: took %v, and must take %v at least", what, took, least)
		}
	}
	each("putting", func(store *coap.Store, block []byte) error {
		return store.Put(t.Context(), eris.Sum(block), block)
	})
	each("getting", func(store *coap.Store, block []byte) error {
		_, err := fetch.Get(t.Context(), store, eris.Sum(block), eris.BlockSize32KiB, nil)
		return err
	})
}

// TestServeStops stops a block store while clients put as fast as they can, and others hold
// connections on which they say nothing, or not all. It ends in good order, and has what it has
// acknowledged.
func TestServeStops(t *testing.T) {
	directory := t.TempDir()
	server := serveTest(t, directory, "--listen=coap+tcp://127.0.0.1:0", "--listen=http://127.0.0.1:0", "--listen=coap+ws://127.0.0.1:0")
	for _, kind := range []string{"TCP", "HTTP", "WS"} {
		_, address, _ := strings.Cut(server.urls[kind], "://")
		for _, text := range []string{"", "G", "GET / HTTP/1.1\r\nHost: x\r\n", "\x00\xe1\xe1\x7f"} {
			conn, err := net.Dial("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := io.WriteString(conn, text); err != nil {
				t.Fatal(err)
			}
		}
	}
	store, err := coap.Open(server.urls["UNIX"], coap.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var (
		next, count  atomic.Int64
		acknowledged sync.Map
		group        sync.WaitGroup
	)
	enough := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range 64 {
		group.Go(func() {
			for {
				i := int(next.Add(1))
				block := noiseBlock(i)
				if err := store.Put(ctx, eris.Sum(block), block); err != nil {
					return
				}
				acknowledged.Store(i, true)
				if count.Add(1) == 200 {
					close(enough)
				}
			}
		})
	}
	<-enough
	if err := server.stop(); err != nil {
		t.Error(err)
	}
	cancel()
	group.Wait()
	store.Close()

	server = serveTest(t, directory)
	if store, err = coap.Open(server.urls["UNIX"], coap.Options{}); err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	acknowledged.Range(func(i, _ any) bool {
		want := noiseBlock(i.(int))
		if _, err := fetch.Get(t.Context(), store, eris.Sum(want), eris.BlockSize(len(want)), nil); err != nil {
			t.Errorf("block %d was acknowledged: %v", i, err)
		}
		return true
	})
}
