// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var bothSizes = []BlockSize{BlockSize1KiB, BlockSize32KiB}

// memory is a store of blocks.
type memory struct {
	mu     sync.Mutex
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
	capability, err := Encode(t.Context(), bytes.NewReader(content), m.Put, options)
	testhelp.Must(t, err)
	return capability, m
}

func checkSameBlocks(t *testing.T, got, want *memory) {
	t.Helper()
	if !maps.EqualFunc(got.blocks, want.blocks, bytes.Equal) {
		t.Errorf("%d blocks, not those of the %d that are expected", len(got.blocks), len(want.blocks))
	}
}
