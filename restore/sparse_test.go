// SPDX-License-Identifier: GPL-3.0-or-later

package restore_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// allocated is how many bytes of a file have a place on the disk.
func allocated(t *testing.T, name string) int64 {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(name, &st))
	return st.Blocks * 512
}

// TestHoles restores files with runs of zeros, which must take no place and be read as they were.
func TestHoles(t *testing.T) {
	d := t.TempDir()
	must(t, os.WriteFile(d+"/probe", nil, 0o644))
	must(t, os.Truncate(d+"/probe", 1<<20))
	holes := allocated(t, d+"/probe") == 0
	zeros := func(n int) []byte { return make([]byte, n) }
	data := func(n int) []byte { return bytes.Repeat([]byte{7, 0, 0, 0, 9}, n/5+1)[:n] }
	for i, v := range []struct {
		parts [][]byte
		most  int64 // bytes that need a place
	}{
		{[][]byte{zeros(1 << 20)}, 0},
		{[][]byte{zeros(1<<20 + 1)}, 0},
		{[][]byte{data(10000), zeros(1 << 20), data(10000)}, 6 * 4096},
		{[][]byte{zeros(1 << 20), data(1)}, 4096},
		{[][]byte{data(1), zeros(1 << 20)}, 4096},
		{[][]byte{data(5000), zeros(4096), data(5000), zeros(20000), data(1)}, 10 * 4096},
		{[][]byte{zeros(8192)}, 0},
		{[][]byte{zeros(8191)}, 0},
		{[][]byte{zeros(100)}, 0},
		{[][]byte{data(1 << 20)}, 1 << 20},
	} {
		content := bytes.Join(v.parts, nil)
		tree := filepath.Join(d, fmt.Sprint("file", i))
		must(t, os.WriteFile(tree, content, 0o644))
		archive := archiveOf(t, tree)
		for _, piece := range []int{1000, 30000, 128 << 10} {
			s := store(t)
			got := mustRestore(t, archive, piece, s+"/item", restore.Options{LinksDirectory: s + "/.links"})
			if got.NarHash != sha256.Sum256(archive) {
				t.Errorf("%d, in pieces of %d: another NarHash", i, piece)
			}
			if b, err := os.ReadFile(s + "/item"); err != nil || !bytes.Equal(b, content) {
				t.Errorf("%d, in pieces of %d: %d other bytes instead of %d, %v", i, piece, len(b), len(content), err)
			}
			// Some file systems have a block of addresses beside those of data.
			if n := allocated(t, s+"/item"); holes && n > v.most+min(v.most, 4096) {
				t.Errorf("%d, in pieces of %d: %d bytes have a place, %d need one", i, piece, n, v.most)
			}
		}
	}
	if !holes {
		t.Log("this file system has no holes")
	}
}
