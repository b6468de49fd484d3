// SPDX-License-Identifier: GPL-3.0-or-later

package restore

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Remove deletes the tree at path, whatever its permissions, without following
// symbolic links and without crossing into another file system (Guix,
// guix/build/utils.scm: delete-file-recursively). It is no error when there is
// nothing.
func Remove(path string) error {
	parent, err := unix.Open(filepath.Dir(path), unix.O_DIRECTORY|unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: filepath.Dir(path), Err: err}
	}
	defer unix.Close(parent)
	var st unix.Stat_t
	err = unix.Fstatat(parent, filepath.Base(path), &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == unix.ENOENT {
		return nil
	} else if err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if err := removeAt(parent, filepath.Base(path), uint64(st.Dev)); err != nil {
		return fmt.Errorf("cannot remove %s: %w", path, err)
	}
	return nil
}

// removeAt deletes name in the open directory dir if it is on the device.
func removeAt(dir int, name string, device uint64) error {
	err := unix.Unlinkat(dir, name, 0)
	if err == nil || err == unix.ENOENT {
		return nil
	}
	if err != unix.EISDIR && err != unix.EPERM {
		return err
	}
	fd, err := openForRemoval(dir, name)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if uint64(st.Dev) != device {
		return fmt.Errorf("%q is a mount point", name)
	}
	// The owner needs write permission to delete entries; root does not.
	if st.Mode&0o700 != 0o700 && os.Geteuid() != 0 {
		if err := unix.Fchmod(fd, 0o700); err != nil {
			return err
		}
	}
	// A file system may skip entries when others are deleted while it lists them.
	for range 3 {
		if err := removeEntries(f, device); err != nil {
			return err
		}
		if err = unix.Unlinkat(dir, name, unix.AT_REMOVEDIR); err != unix.ENOTEMPTY {
			return err
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
	}
	return err
}

// removeEntries deletes what is in the directory f.
func removeEntries(f *os.File, device uint64) error {
	for {
		names, err := f.Readdirnames(1024)
		for _, n := range names {
			if err := removeAt(int(f.Fd()), n, device); err != nil {
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

// openForRemoval opens the directory name, after giving its owner permission if
// there is none.
func openForRemoval(dir int, name string) (int, error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(dir, name, flags, 0)
	if err != unix.EACCES {
		return fd, err
	}
	// fchmodat follows links; O_PATH with O_NOFOLLOW makes sure that this is the
	// directory itself.
	path, err := unix.Openat(dir, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(path)
	if err := unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", path), 0o700); err != nil {
		return -1, err
	}
	return unix.Openat(dir, name, flags, 0)
}
