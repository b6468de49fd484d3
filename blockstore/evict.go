// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"cmp"
	"errors"
	"math"
	"slices"
	"syscall"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// maxVictims bounds the blocks that are evicted in one transaction.
const maxVictims = 8192

// Eviction goes through the index in the order of references, round after round, and takes the
// blocks that were last used before a certain time. The time is chosen so that it leaves out all
// but the least recently used thirty-second of the bytes that the store may have. So it costs some
// 32 steps in the index for each block, no order of all blocks has to be kept, and blocks that go
// together are on the same pages of the index.

// plan says what is to be evicted next.
type plan struct {
	bytes int64          // how much more to evict by this plan
	time  uint32         // blocks last used at this time or before are evicted
	hand  eris.Reference // where to go on
}

// samples is of how many slots of each slab the times are looked at for a plan.
const samples = 1 << 16

// makePlan chooses the time so that about so many bytes were last used before it, if there are: at
// least as many where each slot is looked at.
func (w *writer) makePlan(bytes int64) {
	type use struct {
		time uint32
		size int64 // of all blocks for which it stands
	}
	var uses []use
	for _, slab := range w.store.slabs {
		step := slab.end/samples + 1
		for slot := int64(0); slot < slab.end; slot += step {
			if slab.isTaken(uint32(slot)) {
				uses = append(uses, use{slab.time(uint32(slot)), step * int64(slab.class.size())})
			}
		}
	}
	slices.SortFunc(uses, func(a, b use) int { return cmp.Compare(a.time, b.time) })
	w.plan.bytes, w.plan.time = bytes, math.MaxUint32
	for _, u := range uses {
		if bytes -= u.size; bytes <= 0 {
			w.plan.time = u.time
			return
		}
	}
}

// evict removes least recently used blocks of at least so many bytes in total, as far as there are
// any, and no more blocks than given. It returns how many bytes it removed.
func (c *change) evict(bytes int64, most int) (int64, error) {
	var victims []found
	var freed int64
	plan := &c.w.plan
	share := c.w.store.options.MaxBytes / 32
	cursor := c.blocks.Cursor()
	k, v := cursor.Seek(plan.hand[:])
	for rounds := 0; freed < bytes && len(victims) < most; k, v = cursor.Next() {
		if k == nil {
			// A round has ended. Begun again, it would come to the same victims.
			if k, v = cursor.First(); k == nil || len(victims) > 0 {
				break
			}
			// Blocks may have been used since the plan was made; in the end any will do.
			switch rounds++; {
			case rounds <= 2:
				plan.bytes = 0
			case rounds == 3:
				plan.bytes, plan.time = bytes, math.MaxUint32
			default:
				return 0, nil
			}
		}
		if plan.bytes <= 0 {
			c.w.makePlan(max(bytes-freed, share))
		}
		l, err := parseLocation(k, v)
		if err != nil {
			return 0, err
		}
		if slab := c.slab(l); slab.time(l.slot()) <= plan.time {
			victims = append(victims, found{eris.Reference(k), l})
			freed += int64(slab.class.size())
			plan.bytes -= int64(slab.class.size())
		}
	}
	plan.hand = eris.Reference{}
	if k != nil {
		copy(plan.hand[:], k)
	}
	for _, v := range victims {
		if err := c.remove(&v.ref, v.location); err != nil {
			return 0, err
		}
	}
	c.evicted += int64(len(victims))
	return freed, nil
}

// evict evicts in a transaction of its own.
func (w *writer) evict(bytes int64) (freed int64, err error) {
	// On a full disk, where eviction is wanted most, the index may have no room for the pages that
	// a large transaction changes, but it has those that the last one gave up.
	for most := maxVictims; most > 0; most /= 8 {
		freed, err = w.evictAtMost(bytes, most)
		if !isFullDisk(err) {
			return freed, err
		}
	}
	w.giveBack()
	return w.evictAtMost(bytes, 1)
}

func isFullDisk(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// giveBack gives the space of all free slots back to the file system: on a full disk the index
// needs it. Blocks may have been written to them that the index then had no room for.
func (w *writer) giveBack() {
	for _, slab := range w.store.slabs {
		w.store.progress.background(slab.giveBack())
	}
}

func (w *writer) evictAtMost(bytes int64, most int) (int64, error) {
	c, err := w.begin()
	if err != nil {
		return 0, err
	}
	defer c.rollback()
	freed, err := c.evict(bytes, most)
	if err != nil || freed == 0 {
		return 0, err
	}
	return freed, c.commit()
}

// makeRoom evicts until there is room for so many bytes, or nothing is left.
func (w *writer) makeRoom(bytes int64) error {
	limit := w.store.options.MaxBytes
	for limit > 0 && w.state.bytes()+bytes > limit {
		evicted, err := w.evict(w.state.bytes() + bytes - limit)
		if err != nil || evicted == 0 {
			return err
		}
	}
	return nil
}
