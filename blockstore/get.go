// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// Get returns the block with the given reference, as [eris.Blocks] has it. The bytes are those that were put, but their hash
// is not computed again: a reader that does not trust the disk does that. The size is 1 KiB, 32 KiB, or 0 for whichever it
// is. The block is written to dst if the capacity of dst suffices, else to new memory.
//
// Some hundred reads are done at a time, and further ones wait. For a block that the store does not have in that size the error wraps eris.ErrNotFound; so it does for one that was
// damaged on disk, which is removed. Other errors are those of the file system, [ErrDamaged], [ErrClosed], and the cause of
// the context.
func (s *Store) Get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	if size != 0 && !size.Valid() {
		return nil, fmt.Errorf("block %v: %d bytes is not a block size", ref, int(size))
	}
	share := &s.reads[ref[0]%readShares]
	select {
	case share.places <- struct{}{}:
	default:
		select {
		case share.places <- struct{}{}:
		case <-ctx.Done():
			return nil, fmt.Errorf("block %v: %w", ref, context.Cause(ctx))
		}
	}
	defer func() { <-share.places }()
	// A wrong hint costs a read and does no harm.
	if l, ok := s.hints.get(&ref); ok && (size == 0 || l.class().size() == int(size)) {
		if block, ok, _ := s.read(&ref, l, dst); ok {
			// Readers that never wait would keep the writer from its processor for a time slice after each of its system
			// calls, so that a commit takes a tenth of a second.
			if share.hits.Add(1)%16 == 0 && s.committing.Load() {
				runtime.Gosched()
			}
			return block, nil
		}
	}
	block, err := s.search(ctx, &ref, size, dst)
	switch {
	case err == nil:
		share.hits.Add(1)
	case errors.Is(err, eris.ErrNotFound):
		share.misses.Add(1)
		fallthrough
	default:
		err = fmt.Errorf("block %v: %w", ref, readable(err))
	}
	return block, err
}

// search gets a block by the index.
func (s *Store) search(ctx context.Context, ref *eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	var seen location // where other bytes than the block have been seen
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		r, found, err := s.lookup(ref)
		if err != nil {
			return nil, err
		}
		if !found {
			s.hints.remove(ref)
			return nil, eris.ErrNotFound
		}
		if size != 0 && r.location.class().size() != int(size) {
			return nil, eris.ErrNotFound
		}
		block, ok, err := s.read(ref, r.location, dst)
		if err != nil {
			return nil, err
		}
		if ok {
			s.hints.put(ref, r.location)
			return block, nil
		}
		// Either the block was evicted and its slot taken by another one since the index was read, which a second look
		// tells, or it is damaged.
		if seen != r.location {
			seen = r.location
			continue
		}
		if err := s.removeDamaged(ctx, *ref); err != nil {
			return nil, err
		}
	}
}

// read reads the block at a location, and reports whether it is there. An error says that the file could not be read.
func (s *Store) read(ref *eris.Reference, l location, dst []byte) ([]byte, bool, error) {
	slab, size := s.slabs[l.class()], l.class().size()
	if cap(dst) < size {
		dst = make([]byte, size)
	}
	dst = dst[:size]
	if err := slab.read(dst, l.slot()); err == io.EOF || err == io.ErrUnexpectedEOF {
		return nil, false, nil
	} else if err != nil {
		return nil, false, err
	}
	if checksum(*ref, dst) != l.sum() {
		return nil, false, nil
	}
	slab.touch(l.slot(), s.now())
	return dst, true, nil
}

// removeDamaged has the writer remove a block if it is damaged, which the writer alone can know for certain: nobody takes
// slots meanwhile. If it could not be removed, it is absent nevertheless.
func (s *Store) removeDamaged(ctx context.Context, ref eris.Reference) error {
	t := newTicket(1)
	r := &request{kind: requestCheck, ref: ref, owner: t}
	err := s.send(ctx, r)
	if err == nil {
		err = t.wait(ctx, r)
	}
	if err == nil || ctx.Err() != nil {
		return err
	}
	return fmt.Errorf("%w: damaged on disk, and could not be removed: %w", eris.ErrNotFound, err)
}
