// SPDX-License-Identifier: GPL-3.0-or-later

package dir

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/local"
)

// incoming is the subdirectory where files are while they are being written.
const incoming = ".incoming"

// root is an open directory. It may be closed while it is being used, upon which operations fail by os.ErrClosed or are
// finished.
type root struct {
	file    *os.File
	commits *local.Commits
}

func openRoot(path string, make bool) (*root, error) {
	if make {
		if err := os.Mkdir(path, 0o777); err != nil && !errors.Is(err, os.ErrExist) {
			if _, statErr := os.Stat(path); statErr != nil {
				return nil, err
			}
		}
	}
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	r := &root{file: file}
	r.commits = local.NewCommits(func() error {
		return r.do(func(fd int) error {
			if err := syncFileSystem(fd); err != nil {
				return &os.PathError{Op: "sync", Path: path, Err: err}
			}
			return nil
		})
	})
	return r, nil
}

// do calls f with the descriptor of the directory, which stays open meanwhile.
func (r *root) do(f func(fd int) error) error {
	raw, err := r.file.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	if err := raw.Control(func(fd uintptr) { result = f(int(fd)) }); err != nil {
		return os.ErrClosed
	}
	return result
}

// retry repeats a system call that a signal has interrupted, which network file systems let happen.
func retry[T any](call func() (T, error)) (T, error) {
	for {
		v, err := call()
		if err != unix.EINTR {
			return v, err
		}
	}
}

// openAt opens a file below a directory. It never follows a symbolic link in the place of the file, nor waits for the other
// end of a pipe.
func openAt(dir int, name string, flags int, mode uint32) (int, error) {
	const always = unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY
	return retry(func() (int, error) { return unix.Openat(dir, name, flags|always, mode) })
}

// in calls f with the directory in which blocks of a layout are, or would be: with that of a name.
func in(fd int, layout Layout, name string, make bool, f func(dir int) error) error {
	if layout == Flat {
		return f(fd)
	}
	return inSubdirectory(fd, name[:2], make, f)
}

// inSubdirectory calls f with a subdirectory, which is made first if that is wanted.
func inSubdirectory(fd int, name string, make bool, f func(dir int) error) error {
	if make {
		_, err := retry(func() (int, error) { return 0, unix.Mkdirat(fd, name, 0o777) })
		if err != nil && err != unix.EEXIST {
			return &os.PathError{Op: "mkdir", Path: name, Err: err}
		}
	}
	dir, err := openAt(fd, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(dir)
	return f(dir)
}

// wrongSizeError is the size in bytes of a file that has not the size that was expected.
type wrongSizeError int64

func (e wrongSizeError) Error() string { return fmt.Sprintf("file has %d bytes", int64(e)) }

// read reads the file with the given name, which must have the size of block. The error is eris.ErrNotFound if there is none
// that could be a block.
func (r *root) read(layout Layout, name string, block []byte) error {
	err := r.do(func(fd int) error {
		return in(fd, layout, name, false, func(dir int) error { return readAt(dir, name, block) })
	})
	// The last: a symbolic link was not followed.
	for _, absent := range []error{unix.ENOENT, unix.ENOTDIR, unix.ELOOP} {
		if errors.Is(err, absent) {
			return eris.ErrNotFound
		}
	}
	return err
}

func readAt(dir int, name string, block []byte) error {
	// To open a device may have effects, so look first.
	var stat unix.Stat_t
	if _, err := retry(func() (int, error) { return 0, unix.Fstatat(dir, name, &stat, unix.AT_SYMLINK_NOFOLLOW) }); err != nil {
		return &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if err := check(&stat, len(block)); err != nil {
		return err
	}
	fd, err := openAt(dir, name, unix.O_RDONLY, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	if _, err := retry(func() (int, error) { return 0, unix.Fstat(fd, &stat) }); err != nil {
		return &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if err := check(&stat, len(block)); err != nil {
		return err
	}
	for read := 0; read < len(block); {
		n, err := retry(func() (int, error) { return unix.Pread(fd, block[read:], int64(read)) })
		if err != nil {
			return &os.PathError{Op: "read", Path: name, Err: err}
		}
		if n == 0 {
			return wrongSizeError(read)
		}
		read += n
	}
	return nil
}

// check returns an error if a file cannot be a block of the given size. An empty file is what a power cut leaves behind.
func check(stat *unix.Stat_t, size int) error {
	switch {
	case stat.Mode&unix.S_IFMT != unix.S_IFREG, stat.Size == 0:
		return eris.ErrNotFound
	case stat.Size != int64(size):
		return wrongSizeError(stat.Size)
	}
	return nil
}

// write writes a block under another name and renames it.
func (r *root) write(layout Layout, name string, block []byte) error {
	var random [8]byte
	rand.Read(random[:])
	temporary := hex.EncodeToString(random[:])
	return r.do(func(fd int) error {
		return inSubdirectory(fd, incoming, true, func(dir int) error {
			err := writeAt(dir, temporary, block)
			if err == nil {
				err = in(fd, layout, name, true, func(to int) error {
					_, err := retry(func() (int, error) { return 0, unix.Renameat(dir, temporary, to, name) })
					if err != nil {
						return &os.PathError{Op: "rename to", Path: name, Err: err}
					}
					return nil
				})
			}
			if err != nil {
				unix.Unlinkat(dir, temporary, 0)
			}
			return err
		})
	})
}

func writeAt(dir int, name string, block []byte) error {
	fd, err := openAt(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o666)
	if err != nil {
		return &os.PathError{Op: "create", Path: filepath.Join(incoming, name), Err: err}
	}
	for len(block) > 0 && err == nil {
		var n int
		n, err = retry(func() (int, error) { return unix.Write(fd, block) })
		if err == nil && n == 0 {
			err = io.ErrShortWrite
		}
		block = block[max(n, 0):]
	}
	if closeErr := unix.Close(fd); err == nil && closeErr != unix.EINTR {
		err = closeErr
	}
	if err != nil {
		return &os.PathError{Op: "write", Path: filepath.Join(incoming, name), Err: err}
	}
	return nil
}

// remove removes the file of a block.
func (r *root) remove(layout Layout, name string) {
	r.do(func(fd int) error {
		return in(fd, layout, name, false, func(dir int) error { return unix.Unlinkat(dir, name, 0) })
	})
}

// forgotten is the age from which on a file that is being written is taken for one that nobody writes any more.
const forgotten = time.Hour

// sweep removes what writers that were interrupted have left behind.
func (r *root) sweep() {
	r.do(func(fd int) error {
		return inSubdirectory(fd, incoming, false, func(dir int) error {
			// A descriptor of its own, because File closes it.
			again, err := openAt(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
			if err != nil {
				return err
			}
			file := os.NewFile(uintptr(again), incoming)
			defer file.Close()
			const most = 10000
			names, err := file.Readdirnames(most)
			for _, name := range names {
				var stat unix.Stat_t
				if len(name) != 16 || strings.Trim(name, "0123456789abcdef") != "" ||
					unix.Fstatat(dir, name, &stat, unix.AT_SYMLINK_NOFOLLOW) != nil || stat.Mode&unix.S_IFMT != unix.S_IFREG {
					continue
				}
				if age := time.Since(time.Unix(stat.Mtim.Unix())); age > forgotten {
					unix.Unlinkat(dir, name, 0)
				}
			}
			return err
		})
	})
}

// readOnly makes fetch.ErrReadOnly of the errors that say that writing is not allowed.
func readOnly(err error) error {
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: %w", fetch.ErrReadOnly, err)
	}
	return err
}
