// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/narinfocache"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
)

// How long answers of a server are kept that does not say it (Guix,
// guix/substitutes.scm: %narinfo-ttl and the two after it).
const (
	narinfoTTL   = 36 * time.Hour
	negativeTTL  = 2 * time.Minute
	transientTTL = time.Minute
	maxTTL       = 365 * 24 * time.Hour
)

const (
	// slowAfter is for how long a server may give no answer before the next one
	// is asked as well.
	slowAfter = time.Second
	// slowAtLast is for how long one may give answers before that.
	slowAtLast = 5 * time.Second
	// lookupTimeout is how long a server gets in all, beside lookupTimeoutEach
	// per item, so that one that trickles holds up nobody for ever.
	lookupTimeout     = 30 * time.Second
	lookupTimeoutEach = 50 * time.Millisecond
	// lookupBytes is how many bytes of narinfos a server may send in one look-up,
	// beside lookupBytesEach per item: narinfos have some kilobytes, and few of them
	// some hundred.
	lookupBytes     = 16 << 20
	lookupBytesEach = 8 << 10
)

// A record is the narinfo of one server for one item.
type record struct {
	server     *server
	narinfo    *narinfo.Narinfo
	size       int  // of its text, in bytes
	verified   bool // bears a good signature of a key that is authorised
	authorised bool // and so it counts, or would without
}

// A found is an item that is available.
type found struct {
	// authorised is the record that vouches for the item, the first such in the
	// order of the servers.
	authorised record
	// chosen is the first record that is equivalent to it: what the reply is
	// made of and what is downloaded first.
	chosen record
	// others are all other equivalent ones, in order.
	others []record
}

// A lookup asks servers about items. Servers are asked in order, each for what
// those before it have no authorised narinfo of. When a server is slow, the next
// one is asked without waiting for it.
type lookup struct {
	s       *Substituter
	items   []*item
	byHash  map[string]*item
	changed chan struct{} // has room for one: something has happened
	// ahead is called with each authorised record, from several goroutines, if
	// nobody has asked for it yet. Then nothing may be shown.
	ahead func(*record)

	mu    sync.Mutex
	asked []*asked
}

// An item is a store item that is looked up.
type item struct {
	path, hash string
	records    []record // of each server that has a narinfo
	waiting    map[*asked]bool
}

// asked is a server that has been asked.
type asked struct {
	server  *server
	begin   time.Time
	last    time.Time // of an answer
	pending int       // items without an answer
	done    bool      // no more answers will come
	slow    bool      // others are asked without waiting for it
}

// lookup returns the items among paths that are available.
func (s *Substituter) lookup(ctx context.Context, paths []string) map[string]*found {
	s.notes.show(s.Log)
	l := s.newLookup(paths, nil)
	l.run(ctx)
	s.notes.show(s.Log)
	result := make(map[string]*found, len(l.items))
	for _, it := range l.items {
		if f := it.found(); f != nil {
			result[it.path] = f
		}
	}
	return result
}

func (s *Substituter) newLookup(paths []string, ahead func(*record)) *lookup {
	l := &lookup{s: s, byHash: map[string]*item{}, changed: make(chan struct{}, 1), ahead: ahead}
	for _, path := range paths {
		hash, err := narinfo.HashPart(s.StoreDir, path)
		if err != nil {
			s.warnOnce(ahead != nil, "path "+path, "not looked up: %v", err)
			continue
		}
		// Two paths may have the same hash part; only a narinfo of the very path
		// counts, so that the first of them decides which it is.
		if l.byHash[hash] == nil {
			it := &item{path: path, hash: hash, waiting: map[*asked]bool{}}
			l.items = append(l.items, it)
			l.byHash[hash] = it
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
	for _, server := range l.s.servers {
		todo := l.todo()
		if len(todo) == 0 || ctx.Err() != nil {
			break
		}
		a := l.start(server, todo)
		workers.Go(func() { l.ask(ctx, a, todo) })
		l.wait(ctx, func() bool { return a.done || a.slow })
	}
	l.wait(ctx, l.decided)
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range l.asked {
		// The next lookup does not wait for it again.
		a.server.sluggish.Store(a.slow && a.pending > 0)
	}
}

// wait waits until condition holds or ctx is done. It sees to it that servers
// become slow.
func (l *lookup) wait(ctx context.Context, condition func() bool) {
	ticker := time.NewTicker(slowAfter / 10)
	defer ticker.Stop()
	for {
		l.mu.Lock()
		now := time.Now()
		for _, a := range l.asked {
			if now.Sub(a.last) >= slowAfter || now.Sub(a.begin) >= slowAtLast {
				a.slow = true
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

// decided tells whether no answer to come could matter: each item either has an
// authorised narinfo, and no server before the one that gave it is worth waiting
// for, or no server is left that could have one. The caller holds the lock.
func (l *lookup) decided() bool {
	for _, it := range l.items {
		hit := it.firstAuthorised()
		for a := range it.waiting {
			if a.done {
				continue
			}
			if hit < 0 || a.server.index < hit && !a.slow {
				return false
			}
		}
	}
	return true
}

// firstAuthorised returns the index of the first server with an authorised
// narinfo, or -1.
func (it *item) firstAuthorised() int {
	first := -1
	for _, r := range it.records {
		if r.authorised && (first < 0 || r.server.index < first) {
			first = r.server.index
		}
	}
	return first
}

// todo returns the items that no server has an authorised narinfo of.
func (l *lookup) todo() []*item {
	l.mu.Lock()
	defer l.mu.Unlock()
	var todo []*item
	for _, it := range l.items {
		if it.firstAuthorised() < 0 {
			todo = append(todo, it)
		}
	}
	return todo
}

func (l *lookup) start(server *server, todo []*item) *asked {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	a := &asked{server: server, begin: now, last: now, pending: len(todo), slow: server.sluggish.Load()}
	l.asked = append(l.asked, a)
	for _, it := range todo {
		it.waiting[a] = true
	}
	return a
}

// answered notes that a server has answered for an item; r is nil if it has
// nothing for it.
func (l *lookup) answered(a *asked, it *item, r *record) {
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

// ask asks one server, first the cache of what it has said before.
func (l *lookup) ask(ctx context.Context, a *asked, todo []*item) {
	defer func() {
		l.mu.Lock()
		a.done = true
		l.notify()
		l.mu.Unlock()
	}()
	l.s.ask(ctx, a.server, todo, l.ahead != nil, func(it *item, r *record) {
		l.answered(a, it, r)
		if l.ahead != nil && r != nil && r.authorised {
			l.ahead(r)
		}
	})
}

// ask asks one server about items, and calls answer, from several goroutines, for
// those that it says something about. What somebody else is asking for already is
// waited for. With ahead, nobody has asked for the items yet, and nothing is shown.
func (s *Substituter) ask(ctx context.Context, server *server, todo []*item, ahead bool, answer func(*item, *record)) {
	// Again only for what others have been asking for in vain.
	for range maxAsks {
		if todo = s.askOnce(ctx, server, todo, ahead, answer); len(todo) == 0 || ctx.Err() != nil {
			return
		}
	}
}

var errTooMuch = errors.New("sends more than narinfos can be, so that its further ones are ignored")

// maxAsks is how often it is hoped for an answer that somebody else waits for.
const maxAsks = 3

// askOnce returns the items that others have been asking for in vain.
func (s *Substituter) askOnce(ctx context.Context, server *server, todo []*item, ahead bool, answer func(*item, *record)) (again []*item) {
	local := mirror.IsLocal(server.url)
	missing := map[string]*asking{} // by hash part
	theirs := map[*item]*flight{}
	// Before anything of others is waited for: they may wait for ours.
	land := func() {
		for _, m := range missing {
			s.flights.end(memoryKey{server, m.item.path}, m.flight)
		}
	}
	defer land() // whatever happens
	for _, it := range todo {
		if ctx.Err() != nil {
			return nil
		}
		if r, ok := s.known(server, it, local, ahead); ok {
			answer(it, r)
			continue
		}
		f, mine := s.flights.begin(memoryKey{server, it.path})
		if !mine {
			theirs[it] = f
			continue
		}
		// Whoever had it may have had the answer just now.
		if r, ok := s.memory.get(server, it.path, s.Now()); ok {
			f.answer(r)
			s.flights.end(memoryKey{server, it.path}, f)
			answer(it, r)
			continue
		}
		missing[it.hash] = &asking{it, f}
	}
	var waiter sync.WaitGroup
	if len(theirs) > 0 {
		waiter.Go(func() {
			for it, f := range theirs {
				select {
				case <-f.done:
				case <-ctx.Done():
					return
				}
				if f.answered {
					answer(it, f.record)
				} else {
					again = append(again, it)
				}
			}
		})
	}
	if len(missing) > 0 {
		s.fetch(ctx, server, missing, ahead, answer)
		land()
	}
	waiter.Wait()
	return again
}

// known returns what is known already of a server's answer, and whether that is
// anything.
func (s *Substituter) known(server *server, it *item, local, ahead bool) (*record, bool) {
	if r, ok := s.memory.get(server, it.path, s.Now()); ok {
		return r, true
	}
	if s.Cache == nil || local {
		return nil, false
	}
	e, ok := s.Cache.Get(server.url, it.hash, s.Now())
	if !ok {
		return nil, false
	}
	r := s.read(server, it, e.Narinfo, e.Verified, ahead)
	s.memory.put(server, it.path, r, e.Until)
	return r, true
}

// asking is an item that is being asked for.
type asking struct {
	item   *item
	flight *flight
}

// fetch gets narinfos from a server.
func (s *Substituter) fetch(ctx context.Context, server *server, missing map[string]*asking, ahead bool, answer func(*item, *record)) {
	if err := s.Mirrors.Down(server.url); err != nil {
		s.sayDown(server.name, err, ahead)
		return
	}
	local := mirror.IsLocal(server.url)
	var progress *protocol.Lookup
	if !local && !ahead {
		progress = s.Log.Lookup(server.name, len(missing))
		defer progress.End()
	}
	ctx, cancel := context.WithTimeoutCause(ctx, lookupTimeout+time.Duration(len(missing))*lookupTimeoutEach,
		errors.New("too slow"))
	defer cancel()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var left atomic.Int64 // bytes
	left.Store(lookupBytes + int64(len(missing))*lookupBytesEach)
	hashes := make([]string, 0, len(missing))
	for hash := range missing {
		hashes = append(hashes, hash)
	}
	slices.Sort(hashes)
	narinfos := s.Mirrors.Narinfos
	if ahead {
		narinfos = s.Mirrors.NarinfosAhead
	}
	err := narinfos(ctx, server.url, hashes, func(a mirror.Answer) {
		if left.Add(-int64(len(a.Body))) < 0 {
			stop(errTooMuch)
			return
		}
		it := missing[a.Hash].item
		var text []byte
		if a.Status == http.StatusOK {
			text = a.Body
		}
		r := s.read(server, it, text, false, ahead)
		if s.Debug && !ahead && a.Status != http.StatusOK {
			baking := ""
			if a.Baking {
				baking = " (baking)"
			}
			s.Log.Notef("narinfo of %s from %s: status %d%s", it.path, server.name, a.Status, baking)
		}
		if progress != nil {
			progress.Answered()
		}
		if !local {
			s.remember(server, it, a, r, ahead)
		}
		missing[a.Hash].flight.answer(r)
		answer(it, r)
	})
	switch down := s.Mirrors.Down(server.url); {
	case err == nil || errors.Is(err, context.Canceled):
	case down != nil:
		s.sayDown(server.name, down, ahead)
	default:
		s.warnOnce(ahead, "server "+server.url, "%v", naming(server.name, err))
	}
}

// sayDown shows once why a server is not asked any more; url is what it was
// found out with.
func (s *Substituter) sayDown(url string, down error, ahead bool) {
	key := url
	var e *mirror.ServerError
	if errors.As(down, &e) {
		key = e.Server
	}
	s.warnOnce(ahead, "down "+key, "%v", naming(url, down))
}

// remember keeps an answer of a server for later.
func (s *Substituter) remember(server *server, it *item, a mirror.Answer, r *record, ahead bool) {
	e := narinfocache.Entry{TTL: transientTTL}
	switch {
	case r != nil:
		e.Narinfo, e.TTL, e.Verified = a.Body, narinfoTTL, r.verified
		if a.MaxAge >= 0 {
			e.TTL = min(a.MaxAge, maxTTL)
		}
	case a.Status == http.StatusNotFound || a.Status == http.StatusAccepted:
		e.TTL = negativeTTL
		if a.MaxAge >= 0 {
			e.TTL = min(a.MaxAge, maxTTL)
		}
	}
	now := s.Now()
	s.memory.put(server, it.path, r, now.Add(e.TTL))
	if s.Cache == nil {
		return
	}
	if err := s.Cache.PutLater(server.url, a.Hash, e, now); err != nil {
		s.warnOnce(ahead, "cache", "narinfos cannot be kept for later: %v", err)
	}
}

// A memory keeps records for the next request of this process, for clients ask
// first what is available and then about it. It is safe for concurrent use.
type memory struct {
	mu      sync.Mutex
	entries map[memoryKey]memoryEntry
	bytes   int // put since the entries were made
}

type memoryKey struct {
	server *server
	path   string
}

type memoryEntry struct {
	record *record // nil if the server has nothing
	until  time.Time
}

// maxMemory is how many records are kept, and maxMemoryBytes how many bytes of
// narinfos they may have been made of.
const (
	maxMemory      = 20000
	maxMemoryBytes = 32 << 20
)

func (m *memory) get(server *server, path string, now time.Time) (*record, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.entries[memoryKey{server, path}]
	return e.record, ok && !now.After(e.until)
}

func (m *memory) put(server *server, path string, r *record, until time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.entries == nil || len(m.entries) >= maxMemory || m.bytes > maxMemoryBytes {
		m.entries, m.bytes = map[memoryKey]memoryEntry{}, 0
	}
	if r != nil {
		m.bytes += r.size
	}
	m.entries[memoryKey{server, path}] = memoryEntry{r, until}
}

func (m *memory) clear() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.entries, m.bytes = nil, 0
}

// read turns the text that a server has given for an item into a record, or into
// nil if there is none or if it is good for nothing. With verified, the signature was
// found to be good before; whether its key is authorised is another question.
func (s *Substituter) read(server *server, it *item, text []byte, verified, ahead bool) (r *record) {
	if text == nil {
		return nil
	}
	defer func() {
		// Not even a fault of ours that a narinfo brings out ends the process.
		if fault := recover(); fault != nil {
			s.Log.WarnOnce("fault", "narinfo of %s from %s ignored: internal error: %v", it.path, server.url, fault)
			r = nil
		}
	}()
	n, err := narinfo.Parse(text)
	if err == nil {
		err = n.CheckItem(s.StoreDir, it.path)
	}
	if err != nil {
		s.warnOnce(ahead, fmt.Sprintf("narinfo %s %s", server.url, it.hash),
			"narinfo of %s from %s ignored: %v", it.path, server.name, err)
		return nil
	}
	var keys narinfo.Verifier = s.Keys
	if verified {
		keys = s.Keys.Known()
	}
	r = &record{server: server, narinfo: n, size: len(text)}
	r.verified = n.Authorise(keys) == nil
	r.authorised = r.verified || s.AllowUnauthenticated
	return r
}

// sorted returns records in the order of their servers.
func sorted(records []record) []record {
	records = slices.Clone(records)
	slices.SortFunc(records, func(a, b record) int { return a.server.index - b.server.index })
	return records
}

// found decides about an item after the lookup; nil if it is not available.
func (it *item) found() *found {
	first := it.firstAuthorised()
	if first < 0 {
		return nil
	}
	f := &found{}
	for _, r := range it.records {
		if r.server.index == first {
			f.authorised = r
		}
	}
	for _, r := range sorted(it.records) {
		switch {
		case !narinfo.Equivalent(r.narinfo, f.authorised.narinfo):
		case f.chosen.narinfo == nil:
			f.chosen = r
		default:
			f.others = append(f.others, r)
		}
	}
	return f
}
