// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"bytes"
	"context"
	"fmt"
	"sync"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// Pipeline puts blocks without waiting for each: it is an eris.Sink for an encoder, which makes one block after the other
// and would else wait for a commit after each. Its methods are safe for use by several goroutines at a time.
type Pipeline struct {
	store  *Store
	pinned bool

	mu      sync.Mutex
	idle    sync.Cond // nothing is waiting
	waiting int
	err     error
}

// Pipeline returns a Pipeline of the store, whose blocks are pinned or not. It needs no closing, but [Pipeline.Wait] must be
// called before the blocks are relied on.
func (s *Store) Pipeline(pinned bool) *Pipeline {
	p := &Pipeline{store: s, pinned: pinned}
	p.idle.L = &p.mu
	return p
}

// Put verifies a block, copies it, and hands it to the store. It waits only while the queue of the store is full. It returns
// the errors of [Store.Put], or that of an earlier block; the block is not durable before [Pipeline.Wait] has returned nil.
func (p *Pipeline) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	if err := eris.Verify(ref, block); err != nil {
		return err
	}
	p.mu.Lock()
	err := p.err
	p.waiting++
	p.mu.Unlock()
	r := new(request)
	pool := &p.store.buffers[classOf(len(block))]
	if err == nil {
		if buffer, ok := pool.Get().(*[]byte); ok {
			copy(*buffer, block)
			r.set(ref, *buffer, p.pinned, p)
		} else {
			r.set(ref, bytes.Clone(block), p.pinned, p)
		}
		if err = p.store.send(ctx, r); err == nil {
			return nil
		}
		err = fmt.Errorf("storing block %v: %w", ref, err)
	}
	p.complete(r, nil) // the caller has the error
	return err
}

// Wait waits until all blocks that were put before are durable, and returns the first error of any block since the Pipeline
// was made. It must not be called at the same time as Put.
func (p *Pipeline) Wait() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.waiting > 0 {
		p.idle.Wait()
	}
	return p.err
}

func (p *Pipeline) complete(r *request, err error) {
	if block := r.block; block != nil {
		p.store.buffers[classOf(len(block))].Put(&block)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil && err != nil {
		p.err = fmt.Errorf("storing block %v: %w", r.ref, err)
	}
	if p.waiting--; p.waiting == 0 {
		p.idle.Broadcast()
	}
}
