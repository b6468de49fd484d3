// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"bytes"
	"errors"
	"fmt"

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

	taken, freed [classes][]uint32 // slots; the first are taken in the slab already
	inserted     []*addition
	removed      []eris.Reference
	buffer       []byte

	duplicates, damaged, evicted int64
}

// begin starts a change. It must be ended by commit or rollback.
func (w *writer) begin() (*change, error) {
	tx, err := w.store.index.Begin(true)
	if err != nil {
		return nil, err
	}
	return &change{w: w, tx: tx, blocks: tx.Bucket(blocksBucket), state: w.state, time: w.store.options.now()}, nil
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
	c.count(false)
}

// count adds what has been done to the statistics.
func (c *change) count(committed bool) {
	c.w.store.progress.note(func(s *Stats) {
		s.Duplicates += c.duplicates
		s.Damaged += c.damaged
		if committed {
			s.Evicted += c.evicted
			s.hold(c.state)
		}
	})
}

func (c *change) slab(l location) *slab { return c.w.store.slabs[l.class()] }

// holds reports whether a block can be read at a location: the given block, if there is one, else
// whichever has the checksum.
func (c *change) holds(ref *eris.Reference, l location, block []byte) bool {
	if c.buffer == nil {
		c.buffer = make([]byte, class32KiB.size())
	}
	there := c.buffer[:l.class().size()]
	// A block that cannot be read counts as damaged: what is put is then written elsewhere.
	if err := c.slab(l).read(there, l.slot()); err != nil {
		return false
	}
	return checksum(ref[:], there) == l.sum() && (block == nil || bytes.Equal(block, there))
}

// insert adds a block that has been written.
func (c *change) insert(a *addition) error {
	c.state.blocks[a.location.class()]++
	c.inserted = append(c.inserted, a)
	return c.blocks.Put(bytes.Clone(a.ref[:]), appendLocation(make([]byte, 0, locationSize+4), &a.ref, a.location))
}

// remove removes a block. Its slot can be taken after the commit.
func (c *change) remove(ref *eris.Reference, l location) error {
	c.state.blocks[l.class()]--
	c.removed = append(c.removed, *ref)
	c.freed[l.class()] = append(c.freed[l.class()], l.slot())
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
		// If the transaction can be seen, its last page was written and only the sync failed: the
		// index on disk may be the old one or the new one. Else it was given up, and nothing has
		// happened.
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
	c.w.state = c.state
	c.count(true)
	for _, ref := range c.removed {
		s.hints.remove(&ref)
	}
	for _, a := range c.inserted {
		s.hints.put(&a.ref, a.location)
	}
	for class, slab := range s.slabs {
		for _, slot := range c.freed[class] {
			slab.free(slot)
		}
		if slab.unused() > c.w.atMost(maxUnused, 8) {
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
			if !slab.isTaken(slot) || !chunk(slot).has(slot) {
				return fmt.Errorf("%w: block in a free slot, or two in one", ErrDamaged)
			}
			chunk(slot).clear(slot)
		}
		for i, b := range chunks {
			key := slotKey(class, i)
			if err := slots.Put(key, b.append(nil, key)); err != nil {
				return err
			}
		}
	}
	return c.tx.Bucket(storeBucket).Put(stateKey, c.state.append(nil))
}
