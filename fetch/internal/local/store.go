// SPDX-License-Identifier: GPL-3.0-or-later

// Package local is what stores in local files have in common: a [Store] whose calls can be given up
// although reading and writing files cannot, and [Commits] that many callers share.
package local

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
)

const (
	// maxOperations is how many files are read or written at a time.
	maxOperations = 32
	// closeWait is how long Close waits for operations that are under way. A file system may let
	// them hang for ever.
	closeWait = time.Second
)

var errSize = errors.New("block size is neither 1 KiB nor 32 KiB")

// Files is what a [Store] keeps blocks in. Its methods are called from many goroutines at a time.
type Files interface {
	// Read fills a slice that has the size of the block.
	Read(ref eris.Reference, block []byte) error
	// Write writes a block. Once commit returns nil it is durable. Block is not used any more after
	// Write.
	Write(ref eris.Reference, block []byte) (commit func() error, err error)
	// Release lets go of files. It is called once, last.
	Release()
}

// Store is a store in local files, which the packages of such stores embed: it implements
// [fetch.Store]. File operations run on goroutines of their own, so that whoever waits for them can
// stop waiting: a read from a network file system whose server is gone, or from a medium that is
// wearing out, may take minutes or for ever.
type Store struct {
	*fetch.Workers
	// URL is that of the store.
	URL storeurl.URL

	// Before and After are for tests: they are called before each file operation, and after a block
	// has been made durable.
	Before func(ref eris.Reference, put bool) error
	After  func(ref eris.Reference)

	files  Files
	memory sync.Pool // of *[eris.BlockSize32KiB]byte
	slots  chan struct{}
	done   chan struct{} // closed by Close
	idle   chan struct{} // closed when all operations have come to an end after that

	mu     sync.Mutex
	closed bool
	group  sync.WaitGroup
}

// New returns a store whose blocks are in files.
func New(u storeurl.URL, files Files) *Store {
	s := &Store{
		URL: u, files: files,
		slots: make(chan struct{}, maxOperations), done: make(chan struct{}), idle: make(chan struct{}),
	}
	s.memory.New = func() any { return new([eris.BlockSize32KiB]byte) }
	s.Workers = fetch.NewWorkers(maxOperations, s.get)
	return s
}

// String returns the URL of the store.
func (s *Store) String() string { return s.URL.String() }

// With calls f with memory for a block, which is used again afterwards.
func (s *Store) With(f func(memory []byte) error) error {
	memory := s.memory.Get().(*[eris.BlockSize32KiB]byte)
	defer s.memory.Put(memory)
	return f(memory[:])
}

// get is what the workers call.
func (s *Store) get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	if !s.URL.Get {
		return nil, fmt.Errorf("%v: %w", s, eris.ErrNotFound)
	}
	memory := s.memory.Get().(*[eris.BlockSize32KiB]byte)
	finished, err := s.Do(ctx, func() error {
		if s.Before != nil {
			if err := s.Before(ref, false); err != nil {
				return err
			}
		}
		return s.files.Read(ref, memory[:size])
	}, nil)
	if finished {
		defer s.memory.Put(memory)
	}
	if err != nil {
		return nil, fmt.Errorf("%v: %w", s, err)
	}
	return append(dst[:0], memory[:size]...), nil
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
		return errSize
	}
	if err := eris.Verify(ref, block); err != nil {
		return err
	}
	memory := s.memory.Get().(*[eris.BlockSize32KiB]byte)
	block = memory[:copy(memory[:], block)]
	var commit func() error
	_, err := s.Do(ctx, func() (err error) {
		defer s.memory.Put(memory)
		if s.Before != nil {
			if err := s.Before(ref, true); err != nil {
				return err
			}
		}
		commit, err = s.files.Write(ref, block)
		return err
	}, func() error {
		if err := commit(); err != nil {
			return err
		}
		if s.After != nil {
			s.After(ref)
		}
		return nil
	})
	return ReadOnly(err)
}

// Do runs an operation, then its end, and returns their error. The end, which may be nil, is not
// among those whose number is limited; it is for waiting for others.
//
// If ctx is done or Close is called before that, Do returns the cause of ctx or [fetch.ErrClosed]
// at once. Unless finished is true, the operation may still be going on then, so it must not use
// memory that the caller uses otherwise.
func (s *Store) Do(ctx context.Context, operation, end func() error) (finished bool, err error) {
	select {
	case <-ctx.Done():
		return true, context.Cause(ctx)
	case <-s.done:
		return true, fetch.ErrClosed
	case s.slots <- struct{}{}:
	}
	result := make(chan error, 1)
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		<-s.slots
		return true, fetch.ErrClosed
	}
	s.group.Go(func() {
		err := operation()
		<-s.slots
		if err == nil && end != nil {
			err = end()
		}
		result <- err
	})
	s.mu.Unlock()
	select {
	case err := <-result:
		return true, err
	case <-ctx.Done():
		return false, context.Cause(ctx)
	case <-s.done:
		return false, fetch.ErrClosed
	}
}

// Closing reports whether Close has been called, for operations that take long.
func (s *Store) Closing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// Close lets go of the files. Calls that are under way fail, and blocks that were being put may or
// may not be stored. It waits at most a second for operations of the file system that do not come
// to an end.
func (s *Store) Close() error {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.done)
		go func() {
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
	return s.Workers.Close()
}

// ReadOnly makes [fetch.ErrReadOnly] of the errors that say that writing is not allowed.
func ReadOnly(err error) error {
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: %w", fetch.ErrReadOnly, err)
	}
	return err
}
