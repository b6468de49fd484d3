// SPDX-License-Identifier: GPL-3.0-or-later

package lanes

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"golang.org/x/crypto/blake2b"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// withRoutines has every routine that this processor can run do the work, not only the one that it
// would choose.
func withRoutines(f func(name string)) {
	avx2, avx512 := useAVX2, useAVX512
	defer func() { useAVX2, useAVX512 = avx2, avx512 }()
	f("chosen")
	useAVX512 = false
	f("at most AVX2")
	useAVX2 = false
	f("plain")
}

// checkSums compares a routine with the blake2b package, and looks whether it changes its blocks or
// more than their sums.
func checkSums(t *testing.T, name string, blocks [][]byte, key *[32]byte) {
	t.Helper()
	kept := make([][]byte, len(blocks))
	for i, block := range blocks {
		kept[i] = bytes.Clone(block)
	}
	guard := [32]byte{0xA5, 31: 0x5A}
	sums := make([][32]byte, len(blocks)+2)
	sums[0], sums[len(blocks)+1] = guard, guard
	Sum256(sums[1:len(blocks)+1], blocks, key)
	for i, block := range kept {
		var k []byte
		if key != nil {
			k = key[:]
		}
		hash, err := blake2b.New256(k)
		testhelp.Must(t, err)
		hash.Write(block)
		if want := hash.Sum(nil); !bytes.Equal(sums[1+i][:], want) {
			t.Fatalf("%s, %d blocks of %d bytes, keyed %t: sum %d is %x, want %x",
				name, len(blocks), len(block), key != nil, i, sums[1+i], want)
		}
		if !bytes.Equal(block, blocks[i]) {
			t.Fatalf("%s: changed block %d", name, i)
		}
	}
	if sums[0] != guard || sums[len(blocks)+1] != guard {
		t.Fatalf("%s: wrote outside of the sums", name)
	}
}

func TestSumRoutines(t *testing.T) {
	random := rand.NewChaCha8([32]byte{2})
	key := new([32]byte)
	random.Read(key[:])
	withRoutines(func(name string) {
		t.Run(name, func(t *testing.T) {
			for _, size := range []int{chunk, 2 * chunk, 3 * chunk, 1 << 10, 32 << 10} {
				for n := range 21 {
					for _, key := range []*[32]byte{nil, {}, key} {
						arena := make([]byte, n*(size+1))
						blocks := make([][]byte, n)
						for i := range blocks {
							blocks[i] = arena[i*(size+1):][:size:size] // at every alignment in turn
						}
						checkSums(t, name, blocks, key) // all zero
						random.Read(arena)
						checkSums(t, name, blocks, key)
						for i := range blocks {
							blocks[i] = blocks[i/2*2%n] // some are the same memory
						}
						checkSums(t, name, blocks, key)
						if n > 0 {
							for i := range blocks {
								blocks[i] = arena[i:][:size] // and some overlap
							}
							checkSums(t, name, blocks, key)
						}
					}
				}
			}
		})
	})
}

func TestSum256RefusesLengths(t *testing.T) {
	b := make([]byte, 4096)
	for name, messages := range map[string][][]byte{
		"empty":        {b[:0], b[:0]},
		"half a chunk": {b[:64], b[:64]},
		"odd":          {b[:1023], b[:1023]},
		"shorter":      {b[:1024], b[:1024], b[:1024], b[:896]},
		"longer":       {b[:1024], b[:2048]},
		"too few":      {b[:1024]},
		"none":         {},
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("did not panic")
				}
			}()
			Sum256(make([][32]byte, max(2, len(messages))), messages, nil)
		})
	}
}

func TestSum256Allocates(t *testing.T) {
	withRoutines(func(name string) {
		blocks, sums := make([][]byte, 11), make([][32]byte, 11)
		for i := range blocks {
			blocks[i] = make([]byte, 1024)
		}
		for _, key := range []*[32]byte{nil, {}} {
			if key != nil && !useAVX2 {
				continue // the blake2b package allocates a keyed hash
			}
			if n := testing.AllocsPerRun(10, func() { Sum256(sums, blocks, key) }); n != 0 {
				t.Errorf("%s, keyed %t: %v allocations", name, key != nil, n)
			}
		}
	})
}

// BenchmarkSum256 has the blake2b package beside the routines, as "plain".
func BenchmarkSum256(b *testing.B) {
	for _, size := range []int{1 << 10, 32 << 10} {
		for _, n := range []int{32, 8, 4, 2, 1} {
			content := make([]byte, n*size)
			blocks, sums := make([][]byte, n), make([][32]byte, n)
			for i := range blocks {
				blocks[i] = content[i*size:][:size]
			}
			withRoutines(func(name string) {
				b.Run(fmt.Sprintf("%d/blocks=%d/%s", size, n, name), func(b *testing.B) {
					b.SetBytes(int64(len(content)))
					for b.Loop() {
						Sum256(sums, blocks, nil)
					}
				})
			})
		}
	}
}
