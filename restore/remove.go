// SPDX-License-Identifier: GPL-3.0-or-later

package restore

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// Remove deletes the tree at path, whatever its permissions and depth, without following symbolic
// links and without crossing mount points, of which one at path is one (Guix, guix/build/utils.scm:
// delete-file-recursively). It is no error when there is nothing. The last component of path must
// be a name: what ends with "." or ".." is refused.
func Remove(path string) error {
	parent, name, err := openParent(path)
	if err != nil {
		return err
	}
	defer unix.Close(parent)
	var st unix.Stat_t
	if err := unix.Fstat(parent, &st); err != nil {
		return &os.PathError{Op: "stat", Path: filepath.Dir(path), Err: err}
	}
	r := remover{device: uint64(st.Dev)}
	if err := r.remove(parent, name, 0); err != nil {
		return fmt.Errorf("cannot remove %s: %w", path, err)
	}
	return nil
}

// RemoveUnused removes a directory of this user as [Remove] does, if nobody has its lock; it waits
// for that unless how is [unix.LOCK_NB]. Errors are passed over.
func RemoveUnused(path string, how int) {
	if lock, err := files.LockDirectory(path, unix.LOCK_EX|how); err == nil {
		Remove(path)
		lock.Close()
	}
}

// Temporary makes a directory for trees, of which the name begins with prefix, in one where others
// may have theirs too. What processes that were killed have left of such directories there is
// removed. The caller calls remove when it needs the directory no more.
func Temporary(parent, prefix string) (path string, remove func() error, err error) {
	left, _ := fs.Glob(os.DirFS(parent), prefix+"*")
	for _, name := range left {
		RemoveUnused(filepath.Join(parent, name), unix.LOCK_NB)
	}
	for {
		path, err := os.MkdirTemp(parent, prefix)
		if err != nil {
			return "", nil, err
		}
		lock, err := files.LockDirectory(path, unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, fs.ErrNotExist) {
			continue // another process has taken it for one that was left
		}
		// Where the file system has no locks, nobody takes it for that.
		return path, func() error {
			defer lock.Close()
			return Remove(path)
		}, nil
	}
}

// openParent opens the directory that path is in, and returns the name that path has there.
func openParent(path string) (fd int, name string, err error) {
	trimmed := strings.TrimRight(path, "/")
	name = trimmed[strings.LastIndexByte(trimmed, '/')+1:]
	if err := nar.CheckName(name); err != nil {
		return -1, "", fmt.Errorf("%q cannot be a destination: %w", path, err)
	}
	directory := filepath.Dir(trimmed)
	fd, err = files.OpenAt(unix.AT_FDCWD, directory, unix.O_DIRECTORY|unix.O_PATH, 0)
	if err != nil {
		return -1, "", &os.PathError{Op: "open", Path: directory, Err: err}
	}
	return fd, name, nil
}

// A remover deletes one tree. It has a file open for each directory on the way down; what lies
// deeper than maxOpen is moved up to the root of the tree first, where the file system can do that.
type remover struct {
	device uint64
	root   *os.File // the tree's own directory
	moved  bool     // something has been moved to root since it was listed
}

// maxOpen is how deep a remover goes.
const maxOpen = 8

var errMount = errors.New("it is a mount point")

// remove deletes name in the open directory dir.
func (r *remover) remove(dir int, name string, depth int) error {
	err := unlinkAt(dir, name, 0)
	if err == nil || err == unix.ENOENT {
		return nil
	}
	if err != unix.EISDIR && err != unix.EPERM {
		return err
	}
	fd, openErr := openForRemoval(dir, name)
	if openErr != nil && openErr != unix.ENOTDIR { // a file that may not be changed
		err = openErr
	}
	if openErr != nil {
		return fmt.Errorf("%q: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if uint64(st.Dev) != r.device {
		return fmt.Errorf("%q: %w", name, errMount)
	}
	if st.Mode&0o700 != 0o700 {
		// Its owner needs this to delete entries. Where it fails it may not be needed; if it is,
		// deleting them fails.
		unix.Fchmod(fd, 0o700)
	}
	if depth == maxOpen {
		to := ".removed-" + rand.Text()
		err := files.Retry(func() error { return unix.Renameat(dir, name, int(r.root.Fd()), to) })
		if err != unix.EXDEV { // an overlay leaves directories where they are
			r.moved = true
			return err
		}
		depth--
	}
	if depth == 0 {
		r.root = f
	}
	// A file system may skip entries when others are deleted while it lists them.
	for tries := 0; ; tries++ {
		if depth == 0 && r.moved {
			tries, r.moved = 0, false
		}
		if err := r.entries(f, depth+1); err != nil {
			return err
		}
		err := unlinkAt(dir, name, unix.AT_REMOVEDIR)
		if err != unix.ENOTEMPTY && err != unix.EEXIST || tries == 3 && !r.moved {
			return err
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
	}
}

// entries deletes what is in the directory f.
func (r *remover) entries(f *os.File, depth int) error {
	for {
		names, err := f.Readdirnames(1024)
		for _, n := range names {
			if err := r.remove(int(f.Fd()), n, depth); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// openForRemoval opens the directory name, after giving its owner permission if there is none.
func openForRemoval(dir int, name string) (int, error) {
	const flags = unix.O_DIRECTORY | unix.O_NOFOLLOW
	fd, err := openBeneath(dir, name, unix.O_RDONLY|flags)
	if err != unix.EACCES {
		return fd, err
	}
	// fchmodat follows links; O_PATH with O_NOFOLLOW makes sure that this is the directory itself.
	path, err := openBeneath(dir, name, unix.O_PATH|flags)
	if err != nil {
		return -1, err
	}
	defer unix.Close(path)
	if err := unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", path), 0o700); err != nil {
		return -1, err
	}
	return openBeneath(dir, name, unix.O_RDONLY|flags)
}

// openBeneath opens name in dir unless it is a mount point, which the number of its device does not
// tell if it is a part of the same file system.
func openBeneath(dir int, name string, flags int) (int, error) {
	fd, err := files.OpenResolved(dir, name, flags, unix.RESOLVE_NO_XDEV|unix.RESOLVE_NO_SYMLINKS)
	switch err {
	case unix.EXDEV:
		return -1, errMount
	case unix.ENOSYS:
		return files.OpenAt(dir, name, flags, 0)
	}
	return fd, err
}

func unlinkAt(dir int, name string, flags int) error {
	return files.Retry(func() error { return unix.Unlinkat(dir, name, flags) })
}
