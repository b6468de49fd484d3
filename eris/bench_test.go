// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"bytes"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/blake2lanes"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/chacha20"
)

// alternate measures work and floor in turns, so that both see the same machine, and reports how
// near work comes to floor (1 being equal), and the time per unit that it takes more. The units are
// blocks.
func alternate(b *testing.B, units int, work, floor func()) {
	var working, flooring time.Duration
	for b.Loop() {
		start := time.Now()
		work()
		middle := time.Now()
		floor()
		working += middle.Sub(start)
		flooring += time.Since(middle)
	}
	n := float64(b.N) * float64(units)
	b.ReportMetric(flooring.Seconds()/working.Seconds(), "of-floor")
	b.ReportMetric(float64((working-flooring).Nanoseconds())/n, "ns-over-floor/block")
	b.ReportMetric(n/working.Seconds(), "blocks/s")
	b.ReportMetric(n/flooring.Seconds(), "floor-blocks/s")
	b.ReportMetric(0, "ns/op")
}

// inParallel splits n units among goroutines.
func inParallel(workers, n int, f func(worker, from, to int)) {
	var group sync.WaitGroup
	for i := range workers {
		group.Go(func() { f(i, n*i/workers, n*(i+1)/workers) })
	}
	group.Wait()
}

// useCores limits this benchmark to so many cores.
func useCores(b *testing.B, n int) {
	before := runtime.GOMAXPROCS(n)
	b.Cleanup(func() { runtime.GOMAXPROCS(before) })
}

// withNodes returns how many blocks a tree of so many leaves has: the floors are for all of them.
func withNodes(leaves int, size BlockSize) int {
	return leaves + leaves/(size.Arity()-1)
}

// floorOfEncoding makes n leaves, a batch at a time: two hashes and one encryption each.
func floorOfEncoding(workers, n int, size BlockSize, content []byte) {
	inParallel(workers, n, func(_, from, to int) {
		var keys, references [hashedAtOnce][32]byte
		var plaintexts, blocks [hashedAtOnce][]byte
		for i := range blocks {
			blocks[i] = make([]byte, size)
		}
		for ; from < to; from += hashedAtOnce {
			n := min(hashedAtOnce, to-from)
			for i := range n {
				plaintexts[i] = content[(from+i)%(len(content)/int(size))*int(size):][:size]
			}
			blake2lanes.Sum256(keys[:n], plaintexts[:n], new([32]byte))
			for i := range n {
				chacha20.XORKeyStream(blocks[i], plaintexts[i], &keys[i], 0)
			}
			blake2lanes.Sum256(references[:n], blocks[:n], nil)
		}
	})
}

// The floor is what the cipher and the hash take for so many blocks.
func BenchmarkEncode(b *testing.B) {
	content := randomContent(1, 16<<20)
	for _, size := range bothSizes {
		for _, workers := range []int{1, 2} {
			b.Run(fmt.Sprintf("%v/%d", size, workers), func(b *testing.B) {
				useCores(b, workers)
				n := len(content) / int(size)
				alternate(b, n, func() {
					if _, err := Encode(b.Context(), bytes.NewReader(content), nil, EncodeOptions{BlockSize: size, Workers: workers}); err != nil {
						b.Fatal(err)
					}
				}, func() { floorOfEncoding(workers, withNodes(n, size), size, content) })
			})
		}
	}
}

// BenchmarkEncodeSmall encodes contents of one small block, as trees of many files have them.
func BenchmarkEncodeSmall(b *testing.B) {
	for _, n := range []int{100, 10000} {
		content := randomContent(1, n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Encode(b.Context(), bytes.NewReader(content), nil, EncodeOptions{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
