// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"golang.org/x/crypto/blake2b"
	"golang.org/x/crypto/chacha20"
)

// memory is a store of blocks.
type memory struct {
	mu     sync.RWMutex
	blocks map[Reference][]byte
	puts   int
}

func newMemory() *memory {
	return &memory{blocks: make(map[Reference][]byte)}
}

func (m *memory) Put(_ context.Context, ref Reference, block []byte) error {
	if Sum(block) != ref {
		return fmt.Errorf("block with a wrong reference")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.puts++
	if _, ok := m.blocks[ref]; !ok {
		m.blocks[ref] = bytes.Clone(block)
	}
	return nil
}

func (m *memory) Get(_ context.Context, ref Reference, _ BlockSize, _ []byte) ([]byte, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	block, ok := m.blocks[ref]
	if !ok {
		return nil, fmt.Errorf("memory: %w", ErrNotFound)
	}
	return block, nil
}

// add puts all blocks of another store.
func (m *memory) add(other *memory) {
	maps.Copy(m.blocks, other.blocks)
}

// blocksFunc makes a Blocks of a function.
type blocksFunc func(ctx context.Context, ref Reference, size BlockSize, dst []byte) ([]byte, error)

func (f blocksFunc) Get(ctx context.Context, ref Reference, size BlockSize, dst []byte) ([]byte, error) {
	return f(ctx, ref, size, dst)
}

// randomContent returns bytes that depend on the seed only.
func randomContent(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// mustEncode encodes content into a store of its own.
func mustEncode(t testing.TB, content []byte, options EncodeOptions) (ReadCapability, *memory) {
	t.Helper()
	m := newMemory()
	capability, err := Encode(t.Context(), bytes.NewReader(content), m, options)
	if err != nil {
		t.Fatal(err)
	}
	return capability, m
}

// decodeAll reads a whole content, in order, with Read.
func decodeAll(ctx context.Context, blocks Blocks, capability ReadCapability, limit int64, window Window) ([]byte, error) {
	c, err := Open(ctx, blocks, capability, limit, window)
	if err != nil {
		return nil, err
	}
	r := c.NewReader(ctx)
	defer r.Close()
	b, err := io.ReadAll(r)
	if err == nil && int64(len(b)) != c.Size() {
		err = fmt.Errorf("read %d bytes of a content of %d", len(b), c.Size())
	}
	return b, err
}

// keyStreamReader reads the contents of the large known answers: a ChaCha20 key stream whose key is the hash of a name.
func keyStreamReader(name string, n int64) io.Reader {
	key := blake2b.Sum256([]byte(name))
	cipher, err := chacha20.NewUnauthenticatedCipher(key[:], make([]byte, chacha20.NonceSize))
	if err != nil {
		panic(err)
	}
	return io.LimitReader(zerosThrough{cipher}, n)
}

type zerosThrough struct{ cipher *chacha20.Cipher }

func (z zerosThrough) Read(p []byte) (int, error) {
	clear(p)
	z.cipher.XORKeyStream(p, p)
	return len(p), nil
}

// readSequence reads all contents of a sequence, and calls each with the content's index and bytes if it is not nil.
func readSequence(ctx context.Context, blocks Blocks, wants []Want, total int64, window Window, each func(info ContentInfo, content []byte)) error {
	s := NewSequence(ctx, blocks, slices.Values(wants), total, window)
	defer s.Close()
	var content []byte
	for {
		info, err := s.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		content = content[:0]
		n := int64(0)
		for {
			leaf, err := s.Leaf()
			if err == io.EOF {
				break
			}
			if err != nil {
				return err
			}
			if n += int64(len(leaf.Bytes)); n > info.Size {
				return fmt.Errorf("content %d is longer than its size of %d", info.Index, info.Size)
			}
			if each != nil {
				content = append(content, leaf.Bytes...)
			}
			leaf.Release()
		}
		if n != info.Size {
			return fmt.Errorf("content %d has %d bytes instead of %d", info.Index, n, info.Size)
		}
		if each != nil {
			each(info, content)
		}
	}
}

func sortReferences(refs []Reference) {
	slices.SortFunc(refs, func(a, b Reference) int { return bytes.Compare(a[:], b[:]) })
}
