// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// slotsPerChunk is how many slots share a bit set in the index and a chunk of access times.
const slotsPerChunk = 4096

// bitmap has a bit for each slot of a chunk.
type bitmap [slotsPerChunk / 64]uint64

// The methods of a bitmap take a slot of any chunk, as the one with this position in its chunk.
func (b *bitmap) has(slot uint32) bool { return b[slot%slotsPerChunk/64]&(1<<(slot%64)) != 0 }
func (b *bitmap) set(slot uint32)      { b[slot%slotsPerChunk/64] |= 1 << (slot % 64) }
func (b *bitmap) clear(slot uint32)    { b[slot%slotsPerChunk/64] &^= 1 << (slot % 64) }

// slotsTaken returns how many bits are set.
func slotsTaken(chunks []*bitmap) (n int64) {
	for _, b := range chunks {
		for _, word := range b {
			n += int64(bits.OnesCount64(word))
		}
	}
	return n
}

// slab is a file of slots for blocks of one size, and what is known of each slot. Only the writer
// takes and frees slots; reading and touching are safe for everybody at the same time.
type slab struct {
	class class
	file  *os.File

	// Of the writer.
	taken  []*bitmap
	count  int64 // slots that are taken
	end    int64 // all slots from here on have never been taken, or not since the store was opened
	lowest int   // no slot below this one is free

	accessed     *os.File                         // times of last access, as chunks of 4-byte big-endian numbers
	accessChunks atomic.Pointer[[]*accessesChunk] // as many as taken
}

// accessesChunk has the time of the last access to each slot.
type accessesChunk struct {
	times   [slotsPerChunk]atomic.Uint32
	unsaved atomic.Bool
}

func slabNames(c class) (blocks, accessed string) {
	if c == class1KiB {
		return "blocks-1k", "accessed-1k"
	}
	return "blocks-32k", "accessed-32k"
}

// openSlab opens the files of a slab whose slots are taken as given. If any slot is taken, the file
// of blocks must exist.
func openSlab(directory string, c class, taken []*bitmap, now uint32) (*slab, error) {
	s := &slab{class: c, taken: taken, count: slotsTaken(taken)}
	for chunk, b := range taken {
		for i, word := range b {
			if word != 0 {
				s.end = int64(chunk*slotsPerChunk + i*64 + bits.Len64(word))
			}
		}
	}
	blocks, accessed := slabNames(c)
	flags := os.O_RDWR
	if s.count == 0 {
		flags |= os.O_CREATE
	}
	var err error
	if s.file, err = os.OpenFile(filepath.Join(directory, blocks), flags, 0o600); err != nil {
		return nil, err
	}
	if s.accessed, err = os.OpenFile(filepath.Join(directory, accessed), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, errors.Join(err, s.close())
	}
	s.loadAccesses(now)
	return s, nil
}

func (s *slab) close() error {
	err := s.file.Close()
	if s.accessed != nil {
		err = errors.Join(err, s.accessed.Close())
	}
	return err
}

// read fills the block with the bytes of a slot. It returns io.EOF if the file is too short.
func (s *slab) read(block []byte, slot uint32) error {
	_, err := s.file.ReadAt(block, int64(slot)*int64(s.class.size()))
	return err
}

// take takes the lowest free slot.
func (s *slab) take() (uint32, error) {
	for word := s.lowest / 64; ; word++ {
		chunk := word / len(bitmap{})
		if chunk == len(s.taken) {
			if chunk == maxSlots/slotsPerChunk {
				return 0, fmt.Errorf("%w: no more than %d blocks of %d bytes", errFull, uint32(maxSlots), s.class.size())
			}
			s.grow()
		}
		bit := &s.taken[chunk][word%len(bitmap{})]
		if *bit == ^uint64(0) {
			continue
		}
		i := bits.TrailingZeros64(^*bit)
		*bit |= 1 << i
		slot := word*64 + i
		s.lowest = slot + 1
		s.count++
		s.end = max(s.end, int64(slot)+1)
		return uint32(slot), nil
	}
}

// free makes a slot free that was taken.
func (s *slab) free(slot uint32) {
	s.taken[slot/slotsPerChunk].clear(slot)
	s.lowest = min(s.lowest, int(slot))
	s.count--
}

func (s *slab) isTaken(slot uint32) bool {
	chunk := int(slot / slotsPerChunk)
	return chunk < len(s.taken) && s.taken[chunk].has(slot)
}

// unused returns the bytes of free slots that may have space on disk.
func (s *slab) unused() int64 { return (s.end - s.count) * int64(s.class.size()) }

// grow adds a chunk of free slots.
func (s *slab) grow() {
	s.taken = append(s.taken, new(bitmap))
	old := s.accessChunks.Load()
	chunks := append((*old)[:len(*old):len(*old)], new(accessesChunk))
	s.accessChunks.Store(&chunks)
}

// touch notes an access to a slot, at the given time.
func (s *slab) touch(slot, now uint32) {
	chunks := *s.accessChunks.Load()
	if int(slot/slotsPerChunk) >= len(chunks) {
		return // only where the index is damaged
	}
	chunk := chunks[slot/slotsPerChunk]
	// Written only if it changes: readers on several cores then share the memory.
	if chunk.times[slot%slotsPerChunk].Load() != now {
		chunk.times[slot%slotsPerChunk].Store(now)
		if !chunk.unsaved.Load() {
			chunk.unsaved.Store(true)
		}
	}
}

// time returns the time of the last access to a slot.
func (s *slab) time(slot uint32) uint32 {
	chunks := *s.accessChunks.Load()
	if int(slot/slotsPerChunk) >= len(chunks) {
		return 0
	}
	return chunks[slot/slotsPerChunk].times[slot%slotsPerChunk].Load()
}

// loadAccesses reads the times of access. What is absent, or cannot be read, counts as never
// accessed, what is to come as accessed now.
func (s *slab) loadAccesses(now uint32) {
	chunks := make([]*accessesChunk, len(s.taken))
	b := make([]byte, 4*slotsPerChunk)
	for i := range chunks {
		chunks[i] = new(accessesChunk)
		n, _ := s.accessed.ReadAt(b, int64(i)*int64(len(b)))
		for j := range n / 4 {
			chunks[i].times[j].Store(min(binary.BigEndian.Uint32(b[4*j:]), now))
		}
	}
	s.accessChunks.Store(&chunks)
}

// saveAccesses writes the times of access that have changed. They need not be durable.
func (s *slab) saveAccesses() error {
	var b [4 * slotsPerChunk]byte
	for i, chunk := range *s.accessChunks.Load() {
		if !chunk.unsaved.Swap(false) {
			continue
		}
		for j := range chunk.times {
			binary.BigEndian.PutUint32(b[4*j:], chunk.times[j].Load())
		}
		if _, err := s.accessed.WriteAt(b[:], int64(i)*int64(len(b))); err != nil {
			chunk.unsaved.Store(true)
			return err
		}
	}
	return nil
}

// truncate gives back what lies behind the last block.
func (s *slab) truncate() error {
	end := s.end * int64(s.class.size())
	if info, err := s.file.Stat(); err != nil || info.Size() <= end {
		return err
	}
	return s.file.Truncate(end)
}

// giveBack gives the space of all free slots back to the file system.
func (s *slab) giveBack() error {
	for s.end > 0 && !s.isTaken(uint32(s.end-1)) {
		s.end--
	}
	if err := s.truncate(); err != nil {
		return err
	}
	var free []uint32
	for slot := range uint32(s.end) {
		if !s.isTaken(slot) {
			free = append(free, slot)
		}
	}
	return s.punch(free)
}

// punch gives the space of free slots back to the file system, as far as they make up whole pages.
func (s *slab) punch(slots []uint32) error {
	const page = 4096
	size := int64(s.class.size())
	perPage := uint32(max(1, page/size))
	slices.Sort(slots)
	last := int64(-1)
next:
	for _, slot := range slots {
		first := slot - slot%perPage
		if int64(first) == last {
			continue
		}
		for i := first; i < first+perPage; i++ {
			if s.isTaken(i) {
				continue next
			}
		}
		last = int64(first)
		if err := files.PunchHole(s.file, int64(first)*size, int64(perPage)*size); err != nil {
			return err
		}
	}
	return nil
}
