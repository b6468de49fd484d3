// SPDX-License-Identifier: GPL-3.0-or-later

package files

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// SyncData makes the bytes of a file durable, and of what is known about it as much as is needed to
// read them.
func SyncData(f *os.File) error {
	return onFile(f, "fdatasync", unix.Fdatasync)
}

// SyncFileSystem makes everything that was written to the file system of an open directory durable.
// Since Linux 5.8 it returns an error if that failed for anything written since the directory was
// opened.
func SyncFileSystem(directory *os.File) error {
	return onFile(directory, "sync", unix.Syncfs)
}

// PunchHole gives the space of a part of a file, in bytes, back to the file system. It does nothing
// where the file system cannot.
func PunchHole(f *os.File, offset, length int64) error {
	err := onFile(f, "fallocate", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, length)
	})
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	return err
}

// onFile makes a system call on a file, which must be open.
func onFile(f *os.File, operation string, call func(fd int) error) error {
	if _, err := retry(func() (int, error) { return 0, call(int(f.Fd())) }); err != nil {
		return &fs.PathError{Op: operation, Path: f.Name(), Err: err}
	}
	return nil
}
