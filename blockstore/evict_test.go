// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

func has(t *testing.T, s *Store, i int, size eris.BlockSize) bool {
	t.Helper()
	ref, _ := testBlock(i, size)
	_, err := fetch.Get(t.Context(), s, ref, size, nil)
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
	s := testOpen(t, directory, Options{MaxBytes: MinBytes, now: now.Load})
	for i := 0; i < fits; i += 30 {
		now.Add(1)
		putMany(t, s, eris.BlockSize1KiB, i, i+30)
	}
	if evicted := s.Stats().Evicted; evicted != 0 {
		t.Fatalf("%d evicted before the limit", evicted)
	}
	// Use the first third, after opening the store anew.
	must(t, s.Close())
	s = testOpen(t, directory, Options{MaxBytes: MinBytes, now: now.Load})
	for i := range fits / 3 {
		now.Add(1)
		mustHave(t, s, i, eris.BlockSize1KiB)
	}
	// Opened anew again, put as many as the second third.
	must(t, s.Close())
	s = testOpen(t, directory, Options{MaxBytes: MinBytes, now: now.Load})
	for i := fits; i < fits+fits/3; i++ {
		now.Add(1)
		mustPut(t, s, i, eris.BlockSize1KiB)
		if stats := s.Stats(); stats.Bytes > MinBytes {
			t.Fatalf("%d bytes", stats.Bytes)
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

// A clock of the machine that is set back while a store is open, by a day here, does not make what
// is used from then on seem to be what was used least recently.
func TestClockSetBack(t *testing.T) {
	const day = 4 * 24 * 60 * 60
	right := clock(time.Now())()
	if before := clock(time.Now().Add(24 * time.Hour)); before() < right+day {
		t.Errorf("the clock is back by %d of %d", right+day-before(), day)
	}
}

// A store that is opened with a lower limit shrinks.
func TestShrink(t *testing.T) {
	directory := t.TempDir()
	s := testOpen(t, directory, Options{})
	for i := range 80 {
		mustPut(t, s, i, eris.BlockSize32KiB)
	}
	must(t, s.Close())
	s = testOpen(t, directory, Options{MaxBytes: MinBytes})
	mustPut(t, s, 100, eris.BlockSize32KiB)
	if got := s.Stats().Bytes; got > MinBytes {
		t.Errorf("%d bytes", got)
	}
	mustHave(t, s, 100, eris.BlockSize32KiB)
	checkStore(t, s)
}

// When the mix of sizes shifts, the space of the one becomes space for the other.
func TestShift(t *testing.T) {
	const limit = 4 << 20
	directory := t.TempDir()
	s := testOpen(t, directory, Options{MaxBytes: limit})
	for phase, size := range []eris.BlockSize{eris.BlockSize32KiB, eris.BlockSize1KiB, eris.BlockSize32KiB} {
		putMany(t, s, size, phase<<20, phase<<20+limit/int(size))
		if stats := s.Stats(); stats.Bytes > limit || stats.Err != nil {
			t.Errorf("%+v", stats)
		}
		// Some file systems keep space behind the end of files that are open.
		must(t, s.Close())
		s = testOpen(t, directory, Options{MaxBytes: limit})
		var used int64
		for c := range classes {
			name, _ := slabNames(c)
			info, err := os.Stat(filepath.Join(directory, name))
			must(t, err)
			used += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		if used > limit+limit/3 {
			t.Errorf("phase %d: %d KiB of disk", phase, used>>10)
		}
	}
	checkStore(t, s)
}
