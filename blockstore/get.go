// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"

	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// haveTime is for how long it is looked which blocks are here, on behalf of one question.
const haveTime = 50 * time.Millisecond

// Start implements [fetch.Source]. It looks the block up, reads it, and calls Done before it
// returns. The bytes are those that were put, but their hash is not computed again. Some hundred
// reads are done at a time, and further ones wait.
//
// The error wraps [eris.ErrNotFound] if the store does not have the block in that size; so it does
// for one that was damaged on disk, which is removed. Other errors are those of the file system,
// [ErrDamaged] and [fetch.ErrClosed].
func (s *Store) Start(r *fetch.Request) {
	r.Block, r.Err = nil, eris.ErrBlockSize
	if r.Size.Valid() {
		r.Block, r.Err = s.get(&r.Pair.Reference, r.Size, r.Dst)
	}
	if r.Err != nil {
		r.Err = fmt.Errorf("block %v: %w", r.Pair.Reference, r.Err)
	}
	r.Done(r)
}

// Cancel implements [fetch.Source]. There is nothing to cancel.
func (s *Store) Cancel(*fetch.Request) {}

// String returns the directory.
func (s *Store) String() string { return "block store " + s.directory }

func (s *Store) get(ref *eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	s.reads <- struct{}{}
	defer func() { <-s.reads }()
	// A wrong hint costs a read and does no harm.
	if l, ok := s.hints.get(ref); ok && l.class().size() == int(size) {
		if block, ok, _ := s.read(ref, l, dst); ok {
			// Readers that never wait would keep the writer from its processor for a time slice
			// after each of its system calls, so that a commit takes a tenth of a second.
			if s.hits.Add(1)%16 == 0 && s.committing.Load() {
				runtime.Gosched()
			}
			return block, nil
		}
	}
	block, err := s.search(ref, size, dst)
	switch {
	case err == nil:
		s.hits.Add(1)
	case errors.Is(err, eris.ErrNotFound):
		s.misses.Add(1)
	case errors.Is(err, os.ErrClosed), errors.Is(err, bbolterrors.ErrDatabaseNotOpen):
		err = fetch.ErrClosed
	}
	return block, err
}

// search gets a block by the index.
func (s *Store) search(ref *eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	var seen location // where other bytes than the block have been seen
	for {
		l, found, err := s.lookup(ref)
		if err != nil {
			return nil, err
		}
		if !found {
			s.hints.remove(ref)
		}
		if !found || l.class().size() != int(size) {
			return nil, eris.ErrNotFound
		}
		block, ok, err := s.read(ref, l, dst)
		if err != nil {
			return nil, err
		}
		if ok {
			s.hints.put(ref, l)
			return block, nil
		}
		// Either the block was evicted and its slot taken by another one since the index was read,
		// which a second look tells, or it is damaged.
		if seen == l {
			s.removeDamaged(*ref)
			return nil, fmt.Errorf("%w: damaged on disk", eris.ErrNotFound)
		}
		seen = l
	}
}

// read reads the block at a location, and reports whether it is there. An error says that the file
// could not be read.
func (s *Store) read(ref *eris.Reference, l location, dst []byte) ([]byte, bool, error) {
	slab, size := s.slabs[l.class()], l.class().size()
	if cap(dst) < size {
		dst = make([]byte, size)
	}
	dst = dst[:size]
	if err := slab.read(dst, l.slot()); err == io.EOF {
		return nil, false, nil
	} else if err != nil {
		return nil, false, err
	}
	if checksum(ref[:], dst) != l.sum() {
		return nil, false, nil
	}
	slab.touch(l.slot(), s.options.now())
	return dst, true, nil
}

// removeDamaged has the writer remove a block if it is damaged, which the writer alone can know for
// certain: nobody takes slots meanwhile. It does not wait. If the queue is full the next reader
// asks again.
func (s *Store) removeDamaged(ref eris.Reference) {
	s.gate.RLock()
	defer s.gate.RUnlock()
	if s.shut {
		return
	}
	select {
	case s.queue <- &request{ref: ref, done: make(chan error, 1)}:
	default:
	}
}

// Have implements [fetch.Haver] by the index. It looks for some time only.
func (s *Store) Have(question []byte) (answer []byte) {
	s.reads <- struct{}{}
	defer func() { <-s.reads }()
	begin, n := time.Now(), 0
	_ = s.view(func(tx *bbolt.Tx) error {
		cursor := tx.Bucket(blocksBucket).Cursor()
		answer = fetch.HaveBits(question, func(prefix []byte) (has, known bool) {
			if n++; n%64 == 0 && time.Since(begin) > haveTime {
				return false, false
			}
			key, _ := cursor.Seek(prefix)
			return bytes.HasPrefix(key, prefix), true
		})
		return nil
	})
	return answer // nothing, if the index cannot be read
}
