// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"

	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// The index is a bbolt database with three buckets:
//
//	blocks  reference                              → record
//	slots   class (1 byte), chunk number (4 bytes) → a bit per slot of the chunk, set if the slot is taken
//	store   "state"                                → state
//
// All numbers are big-endian but for the words of the bit sets, which are little-endian.
var (
	blocksBucket = []byte("blocks")
	slotsBucket  = []byte("slots")
	storeBucket  = []byte("store")
	stateKey     = []byte("state")
)

const (
	indexName     = "index.db"
	formatVersion = 1
	recordSize    = 12
	stateSize     = 4 + 4 + 4*8
	slotKeySize   = 5
)

// class is a block size, as an index.
type class uint8

const (
	class1KiB class = iota
	class32KiB
	classes
)

func (c class) size() int {
	if c == class1KiB {
		return int(eris.BlockSize1KiB)
	}
	return int(eris.BlockSize32KiB)
}

// classOf returns the class of blocks of so many bytes, which must be a block size.
func classOf(size int) class {
	if size == int(eris.BlockSize1KiB) {
		return class1KiB
	}
	return class32KiB
}

// location says where a block is, and how to tell that it is there: from the highest bit on 32 bits of checksum, 1 bit of
// class, 31 bits of slot. It fits a word, so that it can be read and written at once.
type location uint64

const maxSlots = 1 << 31

func makeLocation(sum uint32, c class, slot uint32) location {
	return location(uint64(sum)<<32 | uint64(c)<<31 | uint64(slot))
}

func (l location) sum() uint32  { return uint32(l >> 32) }
func (l location) class() class { return class(l >> 31 & 1) }
func (l location) slot() uint32 { return uint32(l) & (maxSlots - 1) }

// checksum returns the CRC-32C of a block, bound to its reference: the bytes of another block, whole and sound, do not pass.
func checksum(ref eris.Reference, block []byte) uint32 {
	return crc32.Update(0, castagnoli, block) ^ binary.BigEndian.Uint32(ref[len(ref)-4:])
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// record is what the index has of a block.
type record struct {
	location location
	pin      uint32 // the block is pinned if this is state.pin
}

func (r record) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(r.location))
	return binary.BigEndian.AppendUint32(b, r.pin)
}

// parseRecord reads what record.append wrote.
func parseRecord(b []byte) (record, error) {
	if len(b) != recordSize {
		return record{}, fmt.Errorf("%w: record of %d bytes", ErrDamaged, len(b))
	}
	return record{location(binary.BigEndian.Uint64(b)), binary.BigEndian.Uint32(b[8:])}, nil
}

// state is what the index has of the store as a whole.
type state struct {
	pin    uint32         // in records of pinned blocks; raised to unpin them all; never 0
	blocks [classes]int64 // how many blocks there are
	pinned [classes]int64 // how many of them are pinned
}

// bytes returns the bytes of all blocks.
func (s *state) bytes() int64 { return bytesOf(s.blocks) }

func bytesOf(blocks [classes]int64) int64 {
	return blocks[class1KiB]*int64(class1KiB.size()) + blocks[class32KiB]*int64(class32KiB.size())
}

func (s *state) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, formatVersion)
	b = binary.BigEndian.AppendUint32(b, s.pin)
	for c := range classes {
		b = binary.BigEndian.AppendUint64(b, uint64(s.blocks[c]))
		b = binary.BigEndian.AppendUint64(b, uint64(s.pinned[c]))
	}
	return b
}

// parseState reads what state.append wrote.
func parseState(b []byte) (state, error) {
	var s state
	if len(b) < 4 {
		return s, fmt.Errorf("%w: no state", ErrDamaged)
	}
	if version := binary.BigEndian.Uint32(b); version != formatVersion {
		return s, fmt.Errorf("format %d is not known to this version of the program", version)
	}
	if len(b) != stateSize {
		return s, fmt.Errorf("%w: state of %d bytes", ErrDamaged, len(b))
	}
	s.pin = binary.BigEndian.Uint32(b[4:])
	b = b[8:]
	for c := range classes {
		blocks, pinned := binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])
		if blocks > maxSlots || pinned > blocks {
			return s, fmt.Errorf("%w: state of %d blocks, %d pinned", ErrDamaged, blocks, pinned)
		}
		s.blocks[c], s.pinned[c] = int64(blocks), int64(pinned)
		b = b[16:]
	}
	if s.pin == 0 {
		return s, fmt.Errorf("%w: state without pin", ErrDamaged)
	}
	return s, nil
}

// slotKey returns the key of a chunk of slots in slotsBucket.
func slotKey(c class, chunk int) []byte {
	return binary.BigEndian.AppendUint32(append(make([]byte, 0, slotKeySize), byte(c)), uint32(chunk))
}

// openIndex opens the index, which must exist.
func openIndex(path string) (*bbolt.DB, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, err
	}
	var db *bbolt.DB
	err := guard(func() (err error) {
		mapped := 1 << 30 // address space, not memory: the map is rarely made anew while the index grows
		if math.MaxInt == math.MaxInt32 {
			mapped = 64 << 20
		}
		db, err = bbolt.Open(path, 0o600, &bbolt.Options{
			Timeout:         1, // it is locked by nobody: see lockDirectory
			FreelistType:    bbolt.FreelistMapType,
			InitialMmapSize: mapped,
			NoStatistics:    true,
		})
		return err
	})
	if err != nil {
		if errors.Is(err, bbolterrors.ErrInvalid) || errors.Is(err, bbolterrors.ErrChecksum) || errors.Is(err, bbolterrors.ErrVersionMismatch) {
			err = fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		return nil, err
	}
	return db, nil
}

// createIndex makes an index without blocks, all or nothing.
func createIndex(directory string) error {
	temporary := filepath.Join(directory, indexName+".new")
	if err := os.Remove(temporary); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	db, err := bbolt.Open(temporary, 0o600, &bbolt.Options{Timeout: 1, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{blocksBucket, slotsBucket, storeBucket} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return tx.Bucket(storeBucket).Put(stateKey, (&state{pin: 1}).append(nil))
	})
	if err = errors.Join(err, db.Close()); err != nil {
		return err
	}
	return installIndex(directory)
}

// installIndex puts a new, synced index in the place of the old one.
func installIndex(directory string) error {
	path := filepath.Join(directory, indexName)
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	return syncDirectory(directory)
}

// lookup returns the record of a block.
func (s *Store) lookup(ref *eris.Reference) (r record, found bool, err error) {
	err = s.view(func(tx *bbolt.Tx) (err error) {
		bucket := tx.Bucket(blocksBucket)
		if bucket == nil {
			return fmt.Errorf("%w: no blocks", ErrDamaged)
		}
		if v := bucket.Get(ref[:]); v != nil {
			found = true
			r, err = parseRecord(v)
		}
		return err
	})
	return r, found, err
}

// view reads in a transaction.
func (s *Store) view(f func(*bbolt.Tx) error) error {
	if s.broken.Load() {
		return ErrDamaged
	}
	began := false
	err := guard(func() error {
		tx, err := s.index.Begin(false)
		began = true
		if err != nil {
			return err
		}
		defer tx.Rollback()
		return f(tx)
	})
	if !began {
		// bbolt panicked while it held its locks. Whoever asked it again would wait for ever.
		s.broken.Store(true)
		s.fail(err)
	}
	return err
}

// guard calls a function that uses bbolt. bbolt panics where its file is damaged, and faults where the file is shorter than
// it was; both become errors. That is sound, because all that bbolt keeps in memory is given up then.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", ErrDamaged, p)
		}
	}()
	return f()
}

// loadIndex reads the state and the bit sets of slots.
func loadIndex(tx *bbolt.Tx) (s state, taken [classes][]*bitmap, err error) {
	store, slots := tx.Bucket(storeBucket), tx.Bucket(slotsBucket)
	if store == nil || slots == nil || tx.Bucket(blocksBucket) == nil {
		return s, taken, fmt.Errorf("%w: a bucket is missing", ErrDamaged)
	}
	if s, err = parseState(store.Get(stateKey)); err != nil {
		return s, taken, err
	}
	err = slots.ForEach(func(k, v []byte) error {
		c, b, err := parseChunk(k, v)
		if err != nil {
			return err
		}
		// Chunks are added one after the other, and never removed.
		if chunk := binary.BigEndian.Uint32(k[1:]); int(chunk) != len(taken[c]) {
			return fmt.Errorf("%w: chunk %d of slots after %d", ErrDamaged, chunk, len(taken[c]))
		}
		taken[c] = append(taken[c], b)
		return nil
	})
	return s, taken, err
}

// parseChunk reads a bit set and its key.
func parseChunk(k, v []byte) (class, *bitmap, error) {
	if len(k) != slotKeySize || k[0] >= byte(classes) || len(v) != slotsPerChunk/8 {
		return 0, nil, fmt.Errorf("%w: chunk of slots of %d, %d bytes", ErrDamaged, len(k), len(v))
	}
	b := new(bitmap)
	for i := range b {
		b[i] = binary.LittleEndian.Uint64(v[8*i:])
	}
	return class(k[0]), b, nil
}

func (b *bitmap) append(to []byte) []byte {
	for _, word := range b {
		to = binary.LittleEndian.AppendUint64(to, word)
	}
	return to
}
