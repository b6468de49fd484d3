// SPDX-License-Identifier: GPL-3.0-or-later

// Package pool makes one source of many: stores of unequal speed and honesty are used together, and any of them may be slow,
// far, dead, or lie. Start with [New].
//
// # How it goes
//
// Every call of Get runs the request on the goroutine of its caller; a request that is started ([Pool.Start]) has none, if the
// source that gets it can do without. With a single source that is all there is to it. With
// several, the pool knows of each source its round-trip time, the rate at which it delivers, and what is in flight to it, from
// which follows when a further block would come. A source is given as much as it delivers in two round trips (the product of
// bandwidth and delay, twice), and no more; callers beyond that wait, in the order in which they came, so that blocks that are
// needed first are not stuck behind a source that turns out to be slow. A source that has room takes the first block of the
// queue that the others would not have delivered earlier: the fast ones take from the front, far ones from behind, and one
// that could only be late takes none.
//
// A goroutine watches what is under way. A block that takes longer than 95 of 100 from its source is asked from another one as
// well, as long as little is asked for twice. A source that falls silent, fails, or gives wrong bytes loses what was asked of it
// to the others. Sources of which nothing is known, and those that failed, are tried by single requests that nobody waits for.
//
// Equal references that are asked for at the same time are fetched once.
package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
)

// Options says how a [Pool] behaves. Zero fields stand for the defaults.
type Options struct {
	// State is where knowledge about sources comes from and goes to, by their String; nil if there is none. Close saves it.
	State *sourcestate.State
	// HedgeShare is the greatest share of bytes that are asked for twice because they are late, beside a first 1 MiB.
	// Default 0.02. Below 0 nothing is asked for twice.
	HedgeShare float64
	// MaxRequests and MaxBytes bound what is in flight to a source, and what Window returns. Defaults 16384 and 32 MiB.
	MaxRequests int
	MaxBytes    int64
	// OnFault, if not nil, is called once for each source that gives wrong bytes, upon which it is not asked again.
	OnFault func(source string, err error)
}

// MaxSources is how many sources a pool uses at most.
const MaxSources = 64

const (
	// hedgeFree is how many bytes may be asked for twice at any time.
	hedgeFree = 1 << 20
	// retrySearch is how far the queue of those that were asked for in vain is searched.
	retrySearch = 256
	// maxRounds is how often one source is asked again for one block at most.
	maxRounds = 20
	// patience is how long a call waits for a source to be tried again when there is no other.
	patience = time.Second
)

var (
	errClosed  = errors.New("pool of sources is closed")
	errNone    = errors.New("there is no source")
	errSilent  = errors.New("source has fallen silent")
	errGivenUp = errors.New("another source was faster")
	errBanned  = errors.New("source gave wrong bytes before")
)

// Pool gets blocks from several sources. It implements [eris.VerifiedBlocks], and is safe for concurrent use: the more calls
// are made at a time, the better it uses its sources, see [Pool.Window].
type Pool struct {
	options Options
	members []*member
	epoch   time.Time
	ctx     context.Context // of requests in the background
	cancel  context.CancelFunc
	group   sync.WaitGroup
	kick    chan struct{} // tells the watcher that there is something to watch

	mu       sync.Mutex
	closed   bool
	watching bool
	single   *member // the only one that was not banned, if it is one
	flights  map[flightKey]*flight
	spare    []*flight
	sequence uint64
	retries  line // blocks that were asked for once, in vain
	fresh    line
	scopes   map[<-chan struct{}]*scope
	latest   *scope

	scratch   survey
	flying    int   // requests under way
	delivered int64 // bytes
	doubled   int64 // bytes that were asked for a second time because they were late
}

type flightKey struct {
	ref  eris.Reference
	size eris.BlockSize
}

// set is a set of members.
type set uint64

// flight is a block that is wanted, from the first call that asks for it until that returns.
type flight struct {
	key      flightKey
	sequence uint64
	missed   set // who does not have it
	failed   set // who failed
	asked    set // who is being asked
	rounds   int
	progress bool  // a source that failed has delivered others meanwhile
	err      error // the last failure, of failed

	line    *line // where it waits for a source, if it does
	place   uint64
	waiting bool     // the caller waits, and is to be woken by whoever sets this to false
	granted *request // when woken
	current *request // that the caller runs
	others  int      // requests in the background
	won     []byte   // by one of these
	over    bool

	wake    chan struct{}
	started *startedRequest // instead of a caller who waits

	// For other callers that want the same block.
	done   chan struct{}
	shared []byte
	result error
	again  bool
}

// New returns a pool of sources, which stay the caller's. Sources should verify their blocks; where they do so already, there is
// no need to do it again. What is beyond MaxSources is not used. Of sources about which nothing is known, earlier ones are tried
// first.
func New(sources []fetch.Source, options Options) *Pool {
	if options.HedgeShare == 0 {
		options.HedgeShare = 0.02
	}
	if options.MaxRequests <= 0 {
		options.MaxRequests = 16384
	}
	if options.MaxBytes <= 0 {
		options.MaxBytes = 32 << 20
	}
	if options.State == nil {
		options.State = sourcestate.Open("")
	}
	p := &Pool{
		options: options, epoch: time.Now(), kick: make(chan struct{}, 1),
		flights: map[flightKey]*flight{}, scopes: map[<-chan struct{}]*scope{},
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	for i, s := range sources[:min(len(sources), MaxSources)] {
		p.members = append(p.members, newMember(p, i, s))
	}
	p.setSingle()
	return p
}

// Verified implements [eris.VerifiedBlocks]: sources verify what they return.
func (p *Pool) Verified() {}

// String returns the names of the sources.
func (p *Pool) String() string {
	var b bytes.Buffer
	for i, m := range p.members {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(m.name)
	}
	return b.String()
}

// Close makes waiting calls fail, ends what goes on in the background and waits for it, and saves the state. Calls that have
// been handed to a source end with their contexts, or with the source.
func (p *Pool) Close() error {
	p.mu.Lock()
	first := !p.closed
	p.closed = true
	for _, f := range p.flights {
		p.awaken(f)
	}
	for _, m := range p.members {
		m.remember()
	}
	p.mu.Unlock()
	p.cancel()
	if first {
		close(p.kick)
	}
	p.group.Wait()
	p.mu.Lock()
	p.latest.drop()
	p.latest = nil
	p.mu.Unlock()
	return p.options.State.Save()
}

// Save saves what has been learnt so far, for processes that may be killed before Close. Errors are those of the file system.
func (p *Pool) Save() error {
	p.mu.Lock()
	for _, m := range p.members {
		m.remember()
	}
	p.mu.Unlock()
	return p.options.State.Save()
}

func (p *Pool) now() time.Duration { return time.Since(p.epoch) }

// Get implements [eris.Blocks]. The error wraps eris.ErrNotFound if all sources that can be used say that they do not have the
// block; it is that of a source if one could not say; and the cause of ctx when that is done.
func (p *Pool) Get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	key := flightKey{ref, size}
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			return nil, errClosed
		}
		if f := p.flights[key]; f != nil {
			if f.done == nil {
				f.done = make(chan struct{})
			}
			p.mu.Unlock()
			select {
			case <-f.done:
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
			if f.again {
				continue
			}
			return f.shared, f.result
		}
		f := p.newFlight(key)
		var block []byte
		var err error
		if m := p.single; m != nil {
			block, err = p.direct(ctx, m, f, dst)
			if lie := p.lieAbout(ref); lie != nil && err != nil && ctx.Err() == nil && !errors.Is(err, eris.ErrNotFound) {
				err = lie
			}
		} else {
			block, err = p.lead(ctx, f, dst)
		}
		if err != nil && ctx.Err() != nil {
			p.finish(f, nil, errAgain) // that is the caller's affair
		} else {
			p.finish(f, block, err)
		}
		p.mu.Unlock()
		return block, err
	}
}

// newFlight begins a flight. The lock is held here and in all that follows, unless said otherwise.
func (p *Pool) newFlight(key flightKey) *flight {
	var f *flight
	if n := len(p.spare); n > 0 {
		f = p.spare[n-1]
		p.spare = p.spare[:n-1]
	} else {
		f = &flight{wake: make(chan struct{}, 1)}
	}
	p.sequence++
	f.key, f.sequence = key, p.sequence
	p.flights[key] = f
	return f
}

// maxSpare is how many flights are kept for use by later calls.
const maxSpare = 4096

// finish ends a flight and gives its result to the others who wait for it.
func (p *Pool) finish(f *flight, block []byte, err error) {
	delete(p.flights, f.key)
	f.over = true
	if f.done != nil {
		switch {
		case err == nil:
			f.shared = bytes.Clone(block) // the caller may go on to change its own
		case err == errAgain:
			f.again = true
		default:
			f.result = err
		}
		close(f.done)
		return
	}
	if f.others == 0 && len(p.spare) < maxSpare {
		*f = flight{wake: f.wake}
		p.spare = append(p.spare, f)
	}
}

// direct asks the only source.
func (p *Pool) direct(ctx context.Context, m *member, f *flight, dst []byte) ([]byte, error) {
	for round := 0; ; round++ {
		if err := p.awaitRest(ctx, m); err != nil {
			return nil, err
		}
		now := p.now()
		r := request{member: m, size: int64(f.key.size)}
		m.sent(&r, now)
		p.mu.Unlock()
		block, err := m.source.Get(ctx, f.key.ref, f.key.size, dst)
		p.mu.Lock()
		now = p.now()
		m.received(&r, now)
		if err == nil {
			m.delivers(&r, now)
			return block, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if p.judge(&r, err, now) != failure || !m.proven || p.closed {
			return nil, err
		}
		// Connections break; as long as blocks come nevertheless, this one is worth another try.
		if round >= maxRounds || round > 0 && m.delivered == r.delivered {
			return nil, err
		}
	}
}

// awaitRest waits until a source that failed may be tried again, unless that is far off.
func (p *Pool) awaitRest(ctx context.Context, m *member) error {
	for {
		left := m.restUntil - p.now()
		if left <= 0 {
			return nil
		}
		if left > patience {
			return fmt.Errorf("%s is not tried again for %v: %w", m.name, left.Round(time.Second), m.lastError)
		}
		p.mu.Unlock()
		timer := time.NewTimer(left)
		select {
		case <-timer.C:
		case <-ctx.Done():
		case <-p.ctx.Done():
		}
		timer.Stop()
		p.mu.Lock()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if p.closed {
			return errClosed
		}
	}
}

// lead asks one source after the other, while the watcher may ask further ones.
func (p *Pool) lead(ctx context.Context, f *flight, dst []byte) ([]byte, error) {
	p.shun(f)
	for {
		if f.won != nil {
			return f.won, nil
		}
		if p.closed {
			return nil, errClosed
		}
		now := p.now()
		if p.candidates(f, now) != 0 {
			p.queue(f, now)
		} else if f.others == 0 {
			if !p.nextRound(f, now) {
				return nil, p.verdict(f, now)
			}
			continue
		}
		if f.granted == nil {
			f.waiting = true
			p.mu.Unlock()
			select {
			case <-f.wake:
				p.mu.Lock()
			case <-ctx.Done():
				p.mu.Lock()
				if !f.waiting {
					<-f.wake
				}
				f.waiting = false
				p.leave(f)
				if r := f.granted; r != nil {
					f.granted = nil
					p.end(r, p.now())
					p.pump(p.now())
				}
				p.abandon(f)
				return nil, context.Cause(ctx)
			}
			p.leave(f)
		}
		r := f.granted
		if r == nil {
			continue
		}
		f.granted, f.current = nil, r
		r.begin(p.scope(ctx), ctx)
		p.mu.Unlock()
		block, err := r.member.source.Get(&r.ctx, f.key.ref, f.key.size, dst)
		p.mu.Lock()
		f.current = nil
		p.settle(r, err)
		if err == nil {
			p.abandon(f)
			return block, nil
		}
		if ctx.Err() != nil {
			p.abandon(f)
			return nil, context.Cause(ctx)
		}
	}
}

// awaken wakes the caller if it waits.
func (p *Pool) awaken(f *flight) {
	if f.started != nil {
		f.started.awaken()
		return
	}
	if f.waiting {
		f.waiting = false
		f.wake <- struct{}{}
	}
}

// leave takes a flight out of the queue.
func (p *Pool) leave(f *flight) {
	if f.line != nil {
		f.line.remove(f)
	}
}

// sweep wakes callers for whose block nobody is left, after a source was given up.
func (p *Pool) sweep() {
	now := p.now()
	for _, l := range []*line{&p.retries, &p.fresh} {
		for _, f := range l.flights {
			if f != nil && p.candidates(f, now) == 0 {
				l.remove(f)
				p.awaken(f)
			}
		}
	}
}

// abandon ends what goes on in the background for a flight whose caller leaves. Requests that are to tell what a source is
// like go on.
func (p *Pool) abandon(f *flight) {
	f.over = true
	if f.others == 0 {
		return
	}
	for _, m := range p.members {
		for r := m.first; r != nil; r = r.next {
			if r.flight == f && r.background && !r.probe {
				r.cutOff(errGivenUp)
			}
		}
	}
}
