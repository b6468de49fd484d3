// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/blake2b"
)

// sumRoutine is one way to do what sumBlocks does.
type sumRoutine struct {
	name string
	sum  func(sums [][32]byte, blocks [][]byte, secret *ConvergenceSecret)
}

// checkSums compares a routine with the blake2b package, and looks whether it changes its blocks or more than their sums.
func checkSums(t *testing.T, r sumRoutine, blocks [][]byte, secret *ConvergenceSecret) {
	t.Helper()
	kept := make([][]byte, len(blocks))
	for i, block := range blocks {
		kept[i] = bytes.Clone(block)
	}
	guard := [32]byte{0xA5, 31: 0x5A}
	sums := make([][32]byte, len(blocks)+2)
	sums[0], sums[len(blocks)+1] = guard, guard
	r.sum(sums[1:len(blocks)+1], blocks, secret)
	for i, block := range kept {
		var key []byte
		if secret != nil {
			key = secret[:]
		}
		hash, err := blake2b.New256(key)
		if err != nil {
			t.Fatal(err)
		}
		hash.Write(block)
		if want := hash.Sum(nil); !bytes.Equal(sums[1+i][:], want) {
			t.Fatalf("%s, %d blocks of %d bytes, keyed %t: sum %d is %x, want %x",
				r.name, len(blocks), len(block), secret != nil, i, sums[1+i], want)
		}
		if !bytes.Equal(block, blocks[i]) {
			t.Fatalf("%s: changed block %d", r.name, i)
		}
	}
	if sums[0] != guard || sums[len(blocks)+1] != guard {
		t.Fatalf("%s: wrote outside of the sums", r.name)
	}
}

func TestSumRoutines(t *testing.T) {
	random := rand.NewChaCha8([32]byte{2})
	secret := new(ConvergenceSecret)
	random.Read(secret[:])
	for _, r := range sumRoutines() {
		t.Run(r.name, func(t *testing.T) {
			for _, size := range []int{hashChunk, 2 * hashChunk, 3 * hashChunk, int(BlockSize1KiB), int(BlockSize32KiB)} {
				for n := range 21 {
					for _, secret := range []*ConvergenceSecret{nil, {}, secret} {
						arena := make([]byte, n*(size+1))
						blocks := make([][]byte, n)
						for i := range blocks {
							blocks[i] = arena[i*(size+1):][:size:size] // at every alignment in turn
						}
						checkSums(t, r, blocks, secret) // all zero
						random.Read(arena)
						checkSums(t, r, blocks, secret)
						for i := range blocks {
							blocks[i] = blocks[i/2*2%n] // some are the same memory
						}
						checkSums(t, r, blocks, secret)
						if n > 0 {
							for i := range blocks {
								blocks[i] = arena[i:][:size] // and some overlap
							}
							checkSums(t, r, blocks, secret)
						}
					}
				}
			}
		})
	}
}

// The blake2b package is called in two other ways where blocks come one by one.
func TestSumBlocksIsSumAndLeafKey(t *testing.T) {
	block := randomContent(1, int(BlockSize1KiB))
	secret := ConvergenceSecret{1, 2, 3}
	var sums [3][32]byte
	sumBlocks(sums[:], [][]byte{block, block, block}, nil)
	if Reference(sums[2]) != Sum(block) {
		t.Error("differs from Sum")
	}
	sumBlocks(sums[:], [][]byte{block, block, block}, &secret)
	if Key(sums[2]) != NewEncrypter(secret).leafKey(block) {
		t.Error("differs from leafKey")
	}
}

func TestSumBlocksRefusesLengths(t *testing.T) {
	b := make([]byte, 4096)
	for _, r := range sumRoutines() {
		for name, blocks := range map[string][][]byte{
			"empty":        {b[:0], b[:0]},
			"half a chunk": {b[:64], b[:64]},
			"odd":          {b[:1023], b[:1023]},
			"shorter":      {b[:1024], b[:1024], b[:1024], b[:896]},
			"longer":       {b[:1024], b[:2048]},
			"too few":      {b[:1024]},
			"none":         {},
		} {
			t.Run(r.name+"/"+name, func(t *testing.T) {
				defer func() {
					if recover() == nil {
						t.Error("did not panic")
					}
				}()
				r.sum(make([][32]byte, max(2, len(blocks))), blocks, nil)
			})
		}
	}
}

func TestSumBlocksAllocates(t *testing.T) {
	for _, r := range sumRoutines() {
		blocks, sums := make([][]byte, 11), make([][32]byte, 11)
		for i := range blocks {
			blocks[i] = make([]byte, BlockSize1KiB)
		}
		for _, secret := range []*ConvergenceSecret{nil, {}} {
			if secret != nil && !strings.HasPrefix(r.name, "AVX") {
				continue // the blake2b package allocates a keyed hash
			}
			if n := testing.AllocsPerRun(10, func() { r.sum(sums, blocks, secret) }); n != 0 {
				t.Errorf("%s, keyed %t: %v allocations", r.name, secret != nil, n)
			}
		}
	}
}

func FuzzSumBlocks(f *testing.F) {
	f.Add(uint64(0), byte(8), byte(8), false, false, make([]byte, 32), []byte{})
	f.Add(uint64(1), byte(11), byte(8), true, false, bytes.Repeat([]byte{0xff}, 32), []byte("some content"))
	f.Add(uint64(2), byte(3), byte(1), true, true, []byte("secret"), bytes.Repeat([]byte{0xff}, 200))
	f.Add(uint64(3), byte(20), byte(255), false, true, []byte{}, []byte{1})
	f.Fuzz(func(t *testing.T, seed uint64, count, chunks byte, keyed, random bool, secretBytes, content []byte) {
		var secret *ConvergenceSecret
		if keyed {
			secret = new(ConvergenceSecret)
			copy(secret[:], secretBytes)
		}
		n, size := int(count%21), (int(chunks)+1)*hashChunk
		arena := make([]byte, size+n*97)
		if random {
			rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(arena)
		}
		copy(arena[seed%uint64(len(arena)):], content)
		blocks := make([][]byte, n)
		for i := range blocks {
			blocks[i] = arena[97*i:][:size]
		}
		for _, r := range sumRoutines() {
			checkSums(t, r, blocks, secret)
		}
	})
}

// BenchmarkSumBlocks has the blake2b package beside the routines, as "plain".
func BenchmarkSumBlocks(b *testing.B) {
	for _, size := range bothSizes {
		for _, n := range []int{32, 8, 4, 3, 2, 1} {
			content := randomContent(1, n*int(size))
			blocks, sums := make([][]byte, n), make([][32]byte, n)
			for i := range blocks {
				blocks[i] = content[i*int(size):][:size]
			}
			for _, keyed := range []bool{false, true} {
				var secret *ConvergenceSecret
				name := ""
				if keyed {
					if size == BlockSize32KiB {
						continue
					}
					secret, name = new(ConvergenceSecret), "/keyed"
				}
				for _, r := range sumRoutines() {
					b.Run(fmt.Sprintf("%v/blocks=%d%s/%s", size, n, name, r.name), func(b *testing.B) {
						b.SetBytes(int64(len(content)))
						for b.Loop() {
							r.sum(sums, blocks, secret)
						}
					})
				}
			}
		}
	}
}

func TestSumAll(t *testing.T) {
	var blocks [][]byte
	var want []Reference
	for i, n := range []int{1024, 1024, 32768, 0, 5, 1024, 32768, 32768, 32768, 128} {
		blocks = append(blocks, randomContent(byte(i), n))
	}
	for i := range 100 {
		blocks = append(blocks, randomContent(byte(100+i), 1024))
	}
	for _, b := range blocks {
		want = append(want, Sum(b))
	}
	got := make([]Reference, len(blocks))
	for n := range blocks {
		clear(got)
		SumAll(got[:n], blocks[:n])
		if !slices.Equal(got[:n], want[:n]) {
			t.Fatalf("wrong references of %d blocks", n)
		}
	}
}

func TestVerifyAll(t *testing.T) {
	var refs []Reference
	var blocks [][]byte
	for i := range 70 {
		b := randomContent(byte(i), int([]BlockSize{BlockSize1KiB, BlockSize32KiB}[i%3/2]))
		refs, blocks = append(refs, Sum(b)), append(blocks, b)
	}
	if err := VerifyAll(refs, blocks); err != nil {
		t.Error(err)
	}
	for i := range blocks {
		right := blocks[i]
		for _, wrong := range [][]byte{right[:len(right)-1], nil, append(right[:len(right):len(right)], 0), make([]byte, len(right))} {
			blocks[i] = wrong
			err := VerifyAll(refs, blocks)
			var e *BlockError
			if !errors.As(err, &e) || e.Reference != refs[i] || e.Length != len(wrong) {
				t.Errorf("block %d of %d bytes: error %v", i, len(wrong), err)
			}
		}
		blocks[i] = right
	}
	short := []byte("a block of no size")
	if err := VerifyAll([]Reference{Sum(short)}, [][]byte{short}); err == nil {
		t.Error("a block of no size is verified")
	}
}
