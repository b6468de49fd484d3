// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import (
	"math/bits"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// retrySearch is how far the queue of those that were asked for in vain is searched.
const retrySearch = 256

// candidates returns which far members can yet be asked for a block, now or soon.
func (p *Pool) candidates(l *lookup, now time.Duration) set {
	var s set
	spent := l.spent()
	for _, m := range p.far {
		if !m.banned && (!m.resting() || m.pauses(now)) && m.isSoon(now) && spent&m.bit == 0 {
			s |= m.bit
		}
	}
	return s
}

// nextRound lets members be asked again that failed, but worked before, for connections break; or
// that were busy.
func (p *Pool) nextRound(l *lookup, now time.Duration) bool {
	if l.rounds >= maxRounds {
		return false
	}
	l.rounds++
	failed := l.failed
	for _, m := range p.far {
		if l.lied&m.bit == 0 {
			m.pardonDamaged(l.key.size)
		}
		if (m.proven || m.failures == 0) && !m.banned && m.isSoon(now) {
			l.failed &^= m.bit
		}
	}
	if p.candidates(l, now) == 0 {
		l.failed = failed
		return false
	}
	return true
}

func (p *Pool) distribute(now time.Duration) {
	if p.closed {
		return
	}
	if n := len(p.unasked); n >= mostAsked/2 || n > 0 && now-p.askedAt >= askInterval {
		p.ask(now)
	}
	for _, m := range p.members {
		for l := p.next(m); l != nil && m.usable(now) && m.hasRoom(m.near, now); l = p.next(m) {
			l.queue.remove(l)
			p.send(m, l, now)
			l.foreground.directed = true
		}
	}
	for p.retries.live+p.fresh.live > 0 {
		m, l := p.match(now)
		if m == nil {
			return
		}
		l.queue.remove(l)
		p.send(m, l, now)
	}
}

// next returns the block that a member is to be asked for first of those that it probably has.
func (p *Pool) next(m *member) *lookup {
	if l := m.queue.First(); l != nil || m.near || p.askable&m.bit == 0 {
		return l
	}
	return p.relief(m)
}

// match finds a far member that has room, and the block for it; of several, that which delivers
// first.
func (p *Pool) match(now time.Duration) (*member, *lookup) {
	v := p.survey(now)
	var tried set
	for {
		var best *member
		for _, m := range p.far {
			if v.open&^tried&m.bit != 0 && m.hasRoom(v.open == m.bit, now) && (best == nil || v.due[m.index] < v.due[best.index]) {
				best = m
			}
		}
		if best == nil {
			return nil, nil
		}
		if l := p.pick(best, v); l != nil {
			return best, l
		}
		tried |= best.bit
	}
}

const (
	smallestSize = int64(eris.BlockSize1KiB)
	leastHits    = 1e-3
)

// survey is when far members would deliver a further block.
type survey struct {
	open    set // who may be asked
	trusted set
	front   *member                   // the trusted one with the least cost
	due     [MaxSources]time.Duration // how long until it is there, if they have it
	cost    [MaxSources]time.Duration // the same, and more the more often they do not, of those that are trusted
}

func (p *Pool) survey(now time.Duration) *survey {
	v := &p.scratch
	v.open, v.trusted, v.front = 0, 0, nil
	for _, m := range p.far {
		due := m.expected(smallestSize)
		v.due[m.index] = due
		if m.usable(now) && !m.resting() {
			v.open |= m.bit
		}
		if !m.trusted(now) {
			continue
		}
		v.trusted |= m.bit
		v.cost[m.index] = min(time.Hour, time.Duration(float64(due)/max(m.hits, leastHits)))
		if v.front == nil || v.cost[m.index] < v.cost[v.front.index] {
			v.front = m
		}
	}
	return v
}

// cheapest reports whether no other trusted member that can yet be asked is to be preferred.
func (v *survey) cheapest(m *member, l *lookup) bool {
	left := v.trusted &^ l.spent()
	for ; left != 0; left &= left - 1 {
		if i := bits.TrailingZeros64(uint64(left)); v.cost[i] < v.cost[m.index] {
			return false
		}
	}
	return true
}

// pick finds the block that a member is to be asked for. Of blocks that were asked for in vain,
// that is the first for which it is the best that is left. Of others, it is the first that the rest
// would not have delivered by the time when this one does, which is the very first for the best of
// all.
func (p *Pool) pick(m *member, v *survey) *lookup {
	trusted := v.trusted&m.bit != 0
	l := p.retries.First()
	for looked := 0; l != nil && looked < retrySearch; looked++ { // what is behind that will come to the front
		if l.spent()&m.bit == 0 && (trusted && v.cheapest(m, l) || v.trusted&^l.spent() == 0) {
			return l
		}
		l = l.Next()
	}
	if !trusted && v.trusted != 0 {
		return nil // probes will tell
	}
	if !trusted || m == v.front {
		return p.fresh.First()
	}
	ahead := int64(0)
	for _, o := range p.far {
		if o != m && v.trusted&o.bit != 0 && v.cost[m.index] > v.due[o.index] {
			ahead += int64((v.cost[m.index] - v.due[o.index]).Seconds() * o.speed() * o.hits)
		}
	}
	if p.retries.bytes+p.fresh.bytes <= ahead {
		return nil
	}
	passed := p.retries.bytes
	l = p.fresh.First()
	for l != nil && passed < ahead {
		passed += int64(l.key.size)
		l = l.Next()
	}
	return l
}
