// SPDX-License-Identifier: GPL-3.0-or-later

// Package dir keeps ERIS blocks in a directory, one file per block: on a USB stick, in a directory
// that a web server serves, or in one that is mirrored. Start with [Open].
//
// A file is named by the 52 characters of Base32 of the block's reference, in upper case, so that
// names are the same on file systems that ignore case. It is either in the directory itself (flat)
// or in a subdirectory named by the first two characters (sharded). Both are read; the URL says
// which is written.
//
// # What stored means
//
// Put returns once the block would survive a power cut, as far as the kernel knows. A block is
// written under another name in the subdirectory ".incoming", renamed, and the file system is
// synced (on Linux by syncfs, which also writes what others have changed in that file system).
// Blocks that are put at the same time share one sync, so that a slow medium takes many callers
// almost as fast as it can write, but a single one only as fast as it can sync. After a power cut
// there may be files that are empty or damaged, but none of a block for which Put had returned; a
// damaged file is replaced when its block is put again.
//
// # What is not trusted
//
// Whoever can write to the directory can withhold blocks, and nothing else: whoever asks for blocks
// verifies them. Only regular files of the right size are opened; symbolic links below the
// directory are not followed.
package dir

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/local"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// Store is a directory with blocks. It implements [fetch.Store]. It is safe for concurrent use,
// also by several processes at a time. Errors of requests wrap [eris.ErrNotFound] if there is no
// file for the block, or one that is empty, not regular, or a symbolic link; [*eris.BlockError] if
// there is one of another size; others are those of the file system.
type Store struct {
	*local.Store
	flat bool        // new blocks are
	hint atomic.Bool // the last block that was found is

	mu      sync.Mutex
	root    *root // nil if it is not open
	checked time.Time
	cleaned bool
}

var _ fetch.Store = (*Store)(nil)

// Open returns the store in the directory that a URL names: file:///media/usb, or file:blocks,
// relative to the working directory. The path is percent-encoded. An element "layout=flat" of the
// query has new blocks written flat instead of sharded; "get", "put" or both restrict what the
// store is used for. Blocks are also found in a subdirectory "blocks", as the command "export"
// makes it.
//
// Open does not touch the directory. It is opened when it is needed; a directory that is not there,
// because a medium is not plugged in, makes requests fail until it is. If it does not exist, the
// first Put makes it, but not its parents. While it is open, its file system cannot be unmounted.
//
// The Store must be closed. Put returns once the block is durable, see the package comment; its
// errors wrap [fetch.ErrReadOnly] if the file system or the permissions of the directory do not
// allow writing.
func Open(url string) (*Store, error) {
	u, err := storeurl.ParseScheme(url, "file")
	if err != nil {
		return nil, err
	}
	s := &Store{flat: u.Has("layout=flat")}
	s.hint.Store(s.flat)
	s.Store = local.New(u, adapter{s})
	return s, nil
}

var errGone = errors.New("the directory is gone")

// adapter is the store as package local sees it.
type adapter struct{ *Store }

// Release implements [local.Files].
func (s adapter) Release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.setRoot(nil)
}

// Read implements [local.Files].
func (s adapter) Read(ref eris.Reference, block []byte) error {
	r, err := s.open(false)
	if err != nil {
		return err
	}
	_, err = s.find(r, ref, len(block), block[:0])
	return err
}

// find looks for a block in both layouts, and reads it as [root.read] does.
func (s *Store) find(r *root, ref eris.Reference, size int, dst []byte) ([]byte, error) {
	first := s.hint.Load()
	name := ref.String()
	result := error(eris.ErrNotFound)
	for _, place := range r.places {
		for _, flat := range [...]bool{first, !first} {
			block, err := r.read(place+file(flat, name), ref, size, dst)
			if err == nil {
				s.hint.Store(flat)
				return block, nil
			}
			if !errors.Is(err, eris.ErrNotFound) {
				result = err
			}
		}
	}
	return nil, result
}

// Write implements [local.Files]. It does nothing if the block is there already.
func (s adapter) Write(ref eris.Reference, block []byte) (commit func() error, err error) {
	r, err := s.open(true)
	if err != nil {
		return nil, err
	}
	name := ref.String()
	if there, err := s.find(r, ref, len(block), nil); err == nil && bytes.Equal(there, block) {
		// The sync covers it even if another process has written it just now.
		return r.commits.Do, nil
	}
	s.hint.Store(s.flat) // it is looked for there first from now on
	return func() error {
		err := r.commits.Do()
		if err != nil {
			// What is in the page cache may never reach the medium, and must not be taken for
			// stored later.
			r.Remove(file(s.flat, name))
		}
		return err
	}, r.write(file(s.flat, name), block)
}

// checkEvery is how often it is checked whether the path still leads to the directory: perhaps
// something has been mounted there.
const checkEvery = time.Second

// open returns the directory, which is made if it is not there and is to be written to; but not in
// place of one that has just gone.
func (s *Store) open(forWriting bool) (*root, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.root != nil && time.Since(s.checked) >= checkEvery {
		s.checked = time.Now()
		there, err := os.Stat(s.URL.Path)
		here, _ := s.root.Stat(".")
		if err != nil || !os.SameFile(here, there) {
			s.setRoot(nil)
		}
		if err != nil {
			return nil, errGone
		}
	}
	if s.root == nil {
		r, err := openRoot(s.URL.Path, forWriting)
		if errors.Is(err, fs.ErrNotExist) && forWriting {
			return nil, local.NoDirectory(s.URL.Path)
		}
		if err != nil {
			return nil, err
		}
		s.setRoot(r)
		s.checked = time.Now()
	}
	if forWriting && !s.cleaned {
		s.cleaned = true
		s.root.clean()
	}
	return s.root, nil
}

// setRoot closes the directory and takes another one. The lock must be held.
func (s *Store) setRoot(r *root) {
	if s.root != nil {
		s.root.Close()
	}
	s.root = r
}

// Each calls f for each block of a directory, in either layout. Blocks are not verified, and their
// memory is used again; of a file that cannot be read or has not the size of a block there are no
// bytes. It returns the first error of f or of reading the directory.
func Each(directory string, f func(ref eris.Reference, block []byte) error) error {
	r, err := openRoot(directory, false)
	if err != nil {
		return err
	}
	defer r.Close()
	memory := make([]byte, 0, eris.BlockSize32KiB)
	return fs.WalkDir(r.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && name != "." && name+"/" != exported && len(strings.TrimPrefix(name, exported)) != 2: // other things
			return fs.SkipDir
		case !d.Type().IsRegular():
			return nil
		}
		ref, err := eris.ParseReference(filepath.Base(name))
		if err != nil || ref.String() != filepath.Base(name) {
			return nil
		}
		info, err := d.Info()
		if os.IsNotExist(err) {
			return nil // somebody removes blocks
		}
		var block []byte
		if err == nil && eris.BlockSize(info.Size()).Valid() {
			if read, err := r.read(name, ref, int(info.Size()), memory); err == nil {
				block = read
			}
		}
		return f(ref, block)
	})
}

// exported is where the blocks of a directory are that "export" has made.
const exported = "blocks/"

// incoming is the subdirectory where files are while they are being written.
const incoming = ".incoming"

// root is an open directory. It may be closed while it is being used: operations then fail by
// os.ErrClosed or are finished. Symbolic links do not lead out of it.
type root struct {
	*os.Root
	places  []string // below it where blocks may be
	commits *local.Commits
}

func openRoot(path string, make bool) (*root, error) {
	if make {
		if err := local.MakeDirectory(path); err != nil {
			return nil, err
		}
	}
	directory, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	r := &root{Root: directory, places: []string{"", exported}}
	if info, err := r.Lstat(exported); err != nil || !info.IsDir() {
		r.places = r.places[:1]
	}
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

// file returns where a block is: DIRECTORY/REFERENCE if it is flat, else DIRECTORY/RE/REFERENCE,
// where RE is the first two characters. File systems for removable media hold few files in one
// directory: FAT32 holds 13,107 with names of this length.
func file(flat bool, name string) string {
	if flat {
		return name
	}
	return name[:2] + "/" + name
}

// read reads the file with the given path, which must have size bytes, into the memory of dst, or
// into new memory if there is such a file and not enough of that. The error is eris.ErrNotFound if
// there is none that could be a block, and an [eris.BlockError] if it has another size.
func (r *root) read(path string, ref eris.Reference, size int, dst []byte) ([]byte, error) {
	// To open a device may have effects, so look first.
	info, err := r.Lstat(path)
	if err == nil {
		err = check(info, ref, size)
	}
	var f *os.File
	if err == nil {
		f, err = r.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		err = eris.ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err = f.Stat(); err == nil {
		err = check(info, ref, size)
	}
	if err != nil {
		return nil, err
	}
	block := slices.Grow(dst, size)[:size]
	n, err := io.ReadFull(f, block)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		err = &eris.BlockError{Reference: ref, Length: n, Want: eris.BlockSize(size)}
	}
	return block[:n], err
}

// check returns an error if a file cannot be a block of the given size. An empty file is what a
// power cut leaves behind.
func check(info fs.FileInfo, ref eris.Reference, size int) error {
	switch {
	case !info.Mode().IsRegular(), info.Size() == 0:
		return eris.ErrNotFound
	case info.Size() != int64(size):
		return &eris.BlockError{Reference: ref, Length: int(info.Size()), Want: eris.BlockSize(size)}
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
		if err = r.MkdirAll(filepath.Dir(path), 0o777); err == nil {
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
		if err := r.MkdirAll(incoming, 0o777); err != nil {
			return nil, err
		}
	} else if err == nil && !info.IsDir() {
		return nil, &os.PathError{Op: "open", Path: incoming, Err: unix.ENOTDIR}
	}
	// Without O_NONBLOCK package os would set and clear that, in four system calls for each file.
	return r.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NONBLOCK, 0o666)
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
