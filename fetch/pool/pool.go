// SPDX-License-Identifier: GPL-3.0-or-later

// Package pool makes one source of many: stores of unequal speed and honesty are used together, and
// any of them may be slow, far, silent, dead, or lie. Start with [New]. A pool of one source runs
// the same code as a pool of ten.
//
// # The stages of a request
//
//   - Near. Members that are marked near, a store of this machine or the cache on disk, are asked
//     first, one after the other. What they do not have, or do not say in time, goes on.
//   - Far. The other members are used together. If there is a limit of the rate, they are asked for
//     a block when those before it have had their time.
//   - Verify. Every answer is checked against its reference, many at a time, here and nowhere else
//     ([fetch.Verify]). A member that gave wrong bytes is not asked again for an hour.
//   - Keep. A block that a near member did not have and a far one had is put into the near one,
//     when there is time.
//   - Count. Whoever wants to know how many bytes have come for an item puts [fetch.Within] before
//     the pool.
//
// Equal blocks that are asked for at the same time are fetched once.
//
// # Words
//
// Window: what is in flight to a member is what it delivers in two round trips, and no more, so
// that blocks that are needed first are not stuck behind a member that turns out to be slow, that
// giving up is quick, and that what is measured is the member and not a queue. Requests beyond that
// wait in the pool in their order. A far member that has room takes the first that the others would
// not have delivered earlier: fast ones take from the front, slow ones from behind, and one that
// could only be late takes none. One that is busy, and refuses some of what it is asked for, gets
// as much at a time as it was answering then, and slowly more.
//
// Rest: a member that answers nothing for a time that follows from its own history, or fails, is
// left alone for a while, which grows from one time to the next. What was asked of it goes
// elsewhere, or fails at once; other processes are told by the state file. It is tried by probes:
// for blocks that were asked for anyway, but that nobody waits for, or only for a moment if there
// is nobody else; over new connections, if it has answered before.
//
// Hedge: a block that takes longer than 95 of 100 from its member is asked from another one as
// well, as long as little is asked for twice.
//
// # Many members with a part each
//
// As long as no far member misses anything, each is taken to have everything. Otherwise who gave a
// node is asked first for its children ([fetch.Kin]), if that has mostly worked; and before large
// nodes, or where it has not, all members that understand it ([fetch.Request], Have) are asked
// which of the children they have. Who denies a block is asked for it only when all others were.
// Nobody waits for the answers of those who have never given one, nor long for others. Who claims
// what it does not have is believed less, and then not at all; at once, if it cannot be.
package pool

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/arrivals"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
)

// Member is a source of a pool, which closes it.
type Member struct {
	Source fetch.Source
	// Near says that it is asked before others, if there are any that are not near, and is given
	// what it did not have if it is a [Keeper] or a [fetch.Store].
	Near bool
	// Local says that it is on this machine: the limit of the rate is not for it. Near members are
	// local, too.
	Local bool
}

// anySizer is a source that knows blocks by reference alone: what it does not have in one size, it
// does not have in the other.
type anySizer interface{ AnySize() bool }

// Options says how a [Pool] behaves. All fields may be zero.
type Options struct {
	// State is where knowledge about sources comes from and goes to, by their String; nil if there
	// is none. Close saves it.
	State *sourcestate.State
	// Limiter bounds the bytes per second of all members together that are not local; nil if
	// nothing does.
	Limiter *ratelimit.Limiter
	// OnFault, if not nil, is called for a source that gives wrong bytes, which is not asked again
	// for an hour.
	OnFault func(source string, err error)
	// OnRest, if not nil, is called the first time that a source is found to be silent or
	// unreachable, or that a near one fails to keep a block; not for what the state says of earlier
	// processes.
	OnRest func(source string, err error)
	// Patient tells that nothing but these sources can have what is wanted: as long as no far one
	// works, each has more time for its first answer, and one that stops is waited for.
	Patient bool
}

// MaxSources is how many sources a pool uses at most.
const MaxSources = 64

// maxRequests and maxBytes bound what is in flight to a source, and what Window returns.
const maxRequests, maxBytes = 16384, 32 << 20

// Pool gets blocks from several sources. It is a [fetch.Source]: the more requests are started at a
// time, the better it uses its members, see [Pool.Window]. What it returns is verified.
type Pool struct {
	options Options
	members []*member
	near    []*member
	far     []*member
	epoch   time.Time
	group   sync.WaitGroup            // the workers, and calls of OnFault and the like
	arrived *arrivals.Queue[*attempt] // that have ended

	mu      sync.Mutex
	closed  bool
	watcher *time.Timer // calls watch
	watched bool        // it will
	lookups map[key]*lookup
	farSet  set
	retries queue // far blocks that were asked for once, in vain
	fresh   queue // others
	spare   *lookup
	scratch survey

	// See inquire.
	askable set     // who may be asked what it has, and is believed
	telling set     // who has said what it has, and is believed
	kin     float64 // share of blocks that whoever gave the node above has
	unasked []asked
	askedAt time.Duration

	limitedUntil time.Duration // by the limit of the rate
	inFlight     int
	delivered    int64 // bytes
	doubled      int64 // bytes that were asked for a second time because they were late

	// What has been decided under the lock and is to be done without it, see unlock.
	starts   *attempt
	lastOf   *attempt
	finished *lookup
}

// New returns a pool of sources. What is beyond MaxSources is not used. Of far sources about which
// nothing is known, earlier ones are tried first.
func New(members []Member, options Options) *Pool {
	if options.State == nil {
		options.State = sourcestate.Open("")
	}
	p := &Pool{
		options: options, epoch: time.Now(), lookups: map[key]*lookup{}, kin: 1, askedAt: -askInterval,
	}
	p.watcher = time.AfterFunc(time.Hour, p.watch)
	p.arrived = arrivals.New(func(a *attempt) eris.BlockSize { return a.request.Size })
	allNear := !slices.ContainsFunc(members, func(m Member) bool { return !m.Near })
	for i, given := range members[:min(len(members), MaxSources)] {
		m := newMember(p, i, given)
		p.members = append(p.members, m)
		if m.near = given.Near && !allNear; m.near {
			p.near = append(p.near, m)
			m.keeper = newKeep(m)
		} else {
			p.far = append(p.far, m)
			p.farSet |= m.bit
			if asks, ok := given.Source.(interface{ AsksHave() bool }); ok && asks.AsksHave() {
				p.askable |= m.bit
			}
		}
	}
	for range runtime.GOMAXPROCS(0) {
		p.group.Go(p.work)
	}
	return p
}

// String returns the names of the sources.
func (p *Pool) String() string {
	var names []string
	for _, m := range p.members {
		names = append(names, m.name)
	}
	return strings.Join(names, " ")
}

func (p *Pool) now() time.Duration { return time.Since(p.epoch) }

// Start implements [fetch.Source]. The error wraps eris.ErrNotFound if all sources that can be used
// say that they do not have the block; it is that of a source if one could not say. Done is called
// by goroutines of the pool, until that is closed.
func (p *Pool) Start(r *fetch.Request) {
	p.mu.Lock()
	now, k := p.now(), key{r.Pair.Reference, r.Size}
	l := p.lookups[k]
	switch {
	case p.closed:
		p.mu.Unlock()
		r.Fail(fetch.ErrClosed)
		return
	case l != nil:
		l.more = append(l.more, r)
		r.Held = l
		p.mu.Unlock()
		return
	}
	l = p.newLookup(k, r)
	r.Held, p.lookups[k] = l, l
	p.join(l, r.Kin, r.Nth)
	for _, m := range p.members {
		m.pardon(now)
		if m.lacks(k, now) {
			l.missed |= m.bit
		}
	}
	p.probe(r.Pair, r.Size, l, now)
	p.proceed(l, now)
	p.distribute(now)
	p.wakeWatcher()
	p.unlock()
}

// Cancel implements [fetch.Source].
func (p *Pool) Cancel(r *fetch.Request) {
	l, ok := r.Held.(*lookup)
	if !ok {
		return
	}
	p.mu.Lock()
	defer p.unlock()
	if l.over {
		return
	}
	if i := slices.Index(l.more, r); i >= 0 {
		l.more = slices.Delete(l.more, i, i+1)
		p.finishAlone(r, context.Canceled)
	} else if l.request == r {
		l.cancelled = true
		p.advance(l, p.now())
	}
}

// unlock gives up the lock, and does what was decided under it. Requests that are over are left to
// the workers, so that Done is never called by a caller of the pool.
func (p *Pool) unlock() {
	starts := p.starts
	p.starts, p.lastOf = nil, nil
	over := p.finished != nil
	p.mu.Unlock()
	if over {
		p.arrived.Kick()
	}
	startAll(starts)
}

// Close cancels all requests, waits a little for blocks that are on their way to be kept, closes
// the members, and saves the state. Errors are those of closing and saving.
func (p *Pool) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		p.group.Wait()
		return nil
	}
	p.closed = true
	p.watcher.Stop()
	for _, m := range p.members {
		m.remember()
		m.cancelAll(fetch.ErrClosed)
	}
	for _, l := range p.lookups {
		p.advance(l, p.now())
	}
	p.unlock()
	p.arrived.Kick()
	for _, m := range p.near {
		m.keeper.close()
	}
	var errs []error
	for _, m := range p.members {
		errs = append(errs, m.source.Close())
	}
	p.group.Wait()
	return errors.Join(append(errs, p.options.State.Save())...)
}

// Probe tries members that rest by a block that nobody waits for, if they are due: for callers that
// see from Expect that the pool is of no use now, and so do not ask it.
func (p *Pool) Probe(pair eris.Pair, size eris.BlockSize) {
	p.mu.Lock()
	if !p.closed {
		p.probe(pair, size, nil, p.now())
		p.wakeWatcher()
	}
	p.unlock()
}
