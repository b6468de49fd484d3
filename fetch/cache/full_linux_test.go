// SPDX-License-Identifier: GPL-3.0-or-later

package cache

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// A cache leaves room on a file system for others, and goes on in what it has; on a full one it
// keeps nothing, and finds what it had.
func TestFullDisk(t *testing.T) {
	const most = 16 << 20
	mount := t.TempDir()
	if err := syscall.Mount("tmpfs", mount, "tmpfs", 0, "size=8m"); err != nil {
		t.Skip("cannot mount a small file system (this needs root): ", err)
	}
	defer func() {
		if err := syscall.Unmount(mount, 0); err != nil {
			t.Error(err)
		}
	}()
	d, filler := filepath.Join(mount, "cache"), filepath.Join(mount, "filler")
	open := func() *Cache {
		t.Helper()
		return Open(d, most, func(err error) { t.Error(err) })
	}
	all := func(int) eris.BlockSize { return large }
	c := open()
	put(c, 0, 1000, all) // 32 MiB
	free := func() uint64 {
		var s syscall.Statfs_t
		must(t, syscall.Statfs(mount, &s))
		return s.Bavail * uint64(s.Bsize)
	}
	if left := free(); left == 0 {
		t.Error("the cache has filled the file system")
	}
	// As much as there is room for is there, and it is the newest.
	if got := count(t, c, 880, 1000, all); got < 119 { // some 4 MiB
		t.Errorf("%d blocks", got)
	}
	// Others take what is left.
	b := make([]byte, 4<<20)
	if err := os.WriteFile(filler, b, 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if left := free(); left != 0 {
		t.Fatalf("%d bytes are left", left)
	}
	put(c, 1000, 1100, all) // over what is there
	if got := count(t, c, 1000, 1100, all); got < 90 {
		t.Errorf("%d blocks of 100 on a full file system", got)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	// A new cache has no room.
	must(t, os.Remove(filepath.Join(d, fileName)))
	os.WriteFile(filler, make([]byte, 8<<20), 0o600)
	var failed error
	c = Open(d, most, func(err error) { failed = err })
	if err := errors.Join(put(c, 0, 1000, all), failed); err == nil {
		t.Error("blocks are lost, and nothing says so")
	}
	if got := count(t, c, 0, 1000, all); got != 0 {
		t.Errorf("%d blocks without room", got)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	// Room again.
	must(t, os.Remove(filler))
	c = open()
	put(c, 0, 100, all)
	if got := count(t, c, 0, 100, all); got < 99 {
		t.Errorf("%d blocks of 100", got)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}
