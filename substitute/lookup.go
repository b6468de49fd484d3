// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"cmp"
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"syscall"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/backoff"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

const (
	// slowAfter is for how long a server may give no answer before the next one is asked as well;
	// half of that for each slow one before, so that many silent ones do not add up.
	slowAfter = time.Second
	// slowAtLast is for how long one may give answers before that.
	slowAtLast = 5 * time.Second
)

// A record is the narinfo of one server for one item.
type record struct {
	server     *server
	narinfo    *narinfo.Narinfo
	given      time.Time // by the server
	authorised bool      // bears a good signature of a key that is authorised, if that is needed
	refused    error     // why it is not
}

// A found is an item that is available.
type found struct {
	// authorised is the record that vouches for the item, the first such in the order of the
	// servers.
	authorised record
	// all are the records that are equivalent to it, in that order: of the first one the reply is
	// made, and what it offers is downloaded first.
	all []record
}

// path is the file name of the item.
func (f *found) path() string { return f.authorised.narinfo.StorePath }

// A lookup asks servers about items. Servers are asked in order, each for what those before it have
// no authorised narinfo of. When a server is slow, the next one is asked without waiting for it.
type lookup struct {
	s       *Substituter
	servers []*server // that are asked
	items   []*item
	changed chan struct{} // has room for one: something has happened
	// ahead is called with each authorised record, from several goroutines, if nobody has asked for
	// it yet. Then nothing may be shown.
	ahead func(*record)
	// counts reports whether no other narinfo of an item is needed: usually if it is authorised.
	counts func(record) bool

	mu        sync.Mutex
	inquiries []*inquiry
}

// An item is a store item that is looked up.
type item struct {
	path, hash string
	anew       bool     // what has been kept does not count
	records    []record // of each server that has a narinfo, in the order of the servers
	waiting    map[*inquiry]bool
}

// An inquiry is a server that is asked about the items of a lookup.
type inquiry struct {
	server  *server
	begin   time.Time
	last    time.Time // of an answer
	pending int       // items without an answer
	done    bool      // no more answers will come
	slow    bool      // others are asked without waiting for it
}

// lookup looks for narinfos of paths, and says why those do not count that nobody authorises.
func (s *Substituter) lookup(ctx context.Context, paths []string) *lookup {
	l := s.newLookup(paths, nil)
	begin := time.Now()
	l.run(ctx)
	pauses := backoff.Backoff{Min: leastAgain, Max: leastAgain << mostAgain}
	for pauses.Failures() < mostAgain && time.Since(begin) < mostAway && l.again(ctx, pauses.Fail(time.Now(), 0)) {
	}
	for _, it := range l.items {
		if l.first(it) == nil {
			for _, r := range it.records {
				s.sayRefused(r)
			}
		}
	}
	return l
}

const (
	// mostAgain is how often a lookup turns again to servers that were there a moment ago, at first
	// after leastAgain, until mostAway is over. They may have been away mostOutages times in a row.
	mostAgain   = 5
	leastAgain  = 200 * time.Millisecond
	mostOutages = 5
	mostAway    = 28 * time.Second
)

// again asks those servers again, after a pause, that have answered before in this process, or have
// taken connections, but have left items open that nobody else has, once they are through with
// their rest: clients of the daemon take what has no answer for missing, and a server that is
// started anew is back at once.
func (l *lookup) again(ctx context.Context, pause time.Duration) bool {
	var servers []*server
	todo := l.todo()
	for _, a := range l.inquiries {
		open := slices.ContainsFunc(todo, func(it *item) bool { return it.waiting[a] })
		down, rests := errors.AsType[*mirror.ServerError](l.s.Mirrors.Down(a.server.url))
		broke := rests && (errors.Is(down, io.ErrUnexpectedEOF) || errors.Is(down, syscall.ECONNRESET))
		if !open || !a.server.answered.Load() && !broke || rests && down.Failures > mostOutages {
			continue
		}
		servers = append(servers, a.server)
		if rests {
			pause = max(pause, down.Rest)
		}
	}
	if len(servers) == 0 {
		return false
	}
	select {
	case <-time.After(pause):
	case <-ctx.Done():
		return false
	}
	l.servers, l.inquiries = servers, nil
	l.run(ctx)
	return true
}

// sayRefused says once for each key, or each other reason, why narinfos do not count.
func (s *Substituter) sayRefused(r record) {
	if !errors.Is(r.refused, acl.ErrUnauthorisedKey) {
		s.Log.WarnOnce("refused "+r.server.url+r.refused.Error(), "narinfo of %s from %s does not count: %v",
			r.narinfo.StorePath, r.server.name, r.refused)
		return
	}
	host, key := acl.Signer(r.narinfo.Signature)
	list := cmp.Or(s.KeysFile, "the access control list")
	key = cmp.Or(key, "that cannot be read")
	s.Log.WarnOnce("key "+key, "narinfo of %s from %s does not count: it is signed by %.60q with a key that %s does not authorise: %.300s",
		r.narinfo.StorePath, r.server.name, host, list, key)
}

// all returns the items that are available, each once, in the order in which they were given.
func (l *lookup) all() (all []*found) {
	for _, it := range l.items {
		if f := l.found(it); f != nil {
			all = append(all, f)
		}
	}
	return all
}

func (s *Substituter) newLookup(paths []string, ahead func(*record)) *lookup {
	l := &lookup{
		s: s, servers: s.servers, changed: make(chan struct{}, 1), ahead: ahead,
		counts: func(r record) bool { return r.authorised },
	}
	seen := map[string]bool{}
	for _, path := range paths {
		hash, err := narinfo.HashPart(s.StoreDir, path)
		if err != nil {
			s.Log.WarnOnce("path "+path, "not looked up: %v", err)
			continue
		}
		// Two paths may have the same hash part; only a narinfo of the very path counts, so that
		// the first of them decides which it is.
		if !seen[hash] {
			seen[hash] = true
			l.items = append(l.items, &item{path: path, hash: hash, waiting: map[*inquiry]bool{}})
		}
	}
	return l
}

// run asks the servers until everything is decided.
func (l *lookup) run(parent context.Context) {
	ctx, cancel := context.WithCancel(parent)
	var workers sync.WaitGroup
	defer workers.Wait()
	defer cancel()
	for _, server := range l.servers {
		todo := l.todo()
		if len(todo) == 0 || ctx.Err() != nil {
			break
		}
		a := l.start(server, todo)
		workers.Go(func() { l.query(ctx, a, todo) })
		l.wait(ctx, func() bool { return a.done || a.slow })
	}
	open := l.items // but those of which all before have been decided
	l.wait(ctx, func() bool {
		for len(open) > 0 && l.decided(open[0]) {
			open = open[1:]
		}
		return len(open) == 0
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range l.inquiries {
		if a.slow && a.pending > 0 {
			a.server.late() // the next lookup does not wait for it again
		}
	}
}

// wait waits until condition holds or ctx is done. It sees to it that servers become slow.
func (l *lookup) wait(ctx context.Context, condition func() bool) {
	ticker := time.NewTicker(slowAfter / 10)
	defer ticker.Stop()
	for {
		l.mu.Lock()
		now, after := time.Now(), slowAfter
		for _, a := range l.inquiries {
			if now.Sub(a.last) >= after || now.Sub(a.begin) >= slowAtLast {
				a.slow = true
			}
			if a.slow {
				after /= 2
			}
		}
		holds := condition()
		l.mu.Unlock()
		if holds {
			return
		}
		select {
		case <-l.changed:
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

// decided reports whether no answer to come could matter for an item: either it has a narinfo that
// counts, and no server before the one that gave it is worth waiting for, or no server is left that
// could have one. In one run that does not change any more. The caller holds the lock.
func (l *lookup) decided(it *item) bool {
	hit := l.first(it)
	for a := range it.waiting {
		if !a.done && (hit == nil || a.server.index < hit.server.index && !a.slow) {
			return false
		}
	}
	return true
}

// first returns the first narinfo that counts, in the order of the servers, or nil.
func (l *lookup) first(it *item) *record {
	if i := slices.IndexFunc(it.records, l.counts); i >= 0 {
		return &it.records[i]
	}
	return nil
}

// todo returns the items that no server has a narinfo of that counts.
func (l *lookup) todo() []*item {
	l.mu.Lock()
	defer l.mu.Unlock()
	var todo []*item
	for _, it := range l.items {
		if l.first(it) == nil {
			todo = append(todo, it)
		}
	}
	return todo
}

func (l *lookup) start(server *server, todo []*item) *inquiry {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	a := &inquiry{server: server, begin: now, last: now, pending: len(todo), slow: server.rests(&server.slow)}
	l.inquiries = append(l.inquiries, a)
	for _, it := range todo {
		it.waiting[a] = true
	}
	return a
}

// answered notes that a server has answered for an item; r is nil if it has nothing for it.
func (l *lookup) answered(a *inquiry, it *item, r *record) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !it.waiting[a] {
		return
	}
	delete(it.waiting, a)
	a.pending--
	a.last = time.Now()
	if r != nil {
		it.records = append(it.records, *r)
		slices.SortStableFunc(it.records, func(a, b record) int { return a.server.index - b.server.index })
	}
	if a.pending == 0 || a.pending%64 == 0 {
		l.notify()
	}
}

func (l *lookup) notify() {
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

// query queries one server, first the cache of what it has said before.
func (l *lookup) query(ctx context.Context, a *inquiry, todo []*item) {
	defer func() {
		l.mu.Lock()
		a.done = true
		l.notify()
		l.mu.Unlock()
	}()
	l.s.queryItems(ctx, a.server, todo, l.ahead != nil, func(it *item, r *record) {
		l.answered(a, it, r)
		if l.ahead != nil && r != nil && r.authorised {
			l.ahead(r)
		}
	})
}

// found decides about an item after the lookup; nil if it is not available.
func (l *lookup) found(it *item) *found {
	first := l.first(it)
	if first == nil {
		return nil
	}
	return &found{*first, equivalent(it.records, first.narinfo)}
}

// equivalent returns those of some records that describe the same as a narinfo.
func equivalent(records []record, n *narinfo.Narinfo) []record {
	return slices.DeleteFunc(slices.Clone(records), func(r record) bool { return !narinfo.Equivalent(r.narinfo, n) })
}
