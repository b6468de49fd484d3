// SPDX-License-Identifier: GPL-3.0-or-later

package content

import (
	"bytes"
	"errors"
	"io"
	"math"
	"slices"
	"sync/atomic"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
)

// forge makes blocks that are right one by one, and trees that no encoder would make.
type forge struct {
	*sourcetest.Backend
	size eris.BlockSize
}

func newForge(size eris.BlockSize) *forge {
	return &forge{sourcetest.NewBackend(), size}
}

// encrypt makes a block of any plaintext; what is missing to a block is zero. Any key will do for a
// leaf; that of a node must be its hash.
func (f *forge) encrypt(level int, key eris.Key, plaintext []byte) eris.Pair {
	block := make([]byte, f.size)
	copy(block, plaintext)
	eris.Decrypt(block, block, key, level) // the cipher is its own inverse
	ref := eris.Sum(block)
	f.Set(ref, block)
	return eris.Pair{Reference: ref, Key: key}
}

// leaf makes a leaf of any plaintext.
func (f *forge) leaf(plaintext []byte) eris.Pair {
	return f.encrypt(0, eris.Key(eris.Sum(plaintext)), plaintext)
}

// full makes n different full leaves.
func (f *forge) full(n int) []eris.Pair {
	var pairs []eris.Pair
	for i := range n {
		pairs = append(pairs, f.leaf(bytes.Repeat([]byte{1, byte(i), byte(i >> 8)}, int(f.size)/3+1)[:f.size]))
	}
	return pairs
}

// last makes a leaf that ends a content.
func (f *forge) last() eris.Pair {
	return f.leaf([]byte("the end\x80"))
}

// plaintext is that of an internal node.
func plaintext(pairs ...eris.Pair) (b []byte) {
	for _, pair := range pairs {
		b = append(append(b, pair.Reference[:]...), pair.Key[:]...)
	}
	return b
}

// node makes an internal node.
func (f *forge) node(level int, pairs ...eris.Pair) eris.Pair {
	return f.raw(level, plaintext(pairs...))
}

// raw makes an internal node of any plaintext.
func (f *forge) raw(level int, plaintext []byte) eris.Pair {
	whole := make([]byte, f.size)
	copy(whole, plaintext)
	return f.encrypt(level, eris.Key(eris.Sum(whole)), whole)
}

// otherKey makes an internal node with a key that is not its hash.
func (f *forge) otherKey(level int, pairs ...eris.Pair) eris.Pair {
	return f.encrypt(level, eris.Key{1, 2, 3}, plaintext(pairs...))
}

func (f *forge) capability(level int, root eris.Pair) eris.ReadCapability {
	return eris.ReadCapability{BlockSize: f.size, Level: level, Root: root.Reference, Key: root.Key}
}

func repeat(pair eris.Pair, n int) []eris.Pair { return slices.Repeat([]eris.Pair{pair}, n) }

// forgeries are trees that must be refused. All of them are made of blocks that are what their
// references say.
func forgeries(f *forge) map[string]eris.ReadCapability {
	key := f.capability(0, f.last())
	key.Key[0]++ // noise; this key's does not happen to end in padding
	two := plaintext(f.full(1)[0], f.last())
	holed := f.full(16)
	holed[5].Reference = eris.Reference{}
	inner := f.node(1, f.full(16)...)
	end := f.node(1, f.last())
	children := repeat(inner, 16)
	good := f.node(2, children...)
	children[7] = f.node(1, f.full(8)...)
	deep := f.node(2, children...)
	return map[string]eris.ReadCapability{
		"leaf without 0x80, all zero":                 f.capability(0, f.leaf(nil)),
		"leaf without padding":                        f.capability(0, f.full(1)[0]),
		"leaf with bytes behind 0x80":                 f.capability(0, f.leaf([]byte{1, 0x80, 0, 0x42})),
		"another key at level 0":                      key,
		"all-zero root":                               f.capability(1, f.raw(1, nil)),
		"root with a single leaf":                     f.capability(1, end),
		"root with a single child":                    f.capability(2, f.node(2, f.node(1, f.full(1)[0], f.last()))),
		"bytes behind the null reference in the root": f.capability(1, f.raw(1, append(append(slices.Clone(two), make([]byte, 100)...), 1))),
		"key beside the null reference in the root":   f.capability(1, f.raw(1, append(append(slices.Clone(two), make([]byte, 32)...), 1))),
		"last leaf without padding":                   f.capability(1, f.node(1, f.full(2)...)),
		"root key is not its hash":                    f.capability(1, f.otherKey(1, f.full(1)[0], f.last())),
		"level one too high":                          f.capability(2, f.node(1, f.full(1)[0], f.last())),
		"level one too low":                           f.capability(1, f.node(2, f.node(1, f.full(2)...), f.last())),
		"level of a leaf":                             f.capability(0, f.node(1, f.full(1)[0], f.last())),
		"leaf where a node is due":                    f.capability(2, f.node(2, f.full(1)[0], f.last())),
		"leaf where a last node is":                   f.capability(2, f.node(2, inner, f.last())),
		"all-zero last node":                          f.capability(2, f.node(2, inner, f.raw(1, nil))),
		"all-zero inner node":                         f.capability(2, f.node(2, f.raw(1, nil), end)),
		"half-full inner node":                        f.capability(2, f.node(2, f.node(1, f.full(8)...), end)),
		"almost full inner node":                      f.capability(2, f.node(2, f.node(1, f.full(15)...), end)),
		"inner key is not its hash":                   f.capability(2, f.node(2, f.otherKey(1, f.full(16)...), end)),
		"last key is not its hash":                    f.capability(2, f.node(2, inner, f.otherKey(1, f.last()))),
		"inner node of the same level":                f.capability(2, f.node(2, f.node(2, f.full(16)...), end)),
		"null reference amid an inner node":           f.capability(2, f.node(2, f.node(1, holed...), end)),
		"half-full node deep inside":                  f.capability(3, f.node(3, good, deep, f.node(2, end))),
		"inner node of one level more, half-full":     f.capability(3, f.node(3, f.node(2, repeat(inner, 8)...), f.node(2, end))),
	}
}

func TestForgeries(t *testing.T) {
	f := newForge(eris.BlockSize1KiB)
	for name, capability := range forgeries(f) {
		t.Run(name, func(t *testing.T) {
			for way, err := range readEveryWay(t, f.Get, capability, 1<<30) {
				if errorKind(err) != "content" || errors.Is(err, ErrTooLarge) {
					t.Errorf("%s: error %v", way, err)
				}
			}
		})
	}
}

// readEveryWay reads a content in all the ways there are, and returns the error of each.
func readEveryWay(t testing.TB, get getFunc, capability eris.ReadCapability, limit int64) map[string]error {
	errs := make(map[string]error)
	source := openImmediate(t, get)
	_, errs["reader"] = readAll(t.Context(), source, capability, limit, fetch.Window{})
	_, errs["narrow"] = readAll(t.Context(), source, capability, limit, fetch.Window{Requests: 1, Bytes: 1})
	errs["sequence"] = readSequence(t.Context(), open(t, get), []Want{{Capability: capability, Limit: limit}}, math.MaxInt64, fetch.Window{}, nil)
	return errs
}

// Trees that look odd but are what an encoder makes.
func TestUnusualTrees(t *testing.T) {
	f := newForge(eris.BlockSize1KiB)
	node := f.node(1, repeat(f.full(1)[0], 16)...)
	for name, capability := range map[string]eris.ReadCapability{
		"single-child nodes on the right": f.capability(2, f.node(2, f.node(1, f.full(16)...), f.node(1, f.leaf([]byte{0x80})))),
		"the same node again and again":   f.capability(3, f.node(3, f.node(2, repeat(node, 16)...), f.node(2, node, node, f.node(1, f.last())))),
	} {
		for way, err := range readEveryWay(t, f.Get, capability, 1<<20) {
			if err != nil {
				t.Errorf("%s, %s: %v", name, way, err)
			}
		}
	}
}

// A bomb is a tree in which all references of a node are equal: as many blocks as it has levels
// describe arity^level times as much. It is refused by its limit, before more of it is fetched than
// the right-most path down to where it is obvious.
func TestBombs(t *testing.T) {
	for _, size := range bothSizes {
		f := newForge(size)
		pair := f.full(1)[0]
		path := f.last()
		for level := 1; level <= greatestLevel(size); level++ {
			// The right-most path must be sound, or the fault would be found there.
			pairs := append(repeat(pair, size.Arity()-1), path)
			pair, path = f.node(level, repeat(pair, size.Arity())...), f.node(level, pairs...)
			capability := f.capability(level, path)
			for _, limit := range []int64{-1, 0, 1000, capacity(size, level-1), least(size, level), 1 << 40, capacity(size, level) - int64(size)} {
				most := int64(1)
				if least(size, level) > limit {
					most = 0
				} else if limit >= capacity(size, level)-int64(size) {
					// Only the last leaf tells that it is a little too much, or it is not.
					continue
				}
				var calls atomic.Int64
				_, err := Open(t.Context(), openImmediate(t, counted(f.Get, &calls)), capability, limit, fetch.Window{Requests: 1})
				if !errors.Is(err, ErrTooLarge) || errorKind(err) != "content" {
					t.Fatalf("%v, level %d, limit %d: error %v", size, level, limit, err)
				}
				if calls.Load() > most {
					t.Errorf("%v, level %d, limit %d: %d blocks were fetched", size, level, limit, calls.Load())
				}
			}
		}
	}
}

// capacity returns the greatest length of content whose root is at the given level: arity^level ×
// size - 1.
func capacity(size eris.BlockSize, level int) int64 {
	if n := least(size, level+1); n < math.MaxInt64 {
		return n - 1
	}
	return math.MaxInt64
}

// greatestLevel returns that of a valid capability.
func greatestLevel(size eris.BlockSize) int {
	level := 0
	for (eris.ReadCapability{BlockSize: size, Level: level + 1}).Validate() == nil {
		level++
	}
	return level
}

// Content of 2^58 or 2^60 bytes is sound, and can be started to be read, and left; its length is
// computed without overflow.
func TestExabytes(t *testing.T) {
	for _, size := range bothSizes {
		level := map[eris.BlockSize]int{eris.BlockSize1KiB: 12, eris.BlockSize32KiB: 5}[size]
		f := newForge(size)
		inner, path := f.full(1)[0], f.last()
		for l := 1; l <= level; l++ {
			inner, path = f.node(l, repeat(inner, size.Arity())...), f.node(l, append(repeat(inner, size.Arity()-1), path)...)
		}
		r, err := Open(t.Context(), open(t, f.Get), f.capability(level, path), math.MaxInt64, fetch.Window{})
		must(t, err)
		if want := capacity(size, level) + 1 - int64(size) + 7; r.Size() != want {
			t.Errorf("%v: size %d, want %d", size, r.Size(), want)
		}
		if _, err := io.ReadFull(r, make([]byte, 1<<20)); err != nil {
			t.Error(err)
		}
		r.Close()

		// At the greatest levels it would be 2^66 bytes or more.
		for l := level + 1; l <= greatestLevel(size); l++ {
			inner, path = f.node(l, repeat(inner, size.Arity())...), f.node(l, append(repeat(inner, size.Arity()-1), path)...)
		}
		if _, err := Open(t.Context(), open(t, f.Get), f.capability(greatestLevel(size), path), math.MaxInt64, fetch.Window{}); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%v, level %d: %v", size, greatestLevel(size), err)
		}
	}
}

// FuzzForgedTrees makes trees by a small program: some are sound, most are not. None may make a
// reader panic, hang, or produce more than its limit; all ways to read must agree; and what can be
// read has the shape that an encoder gives it.
func FuzzForgedTrees(f *testing.F) {
	f.Add([]byte{0, 5, 0, 200}, byte(0), uint32(1<<20))
	f.Add([]byte{1, 1, 0, 9, 2, 2, 1}, byte(1), uint32(1<<20))
	f.Add([]byte{1, 1, 2, 16, 1, 0, 9, 2, 1, 1, 3, 3, 0}, byte(2), uint32(1<<20))
	f.Add([]byte{1, 7, 2, 16, 1, 0, 0, 2, 1, 1, 2, 2, 2}, byte(2), uint32(1<<20))
	f.Add([]byte{1, 7, 2, 16, 1, 4, 3, 0, 0, 2, 1, 1, 2, 2, 2}, byte(2), uint32(1<<20))
	f.Add([]byte{1, 7, 2, 16, 1, 2, 16, 2, 2, 16, 3, 0, 0, 2, 1, 1, 2, 1, 2, 2, 2, 3}, byte(3), uint32(1<<22))
	f.Add([]byte{1, 7, 2, 16, 1, 2, 16, 2, 2, 16, 3, 2, 16, 4, 2, 16, 5}, byte(5), uint32(1<<31))
	f.Fuzz(func(t *testing.T, program []byte, level byte, limit uint32) {
		size := eris.BlockSize1KiB
		tree := newForge(size)
		stack := []eris.Pair{tree.last()}
		next := func() int {
			if len(program) == 0 {
				return 0
			}
			b := program[0]
			program = program[1:]
			return int(b)
		}
		for steps := 0; len(program) > 0 && steps < 200; steps++ {
			top := stack[len(stack)-1]
			switch next() % 6 {
			case 0: // a leaf with padding
				b := bytes.Repeat([]byte{'x'}, next()*4)
				stack = append(stack, tree.leaf(append(b, 0x80)))
			case 1: // a full leaf
				stack = append(stack, tree.leaf(bytes.Repeat([]byte{byte(next()) | 1}, int(size))))
			case 2: // a node of the top n, or of n times the top if there are not so many
				n, l := next()%17, next()%16
				if n <= len(stack) && l > 0 {
					pair := tree.node(l, stack[len(stack)-n:]...)
					stack = append(stack[:len(stack)-n], pair)
				} else if l > 0 {
					stack[len(stack)-1] = tree.node(l, repeat(top, n)...)
				}
			case 3: // spoil a byte of the top's pair
				i := next()
				if i < 32 {
					top.Reference[i]++
				} else {
					top.Key[i%32]++
				}
				stack[len(stack)-1] = top
			case 4: // spoil or remove a block
				block := bytes.Clone(tree.All()[top.Reference])
				if i := next(); i < len(block) && i%5 > 0 {
					block[i]++
				} else if i%2 > 0 {
					block = append(block, 0)
				} else {
					block = nil
				}
				tree.Set(top.Reference, block)
			case 5: // the top again
				stack = append(stack, top)
			}
		}
		capability := tree.capability(int(level), stack[len(stack)-1])
		most := int64(limit % (4 << 20))

		var content []byte
		errs := readEveryWay(t, verified(tree.Get), capability, most)
		content, errs["again"] = readAll(t.Context(), open(t, verified(tree.Get)), capability, most, fetch.Window{Requests: 4})
		for way, err := range errs {
			if (err == nil) != (errs["again"] == nil) {
				t.Fatalf("%s: %v, but again: %v", way, err, errs["again"])
			}
			if kind := errorKind(err); kind == "other" {
				t.Fatalf("%s: error of no kind: %v", way, err)
			}
		}
		if errs["again"] != nil {
			return
		}
		if int64(len(content)) > most {
			t.Fatalf("%d bytes, limit %d", len(content), most)
		}
		if encoded, _ := mustEncode(t, content, eris.EncodeOptions{BlockSize: size}); encoded.Level != capability.Level {
			t.Fatalf("content of %d bytes at level %d, an encoder puts it at %d", len(content), capability.Level, encoded.Level)
		}
	})
}
