// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/backoff"
)

// A Keeper is a source that keeps blocks for later, many at a time. It need not be exact: a wrong
// block from it is taken for one that it does not have.
type Keeper interface {
	// Keep keeps blocks that are what their references say, as far as it can. It may wait until
	// they are written; they are the caller's again when it returns. Errors wrap
	// [fetch.ErrReadOnly] if it will never keep any.
	Keep(ctx context.Context, refs []eris.Reference, blocks [][]byte) error
}

const (
	// keepBytes bounds the blocks that wait while others are being kept, and these. What is more is
	// dropped.
	keepBytes = 8 << 20
	// keepPuts is how many blocks are put into a store at a time.
	keepPuts = 64
	// keepLimit is how long that may take for a batch, and keepClose for what there is when the
	// pool is closed.
	keepLimit = 10 * time.Second
	keepClose = 2 * time.Second
)

// keep has a near member keep what it did not have. While one batch is being kept the next one
// fills.
type keep struct {
	member *member
	keeper Keeper
	cancel context.CancelFunc
	done   chan struct{} // closed when nothing is being kept any more
	wake   chan struct{}

	mu      sync.Mutex
	filling batch
	off     bool // for good
	backoff backoff.Backoff
}

// batch is some blocks, one behind the other.
type batch struct {
	refs  []eris.Reference
	sizes []int
	data  []byte
}

// mayErr reports whether wrong blocks of the member are no lies.
func (m *member) mayErr() bool {
	_, ok := m.source.(Keeper)
	return ok
}

// newKeep returns nil if the member keeps nothing.
func newKeep(m *member) *keep {
	k := &keep{member: m, done: make(chan struct{}), wake: make(chan struct{}, 1)}
	k.backoff = backoff.Backoff{Min: 5 * time.Second, Max: longestRest}
	switch s := m.source.(type) {
	case Keeper:
		k.keeper = s
	case fetch.Store:
		k.keeper = putter{s}
	default:
		return nil
	}
	var ctx context.Context
	ctx, k.cancel = context.WithCancel(context.Background())
	go k.run(ctx) // close waits for it
	return k
}

// add has a block kept, which the caller may change afterwards. It never waits.
func (k *keep) add(ref eris.Reference, block []byte) {
	if k == nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	b := &k.filling
	if k.off || len(b.data)+len(block) > keepBytes || k.backoff.Failures() > 0 && k.backoff.Rest(time.Now()) > 0 {
		return
	}
	b.refs = append(b.refs, ref)
	b.sizes = append(b.sizes, len(block))
	b.data = append(b.data, block...)
	if len(b.refs) == 1 {
		select {
		case k.wake <- struct{}{}:
		default:
		}
	}
}

// run has one batch after the other kept until wake is closed.
func (k *keep) run(ctx context.Context) {
	defer close(k.done)
	var b batch
	var blocks [][]byte
	for range k.wake {
		k.mu.Lock()
		b, k.filling = k.filling, batch{b.refs[:0], b.sizes[:0], b.data[:0]}
		k.mu.Unlock()
		blocks = blocks[:0]
		rest := b.data
		for _, n := range b.sizes {
			blocks = append(blocks, rest[:n:n])
			rest = rest[n:]
		}
		within, cancel := context.WithTimeout(ctx, keepLimit)
		err := k.keeper.Keep(within, b.refs, blocks)
		cancel()
		if ctx.Err() == nil {
			k.note(err)
		}
	}
}

func (k *keep) note(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case err == nil:
		k.backoff.Succeed()
	case errors.Is(err, fetch.ErrReadOnly):
		k.off = true
	default:
		k.backoff.Fail(time.Now(), 0)
		p := k.member.pool
		p.mu.Lock()
		if !k.member.told {
			k.member.told = true
			p.tell(p.options.OnRest, k.member.name, fmt.Errorf("blocks cannot be kept: %w", err))
		}
		p.mu.Unlock()
	}
}

// close waits for what is to be kept, but not for long.
func (k *keep) close() {
	if k == nil {
		return
	}
	k.mu.Lock()
	k.off = true
	close(k.wake)
	k.mu.Unlock()
	timer := time.AfterFunc(keepClose, k.cancel)
	defer timer.Stop()
	select {
	case <-k.done:
	case <-time.After(keepClose + time.Second): // a disk that hangs cannot be told to stop
	}
	k.cancel()
}

// putter keeps blocks in a store.
type putter struct{ store fetch.Store }

// Keep implements [Keeper].
func (s putter) Keep(ctx context.Context, refs []eris.Reference, blocks [][]byte) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(keepPuts)
	for i, ref := range refs {
		group.Go(func() error { return s.store.Put(ctx, ref, blocks[i]) })
	}
	return group.Wait()
}
