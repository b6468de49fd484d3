// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"bytes"
	"fmt"
	"io"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/blake2b"
)

var bothSizes = []BlockSize{BlockSize1KiB, BlockSize32KiB}

func BenchmarkBLAKE2b(b *testing.B) {
	for _, size := range bothSizes {
		block := make([]byte, size)
		b.Run(size.String(), func(b *testing.B) {
			b.SetBytes(int64(size))
			for b.Loop() {
				blake2b.Sum256(block)
			}
		})
		b.Run(size.String()+"/keyed", func(b *testing.B) {
			b.SetBytes(int64(size))
			b.ReportAllocs()
			e := NewEncrypter(ConvergenceSecret{})
			for b.Loop() {
				e.leafKey(block)
			}
		})
	}
}

func BenchmarkChaCha20(b *testing.B) {
	key := new(Key)
	routines := append(xorRoutines(), xorRoutine{"plain", xorKeyStreamPlain})
	for _, size := range bothSizes {
		block := make([]byte, size)
		for _, r := range routines {
			b.Run(size.String()+"/"+r.name, func(b *testing.B) {
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					r.xor(block, block, key, 0)
				}
			})
		}
	}
}

func BenchmarkBlock(b *testing.B) {
	for _, size := range bothSizes {
		plaintext, block := make([]byte, size), make([]byte, size)
		e := NewEncrypter(ConvergenceSecret{})
		pair := e.EncryptLeaf(block, plaintext)
		b.Run(size.String()+"/encrypt", func(b *testing.B) {
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				e.EncryptLeaf(block, plaintext)
			}
		})
		b.Run(size.String()+"/decrypt", func(b *testing.B) {
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				if err := Verify(pair.Reference, block); err != nil {
					b.Fatal(err)
				}
				Decrypt(plaintext, block, pair.Key, 0)
			}
		})
	}
}

// alternate measures work and floor in turns, so that both see the same machine, and reports how near work comes to floor
// (1 being equal), and the time per unit that it takes more. The units are blocks.
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
			sumBlocks(keys[:n], plaintexts[:n], &ConvergenceSecret{})
			for i := range n {
				xorKeyStream(blocks[i], plaintexts[i], (*Key)(&keys[i]), 0)
			}
			sumBlocks(references[:n], blocks[:n], nil)
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

func BenchmarkEncoder(b *testing.B) {
	content := randomContent(1, 4<<20)
	for _, size := range bothSizes {
		b.Run(size.String(), func(b *testing.B) {
			b.SetBytes(int64(len(content)))
			for b.Loop() {
				e, _ := NewEncoder(b.Context(), nil, size, ConvergenceSecret{})
				e.Write(content)
				if _, err := e.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
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

// floorOfDecoding verifies and decrypts n blocks: one hash and one decryption each.
func floorOfDecoding(workers, n int, size BlockSize, pairs []Pair, blocks [][]byte) {
	inParallel(workers, n, func(_, from, to int) {
		plaintext := make([]byte, size)
		for i := from; i < to; i++ {
			i := i % len(pairs)
			if verifySize(pairs[i].Reference, blocks[i], size) != nil {
				panic("bad block")
			}
			Decrypt(plaintext, blocks[i], pairs[i].Key, 0)
		}
	})
}

// leavesOf returns the pairs and blocks of the leaves of a content.
func leavesOf(b *testing.B, content []byte, size BlockSize, m *memory) (pairs []Pair, blocks [][]byte) {
	e, buffer := NewEncrypter(ConvergenceSecret{}), make([]byte, size)
	for i := 0; i+int(size) <= len(content); i += int(size) {
		pair := e.EncryptLeaf(buffer, content[i:][:size])
		pairs, blocks = append(pairs, pair), append(blocks, m.blocks[pair.Reference])
	}
	return pairs, blocks
}

// The floor is what the cipher and the hash take for so many blocks. The source is a map in memory.
func BenchmarkDecode(b *testing.B) {
	for _, size := range bothSizes {
		content := randomContent(1, 16<<20)
		if size == BlockSize32KiB {
			content = randomContent(1, 64<<20)
		}
		capability, m := mustEncode(b, content, EncodeOptions{BlockSize: size})
		pairs, blocks := leavesOf(b, content, size, m)
		for _, cores := range []int{1, 2} {
			for _, requests := range []int{cores, 256} {
				b.Run(fmt.Sprintf("%v/cores=%d/requests=%d", size, cores, requests), func(b *testing.B) {
					useCores(b, cores)
					alternate(b, len(pairs), func() {
						c, err := Open(b.Context(), m, capability, int64(len(content)), Window{Requests: requests})
						if err != nil {
							b.Fatal(err)
						}
						if _, err := c.WriteTo(b.Context(), io.Discard); err != nil {
							b.Fatal(err)
						}
					}, func() { floorOfDecoding(cores, withNodes(len(pairs), size), size, pairs, blocks) })
				})
			}
		}
	}
}

// BenchmarkSequence reads ten thousand contents of one small block each.
func BenchmarkSequence(b *testing.B) {
	const contents = 10000
	all := newMemory()
	var wants []Want
	var pairs []Pair
	var blocks [][]byte
	for i := range contents {
		capability, m := mustEncode(b, fmt.Appendf(nil, "content %d", i), EncodeOptions{})
		all.add(m)
		wants = append(wants, Want{capability, 100})
		pairs = append(pairs, Pair{capability.Root, capability.Key})
		blocks = append(blocks, m.blocks[capability.Root])
	}
	for _, cores := range []int{1, 2} {
		b.Run(fmt.Sprintf("cores=%d", cores), func(b *testing.B) {
			useCores(b, cores)
			alternate(b, contents, func() {
				if err := readSequence(b.Context(), all, wants, 1<<30, Window{}, nil); err != nil {
					b.Fatal(err)
				}
			}, func() { floorOfDecoding(cores, contents, BlockSize1KiB, pairs, blocks) })
		})
	}
}
