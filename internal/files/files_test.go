// SPDX-License-Identifier: GPL-3.0-or-later

package files_test

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

func text(s string) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := io.WriteString(w, s)
		return err
	}
}

func names(t *testing.T, directory string) string {
	t.Helper()
	entries, err := os.ReadDir(directory)
	must(t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

func contents(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	return string(b)
}

func TestReplace(t *testing.T) {
	for _, o := range []files.Options{{}, {Sync: true}, {Locked: true}} {
		directory := t.TempDir()
		path := filepath.Join(directory, "state")
		for _, want := range []string{"first, which is longer", "second", ""} {
			must(t, files.Replace(path, 0o600, o, text(want)))
			if got := contents(t, path); got != want {
				t.Errorf("%+v: %q, want %q", o, got, want)
			}
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
			t.Errorf("%+v: %v, %v", o, info.Mode(), err)
		}
		broken := errors.New("broken")
		err := files.Replace(path, 0o600, o, func(w io.Writer) error { return errors.Join(text("half")(w), broken) })
		if !errors.Is(err, broken) || contents(t, path) != "" || names(t, directory) != "state" {
			t.Errorf("%+v, writing fails: %v, %q, files %s", o, err, contents(t, path), names(t, directory))
		}
	}
}

// What others have put in the place of the file, or of the temporary one, is replaced, and not
// written through.
func TestReplaceLinks(t *testing.T) {
	directory := t.TempDir()
	victim, path := filepath.Join(directory, "victim"), filepath.Join(directory, "state")
	must(t, os.WriteFile(victim, []byte("precious"), 0o600))
	for _, name := range []string{path, filepath.Join(directory, files.TemporaryPrefix+"state")} {
		must(t, os.Symlink(victim, name))
	}
	must(t, files.Replace(path, 0o600, files.Options{Locked: true}, text("new")))
	if contents(t, victim) != "precious" || contents(t, path) != "new" || names(t, directory) != "state victim" {
		t.Errorf("victim %q, state %q, files %s", contents(t, victim), contents(t, path), names(t, directory))
	}
}

// Where there is no renameat2, or not for this file system, one of several makes a file all the
// same.
func TestReplaceNew(t *testing.T) {
	withoutRename(t, func(t *testing.T) {
		directory := t.TempDir()
		path := filepath.Join(directory, "file")
		var group sync.WaitGroup
		results := make(chan error, 8)
		for range cap(results) {
			group.Go(func() { results <- files.Replace(path, 0o666, files.Options{New: true, Sync: true}, text("x")) })
		}
		group.Wait()
		made := 0
		for range cap(results) {
			if err := <-results; err == nil {
				made++
			} else if !errors.Is(err, fs.ErrExist) {
				t.Error(err)
			}
		}
		if made != 1 || names(t, directory) != "file" {
			t.Errorf("%d have made the file; files %s", made, names(t, directory))
		}
	})
}

// withoutRename runs f also where renameat2 fails, as it does on old kernels, on file systems, and
// in sandboxes, if there is another call to rename.
func withoutRename(t *testing.T, f func(t *testing.T)) {
	t.Run("with", f)
	if runtime.GOARCH != "riscv64" {
		testhelp.WithoutCalls(t, []uint32{unix.SYS_RENAMEAT2}, []unix.Errno{unix.ENOSYS, unix.EINVAL, unix.EPERM}, f)
	}
}

func TestMoveNew(t *testing.T) {
	withoutRename(t, func(t *testing.T) {
		directory := t.TempDir()
		from, to := filepath.Join(directory, "from"), filepath.Join(directory, "to")
		for range 2 {
			if err := os.Mkdir(from, 0o555); err != nil { // one that nobody may write to
				t.Fatal(err)
			}
			if err := files.MoveNew(from, to); err == nil && names(t, directory) == "to" {
				continue
			} else if !errors.Is(err, fs.ErrExist) || names(t, directory) != "from to" {
				t.Errorf("%v, files %s", err, names(t, directory))
			}
		}
	})
}

// Directories of some file systems, as those of /proc, cannot be synced.
func TestSyncDirectory(t *testing.T) {
	for _, directory := range []string{t.TempDir(), "/proc"} {
		must(t, files.SyncDirectory(directory))
	}
	if err := files.SyncDirectory(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// No file of another kind or another owner is read or locked, and nothing waits for one.
func TestUnfit(t *testing.T) {
	directory := t.TempDir()
	victim := filepath.Join(directory, "victim")
	must(t, os.WriteFile(victim, []byte("precious"), 0o600))
	for name, test := range map[string]struct {
		make func(path string) error
		root bool
	}{
		"symbolic link": {make: func(path string) error { return os.Symlink(victim, path) }},
		"dangling link": {make: func(path string) error { return os.Symlink(filepath.Join(directory, "none"), path) }},
		"pipe":          {make: func(path string) error { return unix.Mkfifo(path, 0o600) }},
		"directory":     {make: func(path string) error { return os.Mkdir(path, 0o700) }},
		"shared": {make: func(path string) error {
			return errors.Join(os.WriteFile(path, nil, 0o600), os.Chmod(path, 0o622))
		}},
		"foreign": {root: true, make: func(path string) error {
			return errors.Join(os.WriteFile(path, nil, 0o600), os.Chown(path, 1234, 1234))
		}},
		"device": {root: true, make: func(path string) error {
			return unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5)))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(directory, name)
			if err := test.make(path); err != nil {
				if test.root {
					t.Skip(err)
				}
				t.Fatal(err)
			}
			if b, err := files.ReadState(path, 100); err == nil || errors.Is(err, fs.ErrNotExist) && name != "dangling link" {
				t.Errorf("read: %q, %v", b, err)
			}
			if f, err := files.Lock(path, 0); err == nil {
				f.Close()
				t.Error("locked")
			}
			// What is no state may be anybody's, and behind a link, but no less regular.
			b, err := files.ReadRegular(path, 8)
			regular := map[string]string{"symbolic link": "precious", "shared": "", "foreign": ""}
			if want, ok := regular[name]; (err == nil) != ok || string(b) != want {
				t.Errorf("read as no state: %q, %v", b, err)
			}
		})
	}
	if contents(t, victim) != "precious" {
		t.Error("the victim has changed")
	}
	if _, err := files.ReadRegular(victim, 7); err == nil {
		t.Error("a file that is too large is read")
	}
	if _, err := os.Lstat(filepath.Join(directory, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a lock file has been made through a link")
	}
}

func TestReadState(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	if _, err := files.ReadState(path, 10); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	for _, want := range []string{"", "12345", "1234567890"} {
		must(t, files.Replace(path, 0o600, files.Options{}, text(want)))
		if b, err := files.ReadState(path, 10); err != nil || string(b) != want {
			t.Errorf("%q, %v, want %q", b, err, want)
		}
	}
	must(t, os.WriteFile(path, make([]byte, 11), 0o600))
	if _, err := files.ReadState(path, 10); err == nil {
		t.Error("a file that is too large is read")
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	must(t, os.WriteFile(path, []byte("kept"), 0o600))
	first, err := files.Lock(path, 0)
	must(t, err)
	for _, wait := range []time.Duration{0, time.Millisecond} {
		if _, err := files.Lock(path, wait); !errors.Is(err, files.ErrLocked) {
			t.Errorf("second lock within %v: %v", wait, err)
		}
	}
	var group sync.WaitGroup
	defer group.Wait()
	group.Go(func() {
		second, err := files.Lock(path, time.Hour)
		if err != nil {
			t.Error(err)
			return
		}
		if err := errors.Join(files.UnlockFile(second), files.LockFile(second, 0), second.Close()); err != nil {
			t.Error(err)
		}
	})
	must(t, first.Close())
	if contents(t, path) != "kept" {
		t.Error("the lock file has changed")
	}
}

func TestMakeDirectory(t *testing.T) {
	directory := t.TempDir()
	path := filepath.Join(directory, "a", "b")
	for range 2 {
		must(t, files.MakeDirectory(path))
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info, err)
	}
	file := filepath.Join(directory, "file")
	must(t, os.WriteFile(file, nil, 0o600))
	if err := files.MakeDirectory(file); err == nil {
		t.Error("a file in the place of the directory")
	}
	if os.Geteuid() != 0 {
		t.Skip("only root can make the directory of another user")
	}
	must(t, os.Chown(path, 1234, -1))
	link := filepath.Join(directory, "link")
	must(t, os.Symlink(path, link))
	for _, path := range []string{path, link} {
		if err := files.MakeDirectory(path); err == nil {
			t.Errorf("%s belongs to another user", path)
		}
	}
	must(t, errors.Join(os.Chmod(filepath.Dir(directory), 0o755), os.Chmod(directory, 0o755), os.Chown(filepath.Dir(path), 1234, -1)))
	foreign := filepath.Join(directory, "foreign")
	must(t, errors.Join(os.Symlink(path, foreign), os.Lchown(foreign, 1235, -1), syscall.Seteuid(1234)))
	defer syscall.Seteuid(0)
	if err := files.MakeDirectory(link); err != nil {
		t.Errorf("by a link of root: %v", err)
	}
	if err := files.MakeDirectory(foreign); err == nil {
		t.Error("by a link of another user")
	}
}

func TestIdentify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if files.Identify(path) != (files.Identity{}) {
		t.Error("no file has an identity")
	}
	begin := time.Now()
	must(t, os.WriteFile(path, []byte("one"), 0o600))
	if files.Identify(path) != (files.Identity{}) && time.Since(begin) < time.Second {
		t.Error("a file has an identity that may be changed in the same moment")
	}
	time.Sleep(1100 * time.Millisecond)
	first := files.Identify(path)
	if first == (files.Identity{}) || first != files.Identify(path) {
		t.Errorf("a file that does not change has the identity %v", first)
	}
	// What can be set back is the time of the modification alone.
	info, err := os.Stat(path)
	must(t, err)
	must(t, os.WriteFile(path, []byte("two"), 0o600))
	must(t, os.Chtimes(path, info.ModTime(), info.ModTime()))
	time.Sleep(1100 * time.Millisecond)
	if second := files.Identify(path); second == (files.Identity{}) || second == first {
		t.Errorf("after a change a file has the identity %v, before it %v", second, first)
	}
}

// TestRoom has a file system that has room for bytes, but not for many files.
func TestRoom(t *testing.T) {
	directory := t.TempDir()
	if err := unix.Mount("tmpfs", directory, "tmpfs", 0, "size=8m,nr_inodes=100"); err != nil {
		t.Skip("cannot mount a small file system (this needs root): ", err)
	}
	defer unix.Unmount(directory, unix.MNT_DETACH)
	for size, want := range map[int64]bool{100 << 10: true, 1 << 20: false, 9 << 20: false} {
		if room, err := files.RoomIn(directory); err != nil || room.Holds(size) != want {
			t.Errorf("room for %d bytes is %t", size, !want)
		}
	}
}
