// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/memory"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/narinfocache"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
)

// This file queries servers for narinfos, and keeps what they say.

// transientTTL is how long it is kept in memory that there was neither a narinfo, nor none.
const transientTTL = 5 * time.Second

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
	// Again only for what others have requested in vain, so often.
	const most = 3
	for range most {
		if todo = s.queryOnce(ctx, server, todo, ahead, answer); len(todo) == 0 || ctx.Err() != nil {
			return
		}
	}
}

// errUnquoted is the error about what is in a local file, or on a server that a stranger has named.
// What that is, is not told: whoever names them to the daemon need not have the right to read them.
var errUnquoted = errors.New("it has other contents than it should")

var errTooMuch = errors.New("sends more than narinfos can be, so that its further ones are ignored")

// queryOnce returns the items that others have requested in vain.
func (s *Substituter) queryOnce(ctx context.Context, server *server, todo []*item, ahead bool, answer func(*item, *record)) (again []*item) {
	mine := map[string]*missing{} // by hash part
	theirs := map[*item]*pending{}
	// Before anything of others is waited for: they may wait for ours.
	end := func() {
		for _, m := range mine {
			s.memory.End(memoryKey{server, m.item.path}, m.pending, false, nil)
		}
	}
	defer end() // whatever happens
	// Most of what a cache costs is to check signatures, for which there are many cores.
	var workers sync.WaitGroup
	var mu sync.Mutex // of both maps
	for some := range slices.Chunk(todo, 1+len(todo)/runtime.GOMAXPROCS(0)) {
		workers.Go(func() {
			for _, it := range some {
				if ctx.Err() != nil {
					return
				}
				r, known, p, ours := s.known(server, it)
				if known {
					answer(it, r)
					continue
				}
				mu.Lock()
				if ours {
					mine[it.hash] = &missing{it, p}
				} else {
					theirs[it] = p
				}
				mu.Unlock()
			}
		})
	}
	if workers.Wait(); ctx.Err() != nil {
		return nil
	}
	if len(mine) > 0 {
		s.fetch(ctx, server, mine, ahead, answer)
		end()
	}
	for it, p := range theirs {
		select {
		case <-p.Done:
		case <-ctx.Done():
			return nil
		}
		if p.Answered {
			answer(it, p.Answer)
		} else {
			again = append(again, it)
		}
	}
	return again
}

// known returns what is known already of a server's answer, or else the request for it that is
// under way, and whether that is the caller's, who must end it.
func (s *Substituter) known(server *server, it *item) (r *record, known bool, p *pending, ours bool) {
	now, key := s.Now(), memoryKey{server, it.path}
	r, known, p, ours = s.memory.Begin(key, it.anew, now)
	if !ours || it.anew || s.Cache == nil || mirror.IsLocal(server.url) {
		return r, known, p, ours
	}
	e, ok := s.Cache.Get(server.url, it.hash, now)
	if ok {
		r = s.read(server, it, e.Narinfo, e.Until.Add(-e.TTL))
		ok = r != nil || e.Narinfo == nil // or else it is damaged
	}
	if ok {
		s.memory.Put(key, r, r.size(), now.Add(min(e.Until.Sub(now), memoryTime)))
		s.memory.End(key, p, true, r)
	}
	return r, ok, p, true
}

// missing is an item that has to be requested.
type missing struct {
	item    *item
	pending *pending
}

// fetch gets narinfos from a server.
func (s *Substituter) fetch(ctx context.Context, server *server, items map[string]*missing, ahead bool, answer func(*item, *record)) {
	if err := s.Mirrors.Down(server.url); err != nil {
		s.unanswered(server, err)
		return
	}
	local := mirror.IsLocal(server.url)
	var progress *protocol.Lookup
	if !local && !ahead && !s.ahead.began(items) {
		progress = s.Log.Lookup(server.name, len(items))
		defer progress.End()
	}
	ctx, cancel := lookupContext(ctx, len(items))
	defer cancel()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var left atomic.Int64 // bytes
	left.Store(lookupBytes + int64(len(items))*lookupBytesEach)
	urgency := mirror.Wanted
	if ahead {
		urgency = mirror.Ahead
	}
	err := s.Mirrors.Narinfos(ctx, server.url, slices.Sorted(maps.Keys(items)), urgency, func(a mirror.Answer) {
		if left.Add(-int64(len(a.Body))) < 0 {
			stop(errTooMuch)
			return
		}
		server.isHere()
		it := items[a.Hash].item
		r := s.received(server, it, a, ahead)
		if progress != nil {
			progress.Add(1)
		}
		s.memory.End(memoryKey{server, it.path}, items[a.Hash].pending, true, r)
		answer(it, r)
	})
	if err != nil {
		s.unanswered(server, err)
	}
	if context.Cause(ctx) == errTooMuch {
		for _, m := range items {
			answer(m.item, nil) // of which there is none, or it is not asked again
		}
	}
}

// lookupContext ends when a server has had its time for some items.
func lookupContext(ctx context.Context, items int) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, lookupTimeout+time.Duration(items)*lookupTimeoutEach, errors.New("too slow"))
}

// unanswered says once why a server has not answered.
func (s *Substituter) unanswered(server *server, err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	key := "server " + server.url
	if e, ok := errors.AsType[*mirror.ServerError](s.Mirrors.Down(server.url)); ok {
		key, err = "down "+e.Server, e
	}
	s.Log.WarnOnce(key, "%v", naming(server.name, err))
}

// received makes a record of an answer, and says what is odd about that.
func (s *Substituter) received(server *server, it *item, a mirror.Answer, ahead bool) *record {
	r := s.note(server, it, a)
	if s.Debug && !ahead && a.Status != http.StatusOK {
		baking := ""
		if a.Baking {
			baking = " (baking)"
		}
		s.Log.Notef("narinfo of %s from %s: status %d%s", it.path, server.name, a.Status, baking)
	}
	// Once for each kind of answer but a narinfo, or that there is none.
	switch a.Status {
	case http.StatusOK:
		if a.Body == nil {
			s.Log.WarnOnce("long "+server.url, "narinfo of %s from %s ignored: it is longer than %d bytes", it.path, server.name, mirror.MaxNarinfo)
		}
	case http.StatusAccepted, http.StatusNotFound, http.StatusGone:
	default:
		s.Log.WarnOnce(fmt.Sprint("status ", server.url, a.Status), "%s: narinfos are answered by %s", server.name, a.StatusText())
	}
	return r
}

// note makes a record of an answer, and keeps it for later. What may be no answer of the server,
// but of a network that wants us to log in first, is kept for seconds, and not for other processes.
func (s *Substituter) note(server *server, it *item, a mirror.Answer) *record {
	var text []byte
	if a.Status == http.StatusOK {
		text = a.Body
	}
	r := s.read(server, it, text, s.Now())
	e := narinfocache.Entry{TTL: transientTTL}
	switch {
	case mirror.IsLocal(server.url):
		return r
	case r != nil:
		e.Narinfo, e.TTL = a.Body, narinfocache.Lifetime(true, a.MaxAge)
	case a.Status == http.StatusNotFound || a.Status == http.StatusAccepted:
		e.TTL = narinfocache.Lifetime(false, a.MaxAge)
	}
	s.keep(server, it, e, r)
	return r
}

// keep keeps what is known of an item, in memory and on disk; what does not count, or not for long,
// in memory only.
func (s *Substituter) keep(server *server, it *item, e narinfocache.Entry, r *record) {
	now, ttl := s.Now(), e.TTL
	if s.Cache != nil && (e.TTL > transientTTL || r != nil) && (r == nil || r.authorised) {
		ttl = min(ttl, memoryTime)
		if err := s.Cache.PutLater(server.url, it.hash, e, now); err != nil {
			s.Log.WarnOnce("cache", "narinfos cannot be kept for later: %v", err)
		}
	}
	s.memory.Put(memoryKey{server, it.path}, r, r.size(), now.Add(ttl))
}

// renew requests narinfos of an item again that have turned out to be of no use, if they have been
// kept from before a time. It reports whether any of them has changed. Those that have not, and
// those that were new already, are kept as absences for a while, if their narinfo counts.
func (s *Substituter) renew(ctx context.Context, path string, useless []record, before time.Time, again bool) (changed bool) {
	hash, err := narinfo.HashPart(s.StoreDir, path)
	for _, r := range useless {
		if err != nil || mirror.IsLocal(r.server.url) {
			continue
		}
		it := &item{path: path, hash: hash, anew: true}
		same := true
		if r.given.Before(before) && !again {
			s.queryItems(ctx, r.server, []*item{it}, false, func(_ *item, now *record) {
				same = now == nil || now.narinfo.Text() == r.narinfo.Text()
			})
		}
		if same && r.authorised {
			s.keep(r.server, it, narinfocache.Entry{TTL: narinfocache.Lifetime(false, -1)}, nil)
		}
		changed = changed || !same
	}
	return changed
}

// size returns about how many bytes of memory a record takes: with short lines, many more than the
// text has.
func (r *record) size() int {
	if r == nil {
		return 0
	}
	n := r.narinfo
	return len(n.Text()) + 16*len(n.References) + 64*(cap(n.URLs)+cap(n.ERIS)+cap(n.Deltas))
}

// memoryTime is for how long records are kept in memory that are in the cache too: other processes
// may have learnt something else meanwhile.
const memoryTime = time.Minute

// A memoryKey is what a record is an answer to.
type memoryKey struct {
	server *server
	path   string
}

// A pending is one request to one server.
type pending = memory.Request[*record]

// read turns the text that a server has given for an item at some time into a record, or into nil
// if there is none or if it is good for nothing.
func (s *Substituter) read(server *server, it *item, text []byte, given time.Time) (r *record) {
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
		if s.Strangers || mirror.IsLocal(server.url) && !errors.Is(err, narinfo.ErrNoField) {
			err = errUnquoted
		}
		s.Log.WarnOnce("narinfo "+kind+server.url,
			"narinfo of %s from %s ignored: %v", it.path, server.name, err)
		return nil
	}
	r = &record{server: server, narinfo: n, given: given}
	r.refused = n.Authorise(s.Keys)
	r.authorised = r.refused == nil || s.AllowUnauthenticated
	return r
}
