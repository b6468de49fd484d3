// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"cmp"
	"context"
	"fmt"
	"sync/atomic"

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
// or [Store.PutBatch]. If the context ends while the block waits, Put returns its cause; if it ends
// later, Put returns the outcome a little later.
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
	var failure error
	for i := range requests {
		r := &requests[i]
		r.ref, r.block, r.sum, r.done = refs[i], blocks[i], checksum(&refs[i], blocks[i]), done
		if failure == nil {
			failure = s.send(ctx, r)
		}
		if failure != nil {
			r.claimed.Store(true)
			done <- failure
		}
	}
	err := wait(ctx, requests, done)
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

	claimed atomic.Bool // by the writer, or by a caller who no longer waits

	// Of the writer.
	outcome error // if not that of the commit
	known   bool  // the outcome does not depend on the commit
	same    *request
}

// send hands a request to the writer, which completes it unless the owner claims it first. It waits
// for room.
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

// wait waits until the requests are done, or have been taken back because the context ended, and
// returns the first error.
func wait(ctx context.Context, requests []request, done chan error) (err error) {
	ended := ctx.Done()
	for left := len(requests); left > 0; {
		select {
		case outcome := <-done:
			err = cmp.Or(err, outcome)
			left--
		case <-ended:
			ended = nil
			for i := range requests {
				if requests[i].claimed.CompareAndSwap(false, true) {
					done <- context.Cause(ctx)
				}
			}
		}
	}
	return err
}
