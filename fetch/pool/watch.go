// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import (
	"slices"
	"time"
)

const (
	// watchInterval is how often the watcher looks at what is under way.
	watchInterval = 10 * time.Millisecond
	// hedgeDelay is after what time beyond the expected a block may be asked from another source, and unknownDelay after what
	// time if nothing is known about the first.
	hedgeDelay   = 15 * time.Millisecond
	unknownDelay = 100 * time.Millisecond
	// leastSilence is for how long a source may be silent at least, and unknownSilence for how long one that has never
	// answered.
	leastSilence   = 250 * time.Millisecond
	unknownSilence = 5 * time.Second
	// A request is taken for lost after lostFactor times what was expected, and at least lostAge.
	lostAge    = 2 * time.Second
	lostFactor = 10
	// latePerSource is how many late requests of a source are looked at in one go.
	latePerSource = 64
)

// watch makes sure that the watcher is awake.
func (p *Pool) watch() {
	if p.closed {
		return
	}
	if !p.watching {
		p.watching = true
		p.group.Go(p.watcher)
	}
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// watcher runs until the pool is closed; it sleeps while nothing is under way. Called without the lock.
func (p *Pool) watcher() {
	timer := time.NewTimer(watchInterval)
	defer timer.Stop()
	for range p.kick {
		for {
			timer.Reset(watchInterval)
			select {
			case <-timer.C:
			case <-p.ctx.Done():
				return
			}
			p.mu.Lock()
			if p.closed {
				p.mu.Unlock()
				return
			}
			idle := p.flying == 0 && p.retries.live+p.fresh.live == 0
			if !idle {
				p.look()
			} else {
				p.rest()
			}
			p.mu.Unlock()
			if idle {
				break
			}
		}
	}
}

// look does what has become due.
func (p *Pool) look() {
	now := p.now()
	for _, m := range p.members {
		p.checkSilence(m, now)
	}
	p.hedge(now)
	for _, m := range p.members {
		p.giveUp(m, now)
		p.probe(m, now)
	}
	p.sweep()
	p.pump(now)
}

// rest forgets how long sources have been quiet, when nothing is asked of them.
func (p *Pool) rest() {
	for _, m := range p.members {
		m.quiet = 0
	}
}

// checkSilence takes away what was asked of a source that does not answer any more, if there is another. A probe then tells when
// it is back.
func (p *Pool) checkSilence(m *member, now time.Duration) {
	oldest := m.first
	if oldest == nil || m.silent {
		return
	}
	// Counted in looks, not by the clock, so that a machine that has no time for us does not look like a silent source.
	m.quiet += watchInterval
	allowed := unknownSilence
	if m.proven {
		gap := time.Duration(float64(oldest.size) / m.speed() * float64(time.Second))
		allowed = max(leastSilence, 2*m.minRoundTrip(), time.Duration(float64(oldest.expected)*m.tail), 8*gap)
		allowed = min(allowed, unknownSilence)
	} else if m.known {
		allowed = min(2*leastSilence+5*m.minRoundTrip(), unknownSilence) // a connection has to be made
	}
	if m.quiet <= allowed || now-oldest.start <= allowed {
		return
	}
	// If all are silent, that may be our end of the line.
	for _, o := range p.members {
		if o != m && o.trusted(now) && (o.requests == 0 || o.quiet < m.quiet) {
			m.silent, m.lastError = true, errSilent
			m.failed++
			m.cut(errSilent)
			p.sweep()
			return
		}
	}
}

// hedge asks other sources for what is late.
func (p *Pool) hedge(now time.Duration) {
	if p.options.HedgeShare < 0 {
		return
	}
	var late []*request
	for _, m := range p.members {
		n := 0
		for r := m.first; r != nil && n < latePerSource; r = r.next {
			if !m.isLate(r, now) {
				if m.known {
					break
				}
				continue
			}
			n++
			if !r.background && r.cut == nil && !r.hedged && r.flight.others == 0 {
				late = append(late, r)
			}
		}
	}
	// The earlier a block was asked for, the earlier it is needed.
	slices.SortFunc(late, func(a, b *request) int {
		if a.flight.sequence < b.flight.sequence {
			return -1
		}
		return 1
	})
	for _, r := range late {
		// What is so late that it may never come is as good as failed, and must not wait until there is room for hedges again:
		// it may be what everything else waits for.
		if !r.member.isLost(r, now) && float64(p.doubled+r.size) > hedgeFree+p.options.HedgeShare*float64(p.delivered) {
			continue
		}
		if m := p.alternative(r, now); m != nil {
			r.hedged = true
			p.doubled += r.size
			p.behind(m, r.flight, now, false)
		}
	}
}

// giveUp ends requests in the background that may never be answered, and that are all that a caller still waits for, because the
// source that it had asked before has failed meanwhile.
func (p *Pool) giveUp(m *member, now time.Duration) {
	n := 0
	for r := m.first; r != nil && n < latePerSource && m.isLost(r, now); r = r.next {
		n++
		if r.background && !r.probe && r.flight.current == nil && r.flight.waiting {
			r.cutOff(errSilent)
		}
	}
}

// isLost reports whether a request is so late that it may never be answered.
func (m *member) isLost(r *request, now time.Duration) bool {
	return now-r.start > lostAge && (!m.known || now-r.start > lostFactor*r.expected)
}

func (m *member) isLate(r *request, now time.Duration) bool {
	age := now - r.start
	if r.expected >= time.Hour {
		return age > unknownDelay
	}
	return age > time.Duration(float64(r.expected)*m.tail)+hedgeDelay
}

// alternative returns the source that would deliver a late block first.
func (p *Pool) alternative(r *request, now time.Duration) *member {
	var best *member
	f := r.flight
	for _, m := range p.members {
		if f.spent()&m.bit != 0 || !m.trusted(now) || m.lacks(f.key) || m.hits < 0.5 {
			continue
		}
		if best == nil || m.expected(r.size) < best.expected(r.size) {
			best = m
		}
	}
	if best == nil || best.expected(r.size) > 2*(now-r.start) {
		return nil
	}
	return best
}

// probe asks a source about which nothing is known, or that failed, for a block that another one is being asked for.
func (p *Pool) probe(m *member, now time.Duration) {
	if m.probing || m.requests > 0 || !m.usable(now) || m.trusted(now) {
		return
	}
	var newest *flight
	for _, o := range p.members {
		if r := o.last; o != m && r != nil && !r.background && r.flight.asked&m.bit == 0 && (newest == nil || r.flight.sequence > newest.sequence) {
			newest = r.flight
		}
	}
	if newest == nil {
		return
	}
	m.probing = true
	p.behind(m, newest, now, true)
}

// behind asks a source for a block in the background.
func (p *Pool) behind(m *member, f *flight, now time.Duration, probe bool) {
	r := p.start(&request{}, m, f, now)
	r.background, r.probe, r.doubled = true, probe, !probe
	f.others++
	r.begin(p.scope(p.ctx), p.ctx)
	p.group.Go(func() {
		block, err := m.source.Get(&r.ctx, f.key.ref, f.key.size, make([]byte, 0, f.key.size))
		p.mu.Lock()
		defer p.mu.Unlock()
		f.others--
		if probe {
			m.probing = false
		}
		first := !f.over && f.won == nil
		p.settle(r, err)
		if err == nil && first {
			f.won = block
			if f.current != nil {
				f.current.cutOff(errGivenUp)
			}
		}
		if err == nil && first || f.line == nil && f.granted == nil {
			p.leave(f)
			p.awaken(f)
		}
	})
}
