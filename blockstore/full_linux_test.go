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
	s, err := Open(directory, Options{})
	must(t, err)
	defer func() { s.Close() }()
	var acknowledged []int
	next := 0
	// fill puts blocks until so many calls in a row have failed.
	fill := func(size int, failures int) {
		t.Helper()
		for failed := 0; failed < failures; {
			var refs []eris.Reference
			var blocks [][]byte
			for i := next; i < next+size; i++ {
				ref, block := testBlock(i, crashSize(i))
				refs, blocks = append(refs, ref), append(blocks, block)
			}
			err := s.PutBatch(t.Context(), refs, blocks)
			switch {
			case err == nil:
				for i := next; i < next+size; i++ {
					acknowledged = append(acknowledged, i)
				}
				failed = 0
			case errors.Is(err, syscall.ENOSPC):
				failed++
			default:
				t.Fatal(err)
			}
			next += size
		}
	}
	check := func() {
		t.Helper()
		for _, i := range acknowledged {
			mustHave(t, s, i, crashSize(i))
		}
	}
	must(t, os.WriteFile(filler, make([]byte, 3<<20), 0o600))
	// Large batches fail first, then ever smaller ones: now the blocks do not fit, now the index.
	for _, size := range []int{64, 8, 1} {
		fill(size, 20)
		check()
	}
	half := len(acknowledged)
	if half == 0 || s.Stats().Failed == 0 {
		t.Errorf("%d acknowledged, %+v", half, s.Stats())
	}
	// The store can be opened on a full disk.
	if err := s.Close(); err != nil && !errors.Is(err, syscall.ENOSPC) { // times of access may not fit
		t.Fatal(err)
	}
	if s, err = Open(directory, Options{}); err != nil {
		t.Fatal(err)
	}
	check()
	// Space again.
	must(t, os.Remove(filler))
	fill(1, 20)
	if len(acknowledged) < half*3/2 {
		t.Errorf("%d acknowledged with half of the space, %d with all of it", half, len(acknowledged))
	}
	check()
	if err := s.Close(); err != nil && !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if s, err = Open(directory, Options{}); err != nil {
		t.Fatal(err)
	}
	check()
	// Of a batch that failed some blocks may be there.
	if stats := s.Stats(); stats.Damaged != 0 || stats.Blocks1KiB+stats.Blocks32KiB < int64(len(acknowledged)) {
		t.Errorf("%d acknowledged, %+v", len(acknowledged), stats)
	}
	// What was given up has left its space.
	if err := s.Close(); err != nil && !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if s, err = Open(directory, Options{MaxBytes: 2 << 20}); err != nil {
		t.Fatal(err)
	}
	mustPut(t, s, next, eris.BlockSize32KiB)
	mustHave(t, s, next, eris.BlockSize32KiB)
}
