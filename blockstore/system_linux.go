// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"errors"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// syncData makes the bytes of a file durable, and of what is known about it as much as is needed to
// read them.
func syncData(f *os.File) error {
	return withDescriptor(f, "fdatasync", func(fd int) error { return unix.Fdatasync(fd) })
}

// punchHole gives the space of a part of a file back to the file system. It does nothing where the
// file system cannot.
func punchHole(f *os.File, offset, length int64) error {
	err := withDescriptor(f, "fallocate", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, length)
	})
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	return err
}

func withDescriptor(f *os.File, operation string, do func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var failure error
	if err := raw.Control(func(fd uintptr) {
		for {
			if failure = do(int(fd)); !errors.Is(failure, syscall.EINTR) {
				return
			}
		}
	}); err != nil {
		return err
	}
	if failure != nil {
		return &os.PathError{Op: operation, Path: f.Name(), Err: failure}
	}
	return nil
}
