// SPDX-License-Identifier: GPL-3.0-or-later

// Package dump keeps ERIS blocks in block dumps (https://eris.codeberg.page/eer/cbor.xml): single files of CBOR, to be mailed,
// carried or archived. [Open] is a store in such a file; a [Reader] reads one from a stream.
//
// A dump is read as others write it: with or without its tag and that of self-described CBOR, of definite or indefinite
// length, with blocks of both sizes in any order, with things in between that are no blocks, and also if it is cut off. What
// is written is of indefinite length (da65726973 9f bf … ff … ff), so that more can be put into it later.
//
// # What stored means
//
// Put returns once the block would survive a power cut, as far as the kernel knows. Blocks that are put at the same time
// share a sync. A dump that does not exist is made under another name and renamed when it is a dump. Blocks are written
// behind the end of the dump first, and only when they are durable is the old end overwritten by the first of them: whenever
// that is interrupted, the file is the old dump, perhaps with something behind it that readers here pass over, or the new one.
// What an interruption has left is overwritten by the next Put.
//
// One process at a time puts blocks into a dump.
//
// # What is not trusted
//
// Blocks are verified when they are read, and wrong ones in a dump do not hide right ones. The memory that a dump takes is
// about 40 bytes for each of its blocks; of those behind the first 2,097,152 nothing is known. Read capabilities disclose the
// contents to whoever has the dump; they are written only if the URL has the element "capability" in its query.
package dump

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/local"
)

// maxOperations is how many reads and writes are made at a time.
const maxOperations = 32

// Store is a dump in a file. It implements [fetch.Store]. It is safe for concurrent use.
type Store struct {
	url          local.URL
	capabilities bool
	calls        *local.Calls
	commits      *local.Commits
	pool         sync.Pool // of *[eris.BlockSize32KiB]byte
	seed         maphash.Seed
	closing      chan struct{}
	closed       sync.Once
	checkEvery   time.Duration
	sync         func(*os.File) error

	reading  sync.RWMutex
	file     *os.File // nil if it is not open
	state    fileState
	checked  time.Time
	contents *contents

	writing sync.Mutex // taken before reading
	room    *sync.Cond // of the batch
	writer  *writer    // nil if it is not open

	// For tests: called before each file operation, and after a block has been made durable.
	before func(ref eris.Reference, put bool) error
	after  func(ref eris.Reference)
}

var (
	_ fetch.Store         = (*Store)(nil)
	_ eris.VerifiedBlocks = (*Store)(nil)
)

// fileState tells whether a file has been changed.
type fileState struct {
	device, inode uint64
	size          int64
	changed       time.Time
}

func stateOf(info os.FileInfo) fileState {
	s := fileState{size: info.Size(), changed: info.ModTime()}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		s.device, s.inode = uint64(stat.Dev), uint64(stat.Ino)
	}
	return s
}

// Open returns the store in the file that a URL names: dump:///media/usb/blocks.cbor, or dump:out.cbor, relative to the working
// directory. The path is percent-encoded. A query "?get", "?put" or "?get&put" restricts what the store is used for, and
// "?capability" has [Store.AddCapability] write read capabilities.
//
// Open does not touch the file. The first Get or Put reads through it, and so does the first Get after it has been changed. If
// there is no file, the first Put makes one.
//
// The Store must be closed.
func Open(url string) (*Store, error) {
	u, err := local.ParseURL(url, "dump")
	if err != nil {
		return nil, err
	}
	s := &Store{url: u, seed: maphash.MakeSeed(), closing: make(chan struct{}), checkEvery: time.Second, sync: (*os.File).Sync}
	for _, setting := range u.Settings {
		if setting != "capability" {
			return nil, fmt.Errorf("store URL %.100q: element %.40q of the query is not understood", url, setting)
		}
		s.capabilities = true
	}
	s.room = sync.NewCond(&s.writing)
	s.calls = local.NewCalls(maxOperations, s.release)
	s.commits = local.NewCommits(s.commit)
	s.pool.New = func() any { return new([eris.BlockSize32KiB]byte) }
	return s, nil
}

// String returns the URL of the file.
func (s *Store) String() string { return s.url.String() }

// Verified implements [eris.VerifiedBlocks].
func (s *Store) Verified() {}

// Close closes the file. Calls that are under way fail, and blocks that were being put may or may not be stored. It waits at
// most a second for operations of the file system that do not come to an end.
func (s *Store) Close() error {
	s.closed.Do(func() { close(s.closing) })
	s.calls.Close()
	return nil
}

func (s *Store) release() {
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.writer != nil {
		s.writer.file.Close()
		s.writer = nil
	}
	s.reading.Lock()
	defer s.reading.Unlock()
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
	s.contents = nil
}

func (s *Store) error(ref eris.Reference, err error) error {
	return fmt.Errorf("%v: block %v: %w", s.url, ref, err)
}

var (
	errSize    = errors.New("block size is neither 1 KiB nor 32 KiB")
	errRegular = errors.New("not a regular file")
	errTooMany = errors.New("the dump has too many blocks for all of them to be known")
)

// Get implements [eris.Blocks]. The error wraps eris.ErrNotFound if the dump does not have the block, *eris.BlockError if it
// has only other bytes for it, *FormatError if the file is not a dump; or is the cause of ctx. Others are those of the file
// system; among them is that there is no file.
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
	if err := s.refresh(false); err != nil {
		return err
	}
	err := s.find(ref, block)
	var wrong *eris.BlockError
	if errors.As(err, &wrong) {
		// Perhaps the file has been changed since.
		if err := s.refresh(true); err != nil {
			return err
		}
		return s.find(ref, block)
	}
	return err
}

// find reads and verifies a block of the file that is open.
func (s *Store) find(ref eris.Reference, block []byte) error {
	s.reading.RLock()
	defer s.reading.RUnlock()
	if s.contents == nil {
		return os.ErrClosed
	}
	place, ok := s.contents.blocks[maphash.Bytes(s.seed, ref[:])]
	switch {
	case !ok && s.contents.more:
		return errTooMany
	case !ok:
		return eris.ErrNotFound
	case place.size() != len(block):
		return &eris.BlockError{Reference: ref, Length: place.size(), Want: eris.BlockSize(len(block))}
	}
	if n, err := s.file.ReadAt(block, place.offset()); n < len(block) {
		return fmt.Errorf("reading at byte %d: %w", place.offset(), err)
	}
	return eris.Verify(ref, block)
}

// refresh reads through the file if that has not been done, or if it has been changed.
func (s *Store) refresh(now bool) error {
	s.reading.RLock()
	fresh := s.file != nil && !now && time.Since(s.checked) < s.checkEvery
	s.reading.RUnlock()
	if fresh {
		return nil
	}
	s.reading.Lock()
	defer s.reading.Unlock()
	if s.file != nil && !now && time.Since(s.checked) < s.checkEvery {
		return nil // another call has done it
	}
	info, err := os.Stat(s.url.Path)
	if err != nil {
		return err
	}
	s.checked = time.Now()
	if s.file != nil && stateOf(info) == s.state {
		return nil
	}
	file, err := openRegular(s.url.Path, os.O_RDONLY)
	if err != nil {
		return err
	}
	if err := s.setFile(file); err != nil {
		file.Close()
		return err
	}
	return nil
}

// setFile reads through a file and takes it for the present one. The lock reading must be held.
func (s *Store) setFile(file *os.File) error {
	info, err := file.Stat()
	if err != nil {
		return err
	}
	c, err := s.scan(file, info.Size())
	if err != nil {
		return err
	}
	if s.file != nil {
		s.file.Close()
	}
	s.file, s.state, s.contents = file, stateOf(info), c
	return nil
}

func openRegular(path string, flags int) (*os.File, error) {
	file, err := os.OpenFile(path, flags|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = &os.PathError{Op: "open", Path: path, Err: errRegular}
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// KeepsCapabilities reports whether the URL asks for read capabilities to be written.
func (s *Store) KeepsCapabilities() bool { return s.capabilities }

// AddCapability writes a read capability to the end of the dump, unless it is there already or the URL does not ask for that:
// it discloses the contents to everybody who gets the dump. When it returns nil, it is durable. Errors are those of Put.
func (s *Store) AddCapability(ctx context.Context, c eris.ReadCapability) error {
	if !s.capabilities {
		return nil
	}
	if !s.url.Put {
		return fmt.Errorf("%v: %w", s.url, fetch.ErrReadOnly)
	}
	if err := c.Validate(); err != nil {
		return err
	}
	var w *writer
	_, err := s.calls.Do(ctx, func() (err error) {
		s.writing.Lock()
		defer s.writing.Unlock()
		if w, err = s.openWriter(); err != nil {
			return readOnly(err)
		}
		if slices.Contains(w.capabilities, c) {
			return nil
		}
		if len(w.capabilities) == maxCapabilities {
			return errCapabilities
		}
		w.capabilities = append(w.capabilities, c)
		w.changed = true
		return nil
	}, func() error { return s.settle(w) })
	if err != nil {
		return fmt.Errorf("%v: read capability: %w", s.url, err)
	}
	return nil
}

// Put implements [fetch.Store]: see the package comment for what it promises. It verifies the block. Errors wrap
// fetch.ErrReadOnly if the file system or the permissions of the file do not allow writing; else they are those of the file
// system, of ctx, *eris.BlockError, or say why the dump that is there cannot be continued.
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
	var w *writer
	_, err := s.calls.Do(ctx, func() (err error) {
		defer s.pool.Put(memory)
		if s.before != nil {
			if err := s.before(ref, true); err != nil {
				return err
			}
		}
		w, err = s.add(ref, block)
		return readOnly(err)
	}, func() error {
		if err := s.settle(w); err != nil {
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

// readOnly makes fetch.ErrReadOnly of the errors that say that writing is not allowed.
func readOnly(err error) error {
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: %w", fetch.ErrReadOnly, err)
	}
	return err
}
