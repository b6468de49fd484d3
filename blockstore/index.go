// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"

	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// The index is a bbolt database with three buckets:
//
//	blocks  reference                              → location
//	slots   class (1 byte), chunk number (4 bytes) → a bit for each slot, set if it is taken
//	store   "state"                                → state
//
// All numbers are big-endian but for the words of the bit sets, which are little-endian. Each value
// ends in a CRC-32C of the key and of what stands before it: see seal.
var (
	blocksBucket = []byte("blocks")
	slotsBucket  = []byte("slots")
	storeBucket  = []byte("store")
	stateKey     = []byte("state")
)

const (
	indexName     = "index.db"
	formatVersion = 2
	locationSize  = 8
	stateSize     = 4 + 2*8
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

// location says where a block is, and how to tell that it is there: from the highest bit on 32 bits
// of checksum, 1 bit of class, 31 bits of slot. It fits a word, so that it can be read and written
// at once.
type location uint64

const maxSlots = 1 << 31

func makeLocation(sum uint32, c class, slot uint32) location {
	return location(uint64(sum)<<32 | uint64(c)<<31 | uint64(slot))
}

func (l location) sum() uint32  { return uint32(l >> 32) }
func (l location) class() class { return class(l >> 31 & 1) }
func (l location) slot() uint32 { return uint32(l) & (maxSlots - 1) }

// checksum returns the CRC-32C of a reference and a block, or of a key and a value. It finds
// accidents; it is easy to make another reference with the same one.
func checksum(key, value []byte) uint32 {
	return crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, value)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// seal appends a checksum to a value of the index.
func seal(key, value []byte) []byte {
	return binary.BigEndian.AppendUint32(value, checksum(key, value))
}

// unseal returns the value without the checksum, if that and the length are right.
func unseal(key, sealed []byte, length int) ([]byte, error) {
	if len(sealed) != length+4 {
		return nil, fmt.Errorf("%w: value of %d bytes for key %x", ErrDamaged, len(sealed), key)
	}
	value := sealed[:length]
	if checksum(key, value) != binary.BigEndian.Uint32(sealed[length:]) {
		return nil, fmt.Errorf("%w: value of key %x has another checksum", ErrDamaged, key)
	}
	return value, nil
}

// appendLocation appends the value for a block.
func appendLocation(b []byte, ref *eris.Reference, l location) []byte {
	return seal(ref[:], binary.BigEndian.AppendUint64(b, uint64(l)))
}

// parseLocation reads what appendLocation wrote.
func parseLocation(ref, b []byte) (location, error) {
	b, err := unseal(ref, b, locationSize)
	if err != nil {
		return 0, err
	}
	return location(binary.BigEndian.Uint64(b)), nil
}

// state is what the index has of the store as a whole: how many blocks there are.
type state struct{ blocks [classes]int64 }

// bytes returns the bytes of all blocks.
func (s *state) bytes() int64 {
	return s.blocks[class1KiB]*int64(class1KiB.size()) + s.blocks[class32KiB]*int64(class32KiB.size())
}

func (s *state) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, formatVersion)
	b, _ = binary.Append(b, binary.BigEndian, s.blocks[:]) // never fails
	return seal(stateKey, b)
}

// parseState reads what state.append wrote.
func parseState(b []byte) (s state, err error) {
	if len(b) >= 4 && binary.BigEndian.Uint32(b) != formatVersion {
		return s, fmt.Errorf("%w: its format is not %d", ErrDamaged, formatVersion)
	}
	if b, err = unseal(stateKey, b, stateSize); err != nil {
		return s, err
	}
	for c := range classes {
		blocks := binary.BigEndian.Uint64(b[4+8*c:])
		if blocks > maxSlots {
			return s, fmt.Errorf("%w: %d blocks", ErrDamaged, blocks)
		}
		s.blocks[c] = int64(blocks)
	}
	return s, nil
}

// slotKey returns the key of a chunk of slots in slotsBucket.
func slotKey(c class, chunk int) []byte {
	return binary.BigEndian.AppendUint32(append(make([]byte, 0, slotKeySize), byte(c)), uint32(chunk))
}

// parseChunk reads a bit set and its key.
func parseChunk(k, v []byte) (class, *bitmap, error) {
	v, err := unseal(k, v, slotsPerChunk/8)
	if err != nil {
		return 0, nil, err
	}
	if len(k) != slotKeySize || k[0] >= byte(classes) {
		return 0, nil, fmt.Errorf("%w: key %x of slots", ErrDamaged, k)
	}
	b := new(bitmap)
	_, err = binary.Decode(v, binary.LittleEndian, b[:])
	return class(k[0]), b, err
}

// append appends the value for a chunk of slots.
func (b *bitmap) append(to, key []byte) []byte {
	to, _ = binary.Append(to, binary.LittleEndian, b[:]) // never fails
	return seal(key, to)
}

// openIndex opens the index, which must exist.
func openIndex(path string) (*bbolt.DB, error) {
	var db *bbolt.DB
	err := guard(func() (err error) {
		db, err = bbolt.Open(path, 0o600, &bbolt.Options{
			Timeout:         1, // it is locked by nobody: the directory is
			FreelistType:    bbolt.FreelistMapType,
			InitialMmapSize: 64 << 20, // the map is made anew for each doubling beyond that
			NoStatistics:    true,
		})
		return err
	})
	// All that is not the operating system's is about what the file holds: it is too short, or not
	// a database.
	if err != nil && !errors.As(err, new(syscall.Errno)) && !errors.Is(err, bbolterrors.ErrTimeout) && !errors.Is(err, ErrDamaged) {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return db, err
}

// makeIndex makes a new index, all or nothing, in the place of one that may be there. The function
// enters the blocks and returns how many.
func makeIndex(directory string, enter func(*bbolt.DB) (state, error)) (s state, err error) {
	path := filepath.Join(directory, indexName)
	if err := os.Remove(path + ".new"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return s, err
	}
	db, err := bbolt.Open(path+".new", 0o600, &bbolt.Options{Timeout: 1, FreelistType: bbolt.FreelistMapType, NoSync: true})
	if err != nil {
		return s, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(path+".new"))
		}
	}()
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{blocksBucket, slotsBucket, storeBucket} {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		s, err = enter(db)
	}
	if err == nil {
		err = db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(storeBucket).Put(stateKey, s.append(nil)) })
	}
	if err == nil {
		err = db.Sync()
	}
	if err = errors.Join(err, db.Close()); err != nil {
		return s, err
	}
	if err := os.Remove(filepath.Join(directory, sumName)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return s, err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return s, err
	}
	return s, files.SyncDirectory(directory)
}

// lookup returns the location of a block.
func (s *Store) lookup(ref *eris.Reference) (l location, found bool, err error) {
	err = s.view(func(tx *bbolt.Tx) (err error) {
		l, found, err = locate(tx.Bucket(blocksBucket), ref)
		return err
	})
	return l, found, err
}

// locate is lookup in a transaction.
func locate(blocks *bbolt.Bucket, ref *eris.Reference) (l location, found bool, err error) {
	v := blocks.Get(ref[:])
	if v == nil {
		return 0, false, nil
	}
	l, err = parseLocation(ref[:], v)
	return l, true, err
}

// view reads in a transaction.
func (s *Store) view(f func(*bbolt.Tx) error) error {
	return s.guard(func() error {
		tx, err := s.index.Begin(false)
		if err != nil {
			return err
		}
		defer tx.Rollback()
		return f(tx)
	})
}

// guard calls a function that uses the index, unless that was found to be damaged. If it is found
// now, no more is written, and the index loses its name, so that it is made anew when the store is
// opened the next time.
func (s *Store) guard(f func() error) error {
	if s.damaged.Load() {
		return ErrDamaged
	}
	err := guard(f)
	if errors.Is(err, ErrDamaged) && !s.damaged.Swap(true) {
		s.fail(err)
		err := os.Remove(filepath.Join(s.directory, indexName))
		s.progress.background(errors.Join(err, files.SyncDirectory(s.directory)))
	}
	return err
}

// guard calls a function that uses bbolt. bbolt panics where its file is damaged, as do its users
// where a bucket is missing, and faults where the file is shorter than it was; all become errors.
// That is sound, because all that bbolt keeps in memory is given up then.
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
