// SPDX-License-Identifier: GPL-3.0-or-later

package restore

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

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
