// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import (
	"math/bits"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// candidates returns who can yet be asked for a block, now or soon. Sources that were never reached are not waited for if there
// are others, even if these do not have the block.
func (p *Pool) candidates(f *flight, now time.Duration) set {
	var s, dead set
	others := false
	for _, m := range p.members {
		if m.banned {
			continue
		}
		others = others || m.trusted(now)
		if m.restUntil-now > patience || f.spent()&m.bit != 0 {
			continue
		}
		if m.failures > 0 && !m.proven {
			dead |= m.bit
		} else {
			s |= m.bit
		}
	}
	if !others {
		s |= dead
	}
	return s
}

// nextRound lets sources be asked again that failed, but worked before: connections break.
func (p *Pool) nextRound(f *flight, now time.Duration) bool {
	if f.rounds >= maxRounds || f.rounds > 0 && !f.progress {
		return false
	}
	f.rounds++
	f.progress = false
	for _, m := range p.members {
		if f.failed&m.bit != 0 && m.proven && !m.banned && m.restUntil-now <= patience {
			f.failed &^= m.bit
		}
	}
	return p.candidates(f, now) != 0
}

// pump gives waiting blocks to the sources that have room.
func (p *Pool) pump(now time.Duration) {
	for p.retries.live+p.fresh.live > 0 {
		m, f := p.match(now)
		if m == nil {
			return
		}
		f.line.remove(f)
		r := &request{}
		if f.started != nil {
			r = &f.started.request
		}
		f.granted = p.start(r, m, f, now)
		p.awaken(f)
	}
}

// match finds a source that has room, and the block for it; of several, that which delivers first.
func (p *Pool) match(now time.Duration) (*member, *flight) {
	v := p.survey(now)
	var tried set
	for {
		var best *member
		for i, m := range p.members {
			if tried&m.bit == 0 && m.usable(now) && m.hasRoom() && (best == nil || v.due[i] < v.due[best.index]) {
				best = m
			}
		}
		if best == nil {
			return nil, nil
		}
		if f := p.pick(best, v); f != nil {
			return best, f
		}
		tried |= best.bit
	}
}

const smallestSize = int64(eris.BlockSize1KiB)

// survey is when sources would deliver a further block.
type survey struct {
	trusted set
	front   *member                   // the trusted one with the least cost
	due     [MaxSources]time.Duration // how long until it is there, if they have it
	cost    [MaxSources]time.Duration // the same, and what it takes when they do not, of those that are trusted
}

func (p *Pool) survey(now time.Duration) *survey {
	v := &p.scratch
	v.trusted, v.front = 0, nil
	// The least of all, and the least but for the one that has it.
	first, second := time.Hour, time.Hour
	for i, m := range p.members {
		v.due[i] = m.expected(smallestSize)
		if !m.trusted(now) {
			continue
		}
		v.trusted |= m.bit
		if v.due[i] < first {
			first, second = v.due[i], first
		} else {
			second = min(second, v.due[i])
		}
	}
	for i, m := range p.members {
		if v.trusted&m.bit == 0 {
			continue
		}
		other := first
		if v.due[i] == first {
			other = second
		}
		if v.trusted == m.bit {
			other = 0
		}
		v.cost[i] = v.due[i] + time.Duration((1-m.hits)*float64(other))
		if v.front == nil || v.cost[i] < v.cost[v.front.index] {
			v.front = m
		}
	}
	return v
}

// cheapest reports whether no other trusted source that can yet be asked is to be preferred.
func (v *survey) cheapest(m *member, f *flight) bool {
	left := v.trusted &^ f.spent()
	for ; left != 0; left &= left - 1 {
		if i := bits.TrailingZeros64(uint64(left)); v.cost[i] < v.cost[m.index] {
			return false
		}
	}
	return true
}

// pick finds the block that a source is to be asked for. Of blocks that were asked for in vain, that is the first for which it is
// the best that is left. Of others, it is the first that the rest would not have delivered by the time when this one does, which
// is the very first for the best of all.
func (p *Pool) pick(m *member, v *survey) *flight {
	trusted := v.trusted&m.bit != 0
	if !trusted && v.trusted != 0 && m.failures > 0 && !m.proven {
		return nil // it may be dead: probes will tell
	}
	looked := 0
	for _, f := range p.retries.flights {
		if f == nil {
			continue
		}
		if looked++; looked > retrySearch {
			break // what is behind that will come to the front
		}
		switch {
		case f.spent()&m.bit != 0:
		case trusted && v.cheapest(m, f), v.trusted&^f.spent() == 0:
			return f
		}
	}
	ahead := int64(0)
	switch {
	case !trusted && v.trusted != 0:
		return nil
	case trusted && m != v.front:
		for i, o := range p.members {
			if o != m && v.trusted&o.bit != 0 && v.cost[m.index] > v.due[i] {
				ahead += int64((v.cost[m.index] - v.due[i]).Seconds() * o.speed() * o.hits)
			}
		}
	}
	if p.retries.bytes+p.fresh.bytes <= ahead {
		return nil
	}
	passed := p.retries.bytes
	for _, f := range p.fresh.flights {
		if f == nil {
			continue
		}
		if passed >= ahead || m == v.front {
			return f
		}
		passed += int64(f.key.size)
	}
	return nil
}

// spent returns who cannot be asked any more.
func (f *flight) spent() set { return f.missed | f.failed | f.asked }

// start books a request to a source.
func (p *Pool) start(r *request, m *member, f *flight, now time.Duration) *request {
	r.flight, r.member, r.size = f, m, int64(f.key.size)
	f.asked |= m.bit
	m.sent(r, now)
	m.list(r)
	p.flying++
	return r
}

// end books that it has ended.
func (p *Pool) end(r *request, now time.Duration) {
	r.flight.asked &^= r.member.bit
	r.member.unlist(r)
	r.member.received(r, now)
	r.ctx.scope.left(p)
	p.flying--
}
