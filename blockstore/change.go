// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"go.etcd.io/bbolt"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// change is a transaction of the writer, with what is to change in memory once it is committed.
type change struct {
	w      *writer
	tx     *bbolt.Tx
	blocks *bbolt.Bucket
	state  state
	time   uint32

	taken, freed       [classes][]uint32 // slots; the first are taken in the slab already
	inserted           []placed
	removed            []eris.Reference
	pinned             []location
	unpinned, recorded bool
	buffer             []byte

	duplicates, damaged, evicted int64
}

// begin starts a change. It must be ended by commit or rollback.
func (w *writer) begin() (*change, error) {
	if w.store.broken.Load() {
		return nil, ErrDamaged
	}
	w.stuck = true // until it has ended
	tx, err := w.store.index.Begin(true)
	if err != nil {
		w.stuck = false
		return nil, err
	}
	c := &change{w: w, tx: tx, blocks: tx.Bucket(blocksBucket), state: w.state, time: w.store.now()}
	if c.blocks == nil || tx.Bucket(slotsBucket) == nil || tx.Bucket(storeBucket) == nil {
		c.rollback()
		return nil, fmt.Errorf("%w: a bucket is missing", ErrDamaged)
	}
	return c, nil
}

// rollback gives the change up, unless it has been committed.
func (c *change) rollback() {
	if c.tx == nil {
		return
	}
	for class := range classes {
		for _, slot := range c.taken[class] {
			c.w.store.slabs[class].free(slot)
		}
	}
	tx := c.tx
	c.tx = nil
	tx.Rollback() // its one error is that it has been rolled back already, by Commit
	c.w.stuck = false
	c.w.store.progress.count(c.duplicates, c.damaged, 0, false)
}

func (c *change) slab(l location) *slab { return c.w.store.slabs[l.class()] }

// changed reports whether there is anything to commit.
func (c *change) changed() bool {
	return c.recorded || c.unpinned || len(c.removed) > 0
}

// find returns the record of a block.
func (c *change) find(ref *eris.Reference) (bool, record, error) {
	v := c.blocks.Get(ref[:])
	if v == nil {
		return false, record{}, nil
	}
	r, err := parseRecord(v)
	return true, r, err
}

// holds reports whether a block can be read at a location: the given block, if there is one, else whichever has the checksum.
func (c *change) holds(ref *eris.Reference, l location, block []byte) bool {
	if c.buffer == nil {
		c.buffer = make([]byte, class32KiB.size())
	}
	there := c.buffer[:l.class().size()]
	// A block that cannot be read is as good as damaged: what is put is then written elsewhere.
	if err := c.slab(l).read(there, l.slot()); err != nil {
		return false
	}
	return checksum(*ref, there) == l.sum() && (block == nil || bytes.Equal(block, there))
}

func (c *change) put(ref *eris.Reference, r record) error {
	c.recorded = true
	return c.blocks.Put(bytes.Clone(ref[:]), r.append(make([]byte, 0, recordSize)))
}

// insert adds a block that has been written.
func (c *change) insert(p placed) error {
	r := record{location: p.location}
	if p.pinned {
		r.pin = c.state.pin
		c.state.pinned[p.location.class()]++
	}
	c.state.blocks[p.location.class()]++
	c.inserted = append(c.inserted, p)
	return c.put(&p.ref, r)
}

// pin pins a block that is there.
func (c *change) pin(ref *eris.Reference, old record) error {
	c.state.pinned[old.location.class()]++
	c.pinned = append(c.pinned, old.location)
	return c.put(ref, record{old.location, c.state.pin})
}

// unpin unpins all blocks: no record has the new pin.
func (c *change) unpin() {
	c.unpinned = true
	c.state.pin++
	c.state.pinned = [classes]int64{}
}

// remove removes a block. Its slot can be taken after the commit.
func (c *change) remove(ref *eris.Reference, old record) error {
	class := old.location.class()
	c.state.blocks[class]--
	if old.pin == c.state.pin {
		c.state.pinned[class]--
	}
	c.removed = append(c.removed, *ref)
	c.freed[class] = append(c.freed[class], old.location.slot())
	return c.blocks.Delete(ref[:])
}

// commit makes the change durable, and then known in memory.
func (c *change) commit() error {
	if err := c.record(); err != nil {
		return err
	}
	s, number := c.w.store, c.tx.ID()
	if err := c.tx.Commit(); err != nil {
		err = fmt.Errorf("writing the index: %w", err)
		// If the transaction can be seen, its last page was written and only the sync failed: the index on disk may be the
		// old one or the new one. Else it was given up, and nothing has happened.
		if seen := s.view(func(tx *bbolt.Tx) error {
			if tx.ID() >= number {
				return errors.New("it can be seen")
			}
			return nil
		}); seen != nil {
			s.fail(err)
		}
		return err
	}
	c.tx = nil
	c.w.stuck = false
	c.w.state = c.state
	s.progress.set(c.state)
	s.progress.count(c.duplicates, c.damaged, c.evicted, true)
	for _, ref := range c.removed {
		s.hints.remove(&ref)
	}
	for _, p := range c.inserted {
		s.hints.put(&p.ref, p.location)
	}
	for _, l := range c.pinned {
		c.slab(l).setTime(l.slot(), pinnedTime)
	}
	for class, slab := range s.slabs {
		if c.unpinned {
			slab.unpin(c.time)
		}
		for _, slot := range c.freed[class] {
			slab.free(slot)
		}
		if slab.unused() > c.w.unusedBytes() {
			s.progress.background(slab.punch(c.freed[class]))
		}
	}
	return nil
}

// record writes the bit sets of slots and the state.
func (c *change) record() error {
	slots := c.tx.Bucket(slotsBucket)
	for class := range classes {
		slab := c.w.store.slabs[class]
		slices.Sort(c.taken[class])
		slices.Sort(c.freed[class])
		for _, slot := range c.freed[class] {
			if !slab.isTaken(slot) {
				return fmt.Errorf("%w: block in a free slot", ErrDamaged)
			}
		}
		if free := slices.Compact(slices.Clone(c.freed[class])); len(free) != len(c.freed[class]) {
			return fmt.Errorf("%w: blocks in the same slot", ErrDamaged)
		}
		chunks := make(map[int]*bitmap)
		chunk := func(slot uint32) *bitmap {
			i := int(slot / slotsPerChunk)
			if chunks[i] == nil {
				b := *slab.taken[i]
				chunks[i] = &b
			}
			return chunks[i]
		}
		for _, slot := range c.taken[class] {
			chunk(slot)
		}
		for _, slot := range c.freed[class] {
			chunk(slot)[slot%slotsPerChunk/64] &^= 1 << (slot % 64)
		}
		for i, b := range chunks {
			if err := slots.Put(slotKey(class, i), b.append(nil)); err != nil {
				return err
			}
		}
	}
	return c.tx.Bucket(storeBucket).Put(stateKey, c.state.append(nil))
}
