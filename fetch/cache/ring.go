// SPDX-License-Identifier: GPL-3.0-or-later

package cache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// A ring is the file of a cache: a head, a table, and blocks.
//
// Blocks are written one behind the other, in units of 1 KiB, and from the beginning again when the
// end is reached, so that the oldest make room. The position of a block counts all units that were
// ever written before it; it tells both where the block is and whether it has been overwritten
// since.
//
// The table is a hash table of which a block's place is one bucket. An entry is a number of 8
// bytes: 40 bits of position, a bit for the block size, and 23 bits of the reference; 0 is no
// entry. Entries are written after their blocks. Who finds one must check what it leads to: the
// block may have been overwritten, or never written before the power failed, or be another one.
//
// Only the counter of units is written under a lock, which the kernel takes from a process that
// dies.
type ring struct {
	file    *os.File
	units   uint64        // room for blocks, in units
	buckets uint64        // of the table
	data    int64         // where blocks begin in the file
	head    atomic.Uint64 // the counter of units, as it was last seen
}

const (
	magic      = "guix-substitute-eris blocks 1\n"
	headLength = 4096 // page, so that buckets and blocks lie well
	// In the head, little-endian: the number of units, that of buckets, the CRC-32C of all before
	// it, and, beyond that, the counter of units.
	unitsAt   = 32
	bucketsAt = 40
	checkAt   = 48
	counterAt = 64

	unit         = 1 << 10
	bucketSlots  = 64
	bucketLength = 8 * bucketSlots
	// Three quarters of the slots are enough for all units; then about one block of a thousand
	// finds its bucket full of younger ones.
	slotsPerUnit = 4.0 / 3

	positionBits = 40
	tagBits      = 24 // with the bit for the size

	fileName = "blocks"

	// leastBytes is the least size of a cache.
	leastBytes = 1 << 20
	// mostBytes is the greatest: a quarter of what positions can tell apart.
	mostBytes = unit << (positionBits - 2)
)

var (
	errNotOurs = errors.New("is not safe: it must belong to the user of this process, and nobody else may write to it")
	errOther   = errors.New("the file is not a cache of this size")
)

// openRing opens the file in a directory, or makes it. A file that is not a ring of the given size
// is replaced.
func openRing(directory string, maxBytes int64) (*ring, error) {
	if maxBytes < leastBytes || maxBytes > mostBytes {
		return nil, fmt.Errorf("a cache of %d bytes is not possible", maxBytes)
	}
	r := &ring{}
	r.units = uint64(float64(maxBytes-headLength-bucketLength) / (unit + 8*slotsPerUnit))
	r.buckets = (uint64(float64(r.units)*slotsPerUnit) + bucketSlots - 1) / bucketSlots
	r.data = headLength + int64(r.buckets*bucketLength)
	if err := files.MakeDirectory(directory); err != nil {
		return nil, err
	}
	if info, err := os.Stat(directory); err != nil {
		return nil, err
	} else if !ours(info) {
		return nil, errNotOurs
	}
	path := filepath.Join(directory, fileName)
	if err := r.adopt(path); err != nil {
		files.RemoveAbandoned(directory)
		// Of those who find none, one makes it for all.
		none := errors.Is(err, fs.ErrNotExist)
		if err := files.Write(path, 0o600, files.Options{New: none}, r.headBytes()); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		if err := r.adopt(path); err != nil {
			return nil, err
		}
	}
	unix.Fadvise(int(r.file.Fd()), 0, r.data, unix.FADV_WILLNEED) // only to be faster
	return r, nil
}

// adopt opens the file that is there, if it is one that can be used.
func (r *ring) adopt(path string) error {
	f, info, err := files.OpenRegular(path, os.O_RDWR|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	head := make([]byte, headLength)
	_, err = f.ReadAt(head, 0)
	counter := binary.LittleEndian.Uint64(head[counterAt:])
	if err == nil && (!ours(info) || !bytes.Equal(head[:counterAt], r.headBytes()[:counterAt]) || counter < r.units || counter > 1<<62) {
		err = errOther
	}
	if err == nil && info.Size() < r.data {
		// It is new or was cut. Others may have made it longer meanwhile, so it is never cut here.
		_, err = f.WriteAt([]byte{0}, r.data-1)
	}
	if err != nil {
		f.Close()
		return err
	}
	r.file = f
	r.head.Store(counter)
	return nil
}

func (r *ring) headBytes() []byte {
	head := make([]byte, headLength)
	copy(head, magic)
	binary.LittleEndian.PutUint64(head[unitsAt:], r.units)
	binary.LittleEndian.PutUint64(head[bucketsAt:], r.buckets)
	binary.LittleEndian.PutUint32(head[checkAt:], crc32.Checksum(head[:checkAt], crc32.MakeTable(crc32.Castagnoli)))
	// Not from 0 on, so that no entry is 0.
	binary.LittleEndian.PutUint64(head[counterAt:], r.units)
	return head
}

// ours reports whether only the user of this process can write to a file.
func ours(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(stat.Uid) == os.Geteuid() && info.Mode()&0o022 == 0
}

// tag returns what an entry has of a reference and a size.
func tag(ref *eris.Reference, size eris.BlockSize) uint64 {
	t := uint64(binary.LittleEndian.Uint32(ref[16:]) >> (32 - tagBits + 1) << 1)
	if size == eris.BlockSize32KiB {
		t |= 1
	}
	return t
}

func (r *ring) bucket(ref *eris.Reference) int64 {
	high, _ := bits.Mul64(binary.LittleEndian.Uint64(ref[:]), r.buckets)
	return headLength + int64(high*bucketLength)
}

// age returns how many units have been written since a position. It may be below 0, where another
// process has written more than is known here.
func (r *ring) age(position uint64) int64 {
	const unused = 64 - positionBits
	return int64((r.head.Load()-position)<<unused) >> unused
}

// live reports whether a position may not have been overwritten.
func (r *ring) live(position uint64) bool {
	age := r.age(position)
	return -int64(r.units) <= age && age <= int64(r.units)
}

// find returns the position of a block, of which it knows the last bits. There is none in most
// cases where there is no block, and there may be one.
func (r *ring) find(ref *eris.Reference, size eris.BlockSize) (position uint64, ok bool, err error) {
	var b [bucketLength]byte
	if _, err := r.file.ReadAt(b[:], r.bucket(ref)); err != nil {
		return 0, false, err
	}
	want := tag(ref, size)
	for i := 0; i < bucketLength; i += 8 {
		entry := binary.LittleEndian.Uint64(b[i:])
		if entry&(1<<tagBits-1) == want && entry != 0 && r.live(entry>>tagBits) {
			return entry >> tagBits, true, nil
		}
	}
	return 0, false, nil
}

// insert makes the entry of a block at a position, in place of the one that it has, or of none, or
// of the oldest. That another process does the same in between may cost one of the two entries.
func (r *ring) insert(ref *eris.Reference, size eris.BlockSize, position uint64) error {
	var b [bucketLength]byte
	at := r.bucket(ref)
	if _, err := r.file.ReadAt(b[:], at); err != nil {
		return err
	}
	want := tag(ref, size)
	best, oldest := 0, int64(-1)<<62
	for i := 0; i < bucketLength; i += 8 {
		entry := binary.LittleEndian.Uint64(b[i:])
		if entry != 0 && entry&(1<<tagBits-1) == want {
			best = i
			break
		}
		age := int64(1) << 62
		if entry != 0 && r.live(entry>>tagBits) {
			age = r.age(entry >> tagBits)
		}
		if age > oldest {
			best, oldest = i, age
		}
	}
	var entry [8]byte
	binary.LittleEndian.PutUint64(entry[:], position<<tagBits|want)
	_, err := r.file.WriteAt(entry[:], at+int64(best))
	return err
}

// write writes blocks, which lie one behind the other in data, and then their entries.
func (r *ring) write(refs []eris.Reference, blocks [][]byte, data []byte) error {
	position, err := r.reserve(uint64(len(data) / unit))
	if err != nil {
		return err
	}
	if _, err := r.file.WriteAt(data, r.offset(position)); err != nil {
		return err
	}
	for i, block := range blocks {
		if err := r.insert(&refs[i], eris.BlockSize(len(block)), position); err != nil {
			return err
		}
		position += uint64(len(block)) / unit
	}
	return nil
}

func (r *ring) offset(position uint64) int64 {
	return r.data + int64(position%r.units*unit)
}

// read fills block with what is at a position. It returns false if the file ends before that.
func (r *ring) read(block []byte, position uint64) (bool, error) {
	position = r.head.Load() - uint64(r.age(position)) // all bits of it
	_, err := r.file.ReadAt(block, r.offset(position))
	if err == io.EOF {
		return false, nil
	}
	return err == nil, err
}

// refresh learns how much other processes have written.
func (r *ring) refresh() error {
	var b [8]byte
	if _, err := r.file.ReadAt(b[:], counterAt); err != nil {
		return err
	}
	r.head.Store(binary.LittleEndian.Uint64(b[:]))
	return nil
}

// lockWait is how long reserve waits for other processes, which hold the lock for some
// microseconds. One that has been stopped meanwhile must not stop the others.
const lockWait = 100 * time.Millisecond

var errRoom = errors.New("the file system is almost full")

// reserve returns the position of n units that are to be written next. It does not let the file
// grow where the file system is almost full, but begins again at the beginning.
func (r *ring) reserve(n uint64) (position uint64, err error) {
	if err := files.LockFile(r.file, lockWait); err != nil {
		return 0, err
	}
	defer files.UnlockFile(r.file)
	if err := r.refresh(); err != nil {
		return 0, err
	}
	head := r.head.Load()
	offset := head % r.units
	limit := r.units
	info, err := r.file.Stat()
	if err != nil {
		return 0, err
	}
	if used := max(info.Size()-r.data, 0) / unit; min(offset+n, r.units) > uint64(used) && !roomy(r.file) {
		limit = uint64(used)
	}
	if n > limit {
		return 0, errRoom
	}
	if offset+n > limit {
		head += r.units - offset
	}
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], head+n)
	if _, err := r.file.WriteAt(b[:], counterAt); err != nil {
		return 0, err
	}
	r.head.Store(head + n)
	return head, nil
}

// mostReserve bounds what is left free of a large file system, in bytes.
const mostReserve = 512 << 20

// roomy reports whether the file system of a file is less than nine tenths full, or has 512 MiB of
// room: a cache must not take the last of it from what is to be kept.
func roomy(f *os.File) bool {
	var s unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &s); err != nil {
		return true // writing tells
	}
	free := s.Bavail * uint64(s.Bsize)
	return free >= min(s.Blocks/10*uint64(s.Bsize), mostReserve)
}
