// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import (
	"cmp"
	"errors"
	"slices"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

const (
	// watchInterval is how often the watcher looks at what is in flight.
	watchInterval = 10 * time.Millisecond
	// A block that is late by hedgeDelay may be asked from another member, or by unknownDelay if
	// nothing is known about the first.
	hedgeDelay   = 15 * time.Millisecond
	unknownDelay = 100 * time.Millisecond
	// hedgeShare is the greatest share of bytes that are asked for twice because they are late,
	// beside hedgeFree bytes; hedgeSearch is how many late requests of a member are looked at.
	hedgeShare, hedgeFree, hedgeSearch = 0.02, 1 << 20, 64
	// A member is silent that has not answered for some time that follows from what is known about
	// it: at least leastSilence, or loneSilence if there is no other; at most mostSilence, unless
	// it takes longer for one block and there is no other that could be tried; firstSilence if it
	// has never answered, for connections have to be made, or patientSilence.
	leastSilence   = 250 * time.Millisecond
	loneSilence    = 2 * time.Second
	mostSilence    = 3 * time.Second
	firstSilence   = 1500 * time.Millisecond
	patientSilence = 15 * time.Second
	// Where a block comes in parts, so many bytes are a sign of life, for up to mostSlow after the
	// last one that is whole.
	leastMoved, mostSlow = 4 << 10, 30 * time.Second
	// probeLimit is how long a probe may take, and probeWait for how long its block waits for it if
	// there is nobody else: who is back is of use at once.
	probeLimit = 20 * time.Second
	probeWait  = 250 * time.Millisecond
	// A request is taken for lost after lostFactor times what was expected, and at least lostAge
	// and what two blocks take.
	lostAge    = 2 * time.Second
	lostFactor = 10
	// Rests of members that fail, that are silent, and that are busy: how many requests they take
	// in a time, too, is found out by these.
	failureRest, silentRest, busyRest, longestRest = 150 * time.Millisecond, time.Second, 40 * time.Millisecond, time.Minute
)

var errRested = errors.New("source has not answered an earlier process")

// watch looks at what is in flight, and again later until there is nothing. Called without the
// lock.
func (p *Pool) watch() {
	p.mu.Lock()
	defer p.unlock()
	if p.watched = !p.closed && (p.inFlight > 0 || len(p.lookups) > 0); p.watched {
		p.look()
		p.watcher.Reset(watchInterval)
	}
}

// wakeWatcher has somebody watch what is in flight.
func (p *Pool) wakeWatcher() {
	if !p.watched {
		p.watched = true
		p.watcher.Reset(watchInterval)
	}
}

func (p *Pool) look() {
	now := p.now()
	for _, m := range p.members {
		p.checkSilence(m, now)
	}
	p.hedge(now)
	for _, m := range p.members {
		p.giveUp(m, now)
	}
	// While all that is wanted waits for a member that is busy, no request comes to probe others
	// by.
	if l := cmp.Or(p.fresh.First(), p.retries.First()); l != nil && !p.othersWork(nil, now) {
		p.probe(l.pair, l.key.size, nil, now)
		if p.candidates(l, now) == 0 {
			p.reroute(now) // for whom it waits has been away for long
		}
	}
	p.distribute(now)
}

func (p *Pool) checkSilence(m *member, now time.Duration) {
	oldest := m.attempts.First()
	// It may pass over questions, which it perhaps does not understand.
	for ; oldest != nil && oldest.question != nil; oldest = oldest.Next() {
		if oldest.isLate() {
			oldest.cancel(errLate)
		}
	}
	if oldest == nil || m.silent {
		return
	}
	// Counted in looks, not by the clock, so that a machine that has no time for us does not look
	// like a silent source.
	m.quiet += watchInterval
	if m.moves(oldest, now) {
		m.quiet, m.movedAt = 0, now
	}
	allowed := m.allowedSilence(oldest, now)
	switch {
	case m.quiet <= allowed:
	case m.proven && m.requests == 1 && !m.doubted:
		// It may be this request that was lost.
		m.doubted = true
		oldest.cancel(errLate)
	default:
		m.fallsSilent(now)
	}
}

// moves reports whether parts of blocks have come, so that it is a slow line, and not silence.
// While no other works, all may be behind one such line, so that parts from any count. Where others
// are much faster that may have the block, it had better come from them.
func (m *member) moves(oldest *attempt, now time.Duration) bool {
	var spent set
	if oldest.lookup != nil {
		spent = oldest.lookup.spent()
	}
	faster := func(o *member) bool {
		return o != m && spent&o.bit == 0 && o.trusted(now) && 2*o.gap(oldest.request.Size) < m.quiet
	}
	if now-max(oldest.start, m.deliveredAt) > mostSlow || slices.ContainsFunc(m.pool.far, faster) {
		return false
	}
	moved, others := int64(0), m.pool.othersWork(m, now)
	for _, o := range m.pool.members {
		if o.progress != nil && (o == m || !others) {
			moved += o.progress()
		}
	}
	answered := m.quiet <= watchInterval // what comes then may be of others than those that are late
	enough := m.quiet > leastSilence && moved-m.moved >= leastMoved
	if answered || enough || moved < m.moved {
		m.moved = moved
	}
	return enough
}

func (m *member) allowedSilence(oldest *attempt, now time.Duration) time.Duration {
	if !m.proven {
		if m.known && m.pool.othersWork(m, now) {
			return min(2*leastSilence+5*m.minRoundTrip(), m.firstAllowed(now)) // a connection has to be made
		}
		return m.firstAllowed(now)
	}
	gap, most := m.gap(oldest.request.Size), mostSilence
	allowed := max(leastSilence, 2*m.minRoundTrip(), time.Duration(float64(oldest.expected)*m.tail), 8*gap)
	if !m.pool.othersWork(m, now) {
		allowed = max(allowed, loneSilence)
	}
	if !slices.ContainsFunc(m.pool.far, func(o *member) bool { return o != m && o.usable(now) && !o.resting() }) {
		most = max(most, 2*gap)
	}
	return min(allowed, most)
}

// firstAllowed is for how long a member may be silent before its first answer.
func (m *member) firstAllowed(now time.Duration) time.Duration {
	if m.pool.options.Patient && !m.proven && !m.pool.othersWork(m, now) {
		return patientSilence
	}
	return firstSilence
}

// gap returns how long a block takes after the one before it.
func (m *member) gap(size eris.BlockSize) time.Duration {
	rate := m.rate.best(larger)
	if rate == 0 {
		rate = m.speed()
	}
	return seconds(float64(size) / rate)
}

// hedge asks others for blocks that are late.
func (p *Pool) hedge(now time.Duration) {
	for _, m := range p.members {
		a := m.attempts.First()
		for n := 0; a != nil && a.isOverdue(now) && n < hedgeSearch; n++ {
			p.hedgeOne(a, now)
			a = a.Next()
		}
	}
}

func (p *Pool) hedgeOne(a *attempt, now time.Duration) {
	l, size := a.lookup, int64(a.request.Size)
	if l == nil || l.foreground == nil || l.attempts != a || a.cause != nil {
		return
	}
	// What is so late that it may never come does not wait until there is room for hedges again: it
	// may be what everything else waits for.
	if float64(p.doubled+size) > hedgeFree+hedgeShare*float64(p.delivered) && !a.member.isLost(a, now) {
		return
	}
	if m := p.alternative(a, now); m != nil {
		p.doubled += size
		p.sendBehind(m, l, l.pair, l.key.size, now)
	}
}

func (a *attempt) isOverdue(now time.Duration) bool {
	if a.expected >= time.Hour {
		return now-a.start > unknownDelay
	}
	return now-a.start > time.Duration(float64(a.expected)*a.member.tail)+hedgeDelay
}

// alternative returns the far member that would deliver a late block first; while none is known,
// one that has not been tried.
func (p *Pool) alternative(a *attempt, now time.Duration) *member {
	var best, untried *member
	l, size := a.lookup, int64(a.request.Size)
	for _, m := range p.far {
		switch {
		case l.spent()&m.bit != 0:
		case untried == nil && !m.known && m.requests == 0 && m.usable(now) && !m.resting():
			untried = m
		case !m.trusted(now) || m.hits < 0.5 && l.held&m.bit == 0:
		case best == nil || m.expected(size) < best.expected(size):
			best = m
		}
	}
	switch {
	case best == nil:
		return untried
	case best.expected(size) > 2*(now-a.start):
		return nil
	}
	return best
}

// giveUp ends requests that may never be answered although others are, unless there is hope from
// elsewhere.
func (p *Pool) giveUp(m *member, now time.Duration) {
	for a := m.attempts.First(); a != nil; a = a.Next() {
		l := a.lookup
		switch {
		case a.probe && now-a.start > probeLimit:
			a.cancel(errLate)
			m.fails(a, errLate, failureRest, now)
			return
		case a.probe && l != nil && l.queue == nil && now-a.start >= probeWait:
			p.advance(l, now)
		case a.probe:
		case !m.isLost(a, now):
			return
		case l != nil && l.queue == nil && !l.awaits(a, now) && (a.background || now-max(a.start+lostAge, m.movedAt) > lostAge):
			a.cancel(errLate)
		}
	}
}

// isLost reports whether a request is so late that it may never be answered.
func (m *member) isLost(a *attempt, now time.Duration) bool {
	return now-a.start > max(lostAge, m.firstAllowed(now), 2*m.gap(a.request.Size)) && (!m.known || now-a.start > lostFactor*a.expected)
}

// probe asks members that rest, and those about which nothing is known while others work, for a
// block, behind the back of the lookup for it, which may be nil or over.
func (p *Pool) probe(pair eris.Pair, size eris.BlockSize, l *lookup, now time.Duration) {
	for _, m := range p.members {
		if m.requests > 0 || m.probing || !m.usable(now) || m.trusted(now) {
			continue
		}
		if !m.resting() && (m.known || m.near || !p.othersWork(m, now)) {
			continue
		}
		if l != nil && (l.over || l.spent()&m.bit != 0) {
			l = nil
		}
		m.probing = true
		p.sendBehind(m, l, pair, size, now).probe = true
	}
}

// othersWork reports whether there is a far member, but for m, that works.
func (p *Pool) othersWork(m *member, now time.Duration) bool {
	return slices.ContainsFunc(p.far, func(o *member) bool { return o != m && o.trusted(now) })
}
