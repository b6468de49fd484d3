// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync/atomic"
	"testing"
)

// forge makes blocks that are right one by one, and trees that no encoder would make.
type forge struct {
	*memory
	size BlockSize
}

func newForge(size BlockSize) *forge {
	return &forge{newMemory(), size}
}

// leaf makes a leaf of any plaintext; what is missing to a block is zero.
func (f *forge) leaf(plaintext []byte) Pair {
	block := make([]byte, f.size)
	copy(block, plaintext)
	pair := NewEncrypter(ConvergenceSecret{}).EncryptLeaf(block, block)
	f.blocks[pair.Reference] = block
	return pair
}

// full makes n different full leaves.
func (f *forge) full(n int) []Pair {
	var pairs []Pair
	for i := range n {
		pairs = append(pairs, f.leaf(bytes.Repeat([]byte{1, byte(i), byte(i >> 8)}, int(f.size)/3+1)[:f.size]))
	}
	return pairs
}

// last makes a leaf that ends a content.
func (f *forge) last() Pair {
	return f.leaf([]byte("the end\x80"))
}

// node makes an internal node.
func (f *forge) node(level int, pairs ...Pair) Pair {
	var plaintext []byte
	for _, pair := range pairs {
		plaintext = appendPair(plaintext, pair)
	}
	return f.raw(level, plaintext)
}

// raw makes an internal node of any plaintext.
func (f *forge) raw(level int, plaintext []byte) Pair {
	block := make([]byte, f.size)
	copy(block, plaintext)
	pair := EncryptNode(block, block, level)
	f.blocks[pair.Reference] = block
	return pair
}

// otherKey makes an internal node with a key that is not its hash.
func (f *forge) otherKey(level int, pairs ...Pair) Pair {
	var plaintext []byte
	for _, pair := range pairs {
		plaintext = appendPair(plaintext, pair)
	}
	block := make([]byte, f.size)
	copy(block, plaintext)
	pair := encryptWith(Key{1, 2, 3}, block, block, level)
	f.blocks[pair.Reference] = block
	return pair
}

func (f *forge) capability(level int, root Pair) ReadCapability {
	return ReadCapability{f.size, level, root.Reference, root.Key}
}

func repeat(pair Pair, n int) []Pair {
	pairs := make([]Pair, n)
	for i := range pairs {
		pairs[i] = pair
	}
	return pairs
}

// forgeries are trees that must be refused. All of them are made of blocks that are what their references say.
var forgeries = map[string]func(f *forge) ReadCapability{
	"leaf without 0x80, all zero": func(f *forge) ReadCapability { return f.capability(0, f.leaf(nil)) },
	"leaf without padding":        func(f *forge) ReadCapability { return f.capability(0, f.full(1)[0]) },
	"leaf with bytes behind 0x80": func(f *forge) ReadCapability { return f.capability(0, f.leaf([]byte{1, 0x80, 0, 0x42})) },
	"another key at level 0": func(f *forge) ReadCapability {
		c := f.capability(0, f.last())
		c.Key[0]++ // noise; this key's does not happen to end in padding
		return c
	},
	"all-zero root":            func(f *forge) ReadCapability { return f.capability(1, f.raw(1, nil)) },
	"root with a single leaf":  func(f *forge) ReadCapability { return f.capability(1, f.node(1, f.last())) },
	"root with a single child": func(f *forge) ReadCapability { return f.capability(2, f.node(2, f.node(1, f.full(1)[0], f.last()))) },
	"bytes behind the null reference in the root": func(f *forge) ReadCapability {
		plaintext := appendPair(appendPair(nil, f.full(1)[0]), f.last())
		return f.capability(1, f.raw(1, append(append(plaintext, make([]byte, 100)...), 1)))
	},
	"key beside the null reference in the root": func(f *forge) ReadCapability {
		plaintext := appendPair(appendPair(nil, f.full(1)[0]), f.last())
		return f.capability(1, f.raw(1, append(append(plaintext, make([]byte, 32)...), 1)))
	},
	"last leaf without padding": func(f *forge) ReadCapability { return f.capability(1, f.node(1, f.full(2)...)) },
	"root key is not its hash":  func(f *forge) ReadCapability { return f.capability(1, f.otherKey(1, f.full(1)[0], f.last())) },
	"level one too high":        func(f *forge) ReadCapability { return f.capability(2, f.node(1, f.full(1)[0], f.last())) },
	"level one too low":         func(f *forge) ReadCapability { return f.capability(1, f.node(2, f.node(1, f.full(2)...), f.last())) },
	"level of a leaf":           func(f *forge) ReadCapability { return f.capability(0, f.node(1, f.full(1)[0], f.last())) },
	"leaf where a node is due":  func(f *forge) ReadCapability { return f.capability(2, f.node(2, f.full(1)[0], f.last())) },
	"leaf where a last node is": func(f *forge) ReadCapability { return f.capability(2, f.node(2, f.node(1, f.full(16)...), f.last())) },
	"all-zero last node": func(f *forge) ReadCapability {
		return f.capability(2, f.node(2, f.node(1, f.full(16)...), f.raw(1, nil)))
	},
	"all-zero inner node": func(f *forge) ReadCapability { return f.capability(2, f.node(2, f.raw(1, nil), f.node(1, f.last()))) },
	"half-full inner node": func(f *forge) ReadCapability {
		return f.capability(2, f.node(2, f.node(1, f.full(8)...), f.node(1, f.last())))
	},
	"almost full inner node": func(f *forge) ReadCapability {
		return f.capability(2, f.node(2, f.node(1, f.full(15)...), f.node(1, f.last())))
	},
	"inner key is not its hash": func(f *forge) ReadCapability {
		return f.capability(2, f.node(2, f.otherKey(1, f.full(16)...), f.node(1, f.last())))
	},
	"last key is not its hash": func(f *forge) ReadCapability {
		return f.capability(2, f.node(2, f.node(1, f.full(16)...), f.otherKey(1, f.last())))
	},
	"inner node of the same level": func(f *forge) ReadCapability {
		return f.capability(2, f.node(2, f.node(2, f.full(16)...), f.node(1, f.last())))
	},
	"null reference amid an inner node": func(f *forge) ReadCapability {
		pairs := f.full(16)
		pairs[5].Reference = Reference{}
		return f.capability(2, f.node(2, f.node(1, pairs...), f.node(1, f.last())))
	},
	"half-full node deep inside": func(f *forge) ReadCapability {
		good := f.node(2, repeat(f.node(1, f.full(16)...), 16)...)
		children := repeat(f.node(1, f.full(16)...), 16)
		children[7] = f.node(1, f.full(8)...)
		bad := f.node(2, children...)
		return f.capability(3, f.node(3, good, bad, f.node(2, f.node(1, f.last()))))
	},
	"inner node of one level more, half-full": func(f *forge) ReadCapability {
		bad := f.node(2, repeat(f.node(1, f.full(16)...), 8)...)
		return f.capability(3, f.node(3, bad, f.node(2, f.node(1, f.last()))))
	},
}

func TestForgeries(t *testing.T) {
	for name, build := range forgeries {
		t.Run(name, func(t *testing.T) {
			f := newForge(BlockSize1KiB)
			capability := build(f)
			for way, err := range readEveryWay(t.Context(), f, capability, 1<<30) {
				if errorKind(err) != "content" || errors.Is(err, ErrTooLarge) {
					t.Errorf("%s: error %v", way, err)
				}
			}
		})
	}
}

// readEveryWay reads a content in all the ways there are, and returns the error of each.
func readEveryWay(ctx context.Context, blocks Blocks, capability ReadCapability, limit int64) map[string]error {
	errs := make(map[string]error)
	_, errs["reader"] = decodeAll(ctx, blocks, capability, limit, Window{})
	_, errs["narrow"] = decodeAll(ctx, blocks, capability, limit, Window{Requests: 1, Bytes: 1})
	errs["sequence"] = readSequence(ctx, blocks, []Want{{capability, limit}}, math.MaxInt64, Window{}, nil)
	errs["at"] = func() error {
		c, err := Open(ctx, blocks, capability, limit, Window{})
		if err != nil {
			return err
		}
		_, err = c.ReadAt(ctx, make([]byte, c.Size()), 0)
		return err
	}()
	errs["write"] = func() error {
		c, err := Open(ctx, blocks, capability, limit, Window{})
		if err != nil {
			return err
		}
		_, err = c.WriteTo(ctx, io.Discard)
		return err
	}()
	return errs
}

// Trees that look odd but are what an encoder makes.
func TestUnusualTrees(t *testing.T) {
	for name, build := range map[string]func(f *forge) ReadCapability{
		"single-child nodes on the right": func(f *forge) ReadCapability {
			return f.capability(2, f.node(2, f.node(1, f.full(16)...), f.node(1, f.leaf([]byte{0x80}))))
		},
		"the same node again and again": func(f *forge) ReadCapability {
			node := f.node(1, repeat(f.full(1)[0], 16)...)
			return f.capability(3, f.node(3, f.node(2, repeat(node, 16)...), f.node(2, node, node, f.node(1, f.last()))))
		},
	} {
		f := newForge(BlockSize1KiB)
		capability := build(f)
		for way, err := range readEveryWay(t.Context(), f, capability, 1<<20) {
			if err != nil {
				t.Errorf("%s, %s: %v", name, way, err)
			}
		}
	}
}

// counting counts the calls that reach a source.
type counting struct {
	Blocks
	calls atomic.Int64
}

func (c *counting) Get(ctx context.Context, ref Reference, size BlockSize, dst []byte) ([]byte, error) {
	c.calls.Add(1)
	return c.Blocks.Get(ctx, ref, size, dst)
}

// A bomb is a tree in which all references of a node are equal: as many blocks as it has levels describe arity^level times
// as much. It is refused by its limit, before more of it is fetched than the right-most path down to where it is obvious.
func TestBombs(t *testing.T) {
	for _, size := range bothSizes {
		f := newForge(size)
		pair := f.full(1)[0]
		path := f.last()
		for level := 1; level <= size.MaxLevel(); level++ {
			// The right-most path must be sound, or the fault would be found there.
			pairs := append(repeat(pair, size.Arity()-1), path)
			pair, path = f.node(level, repeat(pair, size.Arity())...), f.node(level, pairs...)
			capability := f.capability(level, path)
			for _, limit := range []int64{-1, 0, 1000, size.Capacity(level - 1), size.least(level), 1 << 40, size.Capacity(level) - int64(size)} {
				most := int64(1)
				if size.least(level) > limit {
					most = 0
				} else if limit >= size.Capacity(level)-int64(size) {
					// Only the last leaf tells that it is a little too much, or it is not.
					continue
				}
				source := &counting{Blocks: f}
				_, err := Open(t.Context(), source, capability, limit, Window{})
				if !errors.Is(err, ErrTooLarge) || errorKind(err) != "content" {
					t.Fatalf("%v, level %d, limit %d: error %v", size, level, limit, err)
				}
				if source.calls.Load() > most {
					t.Errorf("%v, level %d, limit %d: %d blocks were fetched", size, level, limit, source.calls.Load())
				}
				err = readSequence(t.Context(), f, []Want{{capability, limit}}, math.MaxInt64, Window{}, nil)
				if !errors.Is(err, ErrTooLarge) {
					t.Errorf("%v, level %d, limit %d: sequence: %v", size, level, limit, err)
				}
			}
		}
	}
}

// Content of 2^58 or 2^60 bytes is sound, and reading at any place of it is possible; its length is computed without overflow.
func TestExabytes(t *testing.T) {
	for _, size := range bothSizes {
		level := map[BlockSize]int{BlockSize1KiB: 12, BlockSize32KiB: 5}[size]
		f := newForge(size)
		inner, path := f.full(1)[0], f.last()
		for l := 1; l <= level; l++ {
			inner, path = f.node(l, repeat(inner, size.Arity())...), f.node(l, append(repeat(inner, size.Arity()-1), path)...)
		}
		c, err := Open(t.Context(), f, f.capability(level, path), math.MaxInt64, Window{})
		if err != nil {
			t.Fatal(err)
		}
		if want := size.Capacity(level) + 1 - int64(size) + 7; c.Size() != want {
			t.Errorf("%v: size %d, want %d", size, c.Size(), want)
		}
		b := make([]byte, 10)
		for _, offset := range []int64{0, 1, 1 << 20, c.Size() / 2, c.Size() - 10} {
			if _, err := c.ReadAt(t.Context(), b, offset); err != nil {
				t.Errorf("%v: at %d: %v", size, offset, err)
			}
		}
		if string(b[3:]) != "the end" {
			t.Errorf("%v: ends in %q", size, b)
		}
		// It can be started to be read, and left.
		r := c.NewReader(t.Context())
		if _, err := io.ReadFull(r, make([]byte, 1<<20)); err != nil {
			t.Error(err)
		}
		r.Close()

		// At the greatest levels it would be 2^66 bytes or more.
		for l := level + 1; l <= size.MaxLevel(); l++ {
			inner, path = f.node(l, repeat(inner, size.Arity())...), f.node(l, append(repeat(inner, size.Arity()-1), path)...)
		}
		if c, err := Open(t.Context(), f, f.capability(size.MaxLevel(), path), math.MaxInt64, Window{}); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%v, level %d: %v, %v", size, size.MaxLevel(), c, err)
		}
	}
}

// FuzzForgedTrees makes trees by a small program: some are sound, most are not. None may make a reader panic, hang, or
// produce more than its limit; all ways to read must agree; and what can be read has the shape that an encoder gives it.
func FuzzForgedTrees(f *testing.F) {
	f.Add([]byte{0, 5, 0, 200}, byte(0), uint32(1<<20))
	f.Add([]byte{1, 1, 0, 9, 2, 2, 1}, byte(1), uint32(1<<20))
	f.Add([]byte{1, 1, 2, 16, 1, 0, 9, 2, 1, 1, 3, 3, 0}, byte(2), uint32(1<<20))
	f.Add([]byte{1, 7, 2, 16, 1, 0, 0, 2, 1, 1, 2, 2, 2}, byte(2), uint32(1<<20))
	f.Add([]byte{1, 7, 2, 16, 1, 4, 3, 0, 0, 2, 1, 1, 2, 2, 2}, byte(2), uint32(1<<20))
	f.Add([]byte{1, 7, 2, 16, 1, 2, 16, 2, 2, 16, 3, 0, 0, 2, 1, 1, 2, 1, 2, 2, 2, 3}, byte(3), uint32(1<<22))
	f.Add([]byte{1, 7, 2, 16, 1, 2, 16, 2, 2, 16, 3, 2, 16, 4, 2, 16, 5}, byte(5), uint32(1<<31))
	f.Fuzz(func(t *testing.T, program []byte, level byte, limit uint32) {
		size := BlockSize1KiB
		tree := newForge(size)
		stack := []Pair{tree.last()}
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
				block := tree.blocks[top.Reference]
				if i := next(); i < len(block) && i%5 > 0 {
					block[i]++
				} else if i%2 > 0 {
					tree.blocks[top.Reference] = append(block, 0)
				} else {
					delete(tree.blocks, top.Reference)
				}
			case 5: // the top again
				stack = append(stack, top)
			}
		}
		capability := tree.capability(int(level), stack[len(stack)-1])
		most := int64(limit % (4 << 20))

		var content []byte
		errs := readEveryWay(t.Context(), tree, capability, most)
		content, errs["again"] = decodeAll(t.Context(), tree, capability, most, Window{Requests: 4})
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
		if encoded, _ := mustEncode(t, content, EncodeOptions{BlockSize: size}); encoded.Level != capability.Level {
			t.Fatalf("content of %d bytes at level %d, an encoder puts it at %d", len(content), capability.Level, encoded.Level)
		}
	})
}

// FuzzDecodeMutated changes blocks of a sound content, so that mostly the source is at fault.
func FuzzDecodeMutated(f *testing.F) {
	f.Add(uint32(5000), uint16(3), uint16(100), byte(1), byte(0))
	f.Add(uint32(300000), uint16(0), uint16(0), byte(255), byte(1))
	f.Add(uint32(20000), uint16(7), uint16(1000), byte(0), byte(2))
	f.Fuzz(func(t *testing.T, length uint32, which, where uint16, change, kind byte) {
		content := randomContent(1, int(length%400_000))
		capability, m := mustEncode(t, content, EncodeOptions{BlockSize: BlockSize1KiB})
		refs := m.sorted()
		ref := refs[int(which)%len(refs)]
		block := m.blocks[ref]
		good := false
		switch kind % 4 {
		case 0:
			block[int(where)%len(block)] ^= change
			good = change == 0
		case 1:
			m.blocks[ref] = block[:int(where)%len(block)]
		case 2:
			m.blocks[ref] = append(block, make([]byte, 1+int(where))...)
		case 3:
			other := m.blocks[refs[int(where)%len(refs)]]
			m.blocks[ref] = other
			good = bytes.Equal(block, other)
		}
		for way, err := range readEveryWay(t.Context(), m, capability, int64(len(content))) {
			var blockError *BlockError
			if good != (err == nil) || err != nil && (!errors.As(err, &blockError) || blockError.Reference != ref) {
				t.Fatalf("%s: error %v for block %v, good: %v", way, err, ref, good)
			}
		}
	})
}

func (m *memory) sorted() []Reference {
	refs := make([]Reference, 0, len(m.blocks))
	for ref := range m.blocks {
		refs = append(refs, ref)
	}
	sortReferences(refs)
	return refs
}

func ExampleOpen() {
	store := newMemory()
	ctx := context.Background()
	capability, err := Encode(ctx, bytes.NewReader([]byte("Hello world!")), store, EncodeOptions{})
	if err != nil {
		panic(err)
	}
	const limit = 1 << 20
	content, err := Open(ctx, store, capability, limit, Window{})
	if err != nil {
		panic(err)
	}
	var b bytes.Buffer
	if _, err := content.WriteTo(ctx, &b); err != nil {
		panic(err)
	}
	fmt.Println(content.Size(), b.String())
	// Output: 12 Hello world!
}
