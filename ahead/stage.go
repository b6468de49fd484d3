// SPDX-License-Identifier: GPL-3.0-or-later

package ahead

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// stagingName is the directory in the store below which items are staged, in a directory for each
// session. No store item has such a name, so the garbage collector may remove it at any time (Guix,
// nix/libstore/gc.cc: LocalStore::collectGarbage), which is right: whatever is wrong with a staged
// item means that it is not staged.
const stagingName = ".guix-substitute-eris"

// lockWait is how often it is looked whether somebody still waits for an item that another helper
// is staging.
const lockWait = 100 * time.Millisecond

// A stage is a directory in the store in which the helpers of one session restore items before they
// are asked for. It is there as long as something is in it. Each helper has a shared lock of it,
// which tells others that it is in use.
//
// Of an item that is called KEY there are KEY.….part while it is being restored, by whoever has the
// lock of KEY.lock, and KEY when it is complete and has the right hash, which is a part of the key:
// helpers that believe other narinfos look for something else. The stage may be collected and made
// anew while an item is restored, so that two helpers restore it, each to a name of its own.
//
// Files are named by their paths, not relative to the directory that is open: whoever could rename
// them has the user that owns the store, and needs no such means.
type stage struct {
	store string
	name  string
	lock  *os.File // the directory; nil as long as there is none
}

func (s *stage) path() string { return filepath.Join(s.store, stagingName, s.name) }

// open makes the directory, if there is none. The error wraps [unix.EWOULDBLOCK] while somebody is
// removing what others have left there.
func (s *stage) open() error {
	if s.lock != nil {
		if files.IsAt(s.lock, s.path()) {
			return nil
		}
		s.lock.Close() // it was collected
		s.lock = nil
	}
	var err error
	// Another helper may take the directory away meanwhile.
	for range 10 {
		// What is in it is nobody's business before its hash has been checked.
		if err = files.MakeDirectory(filepath.Dir(s.path())); err != nil {
			continue
		}
		if err = files.MakeDirectory(s.path()); err != nil {
			continue
		}
		if s.lock, err = files.LockDirectory(s.path(), unix.LOCK_SH|unix.LOCK_NB); err == nil || errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
	}
	return err
}

// close removes the directory with all that is in it, unless another helper uses it.
func (s *stage) close() error {
	if s.lock == nil {
		return nil
	}
	defer func() {
		s.lock.Close()
		s.lock = nil
	}()
	if unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		return nil // who is last removes it
	}
	if !files.IsAt(s.lock, s.path()) {
		return nil // collected
	}
	return s.collect()
}

// collect removes the directory, whoever uses it, as the garbage collector does.
func (s *stage) collect() error {
	err := restore.Remove(s.path())
	os.Remove(filepath.Dir(s.path())) // if there is no other session
	return err
}

// A claim is the right to stage an item.
type claim struct {
	final string
	part  string // the file name at which the item is to be restored
	lock  *os.File
}

// claim returns the right to stage an item, or nil if another helper has it or has staged the item,
// or if it cannot be had.
func (s *stage) claim(key string) *claim {
	final := filepath.Join(s.path(), key)
	lock, err := files.Lock(final+".lock", 0)
	if err != nil {
		return nil
	}
	c := &claim{final, final + "." + rand.Text() + ".part", lock}
	if _, err := os.Lstat(final); err == nil {
		c.release()
		return nil
	}
	return c
}

// watch calls lost when the stage has been collected, unless the context ends before: what is still
// written would be in the way of its being deleted (Guix, nix/libutil/util.cc: deletePath).
func (c *claim) watch(ctx context.Context, lost func()) {
	ticker := time.NewTicker(lockWait)
	defer ticker.Stop()
	for files.IsAt(c.lock, c.lock.Name()) {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
	lost()
}

// finish says that the item is complete.
func (c *claim) finish() error { return rename(c.part, c.final) }

// release gives up the right, if it is one.
func (c *claim) release() {
	if c.lock != nil {
		c.lock.Close()
	}
}

// move gives an item that is staged its place in the store, where there must be nothing.
func (s *stage) move(key, destination string) error {
	d, err := os.Open(s.path())
	if err != nil {
		return err
	}
	defer d.Close()
	return s.moveFrom(d, key, destination)
}

// moveFrom does so, if what is staged is in an open directory that is not collected meanwhile. The
// kernel looks for the item before it waits until it may change the store: when the collector moves
// the stage away then, it may have deleted a part of the item by the time that this is moved.
func (s *stage) moveFrom(d *os.File, key, destination string) error {
	if err := rename(filepath.Join(s.path(), key), destination); err != nil {
		return err
	}
	if files.IsAt(d, s.path()) {
		return nil
	}
	return errors.Join(fs.ErrNotExist, restore.Remove(destination))
}

// remove removes an item that is staged, if there is one. It is renamed first, so that another
// helper either has all of it or nothing.
func (s *stage) remove(key string) {
	final := filepath.Join(s.path(), key)
	if rename(final, final+".gone") == nil {
		restore.Remove(final + ".gone")
	}
}

// take gives an item its place that another helper has staged or is staging; that is waited for,
// until the context ends. If it cannot be had, take returns the right to stage it, which may be
// none.
func (s *stage) take(ctx context.Context, key, destination string) (moved bool, c *claim) {
	if s.move(key, destination) == nil {
		return true, nil
	}
	final := filepath.Join(s.path(), key)
	lock, err := files.Lock(final+".lock", 0)
	for errors.Is(err, files.ErrLocked) && ctx.Err() == nil {
		lock, err = files.Lock(final+".lock", lockWait)
	}
	if err != nil {
		return false, &claim{}
	}
	if s.move(key, destination) == nil {
		lock.Close()
		return true, nil
	}
	return false, &claim{lock: lock}
}

// rename renames a tree that may not be writable, as long as there is nothing of the new name.
func rename(from, to string) error {
	err := files.MoveNew(from, to)
	if info, failed := os.Lstat(from); !errors.Is(err, unix.EACCES) || failed != nil || !info.IsDir() {
		return err
	}
	// To move a directory one must be allowed to write to it, unless one is root.
	if err := os.Chmod(from, 0o755); err != nil {
		return err
	}
	if err := files.MoveNew(from, to); err != nil {
		return err
	}
	return os.Chmod(to, 0o555)
}

// CleanStages removes what helpers that were killed have left in the store. What is in use stays.
// Errors are passed over. It takes no time worth mentioning when there is nothing.
func CleanStages(store string) { clean(store, "*", unix.LOCK_NB) }

// clean removes the stage of a session, or all stages ("*"), once it has its lock, for which it
// waits until no helper uses it, unless how is LOCK_NB. Errors are passed over.
func clean(store, session string, how int) {
	around, _, err := files.OpenState(filepath.Join(store, stagingName), unix.O_DIRECTORY)
	if err != nil {
		return
	}
	defer around.Close()
	sessions, _ := fs.Glob(os.DirFS(around.Name()), session)
	for _, name := range sessions {
		restore.RemoveUnused(filepath.Join(around.Name(), name), how)
	}
	os.Remove(around.Name())
}
