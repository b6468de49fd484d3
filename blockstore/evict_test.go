// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// openAt opens a store whose time is set by the test.
func openAt(t *testing.T, directory string, options Options, now *atomic.Uint32) *Store {
	t.Helper()
	s, err := open(directory, options, now.Load)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func putPinned(t *testing.T, s *Store, i int, size eris.BlockSize) {
	t.Helper()
	ref, block := testBlock(i, size)
	if err := s.PutPinned(t.Context(), ref, block); err != nil {
		t.Fatal(err)
	}
}

// putMany puts blocks of 1 KiB, by the hundred.
func putMany(t *testing.T, s *Store, from, to int) {
	t.Helper()
	for ; from < to; from += 100 {
		var refs []eris.Reference
		var blocks [][]byte
		for i := from; i < from+100; i++ {
			ref, block := testBlock(i, eris.BlockSize1KiB)
			refs, blocks = append(refs, ref), append(blocks, block)
		}
		if err := s.PutBatch(t.Context(), refs, blocks); err != nil {
			t.Fatal(err)
		}
	}
}

func has(t *testing.T, s *Store, i int, size eris.BlockSize) bool {
	t.Helper()
	ref, _ := testBlock(i, size)
	_, err := s.Get(t.Context(), ref, size, nil)
	if err != nil && !errors.Is(err, eris.ErrNotFound) {
		t.Fatal(err)
	}
	return err == nil
}

// The least recently used blocks go: those that were put early and not read since.
func TestEviction(t *testing.T) {
	var now atomic.Uint32
	now.Store(1000)
	const fits = 990 // blocks of 1 KiB, of the 992 that 1 MiB has room for, but for what is kept free
	directory := t.TempDir()
	s := openAt(t, directory, Options{MaxBytes: MinBytes}, &now)
	for i := range fits {
		now.Add(1)
		mustPut(t, s, i, eris.BlockSize1KiB)
	}
	if evicted := s.Stats().Evicted; evicted != 0 {
		t.Fatalf("%d evicted before the limit", evicted)
	}
	// Use the first third, after opening the store anew.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openAt(t, directory, Options{MaxBytes: MinBytes}, &now)
	for i := range fits / 3 {
		now.Add(1)
		mustHave(t, s, i, eris.BlockSize1KiB)
	}
	// Opened anew again, put as many as the second third.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openAt(t, directory, Options{MaxBytes: MinBytes}, &now)
	for i := fits; i < fits+fits/3; i++ {
		now.Add(1)
		mustPut(t, s, i, eris.BlockSize1KiB)
		if stats := s.Stats(); stats.Bytes1KiB > MinBytes {
			t.Fatalf("%d bytes", stats.Bytes1KiB)
		}
	}
	var kept [4]int
	for i := range fits + fits/3 {
		if has(t, s, i, eris.BlockSize1KiB) {
			kept[i/(fits/3)]++
		}
	}
	if kept[0] != fits/3 || kept[3] != fits/3 {
		t.Errorf("blocks that were used went: %d of %d are left in each third", kept, fits/3)
	}
	// All victims were among the least recently used thirty-second at their time.
	if kept[2] < fits/3-fits/32-2 || kept[1] > fits/32+2 {
		t.Errorf("not in the order of use: %d of %d are left in each third", kept, fits/3)
	}
	if stats := s.Stats(); stats.Evicted != fits+fits/3-992 {
		t.Errorf("%+v", stats)
	}
	checkStore(t, s)
}

func TestPinned(t *testing.T) {
	var now atomic.Uint32
	now.Store(1000)
	directory := t.TempDir()
	s := openAt(t, directory, Options{MaxBytes: MinBytes}, &now)
	for i := range 300 {
		putPinned(t, s, i, eris.BlockSize1KiB)
	}
	// Pinned later, one by one and within a batch.
	mustPut(t, s, 300, eris.BlockSize1KiB)
	putPinned(t, s, 300, eris.BlockSize1KiB)
	putPinned(t, s, 300, eris.BlockSize1KiB)
	// Put again without a pin: still pinned.
	mustPut(t, s, 300, eris.BlockSize1KiB)
	now.Add(100)
	putMany(t, s, 1000, 2000)
	// The marks of pinned blocks among the times of access may be lost: the index has them too.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(directory, "accessed-1k"), 0); err != nil {
		t.Fatal(err)
	}
	s = openAt(t, directory, Options{MaxBytes: MinBytes}, &now)
	if stats := s.Stats(); stats.PinnedBlocks != 301 || stats.PinnedBytes != 301<<10 {
		t.Errorf("%+v", stats)
	}
	putMany(t, s, 3000, 4000)
	for i := range 301 {
		mustHave(t, s, i, eris.BlockSize1KiB)
	}
	// Without pins they go, but later than what was used earlier.
	if err := s.UnpinAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if stats := s.Stats(); stats.PinnedBlocks != 0 || stats.PinnedBytes != 0 {
		t.Errorf("%+v", stats)
	}
	now.Add(100)
	putMany(t, s, 5000, 6500)
	for i := range 301 {
		mustLack(t, s, i, eris.BlockSize1KiB)
	}
	checkStore(t, s)
}

func TestFull(t *testing.T) {
	directory := t.TempDir()
	s := testOpen(t, directory, Options{MaxBytes: MinBytes})
	p := s.Pipeline(true)
	for i := range 1024 {
		ref, block := testBlock(i, eris.BlockSize1KiB)
		if err := p.Put(t.Context(), ref, block); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Wait(); err != nil {
		t.Fatal(err)
	}
	ref, block := testBlock(2000, eris.BlockSize1KiB)
	if err := s.Put(t.Context(), ref, block); !errors.Is(err, ErrFull) {
		t.Errorf("Put: %v", err)
	}
	if err := s.PutPinned(t.Context(), ref, block); !errors.Is(err, ErrFull) {
		t.Errorf("PutPinned: %v", err)
	}
	if err := s.PutBatch(t.Context(), []eris.Reference{ref, ref}, [][]byte{block, block}); !errors.Is(err, ErrFull) {
		t.Errorf("PutBatch: %v", err)
	}
	p = s.Pipeline(false)
	if err := errors.Join(p.Put(t.Context(), ref, block), p.Wait()); !errors.Is(err, ErrFull) {
		t.Errorf("Pipeline: %v", err)
	}
	mustPut(t, s, 1, eris.BlockSize1KiB) // is there
	if stats := s.Stats(); stats.Bytes1KiB != MinBytes || stats.Refused != 5 || stats.Failed != 0 {
		t.Errorf("%+v", stats)
	}
	if err := s.UnpinAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustPut(t, s, 2000, eris.BlockSize1KiB)
	mustHave(t, s, 2000, eris.BlockSize1KiB)
	checkStore(t, s)
}

// A store that is opened with a lower limit shrinks.
func TestShrink(t *testing.T) {
	directory := t.TempDir()
	s := testOpen(t, directory, Options{})
	for i := range 80 {
		mustPut(t, s, i, eris.BlockSize32KiB)
	}
	for i := range 5 {
		putPinned(t, s, i, eris.BlockSize32KiB)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = testOpen(t, directory, Options{MaxBytes: MinBytes})
	mustPut(t, s, 100, eris.BlockSize32KiB)
	if got := s.Stats().Bytes32KiB; got > MinBytes {
		t.Errorf("%d bytes", got)
	}
	for i := range 5 {
		mustHave(t, s, i, eris.BlockSize32KiB)
	}
	checkStore(t, s)
}

// When the mix of sizes shifts, the space of the one becomes space for the other.
func TestShift(t *testing.T) {
	const limit = 4 << 20
	directory := t.TempDir()
	s := testOpen(t, directory, Options{MaxBytes: limit})
	for phase, size := range []eris.BlockSize{eris.BlockSize32KiB, eris.BlockSize1KiB, eris.BlockSize32KiB} {
		p := s.Pipeline(false)
		for i := range limit / int(size) {
			ref, block := testBlock(phase<<20+i, size)
			if err := p.Put(t.Context(), ref, block); err != nil {
				t.Fatal(err)
			}
		}
		if err := p.Wait(); err != nil {
			t.Fatal(err)
		}
		var used int64
		for c := range classes {
			name, _ := slabNames(c)
			info, err := os.Stat(filepath.Join(directory, name))
			if err != nil {
				t.Fatal(err)
			}
			used += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		if stats := s.Stats(); stats.Bytes1KiB+stats.Bytes32KiB > limit || stats.Err != nil {
			t.Errorf("%+v", stats)
		}
		if used > limit+limit/3 {
			t.Errorf("phase %d: %d KiB of disk", phase, used>>10)
		}
	}
	checkStore(t, s)
}
