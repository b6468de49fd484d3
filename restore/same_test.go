// SPDX-License-Identifier: GPL-3.0-or-later

package restore_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// sameNodes is a tree of one file that names an open file with its contents; it yields others.
type sameNodes struct {
	nodeList
	contents string
}

func (n *sameNodes) Contents() (nar.Chunk, error) {
	if n.contents == "" {
		return n.nodeList.Contents()
	}
	c := nar.NewChunk([]byte(n.contents), nil)
	n.contents = ""
	return c, nil
}

var storeTime = []unix.Timespec{{Sec: 1}, {Sec: 1}}

// canonicalFile makes a file as it is in a store, of the given contents.
func canonicalFile(t *testing.T, path, contents string) *os.File {
	t.Helper()
	must(t, os.WriteFile(path, []byte(contents), 0o444))
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, path, storeTime, 0))
	f, err := os.Open(path)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// TestSame links to files that are named, or writes the contents where it must not or cannot.
func TestSame(t *testing.T) {
	contents := strings.Repeat("0123456789abcdef", 20000)
	chtimes := func(path string) error {
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{{Sec: 1}, {Sec: 1, Nsec: 1}}, 0)
	}
	for name, test := range map[string]struct {
		linked     bool
		contents   string
		executable bool
		change     func(path string) error
		options    func(*restore.Options)
		directory  string
	}{
		"linked":             {linked: true, contents: contents},
		"small":              {contents: contents[:8192-1]},
		"least":              {linked: true, contents: contents[:8192]},
		"no de-duplication":  {contents: contents, options: func(o *restore.Options) { o.LinksDirectory = "" }},
		"writable":           {contents: contents, options: func(o *restore.Options) { o.Writable = true }},
		"another mode":       {contents: contents, executable: true},
		"set user id":        {contents: contents, change: func(path string) error { return os.Chmod(path, 0o444|os.ModeSetuid) }},
		"another time":       {contents: contents, change: chtimes},
		"deleted":            {contents: contents, change: os.Remove},
		"too many links":     {contents: contents, change: exhaustLinks},
		"another filesystem": {contents: contents, directory: "/dev/shm"},
	} {
		t.Run(name, func(t *testing.T) {
			directory := test.directory
			if directory == "" {
				directory = t.TempDir()
			} else if temporary, err := os.MkdirTemp(directory, "restore"); err != nil {
				t.Skip(err)
			} else {
				directory = temporary
				t.Cleanup(func() { os.RemoveAll(temporary) })
			}
			f := canonicalFile(t, directory+"/old", test.contents)
			if test.change != nil {
				if err := test.change(f.Name()); err != nil {
					t.Skip(err)
				}
			}
			s := store(t)
			if test.directory != "" && sameDevice(t, s, directory) {
				t.Skip("there is one file system only")
			}
			o := restore.Options{LinksDirectory: s + "/.links"}
			if test.options != nil {
				test.options(&o)
			}
			node := nar.Node{Kind: nar.Regular, Size: uint64(len(test.contents)), Executable: test.executable, Same: f}
			r, err := restore.Restore(t.Context(), &sameNodes{nodeList{node}, test.contents}, s+"/item", o)
			must(t, err)
			got, err := os.ReadFile(s + "/item")
			if err != nil || string(got) != test.contents {
				t.Errorf("wrong contents: %v", err)
			}
			if want := sha256.Sum256(archiveOf(t, s+"/item")); r.NarHash != want {
				t.Error("wrong hash")
			}
			a, err := f.Stat()
			must(t, err)
			b, err := os.Stat(s + "/item")
			must(t, err)
			if os.SameFile(a, b) != test.linked {
				t.Errorf("it is a link: %t", !test.linked)
			}
		})
	}
}

func sameDevice(t *testing.T, a, b string) bool {
	t.Helper()
	var x, y unix.Stat_t
	must(t, errors.Join(unix.Stat(a, &x), unix.Stat(b, &y)))
	return x.Dev == y.Dev
}

// exhaustLinks makes links to a file until there can be no more.
func exhaustLinks(path string) error {
	for i := range 70000 {
		if err := os.Link(path, filepath.Dir(path)+"/"+strconv.Itoa(i)); errors.Is(err, unix.EMLINK) {
			return nil
		} else if err != nil {
			return err
		}
	}
	return errors.New("links have no limit here")
}

// TestSameIsWhatIsHashed has nodes that say other contents than the file has that they name. What
// is linked is what is hashed.
func TestSameIsWhatIsHashed(t *testing.T) {
	contents := strings.Repeat("x", 1<<20)
	f := canonicalFile(t, t.TempDir()+"/old", contents)
	s := store(t)
	nodes := &sameNodes{nodeList{{Kind: nar.Regular, Size: 1 << 20, Same: f}}, strings.Repeat("y", 1<<20)}
	r, err := restore.Restore(t.Context(), nodes, s+"/item", restore.Options{LinksDirectory: s + "/.links"})
	must(t, err)
	if want := sha256.Sum256(archiveOf(t, s+"/item")); r.NarHash != want {
		t.Error("the hash is not that of what is there")
	}
}

// TestSameChanges changes the file while it is read: as soon as there is a link to it.
func TestSameChanges(t *testing.T) {
	for name, change := range map[string]func(path string) error{
		"time":   func(path string) error { return os.Chtimes(path, time.Unix(2, 0), time.Unix(2, 0)) },
		"length": func(path string) error { return errors.Join(os.Chmod(path, 0o644), os.Truncate(path, 1<<20)) },
		"mode":   func(path string) error { return os.Chmod(path, 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			// Reading takes long, but how long is not known: the change may come too late.
			for range 100 {
				if err := changeSame(t, change); err != nil {
					return
				}
			}
			t.Error("no change has been noticed")
		})
	}
}

// changeSame restores a file of 64 MB that is changed meanwhile, and returns the error.
func changeSame(t *testing.T, change func(path string) error) error {
	const size = 64 << 20
	directory := t.TempDir()
	f := canonicalFile(t, directory+"/old", "")
	must(t, errors.Join(os.Chmod(f.Name(), 0o644), os.Truncate(f.Name(), size), os.Chmod(f.Name(), 0o444), unix.UtimesNanoAt(unix.AT_FDCWD, f.Name(), storeTime, 0)))
	s := store(t)
	ctx, cancel := context.WithCancel(t.Context())
	var changer sync.WaitGroup
	changer.Go(func() {
		for ctx.Err() == nil {
			if _, err := os.Lstat(s + "/item"); err == nil {
				change(f.Name())
				return
			}
		}
	})
	nodes := &sameNodes{nodeList: nodeList{{Kind: nar.Regular, Size: size, Same: f}}}
	_, err := restore.Restore(ctx, nodes, s+"/item", restore.Options{LinksDirectory: s + "/.links"})
	cancel()
	changer.Wait()
	return err
}
