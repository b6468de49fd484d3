// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"context"
	"os"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// The daemon asks about one item at a time, and then about what it refers to (Guix,
// nix/libstore/build.cc: SubstitutionGoal::tryNext), so that a closure costs a round trip for each
// item. Looking ahead makes that one for each step from the first item to the farthest one:
// narinfos of references are fetched in the background, wherever a request would look for them
// first, in memory and on disk.

const (
	// maxAheadRequest is the number of items of a request after which nothing is looked up ahead:
	// whoever asks about many at once knows what is wanted.
	maxAheadRequest = 16
	// aheadLookups is how many lookups go on at once, each of aheadBatch items at most; the bounds
	// on connections are those of the mirrors.
	aheadLookups = 8
	aheadBatch   = 256
	// aheadGather is the time in which references are gathered for a lookup. It is short beside a
	// round trip.
	aheadGather = 2 * time.Millisecond
	// aheadTime is for how long it goes on without a request, which tells that somebody is still
	// interested.
	aheadTime = 30 * time.Second
)

// A lookAhead fetches narinfos before they are asked for. The zero value is ready.
type lookAhead struct {
	workers sync.WaitGroup

	mu     sync.Mutex
	ctx    context.Context // nil while nothing goes on
	cancel context.CancelFunc
	until  time.Time
	active int             // workers
	seen   map[string]bool // store items
	queue  []string        // those not yet looked up
}

// stop ends everything, and waits for that. What it was about to look up is forgotten.
func (a *lookAhead) stop() {
	a.mu.Lock()
	if a.cancel != nil {
		a.cancel()
	}
	a.ctx, a.cancel, a.queue, a.seen = nil, nil, nil, nil
	a.mu.Unlock()
	a.workers.Wait()
}

// began reports whether all items are being looked up ahead, or have been.
func (a *lookAhead) began(items map[string]*missing) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, m := range items {
		if !a.seen[m.item.path] {
			return false
		}
	}
	return true
}

// lookAhead begins with what the found items refer to.
func (s *Substituter) lookAhead(items []string, found map[string]*found) {
	if s.LookAhead <= 0 || len(items) > maxAheadRequest {
		return
	}
	a := &s.ahead
	a.mu.Lock()
	if a.ctx == nil {
		a.ctx, a.cancel = context.WithCancel(context.Background())
		a.seen = map[string]bool{}
	}
	ctx := a.ctx
	a.until = time.Now().Add(aheadTime)
	for _, item := range items {
		if len(a.seen) < s.LookAhead {
			a.seen[item] = true
		}
	}
	a.mu.Unlock()
	for _, f := range found {
		s.goAhead(ctx, f.authorised.narinfo)
	}
}

// goAhead arranges for what an item refers to to be looked up.
func (s *Substituter) goAhead(ctx context.Context, n *narinfo.Narinfo) {
	a := &s.ahead
	var wanted []string
	for _, name := range n.References {
		path := s.StoreDir + "/" + name
		a.mu.Lock()
		known := a.seen[path] || len(a.seen) >= s.LookAhead
		if !known && ctx.Err() == nil {
			a.seen[path] = true
		}
		a.mu.Unlock()
		if known {
			continue
		}
		// The daemon does not ask about what is there, nor about what that refers to, which is
		// there as well.
		if _, err := os.Lstat(path); err == nil {
			continue
		}
		wanted = append(wanted, path)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if ctx.Err() != nil {
		return
	}
	a.queue = append(a.queue, wanted...)
	for left := len(a.queue); left > 0 && a.active < aheadLookups; left -= aheadBatch {
		a.active++
		a.workers.Go(func() { s.workAhead(ctx) })
	}
}

// workAhead looks up what is in the queue until nothing is.
func (s *Substituter) workAhead(ctx context.Context) {
	defer func() {
		if fault := recover(); fault != nil {
			s.Log.WarnOnce("ahead", "internal error while looking ahead: %v", fault)
			s.ahead.mu.Lock()
			s.ahead.active--
			s.ahead.mu.Unlock()
		}
	}()
	for {
		timer := time.NewTimer(aheadGather)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
		batch := s.ahead.take(ctx)
		if len(batch) == 0 {
			return
		}
		s.newLookup(batch, func(r *record) { s.goAhead(ctx, r.narinfo) }).run(ctx)
	}
}

// take returns what is to be looked up next. If that is nothing, the worker that calls it is
// counted no more.
func (a *lookAhead) take(ctx context.Context) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if ctx.Err() != nil || len(a.queue) == 0 || time.Now().After(a.until) {
		a.active--
		return nil
	}
	n := min(len(a.queue), aheadBatch)
	batch := a.queue[:n:n]
	a.queue = a.queue[n:]
	return batch
}
