// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"hash/fnv"
	"io"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// sumName is a file with the checksum of the whole index. It is there while the store is closed,
// unless the program or the machine crashed. bbolt has no checksums but for its two meta pages; and
// where the last one of these is damaged, it takes the other one, and with it the index of one
// transaction before.
const sumName = "index.sum"

// maxSumTime is how long it may take to read the index for its checksum when the store is closed.
const maxSumTime = 5 * time.Second

// closeIndex closes the index, and notes its checksum if nobody has to doubt it.
func (s *Store) closeIndex() error {
	var size int64
	err := s.view(func(tx *bbolt.Tx) error { size = tx.Size(); return nil })
	if s.damaged.Load() {
		return nil // where bbolt has panicked it may still hold one of its locks: closing would wait for ever
	}
	if err = errors.Join(err, guard(s.index.Close)); err != nil || s.Err() != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), maxSumTime)
	defer cancel()
	sum, err := s.sumIndex(ctx, size)
	if ctx.Err() != nil {
		return nil // the entries will be checked
	} else if err != nil {
		return err
	}
	return files.Replace(filepath.Join(s.directory, sumName), 0o600, files.Options{Locked: true}, func(w io.Writer) error {
		return binary.Write(w, binary.BigEndian, sum)
	})
}

// sumIndex returns the checksum of the index, up to the given size. What bbolt has in stock behind
// that does not count, and may not be there; nor may free pages at the end.
func (s *Store) sumIndex(ctx context.Context, size int64) (sum uint32, err error) {
	f, err := os.Open(filepath.Join(s.directory, indexName))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	h := crc32.New(castagnoli)
	_, err = io.CopyBuffer(nar.Until(ctx, h), io.LimitReader(f, size), make([]byte, 1<<20))
	return h.Sum32(), err
}

// checkIndex checks the whole index: against the checksum, or, where there is none, entry by entry.
// It must be called before anything is written: what a damaged index has as free may be in use.
// Besides, the checksum is good for that time only.
func (s *Store) checkIndex(ctx context.Context) error {
	if s.options.checking != nil {
		s.options.checking(ctx)
	}
	path := filepath.Join(s.directory, sumName)
	b, err := files.ReadState(path, crc32.Size)
	return s.view(func(tx *bbolt.Tx) error {
		if err != nil || len(b) != crc32.Size {
			if err := checkMeta(tx.DB()); err != nil {
				return err
			}
			// Before the entries: of pages that lead to themselves there is no end.
			if err := checkPages(ctx, tx); err != nil {
				return err
			}
			return checkEntries(ctx, tx)
		}
		sum, err := s.sumIndex(ctx, tx.Size())
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			return fmt.Errorf("%w: %w", ErrDamaged, err) // a new one will be written elsewhere
		case sum != binary.BigEndian.Uint32(b):
			return fmt.Errorf("%w: it has another checksum", ErrDamaged)
		}
		return errors.Join(os.Remove(path), files.SyncDirectory(s.directory))
	})
}

// checkMeta checks the numbers and the checksums of both meta pages (as in bbolt's internal/common:
// FNV-1a of 56 bytes behind the header of the page, which begins with its number).
func checkMeta(db *bbolt.DB) error {
	f, err := os.Open(db.Path())
	if err != nil {
		return err
	}
	defer f.Close()
	for page := range int64(2) {
		var meta [80]byte
		_, err := f.ReadAt(meta[:], page*int64(db.Info().PageSize))
		sum := fnv.New64a()
		sum.Write(meta[16:72])
		if err != nil || binary.NativeEndian.Uint64(meta[:]) != uint64(page) || sum.Sum64() != binary.NativeEndian.Uint64(meta[72:]) {
			return fmt.Errorf("%w: meta page %d is not what was written", ErrDamaged, page)
		}
	}
	return nil
}

// checkEntries reads all entries of the index. Each must be found where it is looked for, and have
// a slot of its own, and no other slot may be taken: then no block is missing.
func checkEntries(ctx context.Context, tx *bbolt.Tx) error {
	want, taken, err := loadIndex(tx)
	if err != nil {
		return err
	}
	blocks := tx.Bucket(blocksBucket)
	cursor := blocks.Cursor()
	for k, v := cursor.First(); k != nil; k, v = cursor.Next() {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		found := blocks.Get(k)
		l, err := parseLocation(k, found)
		if err != nil {
			return err
		}
		c, slot := l.class(), l.slot()
		if !bytes.Equal(found, v) || int(slot/slotsPerChunk) >= len(taken[c]) || !taken[c][slot/slotsPerChunk].has(slot) {
			return fmt.Errorf("%w: block %x is in a slot that is free, or has another block", ErrDamaged, k)
		}
		taken[c][slot/slotsPerChunk].clear(slot)
		want.blocks[c]--
	}
	for c := range classes {
		if want.blocks[c] != 0 || slotsTaken(taken[c]) != 0 {
			return fmt.Errorf("%w: %d blocks of %d bytes are missing", ErrDamaged, want.blocks[c], c.size())
		}
	}
	return nil
}

// checkPages checks that each page of the index has something of it, once, or is free, for bbolt
// writes to those that it takes for free; and that each begins with the key by which a branch leads
// to it, for by that key bbolt looks for what it puts another page in place of. (bbolt's
// internal/common: a page begins with its number, flags, of which the first is that of a branch,
// how many elements there are, and how many pages more it takes. An element has 16 bytes; the last
// 8 of one of a branch are the number of a page.)
func checkPages(ctx context.Context, tx *bbolt.Tx) error {
	f, err := os.Open(tx.DB().Path())
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, tx.DB().Info().PageSize)
	used := make([]bool, tx.Size()/int64(len(b)))
	type edge struct {
		page uint64
		key  []byte // nil if it is the first page of a bucket
	}
	todo := []edge{{page: uint64(tx.Cursor().Bucket().RootPage())}}
	err = tx.ForEach(func(_ []byte, bucket *bbolt.Bucket) error {
		if root := bucket.RootPage(); root != 0 { // or it is in the page of the root
			todo = append(todo, edge{page: uint64(root)})
		}
		return nil
	})
	if err != nil {
		return err
	}
	for len(todo) > 0 {
		page, key := todo[len(todo)-1].page, todo[len(todo)-1].key
		todo = todo[:len(todo)-1]
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if _, err := f.ReadAt(b, int64(page)*int64(len(b))); err != nil {
			return fmt.Errorf("%w: page %d: %w", ErrDamaged, page, err)
		}
		last := page + uint64(binary.NativeEndian.Uint32(b[12:]))
		for i := page; i <= last; i++ {
			if i >= uint64(len(used)) || used[i] {
				return fmt.Errorf("%w: page %d is in use twice, or beyond the end", ErrDamaged, i)
			}
			used[i] = true
		}
		if key != nil && !bytes.Equal(keyOf(b, 0), key) {
			return fmt.Errorf("%w: page %d does not begin with the key %x", ErrDamaged, page, key)
		}
		if isBranch(b) {
			for i := range int(binary.NativeEndian.Uint16(b[10:])) {
				todo = append(todo, edge{binary.NativeEndian.Uint64(b[16+16*i+8:]), bytes.Clone(keyOf(b, i))})
			}
		}
	}
	lists := 0
	for i := 2; i < len(used); i++ {
		info, err := tx.Page(i)
		switch {
		case err != nil:
			return err
		case info.Type == "freelist" && !used[i]:
			lists++
			i += info.OverflowCount
		case used[i] == (info.Type == "free"):
			return fmt.Errorf("%w: page %d is in use and free, or neither", ErrDamaged, i)
		}
	}
	if lists != 1 {
		return fmt.Errorf("%w: there are %d lists of free pages", ErrDamaged, lists)
	}
	return nil
}

func isBranch(page []byte) bool { return page[8]&1 != 0 }

// keyOf returns the key of an element of a page: it says how far behind itself that is, and how
// long; before that an element of a leaf has four bytes more.
func keyOf(page []byte, i int) []byte {
	element := page[16+16*i:]
	place := element
	if !isBranch(page) {
		place = element[4:]
	}
	key := element[binary.NativeEndian.Uint32(place):]
	return key[:binary.NativeEndian.Uint32(place[4:])]
}
