// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// benchmarkStore returns a store with blocks of one size, 128 MB of them, and their references.
func benchmarkStore(b *testing.B, size eris.BlockSize, options Options) (*Store, []eris.Reference) {
	b.Helper()
	s := testOpen(b, b.TempDir(), options)
	return s, putMany(b, s, size, 0, 128<<20/int(size))
}

// reader gets blocks as a server does, and does not verify them.
func reader(s *Store, size eris.BlockSize) func(ref eris.Reference) error {
	r := fetch.Request{Size: size, Dst: make([]byte, 0, size), Done: func(*fetch.Request) {}}
	return func(ref eris.Reference) error {
		r.Pair.Reference = ref
		s.Start(&r)
		return r.Err
	}
}

func BenchmarkGet(b *testing.B) {
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		for _, hintBytes := range []int{0, 64} {
			s, refs := benchmarkStore(b, size, Options{hintBytes: hintBytes})
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
					for seed := range readers {
						group.Go(func() {
							random := rand.New(rand.NewPCG(uint64(seed), 1))
							read := reader(s, size)
							for left.Add(-64) > -64 {
								for range 64 {
									if err := read(refs[random.IntN(len(refs))]); err != nil {
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
	read := reader(s, eris.BlockSize1KiB)
	for b.Loop() {
		var ref eris.Reference
		random.Read(ref[:])
		if err := read(ref); err == nil {
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
			for seed := range 8 {
				group.Go(func() {
					random := rand.New(rand.NewPCG(uint64(seed), 1))
					read := reader(s, size)
					for !stop.Load() {
						for range 64 {
							if err := read(refs[random.IntN(len(refs))]); err != nil {
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
