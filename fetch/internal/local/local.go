// SPDX-License-Identifier: GPL-3.0-or-later

// Package local is what stores in local files have in common: a [Store] whose calls can be given up
// although reading and writing files cannot, and [Commits] that many callers share.
package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
)

const (
	// maxOperations is how many files are read at a time, and how many are written.
	maxOperations = 32
	// closeWait is how long Close waits for operations that are under way. A file system may let
	// them hang for ever.
	closeWait = time.Second
)

// MakeDirectory makes the directory of a store, but not its parents. One that is there is kept,
// whatever the file system says to making it.
func MakeDirectory(path string) error {
	err := os.Mkdir(path, 0o777)
	if err == nil || errors.Is(err, fs.ErrExist) {
		return nil
	}
	if _, statErr := os.Stat(path); statErr == nil {
		return nil
	}
	return err
}

// NoDirectory says that nothing can be made at path, as its directory does not exist.
func NoDirectory(path string) error {
	return fmt.Errorf("the directory %s does not exist; make it, or plug the medium in: %w", filepath.Dir(path), fs.ErrNotExist)
}

// Files is what a [Store] keeps blocks in. Its methods are called from many goroutines at a time.
type Files interface {
	// Read fills a slice that has the size of the block.
	Read(ref eris.Reference, block []byte) error
	// Write writes a block, of which it keeps nothing. Once commit returns nil it is durable.
	Write(ref eris.Reference, block []byte) (commit func() error, err error)
	// Release lets go of files. It is called once, last.
	Release()
}

// Store is a store in local files, which the packages of such stores embed: it implements
// [fetch.Store]. Whoever waits for file operations can stop waiting: a read from a network file
// system whose server is gone, or from a medium that is wearing out, may take minutes or for ever.
type Store struct {
	*fetch.Workers
	// URL is that of the store.
	URL storeurl.URL

	files  Files
	slots  chan struct{}
	memory sync.Pool       // of *[eris.BlockSize32KiB]byte, for blocks that are put
	open   context.Context // ends with Close
	close  context.CancelFunc
	idle   chan struct{} // closed when all operations have come to an end after that

	mu    sync.Mutex // held while the context ends, and while group grows
	group sync.WaitGroup
}

// New returns a store whose blocks are in files.
func New(u storeurl.URL, files Files) *Store {
	s := &Store{
		URL: u, files: files,
		slots: make(chan struct{}, maxOperations), idle: make(chan struct{}),
	}
	s.open, s.close = context.WithCancel(context.Background())
	s.memory.New = func() any { return new([eris.BlockSize32KiB]byte) }
	s.Workers = fetch.NewWorkers(u.String(), maxOperations, s.get)
	return s
}

func (s *Store) get(_ context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	if !s.URL.Get {
		return nil, eris.ErrNotFound
	}
	return dst[:size], s.files.Read(ref, dst[:size])
}

// Put implements [fetch.Store]. It verifies the block, because what is in files lasts. When ctx
// ends, it returns; the block may or may not be stored then.
func (s *Store) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	if err := s.put(ctx, ref, block); err != nil {
		return fmt.Errorf("%v: block %v: %w", s, ref, err)
	}
	return nil
}

func (s *Store) put(ctx context.Context, ref eris.Reference, block []byte) error {
	if !s.URL.Put {
		return fetch.ErrReadOnly
	}
	if !eris.BlockSize(len(block)).Valid() {
		return eris.ErrBlockSize
	}
	if err := eris.Verify(ref, block); err != nil {
		return err
	}
	memory := s.memory.Get().(*[eris.BlockSize32KiB]byte)
	block = memory[:copy(memory[:], block)]
	var commit func() error
	return s.Do(ctx, func() (err error) {
		defer s.memory.Put(memory)
		commit, err = s.files.Write(ref, block)
		return err
	}, func() error { return commit() })
}

// Do runs an operation of writing, then its end, and returns their error, which wraps
// [fetch.ErrReadOnly] if writing is not allowed. The end is not among those whose number is
// limited; it is for waiting for others.
//
// If ctx is done or Close is called before that, Do returns the cause of ctx or [fetch.ErrClosed]
// at once. The operation may still be going on then, so it must not use memory that the caller uses
// otherwise.
func (s *Store) Do(ctx context.Context, operation, end func() error) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-s.open.Done():
		return fetch.ErrClosed
	case s.slots <- struct{}{}:
	}
	result := make(chan error, 1)
	s.mu.Lock()
	if s.Closing() {
		s.mu.Unlock()
		<-s.slots
		return fetch.ErrClosed
	}
	s.group.Go(func() {
		err := operation()
		<-s.slots
		if err == nil {
			err = end()
		}
		result <- err
	})
	s.mu.Unlock()
	select {
	case err := <-result:
		if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
			err = fmt.Errorf("%w: %w", fetch.ErrReadOnly, err)
		}
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-s.open.Done():
		return fetch.ErrClosed
	}
}

// Closing reports whether Close has been called, for operations that take long.
func (s *Store) Closing() bool { return s.open.Err() != nil }

// Close lets go of the files. Calls that are under way fail, and blocks that were being put may or
// may not be stored. It waits at most a second for operations of the file system that do not come
// to an end.
func (s *Store) Close() error {
	s.mu.Lock()
	if !s.Closing() {
		s.close()
		go func() {
			s.Workers.Close()
			s.group.Wait()
			s.files.Release()
			close(s.idle)
		}()
	}
	s.mu.Unlock()
	select {
	case <-s.idle:
	case <-time.After(closeWait):
	}
	return nil
}

// Commits makes what several goroutines have written durable by one operation. It is safe for
// concurrent use.
type Commits struct {
	commit func() error
	turn   chan struct{} // has room if no commit is going on
	group  singleflight.Group
}

// NewCommits returns Commits that call commit, never twice at a time.
func NewCommits(commit func() error) *Commits {
	return &Commits{commit: commit, turn: make(chan struct{}, 1)}
}

// Do returns the error of a commit that began after Do was called. Callers that come while a commit
// is going on share the next one.
func (c *Commits) Do() error {
	_, err, _ := c.group.Do("", func() (any, error) {
		c.turn <- struct{}{}
		defer func() { <-c.turn }()
		c.group.Forget("")
		return nil, c.commit()
	})
	return err
}
