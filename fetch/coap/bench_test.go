// SPDX-License-Identifier: GPL-3.0-or-later

package coap_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
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

// processorTime returns how much time of all processors the process has used. Unlike time on the wall, it does not depend much on
// what else goes on.
func processorTime() time.Duration {
	var usage syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &usage)
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// BenchmarkGet gets blocks through one Unix socket, client and server in one process.
func BenchmarkGet(b *testing.B) {
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		store := newMemory()
		var refs []eris.Reference
		for range 256 {
			refs = append(refs, store.add(b, size))
		}
		for _, verified := range []bool{false, true} {
			for _, window := range []int{1, 16, 256, 4096} {
				name := fmt.Sprintf("%v/verified=%v/window=%d", size, verified, window)
				b.Run(name, func(b *testing.B) {
					server, err := coapserver.New(coapserver.Config{Resources: []coapserver.Resource{{Blocks: store}}})
					if err != nil {
						b.Fatal(err)
					}
					socket := filepath.Join(b.TempDir(), "s")
					listener, err := net.Listen("unix", socket)
					if err != nil {
						b.Fatal(err)
					}
					go server.Serve(listener, coapserver.Access{Get: true})
					defer server.Close()
					client, err := coap.Open("coap+unix://"+socket, coap.Options{Unverified: !verified})
					if err != nil {
						b.Fatal(err)
					}
					defer client.Close()
					b.SetBytes(int64(size))
					b.ReportAllocs()
					var next atomic.Int64
					var group sync.WaitGroup
					b.ResetTimer()
					before := processorTime()
					for range window {
						group.Go(func() {
							dst := make([]byte, 0, size)
							for {
								i := next.Add(1)
								if i > int64(b.N) {
									return
								}
								if _, err := client.Get(b.Context(), refs[i%int64(len(refs))], size, dst); err != nil {
									b.Error(err)
									return
								}
							}
						})
					}
					group.Wait()
					b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "blocks/s")
					b.ReportMetric(float64(processorTime()-before)/float64(b.N), "cpu-ns/op")
				})
			}
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		b.Run(size.String(), func(b *testing.B) {
			b.SetBytes(int64(size))
			before := processorTime()
			b.RunParallel(func(pb *testing.PB) {
				block := make([]byte, size)
				ref := eris.Sum(block)
				for pb.Next() {
					if err := eris.Verify(ref, block); err != nil {
						b.Error(err)
					}
				}
			})
			b.ReportMetric(float64(processorTime()-before)/float64(b.N), "cpu-ns/op")
		})
	}
}
