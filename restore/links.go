// SPDX-License-Identifier: GPL-3.0-or-later

package restore

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// deduplicationMinimum is the length in bytes of the smallest file that is shared (Guix,
// guix/store/deduplication.scm: %deduplication-minimum-size).
const deduplicationMinimum = 8192

// links is the directory through which the files of a store share their contents: one hard link for
// each, named by the hash of the file (Guix, nix/libstore/optimise-store.cc:
// LocalStore::optimisePath_). Its methods are safe for concurrent use. Sharing is a matter of space
// only: each failure of it leaves the file as it is.
type links struct {
	path    string
	damaged func(file string) // tells a link that has other contents than its name says; or nil

	once sync.Once
	fd   int // of path, -1 if it is not open
}

func (l *links) close() {
	if l.fd >= 0 {
		unix.Close(l.fd)
	}
}

// open returns the descriptor of the directory, which it makes if need be; -1 if it cannot.
func (l *links) open() int {
	l.once.Do(func() {
		const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW
		fd, err := files.OpenAt(unix.AT_FDCWD, l.path, flags, 0)
		if err == unix.ENOENT {
			unix.Mkdir(l.path, 0o755)
			fd, err = files.OpenAt(unix.AT_FDCWD, l.path, flags, 0)
		}
		if err == nil {
			l.fd = fd
		}
	})
	return l.fd
}

// use creates f as a link to the contents of the given name, and reports whether that went well. If
// not, nothing has been created.
func (l *links) use(name string, f *file) bool {
	fd := l.open()
	return fd >= 0 && l.usable(fd, name, f) && unix.Linkat(fd, name, f.directory.fd, f.name, 0) == nil
}

// share makes f, which exists in its final form, share its contents with the link of the given
// name, or become that link.
func (l *links) share(name string, f *file) {
	fd := l.open()
	if fd < 0 || unix.Linkat(f.directory.fd, f.name, fd, name, 0) != unix.EEXIST {
		return // it is the link now; or the directory is full, or of another owner
	}
	if !l.usable(fd, name, f) {
		// One that was damaged is gone.
		unix.Linkat(f.directory.fd, f.name, fd, name, 0)
		return
	}
	// The new link takes the place of the file in one step. It comes from beside it: the collector
	// ends with an error when what it has read in the directory of links is gone. A name of the form
	// that the daemon clears away from the store should it be left behind.
	temporary, dir := fmt.Sprintf(".tmp-link-%d-%s", os.Getpid(), rand.Text()), f.directory.fd
	if unix.Linkat(fd, name, dir, temporary, 0) != nil {
		return
	}
	if unix.Renameat(dir, temporary, dir, f.name) != nil {
		unix.Unlinkat(dir, temporary, 0)
	}
}

// usable reports whether the link has the contents of f, and the mode, time and owner of a store
// file: it is never changed, as other items share it. One that has other contents, because a disk
// or whoever could write to it has changed it, or because it was truncated when the machine went
// down, is removed, and told.
func (l *links) usable(fd int, name string, f *file) bool {
	link, err := files.OpenAt(fd, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	contents := os.NewFile(uintptr(link), l.path+"/"+name)
	defer contents.Close()
	var st unix.Stat_t
	if unix.Fstat(link, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return false
	}
	if uint64(st.Size) == f.size {
		same, err := f.same(contents, name)
		if same {
			same, err = canonical(f, contents)
			return same && err == nil
		} else if err != nil {
			return false
		}
	}
	if unix.Unlinkat(fd, name, 0) == nil && l.damaged != nil {
		l.damaged(contents.Name())
	}
	return false
}

// same reports whether r, which has as many bytes, has the contents of f, whose link has the name.
func (f *file) same(r io.Reader, name string) (bool, error) {
	if f.stream != nil { // they are not at hand any more
		h := newLinkHash(f)
		_, err := io.Copy(h.hash, r)
		return err == nil && h.name() == name, err
	}
	buffer := make([]byte, 64<<10)
	for _, piece := range f.pieces {
		for rest := piece.Bytes; len(rest) > 0; {
			n, err := io.ReadFull(r, buffer[:min(len(rest), len(buffer))])
			if err != nil {
				return false, err
			}
			if !bytes.Equal(buffer[:n], rest[:n]) {
				return false, nil
			}
			rest = rest[n:]
		}
	}
	return true, nil
}

var errChanged = errors.New("the file that it is linked to has changed meanwhile")

// link makes f a hard link to same and reads the contents, for the hash, from the very file that it
// has linked: nobody can put another one in its place. It reports whether it did. If not, nothing
// has been created, and f is to be written: without de-duplication, if same is not a canonical file
// of a store that belongs to us, or if the file system refuses the link.
func (r *restorer) link(f *file, same *os.File) (bool, error) {
	if same == nil || r.links == nil || r.writable || f.size < deduplicationMinimum {
		return false, nil
	}
	if ok, err := canonical(f, same); err != nil || !ok || linkDescriptor(same, f.directory.fd, f.name) != nil {
		return false, nil
	}
	for offset := uint64(0); offset < f.size; {
		c := r.pool.Get()
		c.Bytes = c.Bytes[:min(uint64(len(c.Bytes)), f.size-offset)]
		_, err := same.ReadAt(c.Bytes, int64(offset))
		if err == nil {
			err = r.hash.Contents(c)
		}
		offset += uint64(len(c.Bytes))
		c.Release()
		if err != nil {
			return false, r.pathError("link", f.name, err)
		}
	}
	ok, err := canonical(f, same)
	if err == nil && !ok {
		err = errChanged
	}
	if err != nil {
		return false, r.pathError("link", f.name, err)
	}
	return true, nil
}

// canonical reports whether an open file looks as f would if it were written.
func canonical(f *file, same *os.File) (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(same.Fd()), &st); err != nil {
		return false, err
	}
	return st.Mode == unix.S_IFREG|f.mode() && uint64(st.Size) == f.size && st.Mtim == canonicalTime[1] &&
		int(st.Uid) == os.Geteuid() && int(st.Gid) == os.Getegid(), nil
}

// linkDescriptor links an open file. Not everybody may do so by the descriptor alone; for others
// /proc is needed.
func linkDescriptor(f *os.File, directory int, name string) error {
	err := unix.Linkat(int(f.Fd()), "", directory, name, unix.AT_EMPTY_PATH)
	if err == unix.ENOENT || err == unix.EPERM {
		path := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
		err = unix.Linkat(unix.AT_FDCWD, path, directory, name, unix.AT_SYMLINK_FOLLOW)
	}
	return err
}
