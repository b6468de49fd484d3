// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// On a full disk Put fails and says why, what was acknowledged can be read, and when there is space
// again Put works again.
func TestFullDisk(t *testing.T) {
	mount := t.TempDir()
	if err := syscall.Mount("tmpfs", mount, "tmpfs", 0, "size=6m"); err != nil {
		t.Skip("cannot mount a small file system (this needs root): ", err)
	}
	defer func() {
		if err := syscall.Unmount(mount, 0); err != nil {
			t.Error(err)
		}
	}()
	directory, filler := filepath.Join(mount, "store"), filepath.Join(mount, "filler")
	var s *Store
	reopen := func(options Options) {
		t.Helper()
		if s != nil {
			if err := s.Close(); err != nil && !errors.Is(err, syscall.ENOSPC) { // times of access may not fit
				t.Fatal(err)
			}
		}
		var err error
		s, err = Open(directory, options)
		must(t, err)
	}
	reopen(Options{})
	defer func() { s.Close() }()
	var acknowledged []int
	next := 0
	// fill puts batches until 20 in a row have failed, and checks all that was acknowledged.
	fill := func(size int) {
		t.Helper()
		for failed := 0; failed < 20; next += size {
			refs, blocks := testBlocks(next, next+size, mixedSize)
			failed++
			if err := s.PutBatch(t.Context(), refs, blocks); err == nil {
				for i := range refs {
					acknowledged = append(acknowledged, next+i)
				}
				failed = 0
			} else if !errors.Is(err, syscall.ENOSPC) {
				t.Fatal(err)
			}
		}
		for _, i := range acknowledged {
			mustHave(t, s, i, mixedSize(i))
		}
	}
	must(t, os.WriteFile(filler, make([]byte, 3<<20), 0o600))
	// Large batches fail first, then ever smaller ones: now the blocks do not fit, now the index.
	for _, size := range []int{64, 8, 1} {
		fill(size)
	}
	half := len(acknowledged)
	if half == 0 || s.Stats().Failed == 0 {
		t.Errorf("%d acknowledged, %+v", half, s.Stats())
	}
	reopen(Options{}) // on a full disk
	must(t, os.Remove(filler))
	fill(1)
	if len(acknowledged) < half*3/2 {
		t.Errorf("%d acknowledged with half of the space, %d with all of it", half, len(acknowledged))
	}
	reopen(Options{})
	fill(1)
	// Of a batch that failed some blocks may be there.
	if stats := s.Stats(); stats.Damaged != 0 || stats.Blocks1KiB+stats.Blocks32KiB < int64(len(acknowledged)) {
		t.Errorf("%d acknowledged, %+v", len(acknowledged), stats)
	}
	// What was given up has left its space.
	reopen(Options{MaxBytes: 2 << 20})
	mustPut(t, s, next, eris.BlockSize32KiB)
	mustHave(t, s, next, eris.BlockSize32KiB)
}
