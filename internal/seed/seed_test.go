// SPDX-License-Identifier: GPL-3.0-or-later

package seed

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dir"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

// full is a store that takes nothing.
type full struct{ fetch.Store }

func (full) Put(context.Context, eris.Reference, []byte) error { return fs.ErrPermission }
func (full) Close() error                                      { return nil }

func open(directory string, store fetch.Store) (s *Seeds, failures func() error) {
	var mu sync.Mutex
	var failed error
	s = Open(directory, store, func(err error) {
		mu.Lock()
		defer mu.Unlock()
		failed = errors.Join(failed, err)
	})
	return s, func() error {
		mu.Lock()
		defer mu.Unlock()
		return failed
	}
}

func left(t *testing.T, directory string) string {
	t.Helper()
	names, err := filepath.Glob(directory + "/*")
	must(t, err)
	return strings.Join(names, " ")
}

func TestSeeds(t *testing.T) {
	directory, blocks := t.TempDir()+"/seeds", t.TempDir()
	nar := bytes.Repeat([]byte("compressed "), 10000)
	want, err := eris.Encode(t.Context(), bytes.NewReader(nar), nil, eris.EncodeOptions{})
	must(t, err)
	has := func() bool {
		store, err := dir.Open("file:" + blocks)
		must(t, err)
		defer store.Close()
		_, err = fetch.Get(t.Context(), store, want.Root, want.BlockSize, nil)
		return err == nil
	}

	// A store that takes nothing: what is right is kept for later, and nothing else.
	s, failures := open(directory, full{})
	for _, right := range []bool{false, true} {
		c := s.Begin(uint64(len(nar)))
		for part := range bytes.Lines(nar) {
			c.Write(part)
		}
		c.End(right)
	}
	s.Close()
	if !errors.Is(failures(), fs.ErrPermission) || strings.Count(left(t, directory), "/nar-") != 1 {
		t.Errorf("error %v, left: %s", failures(), left(t, directory))
	}

	// The next process goes on.
	store, err := dir.Open("file:" + blocks)
	must(t, err)
	s, failures = open(directory, store)
	s.Close()
	if failures() != nil || left(t, directory) != "" || !has() {
		t.Errorf("error %v, left: %s, seeded: %t", failures(), left(t, directory), has())
	}
}

// TestBounded copies nothing beyond the bound, and removes what nobody has wanted for a day.
func TestBounded(t *testing.T) {
	directory := t.TempDir()
	whole, killed := directory+"/nar-1", directory+"/"+files.TemporaryPrefix+"1"
	old := time.Now().Add(-25 * time.Hour)
	for _, name := range []string{whole, killed} {
		must(t, errors.Join(os.WriteFile(name, nil, 0o600), os.Truncate(name, maxBytes-10)))
	}
	s, failures := open(directory, full{})
	defer s.Close()
	try := func(size uint64, want bool) {
		t.Helper()
		c := s.Begin(size)
		if (c != nil) != want {
			t.Errorf("%d bytes: taken %t", size, c != nil)
		}
		c.Write([]byte("x"))
		c.End(false)
	}
	try(0, false)
	must(t, os.Chtimes(killed, old, old))
	try(11, false)
	try(10, true)
	try(1<<63, false)
	// What is under way counts, though nothing has come.
	c := s.Begin(8)
	try(5, false)
	c.End(false)
	if left(t, directory) != whole || failures() != nil && !errors.Is(failures(), fs.ErrPermission) {
		t.Errorf("left: %s, error %v", left(t, directory), failures())
	}
}

// picky is a store that does not want one block.
type picky struct {
	fetch.Store
	not eris.Reference
}

func (p picky) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	if ref == p.not {
		return fs.ErrPermission
	}
	return p.Store.Put(ctx, ref, block)
}

// TestInTheWay has copies that cannot be read, and that the store does not want, before one that it
// gets all the same.
func TestInTheWay(t *testing.T) {
	directory, blocks := t.TempDir(), t.TempDir()
	unwanted, err := eris.Encode(t.Context(), strings.NewReader("unwanted"), nil, eris.EncodeOptions{})
	must(t, err)
	err = errors.Join(os.Mkdir(directory+"/nar-1", 0o700), os.WriteFile(directory+"/nar-2", []byte("unwanted"), 0o600),
		os.WriteFile(directory+"/nar-3", []byte("wanted"), 0o600))
	must(t, err)
	store, err := dir.Open("file:" + blocks)
	must(t, err)
	s, failures := open(directory, picky{store, unwanted.Root})
	s.Close()
	if want := directory + "/nar-1 " + directory + "/nar-2"; left(t, directory) != want || failures() == nil {
		t.Errorf("left: %s, error %v", left(t, directory), failures())
	}
}

// TestFullDisk has a copy take no more than half of what is left of a disk, and give its room back
// at once when the disk is full.
func TestFullDisk(t *testing.T) {
	directory := t.TempDir()
	if err := unix.Mount("tmpfs", directory, "tmpfs", 0, "size=8m"); err != nil {
		t.Skip("cannot mount a small file system (this needs root): ", err)
	}
	defer unix.Unmount(directory, unix.MNT_DETACH)
	s, failures := open(directory+"/seeds", full{})
	defer s.Close()
	if c := s.Begin(5 << 20); c != nil {
		c.End(false)
		t.Error("a copy of 5 MiB is begun where 8 MiB are left")
	}
	c := s.Begin(3 << 20)
	c.Write(make([]byte, 1<<20))
	if err := os.WriteFile(directory+"/filler", make([]byte, 9<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	c.Write(make([]byte, 1<<20))
	if err := os.WriteFile(directory+"/other", make([]byte, 1<<19), 0o600); err != nil {
		t.Errorf("the copy keeps its room: %v", err)
	}
	c.End(true)
	if err := failures(); !errors.Is(err, unix.ENOSPC) || left(t, directory+"/seeds") != "" {
		t.Errorf("error %v, left: %s", err, left(t, directory+"/seeds"))
	}
}
