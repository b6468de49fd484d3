// SPDX-License-Identifier: GPL-3.0-or-later

package sourcetest

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// Backend is a store in memory that misbehaves on command. The server of the transport under test
// serves it: its Get and Put are what a server needs. It is safe for concurrent use.
type Backend struct {
	mu      sync.Mutex
	blocks  map[eris.Reference][]byte
	held    chan struct{} // closed when calls may go on
	err     error
	waiting atomic.Int64 // calls that are held
	ever    atomic.Int64 // calls that have been held
}

// NewBackend returns an empty Backend that behaves.
func NewBackend() *Backend { return &Backend{blocks: make(map[eris.Reference][]byte)} }

// Get is what [fetch.NewWorkers] calls. It returns whatever was set for the reference, of whatever
// size.
func (b *Backend) Get(ctx context.Context, ref eris.Reference, _ eris.BlockSize, _ []byte) ([]byte, error) {
	if err := b.wait(ctx); err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	block, ok := b.blocks[ref]
	if !ok {
		return nil, eris.ErrNotFound
	}
	return block, nil
}

// Put stores a copy of the block.
func (b *Backend) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	if err := b.wait(ctx); err != nil {
		return err
	}
	if len(block) == 0 {
		return errors.New("no block")
	}
	b.Set(ref, bytes.Clone(block))
	return nil
}

// PutBatch puts several blocks.
func (b *Backend) PutBatch(ctx context.Context, refs []eris.Reference, blocks [][]byte) error {
	for i, ref := range refs {
		if err := b.Put(ctx, ref, blocks[i]); err != nil {
			return err
		}
	}
	return nil
}

// wait waits while calls are held, and returns the error that calls shall return.
func (b *Backend) wait(ctx context.Context) error {
	b.mu.Lock()
	held, err := b.held, b.err
	b.mu.Unlock()
	if held == nil {
		return err
	}
	b.ever.Add(1)
	b.waiting.Add(1)
	defer b.waiting.Add(-1)
	select {
	case <-held:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Set makes the backend answer any bytes to a reference.
func (b *Backend) Set(ref eris.Reference, block []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.blocks[ref] = block
}

// Add makes the backend have a new block.
func (b *Backend) Add(size eris.BlockSize) (eris.Reference, []byte) {
	ref, block := NewBlock(size)
	b.Set(ref, block)
	return ref, block
}

// All returns everything that was set or put and is still there: for transports whose server is not
// a program but a file, which a test has to write.
func (b *Backend) All() map[eris.Reference][]byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return maps.Clone(b.blocks)
}

// Has reports whether the backend has the bytes of the block with the given reference.
func (b *Backend) Has(ref eris.Reference) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	block, ok := b.blocks[ref]
	return ok && eris.Verify(ref, block) == nil
}

// Hold lets all further calls wait, until the function that it returns is called or their contexts
// end.
func (b *Backend) Hold() (release func()) {
	held := make(chan struct{})
	b.mu.Lock()
	b.held = held
	b.mu.Unlock()
	return sync.OnceFunc(func() {
		b.mu.Lock()
		if b.held == held {
			b.held = nil
		}
		b.mu.Unlock()
		close(held)
	})
}

// passOthers lets calls pass that are not held yet.
func (b *Backend) passOthers() {
	b.mu.Lock()
	b.held = nil
	b.mu.Unlock()
}

// Held returns how many calls are held.
func (b *Backend) Held() int { return int(b.waiting.Load()) }

// AwaitHeld waits until at least n calls are held.
func (b *Backend) AwaitHeld(n int) {
	for b.Held() < n {
		time.Sleep(time.Millisecond)
	}
}

// errBackend is a failure that says nothing about blocks.
var errBackend = errors.New("the backend fails because the test wants it to")

// Fail makes all further calls fail, or not.
func (b *Backend) Fail(fail bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.err = nil
	if fail {
		b.err = errBackend
	}
}

// Store is the blocks of a backend, without a transport in between.
type Store struct {
	*fetch.Workers
	*Backend
}

// Open returns a store that serves n requests at a time.
func (b *Backend) Open(n int) *Store { return &Store{fetch.NewWorkers("backend:", n, b.Get), b} }

// Have implements [fetch.Haver].
func (b *Backend) Have(question []byte) []byte {
	prefixes := map[[fetch.HavePrefix]byte]bool{}
	for ref := range b.All() {
		prefixes[[fetch.HavePrefix]byte(ref[:])] = true
	}
	return fetch.HaveBits(question, func(prefix []byte) (has, known bool) {
		return prefixes[[fetch.HavePrefix]byte(prefix)], true
	})
}

// Have implements [fetch.Haver].
func (s *Store) Have(question []byte) []byte { return s.Backend.Have(question) }
