// SPDX-License-Identifier: GPL-3.0-or-later

package cache

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// A StoreCache is a store, for example the daemon of this machine, in the place of
// a [Cache]: it is asked first, and is given what it did not have. It implements
// [eris.VerifiedBlocks], and [eris.Starter] as far as the store and the other blocks do. Close must be called at the end.
type StoreCache struct {
	store   fetch.Store
	blocks  eris.VerifiedBlocks
	onFault func(error)

	gets, puts switchable
	room       *semaphore.Weighted // bytes
	impeded    atomic.Bool         // somebody has waited for room for long

	ctx      context.Context // of puts
	cancel   context.CancelFunc
	mu       sync.Mutex
	closed   bool
	wait     sync.WaitGroup
	answered []*storeRequest // by the store; see StoreCache.Start
	passing  bool            // somebody looks at these
	passed   sync.WaitGroup  // who does
}

const (
	// storeBytes bounds the blocks that are on their way to the store.
	storeBytes = 8 << 20
	// storeCost is what a block counts beside its bytes: a goroutine.
	storeCost = 4 << 10
)

// ThroughStore returns blocks that are looked for in store first, and put there
// when they had to be got from elsewhere. The store, which stays the caller's, is
// asked again some seconds after it has failed; never after it has given wrong
// bytes; and is given nothing more after it has said that it is read-only. OnFault,
// unless it is nil, is called with the first failure of each kind but the last.
func ThroughStore(store fetch.Store, blocks eris.VerifiedBlocks, onFault func(error)) *StoreCache {
	s := &StoreCache{store: store, blocks: blocks, onFault: onFault, room: semaphore.NewWeighted(storeBytes)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// A switchable is something that may be off for some time, or for good.
type switchable struct {
	until atomic.Int64 // nanoseconds since 1970; 0 is on
	told  atomic.Bool
}

const forGood = 1<<63 - 1

func (s *switchable) on() bool {
	until := s.until.Load()
	return until == 0 || until != forGood && time.Now().UnixNano() >= until
}

func (s *switchable) off() {
	if old := s.until.Load(); old != forGood {
		s.until.CompareAndSwap(old, time.Now().Add(pause).UnixNano())
	}
}

func (s *switchable) offForGood() { s.until.Store(forGood) }

// Verified implements [eris.VerifiedBlocks].
func (s *StoreCache) Verified() {}

// Get implements [eris.Blocks]. The errors are those of the blocks that are not in
// the store.
func (s *StoreCache) Get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	if s.gets.on() {
		block, err := s.store.Get(ctx, ref, size, dst)
		switch {
		case err == nil:
			return block, nil
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		}
		s.judge(err, size)
	}
	block, err := s.blocks.Get(ctx, ref, size, dst)
	if err == nil && s.puts.on() {
		s.put(ref, block)
	}
	return block, err
}

// judge takes note of why the store has not given a block of the given size.
func (s *StoreCache) judge(err error, size eris.BlockSize) {
	var wrong *eris.BlockError
	switch {
	case errors.As(err, &wrong) && wrong.IsOtherSize(size):
	case wrong != nil:
		s.gets.offForGood()
		s.puts.offForGood()
		s.fault(&s.gets, err)
	case !errors.Is(err, eris.ErrNotFound):
		s.gets.off()
		s.fault(&s.gets, err)
	}
}

func (s *StoreCache) fault(what *switchable, err error) {
	if !what.told.Swap(true) && s.onFault != nil {
		s.onFault(fmt.Errorf("%s: %w", s.store, err))
	}
}

// put has a block put into the store, unless that is too slow.
func (s *StoreCache) put(ref eris.Reference, block []byte) {
	cost := int64(len(block) + storeCost)
	if !s.room.TryAcquire(cost) {
		if s.impeded.Load() {
			return
		}
		ctx, cancel := context.WithTimeout(s.ctx, patience)
		defer cancel()
		if s.room.Acquire(ctx, cost) != nil {
			s.impeded.Store(true)
			return
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		s.room.Release(cost)
		return
	}
	block = append([]byte(nil), block...)
	s.wait.Go(func() {
		err := s.store.Put(s.ctx, ref, block)
		s.room.Release(cost)
		s.impeded.Store(false)
		switch {
		case err == nil || s.ctx.Err() != nil:
		case errors.Is(err, fetch.ErrReadOnly):
			s.puts.offForGood()
		default:
			s.puts.off()
			s.fault(&s.puts, err)
		}
	})
}

// Close waits until the store has taken what was on its way, for at most some
// seconds. It does not close the store.
func (s *StoreCache) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.passed.Wait()
	timer := time.AfterFunc(closePatience, s.cancel)
	defer timer.Stop()
	s.wait.Wait()
	s.cancel()
}
