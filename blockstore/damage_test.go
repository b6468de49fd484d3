// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

const damageBlocks = 60 // of each size

// damageTemplate makes a store and returns its files.
func damageTemplate(t *testing.T) map[string][]byte {
	t.Helper()
	directory := t.TempDir()
	s := testOpen(t, directory, Options{})
	for i := range damageBlocks {
		mustPut(t, s, i, eris.BlockSize1KiB)
		mustPut(t, s, i, eris.BlockSize32KiB)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	files := make(map[string][]byte)
	entries, err := os.ReadDir(directory)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if files[entry.Name()], err = os.ReadFile(filepath.Join(directory, entry.Name())); err != nil {
			t.Fatal(err)
		}
	}
	// What bbolt has in stock is of no interest.
	used := len(bytes.TrimRight(files[indexName], "\x00"))
	files[indexName] = files[indexName][:(used+4095)/4096*4096]
	return files
}

func writeFiles(t *testing.T, directory string, files map[string][]byte) {
	t.Helper()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(directory, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// readAll reads all blocks of a damaged store and returns how many there are. None may be wrong.
func readAll(t *testing.T, s *Store) (there int) {
	t.Helper()
	for i := range damageBlocks {
		for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
			ref, _ := testBlock(i, size)
			block, err := s.Get(t.Context(), ref, size, nil)
			if err == nil {
				there++
				if err := eris.Verify(ref, block); err != nil {
					t.Errorf("wrong bytes were served: %v", err)
				}
			}
		}
	}
	return there
}

// A block that is damaged on disk counts as absent, is removed, and can be put again. Others are not affected.
func TestDamagedBlock(t *testing.T) {
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		for _, again := range []bool{false, true} {
			directory := t.TempDir()
			s := testOpen(t, directory, Options{})
			for i := range 3 {
				putPinned(t, s, i, size)
			}
			ref, block := testBlock(1, size)
			found, _, err := s.lookup(&ref)
			if err != nil {
				t.Fatal(err)
			}
			slab := s.slabs[found.location.class()]
			offset := int64(found.location.slot())*int64(size) + int64(size)/2
			if _, err := slab.file.WriteAt([]byte{block[size/2] ^ 0x10}, offset); err != nil {
				t.Fatal(err)
			}
			if again {
				// Put finds it and repairs it.
				putPinned(t, s, 1, size)
				mustHave(t, s, 1, size)
			} else {
				mustLack(t, s, 1, size)
				if stats := s.Stats(); stats.PinnedBlocks != 2 || stats.Blocks1KiB+stats.Blocks32KiB != 2 {
					t.Errorf("%+v", stats)
				}
				mustLack(t, s, 1, size)
			}
			if stats := s.Stats(); stats.Damaged != 1 {
				t.Errorf("%+v", stats)
			}
			mustPut(t, s, 1, size)
			for i := range 3 {
				mustHave(t, s, i, size)
			}
			checkStore(t, s)
		}
	}
}

// Bits flip anywhere in the files. The store may refuse to open and blocks may be lost, but no wrong byte is served.
func TestFlippedBits(t *testing.T) {
	rounds := 12 // for each file
	if n, err := strconv.Atoi(os.Getenv("ERIS_DAMAGE_ROUNDS")); err == nil {
		rounds = n
	}
	template := damageTemplate(t)
	parent := t.TempDir()
	for _, name := range []string{"index.db", "blocks-1k", "blocks-32k", "accessed-1k"} {
		refused, there := 0, 0
		for round := range rounds {
			random := rand.New(rand.NewPCG(uint64(round), 3))
			// A new directory, since a store whose index was found to be damaged cannot be opened again by this process.
			directory := filepath.Join(parent, fmt.Sprint(name, round))
			if err := os.Mkdir(directory, 0o700); err != nil {
				t.Fatal(err)
			}
			writeFiles(t, directory, template)
			damaged := bytes.Clone(template[name])
			for range 1 << random.IntN(10) {
				damaged[random.IntN(len(damaged))] ^= 1 << random.IntN(8)
			}
			writeFiles(t, directory, map[string][]byte{name: damaged})
			s, err := Open(directory, Options{HintBytes: 64})
			if err != nil {
				refused++
				continue
			}
			there += readAll(t, s)
			// Writing does no harm either.
			for i := range 20 {
				ref, block := testBlock(1000+i, eris.BlockSize1KiB)
				if err := s.Put(t.Context(), ref, block); err == nil {
					if got, err := s.Get(t.Context(), ref, 0, nil); err == nil && !bytes.Equal(got, block) {
						t.Error("wrong bytes were served")
					}
				}
			}
			readAll(t, s)
			s.Close()
			if err := os.RemoveAll(directory); err != nil {
				t.Fatal(err)
			}
		}
		t.Logf("%s: of %d stores, %d refused to open; others kept %d blocks of %d", name, rounds, refused, there,
			(rounds-refused)*2*damageBlocks)
		if name != "index.db" && (refused > 0 || there == 0) {
			t.Errorf("%s: %d of %d refused to open, %d blocks are left", name, refused, rounds, there)
		}
		if name == "accessed-1k" && there != rounds*2*damageBlocks {
			t.Errorf("%s: %d blocks are left", name, there)
		}
	}
}

// An index that is older than the blocks, as a wrong restore from a backup leaves it.
func TestOldIndex(t *testing.T) {
	template := damageTemplate(t)
	directory := t.TempDir()
	writeFiles(t, directory, template)
	// With the limit, slots of the old blocks come to be used by others.
	s := testOpen(t, directory, Options{MaxBytes: 2 << 20})
	putMany(t, s, 1000, 3500)
	checkStore(t, s)
	writeFiles(t, directory, map[string][]byte{indexName: template[indexName]})
	s = testOpen(t, directory, Options{})
	there := readAll(t, s)
	if stats := s.Stats(); there == 2*damageBlocks || stats.Damaged != int64(2*damageBlocks-there) {
		t.Errorf("%d blocks are there, %+v", there, stats)
	}
	if got := len(checkStore(t, s)); got != there {
		t.Errorf("%d blocks in the index, %d there", got, there)
	}
}

// Files that become shorter while the store is open, which for a mapped file means a fault.
func TestCutFiles(t *testing.T) {
	template := damageTemplate(t)
	for _, length := range []int64{0, 8192, 12288, 40960} {
		directory := t.TempDir()
		writeFiles(t, directory, template)
		s, err := Open(directory, Options{HintBytes: 64})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(filepath.Join(directory, indexName), length); err != nil {
			t.Fatal(err)
		}
		readAll(t, s)
		ref, block := testBlock(1000, eris.BlockSize1KiB)
		err = s.Put(t.Context(), ref, block)
		if length == 0 && !errors.Is(err, ErrDamaged) {
			t.Errorf("index of %d bytes: %v instead of ErrDamaged", length, err)
		}
		readAll(t, s)
		s.Close() // may or may not say something; it must return
		if n, err := Rebuild(t.Context(), directory); err != nil || n < 2*damageBlocks {
			t.Errorf("rebuilt %d blocks, %v", n, err)
		}
		s = testOpen(t, directory, Options{})
		if there := readAll(t, s); there != 2*damageBlocks {
			t.Errorf("%d blocks are there", there)
		}
	}

	directory := t.TempDir()
	writeFiles(t, directory, template)
	s := testOpen(t, directory, Options{})
	if err := os.Truncate(filepath.Join(directory, "blocks-32k"), 10<<15+1); err != nil {
		t.Fatal(err)
	}
	if there := readAll(t, s); there != damageBlocks+10 {
		t.Errorf("%d blocks are there", there)
	}
	if stats := s.Stats(); stats.Damaged != damageBlocks-10 {
		t.Errorf("%+v", stats)
	}
	checkStore(t, s)
}
