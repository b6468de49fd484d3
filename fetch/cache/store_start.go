// SPDX-License-Identifier: GPL-3.0-or-later

package cache

import (
	"context"
	"errors"
	"sync"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// errElsewhere is what has become of a request for a block that a call of Get may
// yet find.
var errElsewhere = errors.New("not to be had so quickly")

// Starts implements [eris.Starter].
func (s *StoreCache) Starts() bool {
	if s.gets.on() {
		return startsOn(s.store)
	}
	return startsOn(s.blocks)
}

// startsOn tells whether blocks can be started.
func startsOn(blocks eris.Blocks) bool {
	starter, ok := blocks.(eris.Starter)
	return ok && starter.Starts()
}

// Start implements [eris.Starter]. What the store does not have is asked from the
// other blocks, as soon as it has said so.
func (s *StoreCache) Start(ref eris.Reference, size eris.BlockSize, dst []byte, answered func()) eris.Request {
	r := &storeRequest{cache: s, ref: ref, size: size, dst: dst, answered: answered}
	from, then := eris.Blocks(s.store), r.pass
	if !s.gets.on() {
		from, then, r.elsewhere = s.blocks, answered, true
	}
	starter, ok := from.(eris.Starter)
	if !ok {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.of = starter.Start(ref, size, dst, then); r.of == nil {
		return nil
	}
	return r
}

// A storeRequest is a block that is asked from a store, and then from elsewhere.
type storeRequest struct {
	cache    *StoreCache
	ref      eris.Reference
	size     eris.BlockSize
	dst      []byte
	answered func()

	mu        sync.Mutex
	of        eris.Request // that is being waited for, or whose block it is
	elsewhere bool         // it is not that of the store
	cancelled bool
	finished  bool // of is: it must not be cancelled
	block     []byte
	err       error
}

// pass is called when the store has answered. Whoever calls it must not be kept.
func (r *storeRequest) pass() {
	s := r.cache
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answered = append(s.answered, r)
	if s.passing {
		return
	}
	s.passing = true
	s.passed.Go(s.passOn)
}

// passOn looks at answers of the store until there are no more.
func (s *StoreCache) passOn() {
	var batch []*storeRequest
	for {
		s.mu.Lock()
		batch, s.answered = s.answered, batch[:0]
		if len(batch) == 0 {
			s.passing = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		for i, r := range batch {
			r.next()
			batch[i] = nil
		}
	}
}

// next gives the block of the store to who waits for it, or asks for it elsewhere.
func (r *storeRequest) next() {
	if r.ask() {
		return
	}
	r.answered()
}

// ask asks elsewhere for what the store does not have, and reports whether it has.
func (r *storeRequest) ask() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.finished = true
	if r.block, r.err = r.of.Finish(); r.err == nil {
		return false
	}
	err := r.of.Verified(r.err)
	r.of = nil
	if r.cancelled {
		r.err = context.Canceled
		return false
	}
	r.cache.judge(err, r.size)
	r.err = errElsewhere
	starter, ok := r.cache.blocks.(eris.Starter)
	if !ok {
		return false
	}
	if r.of = starter.Start(r.ref, r.size, r.dst, r.answered); r.of == nil {
		return false
	}
	r.elsewhere, r.finished, r.err = true, false, nil
	return true
}

// Cancel implements [eris.Request].
func (r *storeRequest) Cancel() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cancelled = true
	if r.of != nil && !r.finished {
		r.of.Cancel()
	}
}

// Finish implements [eris.Request].
func (r *storeRequest) Finish() ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.elsewhere {
		r.finished = true
		r.block, r.err = r.of.Finish()
	}
	return r.block, r.err
}

// Verified implements [eris.Request].
func (r *storeRequest) Verified(err error) error {
	if r.of == nil {
		return err
	}
	err = r.of.Verified(err)
	switch {
	case err == nil && r.elsewhere && r.cache.puts.on():
		r.cache.put(r.ref, r.block)
	case err != nil && !r.elsewhere:
		r.cache.judge(err, r.size)
		return errElsewhere
	}
	return err
}
