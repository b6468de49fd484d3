// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// Put stores a block and returns when it is durable. If its bytes are not what the reference says, or of neither block size,
// it returns an [*eris.BlockError]. Further errors wrap [ErrFull], [ErrClosed], [ErrDamaged], or are those of the file
// system, for example syscall.ENOSPC; later calls may succeed then. A block that is there already is compared with what is
// given, used, and not written again.
//
// All blocks that are put at a time share a commit, so throughput comes from many calls at a time, or [Store.PutBatch], or
// a [Pipeline]. If the context ends while the block waits, Put returns its cause; if it ends later, Put returns the outcome
// a little later.
func (s *Store) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	if err := eris.Verify(ref, block); err != nil {
		return err
	}
	return s.put(ctx, ref, block, false)
}

// PutPinned is Put, and the block is never evicted from then on, until [Store.UnpinAll]. A block that is there already is
// pinned.
func (s *Store) PutPinned(ctx context.Context, ref eris.Reference, block []byte) error {
	if err := eris.Verify(ref, block); err != nil {
		return err
	}
	return s.put(ctx, ref, block, true)
}

// Add is Put for a block whose reference the caller does not know. It returns the reference.
func (s *Store) Add(ctx context.Context, block []byte) (eris.Reference, error) {
	ref := eris.Sum(block)
	if !eris.BlockSize(len(block)).Valid() {
		return ref, &eris.BlockError{Reference: ref, Length: len(block)}
	}
	return ref, s.put(ctx, ref, block, false)
}

// PutBatch is Put for several blocks; refs and blocks must have the same length. It returns when all blocks are durable. If
// it returns an error, which is that of one of the blocks, some may have been stored.
func (s *Store) PutBatch(ctx context.Context, refs []eris.Reference, blocks [][]byte) error {
	if len(refs) != len(blocks) {
		return fmt.Errorf("%d references for %d blocks", len(refs), len(blocks))
	}
	if err := eris.VerifyAll(refs, blocks); err != nil {
		return err
	}
	t := newTicket(len(refs))
	requests := make([]request, len(refs))
	var failure error
	for i := range requests {
		r := &requests[i]
		r.set(refs[i], blocks[i], false, t)
		if failure == nil {
			failure = s.send(ctx, r)
		}
		if failure != nil {
			r.claimed.Store(true)
			t.complete(r, failure)
		}
	}
	waiting := make([]*request, len(requests))
	for i := range requests {
		waiting[i] = &requests[i]
	}
	if err := t.wait(ctx, waiting...); err != nil {
		return fmt.Errorf("storing %d blocks: %w", len(refs), err)
	}
	return nil
}

// UnpinAll makes all pinned blocks blocks like any other, as if they had just been used, and returns when that is durable.
// Blocks that are put by other goroutines meanwhile may or may not be unpinned.
func (s *Store) UnpinAll(ctx context.Context) error {
	t := newTicket(1)
	r := &request{kind: requestUnpin, owner: t}
	err := s.send(ctx, r)
	if err == nil {
		err = t.wait(ctx, r)
	}
	if err != nil {
		return fmt.Errorf("unpinning: %w", err)
	}
	return nil
}

func (s *Store) put(ctx context.Context, ref eris.Reference, block []byte, pinned bool) error {
	t := newTicket(1)
	r := new(request)
	r.set(ref, block, pinned, t)
	err := s.send(ctx, r)
	if err == nil {
		err = t.wait(ctx, r)
	}
	if err != nil {
		return fmt.Errorf("storing block %v: %w", ref, err)
	}
	return nil
}

// request is something for the writer to do.
type request struct {
	kind   requestKind
	ref    eris.Reference
	block  []byte // to put; the writer must not use it after completion
	sum    uint32
	pinned bool
	owner  owner

	claimed atomic.Bool // by the writer, or by a caller who no longer waits

	// Of the writer.
	outcome error // if not that of the commit
	settled bool  // the outcome does not depend on the commit
	same    *request
}

type requestKind uint8

const (
	requestPut requestKind = iota
	requestCheck
	requestUnpin
)

// owner is told when a request is done. It is told once for each.
type owner interface{ complete(*request, error) }

func (r *request) set(ref eris.Reference, block []byte, pinned bool, owner owner) {
	r.ref, r.block, r.sum, r.pinned, r.owner = ref, block, checksum(ref, block), pinned, owner
}

// send hands a request to the writer, which completes it unless the owner claims it first. It waits for room.
func (s *Store) send(ctx context.Context, r *request) error {
	if err := s.Err(); err != nil {
		return err
	}
	s.gate.RLock()
	defer s.gate.RUnlock()
	if s.shut {
		return ErrClosed
	}
	// The writer works until the gate has been closed, so there will be room.
	if err := s.room.Acquire(ctx, int64(len(r.block))); err != nil {
		return context.Cause(ctx)
	}
	select {
	case s.queue <- r:
		return nil
	case <-ctx.Done():
		s.room.Release(int64(len(r.block)))
		return context.Cause(ctx)
	}
}

// ticket waits for requests.
type ticket struct {
	done chan struct{}

	mu      sync.Mutex
	waiting int
	err     error // the first one
}

func newTicket(requests int) *ticket {
	t := &ticket{done: make(chan struct{}), waiting: requests}
	if requests == 0 {
		close(t.done)
	}
	return t
}

func (t *ticket) complete(_ *request, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil {
		t.err = err
	}
	if t.waiting--; t.waiting == 0 {
		close(t.done)
	}
}

// wait waits until the requests are done, or have been taken back because the context ended.
func (t *ticket) wait(ctx context.Context, requests ...*request) error {
	select {
	case <-t.done:
	case <-ctx.Done():
		for _, r := range requests {
			if r.claimed.CompareAndSwap(false, true) {
				t.complete(r, context.Cause(ctx))
			}
		}
		<-t.done
	}
	return t.err
}
