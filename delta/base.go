// SPDX-License-Identifier: GPL-3.0-or-later

package delta

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// A base is an item that deltas are about. What it has below it is found from its descriptor, by
// one name after the other, and no link is followed: no path leads out of it, whatever changes
// meanwhile.
type base struct {
	name string
	file *os.File // the directory, or the file if the item is one
	dir  bool
}

// openBase opens a directory or a file.
func openBase(name string) (*base, error) {
	fd, err := openAt(unix.AT_FDCWD, name, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	b := &base{name: name, file: os.NewFile(uintptr(fd), name)}
	info, err := b.file.Stat()
	if err == nil && !info.IsDir() && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is neither a directory nor a regular file", name)
	}
	if err != nil {
		b.close()
		return nil, err
	}
	b.dir = info.IsDir()
	return b, nil
}

func (b *base) close() { b.file.Close() }

// openAt opens a file for reading, not through a link, and without waiting for the writer of a
// pipe.
func openAt(directory int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(directory, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC|flags, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

var errNoRegular = errors.New("no regular file")

// open opens the regular file at a path, which is empty if the base is a file, and returns its
// length in bytes.
func (b *base) open(path string) (f *os.File, size uint64, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("file %q of %s: %w", path, b.name, err)
		}
	}()
	fd, err := b.descriptor(path)
	if err != nil {
		return nil, 0, err
	}
	f = os.NewFile(uintptr(fd), b.name+"/"+path)
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = errNoRegular
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, uint64(st.Size), nil
}

// descriptor opens what is at a path.
func (b *base) descriptor(path string) (int, error) {
	at := int(b.file.Fd())
	if !b.dir {
		if path != "" {
			return -1, unix.ENOTDIR
		}
		fd, err := unix.FcntlInt(uintptr(at), unix.F_DUPFD_CLOEXEC, 0)
		return fd, err
	}
	for first := true; ; first = false {
		name, rest, more := strings.Cut(path, "/")
		if err := nar.CheckName(name); err != nil {
			if !first {
				unix.Close(at)
			}
			return -1, err
		}
		flags := 0
		if more {
			flags = unix.O_DIRECTORY
		}
		fd, err := openAt(at, name, flags)
		if !first {
			unix.Close(at)
		}
		if err != nil || !more {
			return fd, err
		}
		at, path = fd, rest
	}
}
