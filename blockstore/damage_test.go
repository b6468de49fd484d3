// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"

	"go.etcd.io/bbolt"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// A store to be damaged has so many blocks.
const (
	damage1KiB  = 200
	damage32KiB = 8
)

// damageTemplate makes a store. It returns its files, and the references of all blocks.
func damageTemplate(t *testing.T) (map[string][]byte, []eris.Reference) {
	t.Helper()
	directory := t.TempDir()
	s := testOpen(t, directory, Options{})
	refs := putMany(t, s, eris.BlockSize1KiB, 0, damage1KiB)
	refs = append(refs, putMany(t, s, eris.BlockSize32KiB, 0, damage32KiB)...)
	var used int64
	must(t, s.view(func(tx *bbolt.Tx) error { used = tx.Size(); return nil }))
	must(t, s.Close())
	files := make(map[string][]byte)
	for _, name := range []string{indexName, sumName, "blocks-1k", "blocks-32k", "accessed-1k", "accessed-32k"} {
		var err error
		files[name], err = os.ReadFile(filepath.Join(directory, name))
		must(t, err)
	}
	files[indexName] = files[indexName][:used] // what bbolt has in stock is of no interest
	return files, refs
}

func writeFiles(t *testing.T, directory string, files map[string][]byte) {
	t.Helper()
	for name, content := range files {
		must(t, os.WriteFile(filepath.Join(directory, name), content, 0o600))
	}
}

// findPage returns the number of the first page of a type in the index of a store.
func findPage(t *testing.T, directory, kind string) (page int) {
	t.Helper()
	index, err := openIndex(filepath.Join(directory, indexName))
	must(t, err)
	defer index.Close()
	must(t, index.View(func(tx *bbolt.Tx) error {
		for info, err := tx.Page(page); info.Type != kind; info, err = tx.Page(page) {
			must(t, err)
			page++
		}
		return nil
	}))
	return page
}

// start opens a store as a server does: where the index cannot be used it is made anew.
func start(t *testing.T, directory string) *Store {
	t.Helper()
	s, err := Open(directory, Options{hintBytes: 64})
	if errors.Is(err, ErrDamaged) {
		_, err = Rebuild(t.Context(), directory)
		must(t, err)
		s, err = Open(directory, Options{hintBytes: 64})
	}
	must(t, err)
	return s
}

// readAll reads blocks of a damaged store and returns how many it got. None may be wrong.
func readAll(t *testing.T, s *Store, refs []eris.Reference) (there int) {
	t.Helper()
	for _, ref := range refs {
		_, err := fetch.Get(t.Context(), s, ref, eris.BlockSize1KiB, nil)
		if errors.Is(err, eris.ErrNotFound) {
			_, err = fetch.Get(t.Context(), s, ref, eris.BlockSize32KiB, nil)
		}
		if errors.As(err, new(*eris.BlockError)) {
			t.Errorf("wrong bytes were served: %v", err)
		}
		if err == nil {
			there++
		}
	}
	return there
}

// wholeBlocks returns which blocks are in the slabs, and where.
func wholeBlocks(t *testing.T, directory string) map[eris.Reference]location {
	t.Helper()
	whole := make(map[eris.Reference]location)
	for c := range classes {
		name, _ := slabNames(c)
		slab, err := os.ReadFile(filepath.Join(directory, name))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		for _, f := range findBlocks(slab[:len(slab)-len(slab)%c.size()], c, 0) {
			whole[f.ref] = f.location
		}
	}
	return whole
}

// doDamage damages one of the files of a store, mostly the index. It returns what it did.
func doDamage(t *testing.T, directory string, random *rand.Rand) string {
	t.Helper()
	name := []string{indexName, indexName, indexName, indexName, "blocks-1k", "blocks-32k", "accessed-1k"}[random.IntN(7)]
	path := filepath.Join(directory, name)
	b, err := os.ReadFile(path)
	must(t, err)
	page := func() []byte {
		i := random.IntN(len(b)/4096) * 4096
		return b[i : i+4096]
	}
	what := ""
	switch random.IntN(10) {
	case 0, 1, 2:
		clear(page())
		what = "page zeroed"
	case 3, 4, 5:
		for range 1 << random.IntN(8) {
			b[random.IntN(len(b))] ^= 1 << random.IntN(8)
		}
		what = "bits flipped"
	case 6:
		b = b[:random.IntN(len(b))]
		what = "cut"
	case 7, 8:
		one, other := page(), page()
		kept := bytes.Clone(one)
		copy(one, other)
		copy(other, kept)
		what = "pages swapped"
	case 9:
		must(t, os.Remove(path))
		return name + ": missing"
	}
	writeFiles(t, directory, map[string][]byte{name: b})
	return name + ": " + what
}

// Whatever happens to the files: no wrong byte is served; after one restart at most, each block
// whose bytes are there is got; and if none is needed, it is got before.
func TestRepair(t *testing.T) {
	rounds := 200
	if strconv.IntSize == 32 {
		rounds = 30 // an index in which bbolt has panicked stays mapped, and 40 of them are all memory
	}
	if n, err := strconv.Atoi(os.Getenv("ERIS_DAMAGE_ROUNDS")); err == nil {
		rounds = n
	}
	template, refs := damageTemplate(t)
	// In memory where possible: waiting for a disk is most of the time else.
	parent, err := os.MkdirTemp("/dev/shm", "")
	if err != nil {
		parent = t.TempDir()
	}
	defer os.RemoveAll(parent)
	var restarts atomic.Int64
	t.Run("rounds", func(t *testing.T) {
		for round := range rounds {
			t.Run(fmt.Sprint(round), func(t *testing.T) {
				t.Parallel()
				directory := filepath.Join(parent, fmt.Sprint(round))
				must(t, os.Mkdir(directory, 0o700))
				writeFiles(t, directory, template)
				if round%2 == 1 {
					os.Remove(filepath.Join(directory, sumName)) // as after a crash
				}
				before := wholeBlocks(t, directory)
				t.Log(doDamage(t, directory, rand.New(rand.NewPCG(uint64(round), 3))))
				after := wholeBlocks(t, directory)
				if repair(t, directory, slices.DeleteFunc(slices.Clone(refs), func(ref eris.Reference) bool {
					return after[ref] != before[ref] // it is lost, or in another place, which may be taken by another one
				})) {
					restarts.Add(1)
				}
			})
		}
	})
	if n := restarts.Load(); n < int64(rounds)/20 {
		t.Errorf("only %d of %d stores were started again", n, rounds)
	}
}

// repair uses a damaged store that still has the bytes of some blocks, and starts it again. It
// reports whether that was needed.
func repair(t *testing.T, directory string, refs []eris.Reference) bool {
	s := start(t, directory)
	readAll(t, s, refs)
	// Nothing is stored before the index has been checked.
	for i := range 3 {
		ref, block := testBlock(1000+i, eris.BlockSize1KiB)
		if err := s.Put(t.Context(), ref, block); err == nil {
			refs = append(refs, ref)
		}
	}
	there, damage := readAll(t, s, refs), s.Err()
	if damage == nil && there < len(refs) {
		t.Errorf("%d blocks of %d are there, and nobody says so", there, len(refs))
	}
	if damage != nil && !errors.Is(damage, ErrDamaged) {
		t.Error(damage)
	}
	s.Close() // may or may not say something

	s = start(t, directory)
	mustPut(t, s, 2000, eris.BlockSize1KiB)
	if there := readAll(t, s, refs); there < len(refs) || s.Err() != nil {
		t.Errorf("%d blocks of %d are there after a restart, %v", there, len(refs), s.Err())
	}
	must(t, s.Close())
	return damage != nil
}

// TestDamagedFreeList has the index take a page for free that is in use, or one of its meta pages
// be a copy of the other, after a crash: no block is lost, although all entries are found at first.
func TestDamagedFreeList(t *testing.T) {
	template, refs := damageTemplate(t)
	parent := t.TempDir()
	writeFiles(t, parent, template)
	list := findPage(t, parent, "freelist")
	good := template[indexName]
	pages := len(good) / os.Getpagesize()
	damage := func(name string, change func(index []byte)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			directory := filepath.Join(parent, name)
			must(t, os.Mkdir(directory, 0o700))
			writeFiles(t, directory, template)
			must(t, os.Remove(filepath.Join(directory, sumName)))
			index := bytes.Clone(good)
			change(index)
			writeFiles(t, directory, map[string][]byte{indexName: index})
			repair(t, directory, slices.Clone(refs))
		})
	}
	for page := 2; page < pages; page++ {
		damage(fmt.Sprint("free-", page), func(index []byte) {
			binary.NativeEndian.PutUint64(index[list*os.Getpagesize()+16:], uint64(page))
		})
	}
	for page := range 2 {
		damage(fmt.Sprint("meta-", page), func(index []byte) {
			copy(index[page*os.Getpagesize():][:os.Getpagesize()], index[(1-page)*os.Getpagesize():])
		})
	}
}

// TestDamagedBranch has a page of the index lead to itself, or say of another one that it begins
// with another key, after a crash: that is found before anybody follows the pages, or adds to them.
func TestDamagedBranch(t *testing.T) {
	template, _ := damageTemplate(t)
	parent := t.TempDir()
	writeFiles(t, parent, template)
	page := findPage(t, parent, "branch")
	elements := binary.NativeEndian.Uint16(template[indexName][page*os.Getpagesize()+10:])
	damage := func(name string, change func(branch []byte)) {
		t.Run(name, func(t *testing.T) {
			directory := filepath.Join(parent, name)
			must(t, os.Mkdir(directory, 0o700))
			writeFiles(t, directory, template)
			index := bytes.Clone(template[indexName])
			change(index[page*os.Getpagesize():])
			writeFiles(t, directory, map[string][]byte{indexName: index})
			must(t, os.Remove(filepath.Join(directory, sumName)))
			s, err := Open(directory, Options{})
			must(t, err)
			ref, block := testBlock(1000, eris.BlockSize1KiB)
			if err := s.Put(t.Context(), ref, block); !errors.Is(err, ErrDamaged) {
				t.Errorf("%v instead of ErrDamaged", err)
			}
			s.Close() // may or may not say something
		})
	}
	damage("child", func(branch []byte) { binary.NativeEndian.PutUint64(branch[16+8:], uint64(page)) })
	for i := range elements {
		damage(fmt.Sprint("key-", i), func(branch []byte) {
			element := branch[16+16*i:]
			element[binary.NativeEndian.Uint32(element)+20]-- // of its key: no other is in between
		})
	}
}

// What keeps a store from being opened at all is damage, too, and Rebuild mends it.
func TestUnusableIndex(t *testing.T) {
	template, refs := damageTemplate(t)
	for name, v := range map[string]struct {
		file   string
		damage func(path string) error
	}{
		"index missing": {indexName, os.Remove},
		"index empty":   {indexName, func(path string) error { return os.Truncate(path, 0) }},
		"index tiny":    {indexName, func(path string) error { return os.Truncate(path, 100) }},
		"index cut":     {indexName, func(path string) error { return os.Truncate(path, 12<<10) }},
		"noise": {indexName, func(path string) error {
			_, b := testBlock(99, eris.BlockSize32KiB)
			return os.WriteFile(path, b, 0o600)
		}},
		"slab missing": {"blocks-32k", os.Remove},
		"old format": {indexName, func(path string) error {
			db, err := bbolt.Open(path, 0o600, nil)
			if err != nil {
				return err
			}
			state := append(binary.BigEndian.AppendUint32(nil, 1), make([]byte, 36)...)
			return errors.Join(db.Update(func(tx *bbolt.Tx) error {
				return tx.Bucket(storeBucket).Put(stateKey, state)
			}), db.Close())
		}},
	} {
		directory := t.TempDir()
		writeFiles(t, directory, template)
		must(t, v.damage(filepath.Join(directory, v.file)))
		want := wholeBlocks(t, directory)
		if _, err := Open(directory, Options{}); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v instead of ErrDamaged", name, err)
		}
		if n, err := Rebuild(t.Context(), directory); err != nil || n != int64(len(want)) {
			t.Fatalf("%s: %d blocks, %v", name, n, err)
		}
		s := testOpen(t, directory, Options{})
		if got := readAll(t, s, refs); got != len(want) {
			t.Errorf("%s: got %d blocks of %d", name, got, len(want))
		}
		if got := len(checkStore(t, s)); got != len(want) {
			t.Errorf("%s: %d blocks of %d", name, got, len(want))
		}
	}
}

// A block that is damaged on disk counts as absent, is removed, and can be put again. Others are
// not affected.
func TestDamagedBlock(t *testing.T) {
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		for _, again := range []bool{false, true} {
			s := testOpen(t, t.TempDir(), Options{})
			putMany(t, s, size, 0, 3)
			ref, block := testBlock(1, size)
			found, _, err := s.lookup(&ref)
			must(t, err)
			offset := int64(found.slot())*int64(size) + int64(size)/2
			_, err = s.slabs[found.class()].file.WriteAt([]byte{block[size/2] ^ 0x10}, offset)
			must(t, err)
			left := int64(3)
			if again {
				// Put finds it and repairs it.
				mustPut(t, s, 1, size)
				mustHave(t, s, 1, size)
			} else {
				mustLack(t, s, 1, size)
				left--
			}
			mustPut(t, s, 0, size) // is done after the removal
			if stats := s.Stats(); stats.Damaged != 1 || stats.Blocks1KiB+stats.Blocks32KiB != left || s.Err() != nil {
				t.Errorf("%+v, %v", stats, s.Err())
			}
			mustPut(t, s, 1, size)
			for i := range 3 {
				mustHave(t, s, i, size)
			}
			checkStore(t, s)
		}
	}
}

// An index that is older than the blocks, as a wrong restore from a backup leaves it, with its
// checksum.
func TestOldIndex(t *testing.T) {
	template, refs := damageTemplate(t)
	directory := t.TempDir()
	writeFiles(t, directory, template)
	// With the limit, slots of the old blocks come to be used by others.
	s := testOpen(t, directory, Options{MaxBytes: 1 << 20})
	putMany(t, s, eris.BlockSize1KiB, 1000, 2500)
	checkStore(t, s)
	writeFiles(t, directory, map[string][]byte{indexName: template[indexName], sumName: template[sumName]})
	s = testOpen(t, directory, Options{})
	there := readAll(t, s, refs)
	mustPut(t, s, 0, eris.BlockSize1KiB)
	if stats := s.Stats(); there == len(refs) || stats.Damaged != int64(len(refs)-there) {
		t.Errorf("%d blocks are there, %+v", there, stats)
	}
	checkStore(t, s)
}

// Files that become shorter while the store is open, which for a mapped file means a fault.
func TestCutFiles(t *testing.T) {
	template, refs := damageTemplate(t)
	// What is left has no room for all references, wherever bbolt has put them.
	for _, length := range []int64{0, 8192, 12288, 16384} {
		directory := t.TempDir()
		writeFiles(t, directory, template)
		s, err := Open(directory, Options{hintBytes: 64})
		must(t, err)
		mustPut(t, s, 0, eris.BlockSize1KiB) // is there; the index has been checked
		must(t, os.Truncate(filepath.Join(directory, indexName), length))
		readAll(t, s, refs)
		if err := s.Err(); !errors.Is(err, ErrDamaged) {
			t.Errorf("index of %d bytes: %v instead of ErrDamaged", length, err)
		}
		ref, block := testBlock(1000, eris.BlockSize1KiB)
		if err = s.Put(t.Context(), ref, block); !errors.Is(err, ErrDamaged) {
			t.Errorf("index of %d bytes: Put returns %v", length, err)
		}
		s.Close() // may or may not say something; it must return
		s = start(t, directory)
		if there := readAll(t, s, refs); there != len(refs) {
			t.Errorf("%d blocks are there", there)
		}
		checkStore(t, s)
	}

	directory := t.TempDir()
	writeFiles(t, directory, template)
	s := testOpen(t, directory, Options{})
	must(t, os.Truncate(filepath.Join(directory, "blocks-32k"), 5<<15+1))
	if there := readAll(t, s, refs); there != damage1KiB+5 {
		t.Errorf("%d blocks are there", there)
	}
	mustPut(t, s, 0, eris.BlockSize1KiB)
	if stats := s.Stats(); stats.Damaged != damage32KiB-5 {
		t.Errorf("%+v", stats)
	}
	checkStore(t, s)
}
