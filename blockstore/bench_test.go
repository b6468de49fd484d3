// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// benchmarkStore returns a store with blocks of one size, 128 MB of them, and their references.
func benchmarkStore(b *testing.B, size eris.BlockSize, options Options) (*Store, []eris.Reference) {
	b.Helper()
	s := testOpen(b, b.TempDir(), options)
	refs := make([]eris.Reference, 128<<20/int(size))
	p := s.Pipeline(false)
	for i := range refs {
		ref, block := testBlock(i, size)
		if err := p.Put(b.Context(), ref, block); err != nil {
			b.Fatal(err)
		}
		refs[i] = ref
	}
	if err := p.Wait(); err != nil {
		b.Fatal(err)
	}
	return s, refs
}

func BenchmarkGet(b *testing.B) {
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		for _, hintBytes := range []int{0, 64} {
			s, refs := benchmarkStore(b, size, Options{HintBytes: hintBytes})
			for _, readers := range []int{1, 8} {
				name := fmt.Sprintf("size=%v/readers=%d", size, readers)
				if hintBytes != 0 {
					name += "/without hints"
				}
				b.Run(name, func(b *testing.B) {
					b.SetBytes(int64(size))
					b.ReportAllocs()
					var left atomic.Int64
					left.Store(int64(b.N))
					var group sync.WaitGroup
					for reader := range readers {
						group.Go(func() {
							random := rand.New(rand.NewPCG(uint64(reader), 1))
							dst := make([]byte, 0, size)
							for left.Add(-64) > -64 {
								for range 64 {
									if _, err := s.Get(b.Context(), refs[random.IntN(len(refs))], size, dst); err != nil {
										b.Error(err)
										return
									}
								}
							}
						})
					}
					group.Wait()
				})
			}
		}
	}
}

func BenchmarkMiss(b *testing.B) {
	s, _ := benchmarkStore(b, eris.BlockSize1KiB, Options{})
	random := rand.NewChaCha8([32]byte{1})
	for b.Loop() {
		var ref eris.Reference
		random.Read(ref[:])
		if _, err := s.Get(b.Context(), ref, eris.BlockSize1KiB, nil); err == nil {
			b.Fatal("found what is not there")
		}
	}
}

func BenchmarkPut(b *testing.B) {
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		for _, batch := range []int{1, 16, 256, 2048} {
			b.Run(fmt.Sprintf("size=%v/batch=%d", size, batch), func(b *testing.B) {
				s := testOpen(b, b.TempDir(), Options{MaxBytes: 4 << 30})
				b.SetBytes(int64(batch) * int64(size))
				refs, blocks := make([]eris.Reference, batch), make([][]byte, batch)
				n := 0
				for b.Loop() {
					b.StopTimer()
					for i := range batch {
						refs[i], blocks[i] = testBlock(n, size)
						n++
					}
					b.StartTimer()
					if err := s.PutBatch(b.Context(), refs, blocks); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkEvict puts blocks into a store that is full.
func BenchmarkEvict(b *testing.B) {
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		b.Run(fmt.Sprintf("size=%v", size), func(b *testing.B) {
			s, _ := benchmarkStore(b, size, Options{MaxBytes: 128 << 20})
			const batch = 256
			b.SetBytes(batch * int64(size))
			refs, blocks := make([]eris.Reference, batch), make([][]byte, batch)
			n := 1 << 30
			for b.Loop() {
				b.StopTimer()
				for i := range batch {
					refs[i], blocks[i] = testBlock(n, size)
					n++
				}
				b.StartTimer()
				if err := s.PutBatch(b.Context(), refs, blocks); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkMixed puts blocks while 8 goroutines do nothing but read.
func BenchmarkMixed(b *testing.B) {
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		b.Run(fmt.Sprintf("size=%v", size), func(b *testing.B) {
			s, refs := benchmarkStore(b, size, Options{})
			const batch = 64
			b.SetBytes(batch * int64(size))
			var stop atomic.Bool
			var reads atomic.Int64
			var group sync.WaitGroup
			for reader := range 8 {
				group.Go(func() {
					random := rand.New(rand.NewPCG(uint64(reader), 1))
					dst := make([]byte, 0, size)
					for !stop.Load() {
						for range 64 {
							if _, err := s.Get(b.Context(), refs[random.IntN(len(refs))], size, dst); err != nil {
								b.Error(err)
								return
							}
						}
						reads.Add(64)
					}
				})
			}
			batchRefs, blocks := make([]eris.Reference, batch), make([][]byte, batch)
			n := 1 << 30
			for b.Loop() {
				for i := range batch {
					batchRefs[i], blocks[i] = testBlock(n, size)
					n++
				}
				if err := s.PutBatch(b.Context(), batchRefs, blocks); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(reads.Load())/b.Elapsed().Seconds(), "reads/s")
			stop.Store(true)
			group.Wait()
		})
	}
}
