// SPDX-License-Identifier: GPL-3.0-or-later

// Package dir keeps ERIS blocks in a directory, one file per block: on a USB stick, in a directory that a web server serves,
// or in one that is mirrored. Start with [Open].
//
// A file is named by the 52 characters of Base32 of the block's reference, in upper case, so that names are the same on file
// systems that ignore case. It is either in the directory itself (flat) or in a subdirectory named by the first two
// characters (sharded). Both are read; [Options] says which is written.
//
// # What stored means
//
// Put returns once the block would survive a power cut, as far as the kernel knows. A block is written under another name in
// the subdirectory ".incoming", renamed, and the file system is synced (on Linux by syncfs, which also writes what others have
// changed in that file system). Blocks that are put at the same time share one sync, so that a slow medium takes many callers
// almost as fast as it can write, but a single one only as fast as it can sync. After a power cut there may be files that are
// empty or damaged, but none of a block for which Put had returned; a damaged file counts as such when it is read, and is
// replaced when its block is put again.
//
// # What is not trusted
//
// Whoever can write to the directory can withhold blocks, and nothing else: blocks are verified. Only regular files of the
// right size are opened; symbolic links below the directory are not followed.
package dir

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/local"
)

// Layout is where in the directory blocks are.
type Layout int

// The layouts: DIRECTORY/RE/REFERENCE and DIRECTORY/REFERENCE, where RE is the first two characters of the reference. File
// systems for removable media hold few files in one directory: FAT32 holds 13,107 with names of this length.
const (
	Sharded Layout = iota
	Flat
)

// Options says how a [Store] behaves. The zero value is what most directories want.
type Options struct {
	// Layout is that of new blocks. An element "layout=flat" or "layout=sharded" in the query of the URL takes precedence.
	Layout Layout
}

// maxOperations is how many files are being read or written at a time.
const maxOperations = 32

// Store is a directory with blocks. It implements [fetch.Store]. It is safe for concurrent use, also by several processes at
// a time.
type Store struct {
	url    local.URL
	layout Layout
	calls  *local.Calls
	pool   sync.Pool    // of *[eris.BlockSize32KiB]byte
	hint   atomic.Int32 // the Layout in which the last block was found

	mu      sync.Mutex
	root    *root // nil if it is not open
	checked time.Time
	swept   bool

	// For tests: called before each file operation, and after a block has been made durable.
	before func(ref eris.Reference, put bool) error
	after  func(ref eris.Reference)
}

var (
	_ fetch.Store         = (*Store)(nil)
	_ eris.VerifiedBlocks = (*Store)(nil)
)

// Open returns the store in the directory that a URL names: file:///media/usb, or file:blocks, relative to the working
// directory. The path is percent-encoded. A query "?get", "?put" or "?get&put" restricts what the store is used for.
//
// Open does not touch the directory. It is opened when it is needed; a directory that is not there, because a medium is not
// plugged in, makes calls fail until it is. If it does not exist, the first Put makes it, but not its parents. While it is
// open, its file system cannot be unmounted.
//
// The Store must be closed.
func Open(url string, options Options) (*Store, error) {
	u, err := local.ParseURL(url, "file")
	if err != nil {
		return nil, err
	}
	s := &Store{url: u, layout: options.Layout}
	for _, setting := range u.Settings {
		switch setting {
		case "layout=flat":
			s.layout = Flat
		case "layout=sharded":
			s.layout = Sharded
		default:
			return nil, fmt.Errorf("store URL %.100q: element %.40q of the query is not understood", url, setting)
		}
	}
	s.hint.Store(int32(s.layout))
	s.calls = local.NewCalls(maxOperations, s.release)
	s.pool.New = func() any { return new([eris.BlockSize32KiB]byte) }
	return s, nil
}

// String returns the URL of the directory.
func (s *Store) String() string { return s.url.String() }

// Verified implements [eris.VerifiedBlocks].
func (s *Store) Verified() {}

// Close closes the directory. Calls that are under way fail, and blocks that were being put may or may not be stored. It
// waits at most a second for operations of the file system that do not come to an end.
func (s *Store) Close() error {
	s.calls.Close()
	return nil
}

func (s *Store) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.setRoot(nil)
}

func (s *Store) error(ref eris.Reference, err error) error {
	return fmt.Errorf("%v: block %v: %w", s.url, ref, err)
}

var errGone = errors.New("the directory is gone")

var errSize = errors.New("block size is neither 1 KiB nor 32 KiB")

// Get implements [eris.Blocks]. The error wraps eris.ErrNotFound if there is no file for the block, or one that is empty, not
// regular, or a symbolic link; *eris.BlockError if there is one with other bytes; or is the cause of ctx. Others are those of
// the file system.
func (s *Store) Get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	if !size.Valid() {
		return nil, s.error(ref, errSize)
	}
	if !s.url.Get {
		return nil, s.error(ref, eris.ErrNotFound)
	}
	memory := s.pool.Get().(*[eris.BlockSize32KiB]byte)
	finished, err := s.calls.Do(ctx, func() error {
		if s.before != nil {
			if err := s.before(ref, false); err != nil {
				return err
			}
		}
		return s.get(ref, memory[:size])
	}, nil)
	if finished {
		defer s.pool.Put(memory)
	}
	if err != nil {
		return nil, s.error(ref, err)
	}
	return append(dst[:0], memory[:size]...), nil
}

// get reads and verifies a block.
func (s *Store) get(ref eris.Reference, block []byte) error {
	r, err := s.open(false)
	if err != nil {
		return err
	}
	if err = s.find(r, ref, block); err == nil {
		return nil
	}
	// Perhaps something has been mounted there since.
	again, changed := s.reopen(r)
	if !changed {
		return err
	}
	if again == nil {
		return errGone
	}
	return s.find(again, ref, block)
}

// find looks for a block in both layouts.
func (s *Store) find(r *root, ref eris.Reference, block []byte) error {
	first := Layout(s.hint.Load())
	name := ref.String()
	result := error(eris.ErrNotFound)
	for _, layout := range [...]Layout{first, 1 - first} {
		err := r.read(layout, name, block)
		if err == nil {
			if err = eris.Verify(ref, block); err == nil {
				if layout != first {
					s.hint.Store(int32(layout))
				}
				return nil
			}
		}
		if length, ok := err.(wrongSizeError); ok {
			err = &eris.BlockError{Reference: ref, Length: int(length), Want: eris.BlockSize(len(block))}
		}
		if !errors.Is(err, eris.ErrNotFound) {
			result = err
		}
	}
	return result
}

// Put implements [fetch.Store]: see the package comment for what it promises. It verifies the block. Errors wrap
// fetch.ErrReadOnly if the file system or the permissions of the directory do not allow writing, else they are those of the
// file system, of ctx, or *eris.BlockError.
//
// When ctx ends, Put returns; the block may or may not be stored then.
func (s *Store) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	if !s.url.Put {
		return s.error(ref, fetch.ErrReadOnly)
	}
	if err := eris.Verify(ref, block); err != nil {
		return fmt.Errorf("%v: %w", s.url, err)
	}
	memory := s.pool.Get().(*[eris.BlockSize32KiB]byte)
	block = memory[:copy(memory[:], block)]
	var r *root
	var written bool
	_, err := s.calls.Do(ctx, func() (err error) {
		defer s.pool.Put(memory)
		if s.before != nil {
			if err := s.before(ref, true); err != nil {
				return err
			}
		}
		r, written, err = s.put(ref, block)
		return readOnly(err)
	}, func() error {
		if err := r.commits.Do(); err != nil {
			if written {
				// What is in the page cache may never reach the medium, and must not be taken for stored later.
				r.remove(s.layout, ref.String())
			}
			return err
		}
		if s.after != nil {
			s.after(ref)
		}
		return nil
	})
	if err != nil {
		return s.error(ref, err)
	}
	return nil
}

// put writes a block, unless it is there already. It returns the directory that has it.
func (s *Store) put(ref eris.Reference, block []byte) (r *root, written bool, err error) {
	if r, err = s.open(true); err != nil {
		return nil, false, err
	}
	if r, _ = s.reopen(r); r == nil {
		return nil, false, errGone
	}
	// The sync that follows covers it even if another process has written it just now.
	memory := s.pool.Get().(*[eris.BlockSize32KiB]byte)
	err = s.find(r, ref, memory[:len(block)])
	s.pool.Put(memory)
	if err == nil {
		return r, false, nil
	}
	return r, true, r.write(s.layout, ref.String(), block)
}

// open returns the directory, and makes it if that is wanted.
func (s *Store) open(forWriting bool) (*root, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.root == nil {
		r, err := openRoot(s.url.Path, forWriting)
		if err != nil {
			return nil, err
		}
		s.setRoot(r)
		s.checked = time.Now()
	}
	if forWriting && !s.swept {
		s.swept = true
		s.root.sweep()
	}
	return s.root, nil
}

// setRoot closes the directory and takes another one. The lock must be held.
func (s *Store) setRoot(r *root) {
	if s.root != nil {
		s.root.file.Close()
	}
	s.root = r
}

// checkEvery is how often it is checked whether the path still leads to the directory.
const checkEvery = time.Second

// reopen reports whether the path leads to another directory than the given one, and returns that, or nil if there is none.
func (s *Store) reopen(old *root) (r *root, changed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.root != old {
		return s.root, true
	}
	if time.Since(s.checked) < checkEvery {
		return old, false
	}
	s.checked = time.Now()
	there, err := os.Stat(s.url.Path)
	if err == nil {
		if here, err := old.file.Stat(); err == nil && os.SameFile(here, there) {
			return old, false
		}
		r, err = openRoot(s.url.Path, false)
	}
	if err != nil {
		r = nil
	}
	s.setRoot(r)
	return r, true
}
