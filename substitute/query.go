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

// This file queries servers for narinfos, and keeps what they say.

// How long answers of a server are kept that does not say it (Guix, guix/substitutes.scm:
// %narinfo-ttl and the two after it; the last one is a minute there).
const (
	narinfoTTL   = 36 * time.Hour
	negativeTTL  = 2 * time.Minute
	transientTTL = 5 * time.Second
	// maxTTL and maxNegativeTTL bound what servers say.
	maxTTL         = 365 * 24 * time.Hour
	maxNegativeTTL = time.Hour
)

const (
	// lookupTimeout is how long a server gets in all, beside lookupTimeoutEach per item, so that
	// one that trickles holds up nobody for ever.
	lookupTimeout     = 30 * time.Second
	lookupTimeoutEach = 50 * time.Millisecond
	// lookupBytes is how many bytes of narinfos a server may send in one lookup, beside
	// lookupBytesEach per item: narinfos have some kilobytes, and few of them some hundred.
	lookupBytes     = 4 << 20
	lookupBytesEach = 8 << 10
)

// queryItems queries one server about items, and calls answer, from several goroutines, for those
// that it says something about. What is requested already is waited for. With ahead, nobody has
// asked for the items yet, and nothing is shown.
func (s *Substituter) queryItems(ctx context.Context, server *server, todo []*item, ahead bool, answer func(*item, *record)) {
	// Again only for what others have requested in vain.
	for range maxQueries {
		if todo = s.queryOnce(ctx, server, todo, ahead, answer); len(todo) == 0 || ctx.Err() != nil {
			return
		}
	}
}

// errUnquoted is the error about what is in a local file. What that is, is not told: whoever names
// such files to the daemon need not have the right to read them.
var errUnquoted = errors.New("the local file has other contents than it should")

var errTooMuch = errors.New("sends more than narinfos can be, so that its further ones are ignored")

// maxQueries is how often it is hoped for an answer that somebody else waits for.
const maxQueries = 3

// queryOnce returns the items that others have requested in vain.
func (s *Substituter) queryOnce(ctx context.Context, server *server, todo []*item, ahead bool, answer func(*item, *record)) (again []*item) {
	local := mirror.IsLocal(server.url)
	mine := map[string]*missing{} // by hash part
	theirs := map[*item]*pending{}
	// Before anything of others is waited for: they may wait for ours.
	end := func() {
		for _, m := range mine {
			s.pending.end(memoryKey{server, m.item.path}, m.pending)
		}
	}
	defer end() // whatever happens
	for _, it := range todo {
		if ctx.Err() != nil {
			return nil
		}
		if r, ok := s.known(server, it, local, ahead); ok {
			answer(it, r)
			continue
		}
		p, ours := s.pending.begin(memoryKey{server, it.path})
		if !ours {
			theirs[it] = p
			continue
		}
		// Whoever had it may have had the answer just now.
		if r, ok := s.memory.get(server, it.path, s.Now()); ok && !it.anew {
			p.answer(r)
			s.pending.end(memoryKey{server, it.path}, p)
			answer(it, r)
			continue
		}
		mine[it.hash] = &missing{it, p}
	}
	var waiter sync.WaitGroup
	if len(theirs) > 0 {
		waiter.Go(func() {
			for it, p := range theirs {
				select {
				case <-p.done:
				case <-ctx.Done():
					return
				}
				if p.answered {
					answer(it, p.record)
				} else {
					again = append(again, it)
				}
			}
		})
	}
	if len(mine) > 0 {
		s.fetch(ctx, server, mine, ahead, answer)
		end()
	}
	waiter.Wait()
	return again
}

// known returns what is known already of a server's answer, and whether that is anything.
func (s *Substituter) known(server *server, it *item, local, ahead bool) (*record, bool) {
	if it.anew {
		return nil, false
	}
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
	r := s.read(server, it, e.Narinfo, e.Until.Add(-e.TTL), ahead)
	now := s.Now()
	s.memory.put(server, it.path, r, now, earlier(e.Until, now.Add(memoryTime)))
	return r, true
}

// missing is an item that has to be requested.
type missing struct {
	item    *item
	pending *pending
}

// fetch gets narinfos from a server.
func (s *Substituter) fetch(ctx context.Context, server *server, items map[string]*missing, ahead bool, answer func(*item, *record)) {
	if err := s.Mirrors.Down(server.url); err != nil {
		s.sayDown(server.name, err, ahead)
		hear(items, err)
		return
	}
	local := mirror.IsLocal(server.url)
	var progress *protocol.Lookup
	if !local && !ahead && !s.ahead.began(items) {
		progress = s.Log.Lookup(server.name, len(items))
		defer progress.End()
	}
	ctx, cancel := context.WithTimeoutCause(ctx, lookupTimeout+time.Duration(len(items))*lookupTimeoutEach,
		errors.New("too slow"))
	defer cancel()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var left atomic.Int64 // bytes
	left.Store(lookupBytes + int64(len(items))*lookupBytesEach)
	hashes := make([]string, 0, len(items))
	for hash := range items {
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
		it := items[a.Hash].item
		if it.heard != nil {
			it.heard(a, nil)
		}
		r := s.received(server, it, a, ahead)
		if progress != nil {
			progress.Answered()
		}
		items[a.Hash].pending.answer(r)
		answer(it, r)
	})
	hear(items, err)
	switch down := s.Mirrors.Down(server.url); {
	case err == nil || errors.Is(err, context.Canceled):
	case down != nil:
		s.sayDown(server.name, down, ahead)
	default:
		s.warnOnce(ahead, "server "+server.url, "%v", naming(server.name, err))
	}
}

// hear tells whoever wants to know it why a server has not answered.
func hear(items map[string]*missing, err error) {
	for _, m := range items {
		if err != nil && m.item.heard != nil {
			m.item.heard(mirror.Answer{}, err)
		}
	}
}

// received makes a record of an answer, and keeps it for later.
func (s *Substituter) received(server *server, it *item, a mirror.Answer, ahead bool) *record {
	var text []byte
	if a.Status == http.StatusOK {
		text = a.Body
	}
	r := s.read(server, it, text, s.Now(), ahead)
	if s.Debug && !ahead && a.Status != http.StatusOK {
		baking := ""
		if a.Baking {
			baking = " (baking)"
		}
		s.Log.Notef("narinfo of %s from %s: status %d%s", it.path, server.name, a.Status, baking)
	}
	s.sayStatus(server, a.Status, ahead)
	if !mirror.IsLocal(server.url) {
		s.remember(server, it, a, r, ahead)
	}
	return r
}

// sayStatus says once for each kind that a server answers in another way than by a narinfo, or that
// it has none.
func (s *Substituter) sayStatus(server *server, status int, ahead bool) {
	switch status {
	case http.StatusOK, http.StatusAccepted, http.StatusNotFound, http.StatusGone:
	default:
		s.warnOnce(ahead, fmt.Sprint("status ", server.url, status), "%s: narinfos are answered by status %d %s",
			server.name, status, http.StatusText(status))
	}
}

// sayDown shows once that a server rests and why; url is what that was found out with.
func (s *Substituter) sayDown(url string, down error, ahead bool) {
	key := url
	var e *mirror.ServerError
	if errors.As(down, &e) {
		key = e.Server
	}
	s.warnOnce(ahead, "down "+key, "%v", naming(url, down))
}

// remember keeps an answer of a server for later. What may be no answer of the server, but of a
// network that wants us to log in first, is kept for seconds, and not for other processes.
func (s *Substituter) remember(server *server, it *item, a mirror.Answer, r *record, ahead bool) {
	e := narinfocache.Entry{TTL: transientTTL}
	switch {
	case r != nil:
		e.Narinfo, e.TTL = a.Body, narinfoTTL
		if a.MaxAge >= 0 {
			e.TTL = min(a.MaxAge, maxTTL)
		}
	case a.Status == http.StatusNotFound || a.Status == http.StatusAccepted:
		e.TTL = negativeTTL
		if a.MaxAge >= 0 {
			e.TTL = min(a.MaxAge, maxNegativeTTL)
		}
	}
	s.keep(server, it, e, r, ahead)
}

// keep keeps what is known of an item, in memory and on disk; what does not count, or not for long,
// in memory only.
func (s *Substituter) keep(server *server, it *item, e narinfocache.Entry, r *record, ahead bool) {
	now := s.Now()
	until := now.Add(e.TTL)
	if s.Cache != nil && (e.TTL > transientTTL || r != nil) && (r == nil || r.authorised) {
		until = earlier(until, now.Add(memoryTime))
		if err := s.Cache.PutLater(server.url, it.hash, e, now); err != nil {
			s.warnOnce(ahead, "cache", "narinfos cannot be kept for later: %v", err)
		}
	}
	s.memory.put(server, it.path, r, now, until)
}

func earlier(t, u time.Time) time.Time {
	if u.Before(t) {
		return u
	}
	return t
}

// query queries one server about one item; nil if it has nothing. With anew, what has been kept of
// it does not count. With quiet, nothing is shown.
func (s *Substituter) query(ctx context.Context, server *server, path string, anew, quiet bool) *record {
	hash, err := narinfo.HashPart(s.StoreDir, path)
	if err != nil {
		return nil
	}
	var result atomic.Pointer[record]
	it := &item{path: path, hash: hash, anew: anew}
	s.queryItems(ctx, server, []*item{it}, quiet, func(_ *item, r *record) { result.Store(r) })
	return result.Load()
}

// renew requests narinfos of an item again that have turned out to be of no use, if they have been
// kept from before a time. It reports whether any of them has changed. Those that have not, and
// those that were new already, are kept as absences for a while, if their narinfo counts.
func (s *Substituter) renew(ctx context.Context, path string, useless []record, before time.Time, again bool) (changed bool) {
	for _, r := range useless {
		if mirror.IsLocal(r.server.url) {
			continue
		}
		same := true
		if r.given.Before(before) && !again {
			if now := s.query(ctx, r.server, path, true, false); now != nil {
				same = now.narinfo.Text() == r.narinfo.Text()
				changed = changed || !same
			}
		}
		if hash, err := narinfo.HashPart(s.StoreDir, path); same && r.authorised && err == nil {
			s.keep(r.server, &item{path: path, hash: hash}, narinfocache.Entry{TTL: negativeTTL}, nil, false)
		}
	}
	return changed
}

// A memory keeps records for the next request of this process, for clients ask first what is
// available and then about it. It is safe for concurrent use.
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
	record      *record // nil if the server has nothing
	from, until time.Time
}

const (
	// maxMemory is how many records are kept, and maxMemoryBytes how many bytes of narinfos they
	// may have been made of.
	maxMemory      = 20000
	maxMemoryBytes = 8 << 20
	// memoryTime is for how long those are kept that are in the cache too: other processes may have
	// learnt something else meanwhile.
	memoryTime = time.Minute
)

func (m *memory) get(server *server, path string, now time.Time) (*record, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.entries[memoryKey{server, path}]
	// One from the future was put there before the clock was set.
	return e.record, ok && !now.After(e.until) && !now.Before(e.from)
}

func (m *memory) put(server *server, path string, r *record, now, until time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.entries == nil || len(m.entries) >= maxMemory || m.bytes > maxMemoryBytes {
		m.entries, m.bytes = map[memoryKey]memoryEntry{}, 0
	}
	if r != nil {
		m.bytes += r.size
	}
	m.entries[memoryKey{server, path}] = memoryEntry{r, now, until}
}

func (m *memory) clear() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.entries, m.bytes = nil, 0
}

// read turns the text that a server has given for an item at some time into a record, or into nil
// if there is none or if it is good for nothing.
func (s *Substituter) read(server *server, it *item, text []byte, given time.Time, ahead bool) (r *record) {
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
	kind := "parse"
	if err == nil {
		err, kind = n.CheckItem(s.StoreDir, it.path), "item"
	}
	if err != nil {
		if mirror.IsLocal(server.url) {
			err = errUnquoted
		}
		s.warnOnce(ahead, "narinfo "+kind+server.url,
			"narinfo of %s from %s ignored: %v", it.path, server.name, err)
		return nil
	}
	r = &record{server: server, narinfo: n, given: given, size: len(text)}
	r.refused = n.Authorise(s.Keys)
	r.authorised = r.refused == nil || s.AllowUnauthenticated
	return r
}
