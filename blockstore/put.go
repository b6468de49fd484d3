// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"cmp"
	"context"
	"fmt"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// Put stores a block and returns when it is durable. If its bytes are not what the reference says,
// or of neither block size, it returns an [*eris.BlockError]. Further errors wrap
// [fetch.ErrClosed], [ErrDamaged], or are those of the file system, for example syscall.ENOSPC;
// later calls may succeed then. A block that is there already is compared with what is given, used,
// and not written again.
//
// All blocks that are put at a time share a commit, so throughput comes from many calls at a time,
// or [Store.PutBatch]. If the context ends while there is no room for the block, Put returns its
// cause; if it ends later, Put returns the outcome a little later.
func (s *Store) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	return s.PutBatch(ctx, []eris.Reference{ref}, [][]byte{block})
}

// PutBatch is Put for several blocks; refs and blocks must have the same length. It returns when
// all blocks are durable. If it returns an error, which is that of one of the blocks, some may have
// been stored.
func (s *Store) PutBatch(ctx context.Context, refs []eris.Reference, blocks [][]byte) error {
	if len(refs) != len(blocks) {
		return fmt.Errorf("%d references for %d blocks", len(refs), len(blocks))
	}
	if err := verify(refs, blocks); err != nil {
		return err
	}
	done := make(chan error, len(refs))
	requests := make([]request, len(refs))
	var err error
	for i := range requests {
		requests[i] = request{ref: refs[i], block: blocks[i], sum: checksum(refs[i][:], blocks[i]), done: done}
		if err == nil {
			err = s.send(ctx, &requests[i])
		}
		if err != nil {
			done <- err
		}
	}
	for range requests {
		err = cmp.Or(err, <-done)
	}
	switch {
	case err == nil:
		return nil
	case len(refs) == 1:
		return fmt.Errorf("storing block %v: %w", refs[0], err)
	default:
		return fmt.Errorf("storing %d blocks: %w", len(refs), err)
	}
}

// verify returns an *eris.BlockError if one of the blocks is not that of its reference.
func verify(refs []eris.Reference, blocks [][]byte) error {
	sums := make([]eris.Reference, len(blocks))
	eris.SumAll(sums, blocks)
	for i, block := range blocks {
		if sums[i] != refs[i] || !eris.BlockSize(len(block)).Valid() {
			return &eris.BlockError{Reference: refs[i], Length: len(block)}
		}
	}
	return nil
}

// request is something for the writer to do.
type request struct {
	ref   eris.Reference
	block []byte // to put; the writer must not use it after completion. If nil, what is there is to be checked
	sum   uint32
	done  chan<- error // gets the outcome, for which it has room

	// Of the writer.
	outcome error // if not that of the commit
	known   bool  // the outcome does not depend on the commit
	same    *request
}

// send hands a request to the writer, which completes it. It waits for room.
func (s *Store) send(ctx context.Context, r *request) error {
	if err := s.Err(); err != nil {
		return err
	}
	s.gate.RLock()
	defer s.gate.RUnlock()
	if s.shut {
		return fetch.ErrClosed
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
