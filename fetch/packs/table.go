// SPDX-License-Identifier: GPL-3.0-or-later

package packs

import (
	"cmp"
	"encoding/binary"
	"errors"
	"slices"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dump"
)

const (
	// magic is the last thing in a table, before the end of the array that it is in.
	magic     = "ERISpack"
	entrySize = 16
	// trailerSize is of the number of entries, the magic, and the end of the array.
	trailerSize = 8 + len(magic) + 1
	// maxBlocks is how many blocks a pack may have: 512 MiB in small ones.
	maxBlocks = 1 << 19
)

var (
	errNotPack = errors.New("this is not a pack")
	errTable   = errors.New("the table of the pack is wrong")
	errCut     = errors.New("the pack ends before its blocks do")
	errTaken   = errors.New("another request has taken the block")
	errTooMany = errors.New("too many blocks for one pack")
)

// entry says where a block is. All of it that is known of the reference is its beginning.
type entry struct {
	prefix uint64
	dump.Position
}

func newEntry(ref eris.Reference, offset int64, size int) entry {
	return entry{binary.BigEndian.Uint64(ref[:]), dump.PositionOf(offset, size)}
}

// table is where the blocks of a pack are, in the order in which they stand there.
type table struct {
	entries []entry
	sorted  []uint32 // indexes of them, by prefix
}

func appendTable(b []byte, entries []entry) []byte {
	for _, e := range entries {
		b = binary.BigEndian.AppendUint64(b, e.prefix)
		b = binary.BigEndian.AppendUint64(b, uint64(e.Position))
	}
	b = binary.BigEndian.AppendUint64(b, uint64(len(entries)))
	return append(b, magic...)
}

// tableLength returns how many bytes of the end of a pack of total bytes have the table, of which
// tail is the last.
func tableLength(tail []byte, total int64) (int, error) {
	if len(tail) < trailerSize || string(tail[len(tail)-trailerSize+8:]) != magic+"\xff" {
		return 0, errNotPack
	}
	count := binary.BigEndian.Uint64(tail[len(tail)-trailerSize:])
	if count > maxBlocks {
		return 0, errTooMany
	}
	if n := int(count)*entrySize + trailerSize; int64(n) <= total {
		return n, nil
	}
	return 0, errTable
}

// parseTable reads the table from the last bytes of a pack of total bytes, as many as tableLength
// says.
func parseTable(b []byte, total int64) (*table, error) {
	count := (len(b) - trailerSize) / entrySize
	t := &table{entries: make([]entry, count), sorted: make([]uint32, count)}
	end := int64(0)
	for i := range t.entries {
		at := b[i*entrySize:]
		e := entry{binary.BigEndian.Uint64(at), dump.Position(binary.BigEndian.Uint64(at[8:]))}
		if e.Offset() < end || e.Offset() > total-int64(len(b)+e.Size()) {
			return nil, errTable
		}
		end = e.End()
		t.entries[i], t.sorted[i] = e, uint32(i)
	}
	slices.SortFunc(t.sorted, func(a, b uint32) int { return cmp.Compare(t.entries[a].prefix, t.entries[b].prefix) })
	return t, nil
}

func (t *table) find(ref eris.Reference) (int, bool) {
	prefix := binary.BigEndian.Uint64(ref[:])
	i, ok := slices.BinarySearchFunc(t.sorted, prefix, func(i uint32, prefix uint64) int { return cmp.Compare(t.entries[i].prefix, prefix) })
	if !ok {
		return 0, false
	}
	return int(t.sorted[i]), true
}
