// SPDX-License-Identifier: GPL-3.0-or-later

package coap_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"sync"
	"syscall"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
)

// memory is a store in memory.
type memory struct {
	mu     sync.RWMutex
	blocks map[eris.Reference][]byte
}

func newMemory() *memory { return &memory{blocks: make(map[eris.Reference][]byte)} }

func (m *memory) Get(_ context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	m.mu.RLock()
	block, ok := m.blocks[ref]
	m.mu.RUnlock()
	if !ok || len(block) != int(size) {
		return nil, eris.ErrNotFound
	}
	return block, nil
}

// Start implements [fetch.Source]; like a database, it answers before it returns.
func (m *memory) Start(r *fetch.Request) {
	r.Block, r.Err = m.Get(context.Background(), r.Pair.Reference, r.Size, r.Dst)
	r.Done(r)
}

func (m *memory) Cancel(*fetch.Request) {}
func (m *memory) String() string        { return "memory:" }
func (m *memory) Close() error          { return nil }

func (m *memory) Put(_ context.Context, ref eris.Reference, block []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.blocks[ref]; !ok {
		m.blocks[ref] = append([]byte(nil), block...)
	}
	return nil
}

func (m *memory) add(tb testing.TB, size eris.BlockSize) eris.Reference {
	block := make([]byte, size)
	rand.Read(block)
	ref := eris.Sum(block)
	m.Put(context.Background(), ref, block)
	return ref
}

// processorTime returns how much time of all processors the process has used. Unlike time on the
// wall, it does not depend much on what else goes on.
func processorTime() time.Duration {
	var usage syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &usage)
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// BenchmarkGet gets blocks through one connection, client and server in one process, without
// verification.
func BenchmarkGet(b *testing.B) {
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		store := newMemory()
		var refs []eris.Reference
		for range 256 {
			refs = append(refs, store.add(b, size))
		}
		for _, v := range []struct {
			network string
			window  int
		}{{"unix", 1}, {"unix", 16}, {"unix", 256}, {"unix", 4096}, {"tcp", 256}, {"ws", 256}, {"udp", 16}} {
			b.Run(fmt.Sprintf("%v/%s/window=%d", size, v.network, v.window), func(b *testing.B) {
				client := mustOpen(b, startServer(b, v.network, store, readWrite).url(""), coap.Options{})
				defer client.Close()
				b.SetBytes(int64(size))
				b.ReportAllocs()
				done := make(chan *fetch.Request, v.window)
				before := processorTime()
				b.ResetTimer()
				for i := range b.N {
					var r *fetch.Request
					if i < v.window {
						r = &fetch.Request{Size: size, Dst: make([]byte, 0, size), Done: func(r *fetch.Request) { done <- r }}
					} else if r = <-done; r.Err != nil {
						b.Fatal(r.Err)
					}
					r.Pair.Reference = refs[i%len(refs)]
					client.Start(r)
				}
				for range min(b.N, v.window) {
					<-done
				}
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "blocks/s")
				b.ReportMetric(float64(processorTime()-before)/float64(b.N), "cpu-ns/op")
			})
		}
	}
}
