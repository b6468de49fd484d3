// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"context"
	"os"
	"slices"
	"sync"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// The daemon asks about one item at a time, and then about what it refers to (Guix,
// nix/libstore/build.cc: SubstitutionGoal::tryNext), so that a closure costs a round trip for each
// item. Looking ahead makes that one for each step from the first item to the farthest one:
// narinfos of references are fetched in the background, wherever a request would look for them
// first, in memory and on disk.

// maxAheadRequest is the number of items of a request after which nothing is looked up ahead:
// whoever asks about many at once knows what is wanted.
const maxAheadRequest = 16

// A lookAhead fetches narinfos before they are asked for.
type lookAhead struct {
	ctx     context.Context
	cancel  context.CancelFunc
	workers sync.WaitGroup

	mu   sync.Mutex
	seen map[string]bool // store items
}

func newLookAhead() *lookAhead {
	a := &lookAhead{seen: map[string]bool{}}
	a.ctx, a.cancel = context.WithCancel(context.Background())
	return a
}

// stop ends everything, and waits for that.
func (a *lookAhead) stop() {
	a.cancel()
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
func (s *Substituter) lookAhead(items []string, found []*found) {
	if s.LookAhead <= 0 || len(items) > maxAheadRequest {
		return
	}
	s.ahead.see(items, s.LookAhead)
	for _, f := range found {
		s.goAhead(f.authorised.narinfo)
	}
}

// see returns those of some items that are to be looked up now, of most in all.
func (a *lookAhead) see(items []string, most int) (unseen []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, item := range items {
		if !a.seen[item] && len(a.seen) < most {
			a.seen[item] = true
			unseen = append(unseen, item)
		}
	}
	return unseen
}

// goAhead looks up what an item refers to. All lookups share the connections to a server, and what
// is requested on them at about the same time.
func (s *Substituter) goAhead(n *narinfo.Narinfo) {
	// The daemon does not ask about what is there, nor about what that refers to, which is there as
	// well.
	wanted := slices.DeleteFunc(s.ahead.see(s.references(n), s.LookAhead), func(path string) bool {
		_, err := os.Lstat(path)
		return err == nil
	})
	if len(wanted) == 0 || s.ahead.ctx.Err() != nil {
		return
	}
	s.ahead.workers.Go(func() {
		defer func() {
			if fault := recover(); fault != nil {
				s.Log.WarnOnce("ahead", "internal error while looking ahead: %v", fault)
			}
		}()
		s.newLookup(wanted, func(r *record) { s.goAhead(r.narinfo) }).run(s.ahead.ctx)
	})
}
