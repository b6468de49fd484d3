// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import (
	"context"
	"errors"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/arrivals"
)

// This file is what happens to answers: they are noted by whoever brings them, and as many workers
// as there are processors take some at a time, verify them, and go on with what they are for, so
// that the lock of the pool and the processor's vectors are used for many blocks at once.

// work goes on with what has arrived until the pool is closed and nothing is in flight. Called
// without the lock.
func (p *Pool) work() {
	var batch [arrivals.Batch]*attempt
	var requests [arrivals.Batch]*fetch.Request
	var done *lookup
	for {
		n, ok := p.arrived.Take(batch[:])
		if !ok {
			return
		}
		for i, a := range batch[:n] {
			requests[i] = &a.request.Request
		}
		fetch.Verify(requests[:n])
		p.mu.Lock()
		p.recycle(done)
		now := p.now()
		for i, a := range batch[:n] {
			p.ended(a, now)
			batch[i], requests[i] = nil, nil
		}
		p.distribute(now)
		done, p.finished = p.finished, nil
		last := p.closed && p.inFlight == 0 && len(p.lookups) == 0
		p.unlock()
		for l := done; l != nil; l = l.next {
			p.deliver(l)
		}
		if last {
			p.arrived.Close()
		}
	}
}

// deliver calls Done of the requests of a lookup that is over. Called without the lock.
func (p *Pool) deliver(l *lookup) {
	if l.err == nil && l.from != nil {
		for _, m := range p.near {
			if l.missed&m.bit != 0 {
				m.keeper.add(l.key.reference, l.block)
			}
		}
	}
	// Those first: the first one may go on to change the block.
	for i, r := range l.more {
		if r.Err = l.err; l.err == nil {
			r.Block = append(r.Dst[:0], l.block...)
		}
		r.Origin = l.from
		l.more[i] = nil
		r.Done(r)
	}
	r := l.request
	r.Block, r.Err, r.Origin = l.block, l.err, l.from
	r.Done(r)
}

// ended takes note of how an attempt has ended, after its block has been verified.
func (p *Pool) ended(a *attempt, now time.Duration) {
	m, l, block := a.member, a.lookup, a.request.Block
	p.detach(a)
	if a.question != nil {
		p.told(a, now)
		a.recycle()
		return
	}
	outcome := p.outcome(a, now)
	cause, err := a.cause, a.request.Err
	a.recycle()
	if l == nil {
		return
	}
	switch {
	case outcome == success && l.block == nil:
		l.block = block
		if !m.near {
			l.from = m
			p.turnsOut(l, m, true)
		}
	case outcome == success:
	case outcome == refusal:
		l.refused = true
	case outcome == miss:
		l.missed |= m.bit
		p.turnsOut(l, m, false)
		if !m.near { // which are quick to say so again
			m.remembersMissing(l.key, m.anySize && errors.Is(err, eris.ErrNotFound), now)
		}
	case cause == errNotFirst && m.mayErr():
		l.missed |= m.bit // it was too slow to say so, and is to have it the next time
	case cause != nil:
		// Not the member's doing, unless it was silent or has lied, which has been noted then.
		if cause != errNotFirst && !l.cancelled {
			l.fail(m, cause)
		}
	default:
		if outcome == lie {
			l.lied |= m.bit
		}
		l.fail(m, err)
	}
	p.advance(l, now)
}

// outcomes of an attempt
type outcome int

const (
	success outcome = iota
	miss            // the member does not have the block
	lie             // it gave something else
	refusal         // it was busy with others
	failure         // it could not say, or was not let
)

// outcome takes note of what the answer says about the member.
func (p *Pool) outcome(a *attempt, now time.Duration) outcome {
	m, err := a.member, a.request.Err
	if err == nil {
		m.delivers(a, now)
		return success
	}
	var wrong *eris.BlockError
	var later *fetch.BusyError
	if m.limiter != nil && !errors.As(err, &wrong) { // nothing has come
		m.limiter.Return(int(a.request.Size))
		p.limitedUntil = min(p.limitedUntil, now+m.limiter.Take(0))
	}
	switch {
	case errors.Is(err, eris.ErrNotFound), errors.As(err, &wrong) && (m.mayErr() || wrong.IsOtherSize(a.request.Size)):
		m.misses++
		m.answers(a, now)
		if !a.directed {
			toward(&m.hits, false, hitWeight)
		}
		return miss
	case wrong != nil:
		m.faults++
		p.ban(m, err)
		return lie
	case errors.As(err, &later):
		return m.refuses(a, later, now)
	case a.cause == nil:
		m.fails(a, err, failureRest, now)
	case a.cause == context.Canceled:
		m.quiet = 0 // it might have answered
	}
	return failure
}

// banTime is for how long a member that gave wrong bytes is not asked: longer than helpers live,
// but servers with upstreams live on, and whoever it was may have been mended.
const banTime = time.Hour

func (m *member) pardon(now time.Duration) {
	m.banned = m.banned && now-m.bannedAt < banTime
}

// pardonDamaged has a member be asked again that has given no fewer right blocks than wrong ones,
// for what nobody else has.
func (m *member) pardonDamaged(size eris.BlockSize) {
	m.banned = m.banned && m.delivered < m.faults*int64(size)
}

// ban excludes a member for a long time.
func (p *Pool) ban(m *member, err error) {
	if m.banned {
		return
	}
	m.banned, m.bannedAt, m.lastError = true, p.now(), err
	p.askable &^= m.bit
	p.telling &^= m.bit
	m.cancelAll(errBanned)
	p.reroute(p.now())
	p.tell(p.options.OnFault, m.name, err)
}

// tell saves the state and calls a function of the caller of the pool, neither of which is to be
// waited for under the lock.
func (p *Pool) tell(f func(source string, err error), name string, err error) {
	if p.closed {
		return
	}
	p.group.Go(func() {
		if f != nil {
			f(name, err)
		}
		p.options.State.Save() // once more at the end, which reports errors
	})
}

// returns lets a member that works again be asked for the blocks that it failed to deliver and that
// wait for others now, which may be for long.
func (p *Pool) returns(m *member) {
	for l := p.retries.First(); l != nil; l = l.Next() {
		if l.failed&p.farSet&m.bit != 0 && l.rounds < maxRounds {
			l.rounds++
			l.failed &^= m.bit
		}
	}
}

// reroute looks again at the blocks that wait, after a member was lost to them.
func (p *Pool) reroute(now time.Duration) {
	for _, m := range p.members {
		if !m.usable(now) || m.resting() {
			m.empty(now)
		}
	}
	for _, q := range []*queue{&p.retries, &p.fresh} {
		var next *lookup
		for l := q.First(); l != nil; l = next {
			if next = l.Next(); p.candidates(l, now) == 0 {
				q.remove(l)
				p.proceed(l, now)
			}
		}
	}
}
