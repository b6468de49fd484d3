// SPDX-License-Identifier: GPL-3.0-or-later

package dir

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/local"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// incoming is the subdirectory where files are while they are being written.
const incoming = ".incoming"

// root is an open directory. It may be closed while it is being used: operations then fail by
// os.ErrClosed or are finished. Symbolic links do not lead out of it.
type root struct {
	*os.Root
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
	directory, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	r := &root{Root: directory}
	r.commits = local.NewCommits(r.sync)
	return r, nil
}

func (r *root) sync() error {
	directory, err := r.Open(".")
	if err != nil {
		return err
	}
	defer directory.Close()
	return files.SyncFileSystem(directory)
}

func file(layout Layout, name string) string {
	if layout == Flat {
		return name
	}
	return name[:2] + "/" + name
}

// wrongSizeError is the size in bytes of a file that has not the size that was expected.
type wrongSizeError int64

func (e wrongSizeError) Error() string { return fmt.Sprintf("file has %d bytes", int64(e)) }

// read reads the file with the given path, which must have the size of block. The error is
// eris.ErrNotFound if there is none that could be a block.
func (r *root) read(path string, block []byte) error {
	// To open a device may have effects, so look first.
	info, err := r.Lstat(path)
	if err == nil {
		err = check(info, len(block))
	}
	var f *os.File
	if err == nil {
		f, err = r.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	}
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			return eris.ErrNotFound
		}
		return err
	}
	defer f.Close()
	if info, err = f.Stat(); err == nil {
		err = check(info, len(block))
	}
	if err != nil {
		return err
	}
	n, err := io.ReadFull(f, block)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return wrongSizeError(n)
	}
	return err
}

// check returns an error if a file cannot be a block of the given size. An empty file is what a
// power cut leaves behind.
func check(info fs.FileInfo, size int) error {
	switch {
	case !info.Mode().IsRegular(), info.Size() == 0:
		return eris.ErrNotFound
	case info.Size() != int64(size):
		return wrongSizeError(info.Size())
	}
	return nil
}

func (r *root) write(path string, block []byte) error {
	temporary := fmt.Sprintf("%s/%016x", incoming, rand.Uint64())
	f, err := r.create(temporary)
	if err != nil {
		return err
	}
	_, err = f.Write(block)
	if err = errors.Join(err, f.Close()); err == nil {
		err = r.Rename(temporary, path)
	}
	if errors.Is(err, fs.ErrNotExist) {
		if err = r.makeDirectory(filepath.Dir(path)); err == nil {
			err = r.Rename(temporary, path)
		}
	}
	if err != nil {
		r.Remove(temporary)
	}
	return err
}

func (r *root) create(path string) (*os.File, error) {
	// A link in its place would lead elsewhere in the directory, where other programs may read.
	if info, err := r.Lstat(incoming); errors.Is(err, fs.ErrNotExist) {
		if err := r.makeDirectory(incoming); err != nil {
			return nil, err
		}
	} else if err == nil && !info.IsDir() {
		return nil, &os.PathError{Op: "open", Path: incoming, Err: unix.ENOTDIR}
	}
	return r.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
}

func (r *root) makeDirectory(path string) error {
	if err := r.Mkdir(path, 0o777); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// forgotten is the age from which on a file that is being written is taken for one that nobody
// writes any more.
const forgotten = time.Hour

func (r *root) clean() {
	directory, err := r.Open(incoming)
	if err != nil {
		return
	}
	defer directory.Close()
	const most = 10000
	names, _ := directory.Readdirnames(most)
	for _, name := range names {
		if len(name) != 16 || strings.Trim(name, "0123456789abcdef") != "" {
			continue
		}
		info, err := r.Lstat(incoming + "/" + name)
		if err == nil && info.Mode().IsRegular() && time.Since(info.ModTime()) > forgotten {
			r.Remove(incoming + "/" + name)
		}
	}
}
