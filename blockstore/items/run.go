// SPDX-License-Identifier: GPL-3.0-or-later

package items

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"os"
	"slices"
	"sort"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

const (
	entrySize   = 16
	pageEntries = 64 // that are read at a time
	footerSize  = 44
	magic       = "ERISrun2"
	// kept1KiB and kept32KiB stand in place of a path in entries of blocks that the run has. Their
	// number is where they begin, in KiB.
	kept1KiB, kept32KiB = math.MaxUint32, math.MaxUint32 - 1
	// innerNode stands in place of a number in entries of inner nodes of small files, which have at
	// most smallFile bytes: these are encoded as a whole when such a node is asked for.
	innerNode = math.MaxUint32
	smallFile = 256 << 10
	maxPaths  = math.MaxUint32 - 1 // bytes
	maxPath   = 4096               // bytes, more than an archive can hold
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errDamaged is a run that is not what was written.
var errDamaged = errors.New("is damaged")

// entry says where a block is.
type entry struct {
	prefix       uint64 // the first bytes of the reference
	path, number uint32
}

func prefixOf(ref *eris.Reference) uint64 { return binary.BigEndian.Uint64(ref[:]) }

// kept returns the size of a block that the run has, or 0 for a leaf in a file.
func (e entry) kept() eris.BlockSize {
	switch e.path {
	case kept1KiB:
		return eris.BlockSize1KiB
	case kept32KiB:
		return eris.BlockSize32KiB
	}
	return 0
}

func (e entry) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, e.prefix)
	b = binary.BigEndian.AppendUint32(b, e.path)
	return binary.BigEndian.AppendUint32(b, e.number)
}

func parseEntry(b []byte) entry {
	return entry{binary.BigEndian.Uint64(b), binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:])}
}

func (e entry) compare(o entry) int {
	return cmp.Or(cmp.Compare(e.prefix, o.prefix), cmp.Compare(e.path, o.path), cmp.Compare(e.number, o.number))
}

// item is a store item of a run: its name, and where its blocks (in KiB) and paths begin.
type item struct {
	name        string
	block, path uint32
	gone        atomic.Bool // it was collected or changed, or another run has it
}

// run is a part of the table. Its methods are safe for concurrent use.
type run struct {
	file                   *os.File
	number                 int   // in its name
	blocks, entries, paths int64 // lengths: bytes, entries, bytes
	size                   int64 // of the file
	fences                 []uint64
	items                  []*item
	damaged                atomic.Bool
}

// load opens a run and checks it. Errors that wrap errDamaged say that it is of no use.
func load(path string, number int) (_ *run, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	r := &run{file: f, number: number}
	if err := r.check(); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// check reads the whole run but for its blocks.
func (r *run) check() error {
	info, err := r.file.Stat()
	if err != nil {
		return err
	}
	r.size = info.Size()
	var footer [footerSize]byte
	if r.size < footerSize {
		return errDamaged
	}
	if _, err := r.file.ReadAt(footer[:], r.size-footerSize); err != nil {
		return err
	}
	left := r.size - footerSize
	var lengths [4]int64
	for i := range lengths {
		n, unit := binary.BigEndian.Uint64(footer[8+8*i:]), int64(1)
		if i == 1 {
			unit = entrySize
		}
		if n > uint64(left/unit) {
			return errDamaged
		}
		lengths[i] = int64(n)
		left -= lengths[i] * unit
	}
	if left != 0 || string(footer[:8]) != magic {
		return errDamaged
	}
	r.blocks, r.entries, r.paths = lengths[0], lengths[1], lengths[2]
	sum := crc32.New(castagnoli)
	in := io.TeeReader(io.NewSectionReader(r.file, r.blocks, r.size-footerSize-r.blocks), sum)
	page := make([]byte, pageEntries*entrySize)
	for n := r.entries; n > 0; n -= pageEntries {
		page = page[:min(n, pageEntries)*entrySize]
		if _, err := io.ReadFull(in, page); err != nil {
			return err
		}
		r.fences = append(r.fences, parseEntry(page).prefix)
	}
	if _, err := io.CopyN(io.Discard, in, r.paths); err != nil {
		return err
	}
	items := make([]byte, lengths[3])
	if _, err := io.ReadFull(in, items); err != nil {
		return err
	}
	sum.Write(footer[:40])
	if sum.Sum32() != binary.BigEndian.Uint32(footer[40:]) {
		return errDamaged
	}
	return r.parseItems(items)
}

func (r *run) parseItems(b []byte) error {
	if r.blocks>>10 > math.MaxUint32 || r.paths > math.MaxUint32 {
		return errDamaged
	}
	for len(b) > 0 {
		if len(b) < 9 || len(b) < 9+int(b[8]) {
			return errDamaged
		}
		n := 9 + int(b[8])
		r.items = append(r.items, &item{block: binary.BigEndian.Uint32(b), path: binary.BigEndian.Uint32(b[4:]), name: string(b[9:n])})
		b = b[n:]
	}
	for n, i := range r.items { // what each of them has begins where the one before ends
		if block, path := r.ends(n); block < i.block || path < i.path {
			return errDamaged
		}
	}
	return nil
}

// ends returns where the blocks (in KiB) and paths of the i-th item end.
func (r *run) ends(i int) (block, path uint32) {
	if i+1 < len(r.items) {
		return r.items[i+1].block, r.items[i+1].path
	}
	return uint32(r.blocks >> 10), uint32(r.paths)
}

// owner returns the index of the item that an entry is of, -1 if there is none.
func (r *run) owner(e entry) int {
	// Items without paths, or blocks, begin where the next one does: the last of them is meant.
	n, _ := slices.BinarySearchFunc(r.items, e, func(i *item, e entry) int {
		if e.kept() != 0 && i.block > e.number || e.kept() == 0 && i.path > e.path {
			return 1
		}
		return -1
	})
	return n - 1
}

// find appends the entries with the beginning of a reference, of items that are not gone.
func (r *run) find(found []candidate, prefix uint64) ([]candidate, error) {
	page, _ := slices.BinarySearch(r.fences, prefix)
	page = max(0, page-1) // the page before may end with the first of them
	var memory [pageEntries * entrySize]byte
	for ; page < len(r.fences) && r.fences[page] <= prefix; page++ {
		first := int64(page) * pageEntries
		b := memory[:min(r.entries-first, pageEntries)*entrySize]
		if _, err := r.file.ReadAt(b, r.blocks+first*entrySize); err != nil {
			return found, err
		}
		n := sort.Search(len(b)/entrySize, func(n int) bool { return parseEntry(b[n*entrySize:]).prefix >= prefix })
		for b = b[n*entrySize:]; len(b) > 0 && parseEntry(b).prefix == prefix; b = b[entrySize:] {
			e := parseEntry(b)
			if i := r.owner(e); i >= 0 && !r.items[i].gone.Load() {
				if found = append(found, candidate{r, r.items[i], e}); len(found) >= maxCandidates {
					return found, nil
				}
			}
		}
	}
	return found, nil
}

// key reads the key of a leaf of 32 KiB, one of those that begin so far behind the path of the
// entry.
func (r *run) key(key *eris.Key, e entry, behind int) error {
	at := int64(e.path) + int64(behind) + int64(e.number)*int64(len(key))
	if at+int64(len(key)) > r.paths {
		return errDamaged
	}
	_, err := r.file.ReadAt(key[:], r.blocks+r.entries*entrySize+at)
	return err
}

// path returns the path below its item of the file of an entry.
func (r *run) path(e entry) (string, error) {
	var memory [maxPath + 1]byte
	if int64(e.path) >= r.paths {
		return "", errDamaged
	}
	b := memory[:min(int64(len(memory)), r.paths-int64(e.path))]
	if _, err := r.file.ReadAt(b, r.blocks+r.entries*entrySize+int64(e.path)); err != nil {
		return "", err
	}
	n := bytes.IndexByte(b, 0)
	if n < 0 {
		return "", errDamaged
	}
	return string(b[:n]), nil
}
