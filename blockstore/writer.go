// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// Bounds of a commit: enough for its cost to be shared well, few enough for it not to take long.
const (
	maxBatchBlocks = 4096
	maxBatchBytes  = 16 << 20
)

// maxUnused is how many bytes of free slots may keep their space on disk, in each slab.
const maxUnused = 64 << 20

// savePeriod is how often times of access are saved; as much of them is lost in a crash.
const savePeriod = 5 * time.Minute

// writer is the one goroutine that changes the store. It commits whatever requests have come in
// while it did the last commit.
type writer struct {
	store *Store
	state state    // as committed
	plan  plan     // for eviction
	next  *request // received, but not part of the last batch
}

// run checks the index, and then does requests until the queue is closed. The context ends the
// check.
func (w *writer) run(ctx context.Context) error {
	s := w.store
	if err := s.checkIndex(ctx); err != nil {
		s.fail(err)
	} else {
		for _, slab := range s.slabs {
			s.progress.background(slab.truncate())
		}
	}
	save := time.NewTicker(savePeriod)
	defer save.Stop()
	if s.Err() == nil {
		s.progress.background(s.guard(func() error { return w.makeRoom(w.batchBytes()) }))
	}
	for {
		first := w.next
		w.next = nil
		for first == nil {
			select {
			case r, ok := <-s.queue:
				if !ok {
					return w.saveAccesses()
				}
				first = r
			case <-save.C:
				s.progress.background(w.saveAccesses())
			}
		}
		w.do(w.collect(first))
	}
}

// collect makes a batch of a request and those that wait behind it.
func (w *writer) collect(first *request) []*request {
	// Those who were waiting for the last commit may be about to come back.
	runtime.Gosched()
	batch, space := []*request{first}, w.batchBytes()-int64(len(first.block))
	for len(batch) < maxBatchBlocks {
		select {
		case next, ok := <-w.store.queue:
			if !ok {
				return batch
			}
			if int64(len(next.block)) > space {
				w.next = next
				return batch
			}
			batch = append(batch, next)
			space -= int64(len(next.block))
		default:
			return batch
		}
	}
	return batch
}

// do does a batch of requests and completes them.
func (w *writer) do(batch []*request) {
	s := w.store
	err := s.Err()
	if err == nil && len(batch) > 0 {
		s.committing.Store(true)
		err = s.guard(func() error { return w.transact(batch) })
		if isFullDisk(err) && s.Err() == nil {
			w.giveBack()
		}
		s.committing.Store(false)
	}
	for _, r := range batch {
		s.room.Release(int64(len(r.block)))
		outcome := r.outcome
		if !r.known {
			if r.same != nil {
				outcome = r.same.outcome
			}
			outcome = errors.Join(outcome, err)
		}
		if r.block != nil {
			s.progress.note(func(stats *Stats) {
				if outcome == nil {
					stats.Puts++
				} else {
					stats.Failed++
				}
			})
		}
		r.done <- outcome
	}
}

// transact does a batch of requests in one transaction, or in two if blocks must be evicted before
// there is room.
func (w *writer) transact(batch []*request) error {
	var coming int64
	for _, r := range batch {
		coming += int64(len(r.block))
	}
	if err := w.store.inPlace(); err != nil {
		w.store.fail(err)
		return err
	}
	if err := w.makeRoom(coming); err != nil {
		return err
	}
	c, err := w.begin()
	if err != nil {
		return err
	}
	defer c.rollback()
	fresh, err := c.sort(batch)
	if err != nil {
		return err
	}
	fresh = c.allocate(fresh)
	// Evicting a little more than is needed now, for the next batch, saves it a transaction of its
	// own.
	if limit := w.store.options.MaxBytes; limit > 0 {
		over := c.state.bytes() + w.batchBytes() - limit
		for _, a := range fresh {
			over += int64(len(a.block))
		}
		if _, err := c.evict(over, maxVictims); err != nil {
			return err
		}
	}
	if len(c.removed)+len(fresh) == 0 {
		return nil
	}
	if err := w.write(fresh); err != nil {
		return err
	}
	for _, a := range fresh {
		if err := c.insert(a); err != nil {
			return err
		}
	}
	return c.commit()
}

// addition is a block to be written, and where.
type addition struct {
	*request
	location location
}

// sort does what requests ask for except for blocks that must be written, which it returns, in the
// order of references: that is how bbolt inserts fastest.
func (c *change) sort(batch []*request) ([]*addition, error) {
	var fresh []*addition
	seen := make(map[eris.Reference]*request)
	for _, r := range batch {
		if first := seen[r.ref]; first != nil && r.block != nil {
			r.same = first
			continue
		}
		old, found, err := locate(c.blocks, &r.ref)
		if err != nil {
			return nil, err
		}
		switch {
		case found && c.holds(&r.ref, old, r.block):
			r.known = true
			if r.block != nil {
				c.duplicates++
				c.slab(old).touch(old.slot(), c.time)
			}
			continue
		case found:
			// What is there is damaged. It goes before the block comes again, into another slot.
			c.damaged++
			if err := c.remove(&r.ref, old); err != nil {
				return nil, err
			}
		}
		if r.block != nil {
			seen[r.ref] = r
			fresh = append(fresh, &addition{request: r})
		}
	}
	slices.SortFunc(fresh, func(a, b *addition) int { return bytes.Compare(a.ref[:], b.ref[:]) })
	return fresh, nil
}

// allocate finds slots for blocks. It returns those blocks that fit, and gives the others their
// outcome.
func (c *change) allocate(blocks []*addition) (fit []*addition) {
	limit := c.w.store.options.MaxBytes
	space := limit - c.state.bytes()
	for _, a := range blocks {
		if limit > 0 && space < int64(len(a.block)) {
			a.outcome = errFull
			continue
		}
		class := classOf(len(a.block))
		slab := c.w.store.slabs[class]
		slot, err := slab.take()
		if err != nil {
			a.outcome = err
			continue
		}
		space -= int64(len(a.block))
		c.taken[class] = append(c.taken[class], slot)
		a.location = makeLocation(a.sum, class, slot)
		slab.touch(slot, c.time)
		fit = append(fit, a)
	}
	return fit
}

// write writes blocks to their slots, and makes them durable.
func (w *writer) write(blocks []*addition) error {
	var dirty [classes]bool
	for _, a := range blocks { // in the order of their slots: they were taken one after the other
		class, slot := a.location.class(), int64(a.location.slot())
		dirty[class] = true
		if _, err := w.store.slabs[class].file.WriteAt(a.block, slot*int64(class.size())); err != nil {
			return fmt.Errorf("writing blocks: %w", err)
		}
	}
	// Both at the same time: a file system with a journal then needs one commit of it.
	var failures [classes]error
	var group sync.WaitGroup
	for class := range classes {
		if dirty[class] {
			group.Go(func() { failures[class] = files.SyncData(w.store.slabs[class].file) })
		}
	}
	group.Wait()
	if err := errors.Join(failures[:]...); err != nil {
		return fmt.Errorf("writing blocks: %w", err)
	}
	return nil
}

// batchBytes is the greatest number of bytes of blocks in a batch, and what eviction keeps free.
func (w *writer) batchBytes() int64 { return w.atMost(maxBatchBytes, 32) }

// atMost returns a number of bytes, but no more than a part of the limit, if there is one.
func (w *writer) atMost(bytes, part int64) int64 {
	if limit := w.store.options.MaxBytes; limit > 0 {
		return min(bytes, limit/part)
	}
	return bytes
}

func (w *writer) saveAccesses() error {
	var err error
	for _, slab := range w.store.slabs {
		err = errors.Join(err, slab.saveAccesses())
	}
	if err != nil {
		return fmt.Errorf("saving times of access: %w", err)
	}
	return nil
}
