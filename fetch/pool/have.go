// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import (
	"errors"
	"math/bits"
	"slices"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// This file is how the pool knows who has which blocks before it asks for them, where members do
// not have all: from who gave the node above, and by questions to all.

const (
	// wholeShare is from which share of hits on a member is taken to have everything. If all are,
	// nothing here is done.
	wholeShare = 0.98
	// kinShare is which share of blocks whoever gave the node above must have had of late, so that
	// it is asked first.
	kinShare = 0.5
	// largeKin is from how many blocks on others are asked at once what they have, too: then it is
	// worth much to have several members deliver, and the questions cost little.
	largeKin = 64
	// mostAsked is about how many blocks a question is at most. One more, which nobody can have, is
	// among them.
	mostAsked = fetch.MaxHave - 1
	// askInterval is how long others are waited for that may be in the same question.
	askInterval = 10 * time.Millisecond
	// A block waits for answers for answerFactor times what is expected, which is less than it
	// takes to ask one after the other, and longestAnswer at most.
	answerFactor  = 4
	longestAnswer = 2 * time.Second
	// reliefSearch is how many of the blocks that wait for a busy member are looked at by another.
	reliefSearch = 64
	// claimWeight is the weight of a claim that turns out to be true or false for the truth of a
	// member, and lateWeight that of an answer that has not come. Below leastTruth claims are not
	// believed any more.
	claimWeight, lateWeight, leastTruth = 1.0 / 16, 1.0 / 4, 0.5
	// kinWeight is the weight of one block for kinShare.
	kinWeight = 1.0 / 8
)

// family is what is known of kin: of each block, at its place among them.
type family struct {
	pool    *Pool
	refs    []eris.Reference
	origin  *member // that gave the node above, if it is known
	asked   bool    // others are asked about it, or will be soon
	pending set     // whose answers are waited for
	held    []set   // who says to have the block
	denied  []set   // who says not to
	lookups []*lookup
}

// asked is a block in a question: that of a family at a place, or, if there is no family, one that
// nobody can have.
type asked struct {
	family *family
	nth    int
}

// toward has a share take account of one more case.
func toward(share *float64, had bool, weight float64) {
	value := 0.0
	if had {
		value = 1
	}
	*share += (value - *share) * weight
}

func (p *Pool) join(l *lookup, k *fetch.Kin, nth int) {
	if k == nil || len(p.far) < 2 || len(k.Refs) > mostAsked || nth >= len(k.Refs) || k.Refs[nth] != l.key.reference {
		return
	}
	f, _ := k.Held.(*family)
	if f == nil || f.pool != p {
		f = &family{pool: p, refs: k.Refs, lookups: make([]*lookup, len(k.Refs))}
		if m, ok := k.Origin.(*member); ok && m.pool == p {
			f.origin = m
		}
		k.Held = f
	}
	l.enter(f, nth)
}

func (l *lookup) enter(f *family, nth int) {
	l.family, l.nth, f.lookups[nth] = f, nth, l
	if f.asked {
		l.held, l.denied = f.held[nth], f.denied[nth]
	}
}

func (p *Pool) isPartial() bool {
	return slices.ContainsFunc(p.far, func(m *member) bool { return !m.banned && m.hits < wholeShare })
}

// kinFirst returns who is asked first because it gave the node above, as a set.
func (p *Pool) kinFirst(l *lookup) set {
	if f := l.family; f != nil && f.origin != nil && p.kin > kinShare && p.isPartial() {
		return f.origin.bit
	}
	return 0
}

// inquire has all members be asked about the family of a block, unless that is of no use, or it is
// known well enough where the block is.
func (p *Pool) inquire(l *lookup, now time.Duration) {
	missed := l.missed&p.farSet != 0
	if p.askable == 0 || l.family != nil && l.family.asked || l.family == nil && !missed || !p.isPartial() {
		return
	}
	if l.family == nil {
		if bits.OnesCount64(uint64(p.candidates(l, now))) < 2 {
			return
		}
		l.enter(&family{pool: p, refs: []eris.Reference{l.key.reference}, lookups: make([]*lookup, 1)}, 0)
	}
	f := l.family
	if !missed && p.kinFirst(l) != 0 && len(f.refs) < largeKin {
		return
	}
	f.asked, f.pending = true, p.telling // nobody waits for those that may not understand
	f.held, f.denied = make([]set, len(f.refs)), make([]set, len(f.refs))
	if len(p.unasked)+len(f.refs) > mostAsked {
		p.ask(now)
	}
	for i := range f.refs {
		p.unasked = append(p.unasked, asked{f, i})
	}
}

// ask asks all members that may answer it what is to be asked.
func (p *Pool) ask(now time.Duration) {
	var refs []eris.Reference
	for _, x := range p.unasked {
		refs = append(refs, x.family.refs[x.nth])
	}
	prefixes, none := fetch.Question(refs)
	question := slices.Insert(p.unasked, none, asked{})
	p.unasked, p.askedAt = nil, now
	to := set(0)
	for _, m := range p.far {
		if p.askable&m.bit != 0 && m.usable(now) && !m.resting() {
			a := p.sendBehind(m, nil, eris.Pair{}, eris.BlockSize((len(question)+7)/8), now)
			a.request.Have, a.question = prefixes, question
			to |= m.bit
		}
	}
	for _, x := range question {
		if f := x.family; f != nil {
			f.pending &= to
			if l := f.lookups[x.nth]; l != nil && l.queue == nil {
				p.advance(l, now)
			}
		}
	}
}

// isLate reports whether a question has waited too long for its answer, when it is looked at.
func (a *attempt) isLate() bool {
	a.waited += watchInterval
	return a.waited > min(longestAnswer, answerFactor*a.expected+hedgeDelay)
}

// told takes note of an answer to a question, or of why there is none.
func (p *Pool) told(a *attempt, now time.Duration) {
	m, answer := a.member, a.request.Block
	lies, _ := fetch.Has(answer, slices.Index(a.question, asked{}))
	switch {
	case a.request.Err == nil && !lies && len(answer) > 0:
		p.telling |= m.bit
		m.answers(a, now)
	case a.request.Err == nil, errors.Is(a.request.Err, fetch.ErrCannotSay):
		m.answers(a, now)
		p.disbelieve(m)
		answer = nil
	default:
		p.outcome(a, now)
		answer = nil
		if a.cause != errLate {
			break
		}
		if toward(&m.truth, false, lateWeight); p.telling&m.bit == 0 || m.truth < leastTruth {
			p.disbelieve(m)
		}
	}
	for i, x := range a.question {
		f := x.family
		if f == nil {
			continue
		}
		f.pending &^= m.bit
		if has, said := fetch.Has(answer, i); said {
			who := &f.denied[x.nth]
			if has {
				who = &f.held[x.nth]
			}
			*who |= m.bit
			if f.origin == m {
				toward(&p.kin, has, kinWeight)
			}
		}
		if l := f.lookups[x.nth]; l != nil {
			l.held |= f.held[x.nth] & m.bit
			l.denied |= f.denied[x.nth] & m.bit
			p.reconsider(l, now)
		}
	}
}

// disbelieve has a member not be asked any more what it has, and what it has claimed count for
// nothing.
func (p *Pool) disbelieve(m *member) {
	p.askable &^= m.bit
	p.telling &^= m.bit
	m.empty(p.now())
}

// reconsider looks anew at a block that waits, if there is one, after something was said about it.
func (p *Pool) reconsider(l *lookup, now time.Duration) {
	switch {
	case l == nil, l.foreground != nil:
		return
	case l.queue == &p.fresh, l.queue == &p.retries && (p.likely(l) != 0 || p.candidates(l, now) == 0):
		l.queue.remove(l)
	case l.queue != nil:
		return
	}
	p.advance(l, now)
}

func (p *Pool) likely(l *lookup) set {
	if s := l.held & p.askable &^ l.spent(); s != 0 || l.family != nil && l.family.pending != 0 {
		return s
	}
	return p.kinFirst(l) &^ l.spent()
}

// holder returns who will deliver a block first of those that probably have it; nil if nobody has,
// or somebody would be earlier whose answer is to come.
func (p *Pool) holder(l *lookup, now time.Duration) *member {
	best, least := p.earliest(p.likely(l), l, now)
	if f := l.family; best != nil && f != nil {
		if m, cost := p.earliest(f.pending&^l.spent(), l, now); m != nil && cost < least {
			return nil
		}
	}
	return best
}

// earliest returns who of a set would deliver a block first, and a measure of when. Who has said
// what is not true has its place behind others.
func (p *Pool) earliest(s set, l *lookup, now time.Duration) (best *member, least float64) {
	for ; s != 0; s &= s - 1 {
		m := p.members[bits.TrailingZeros64(uint64(s))]
		if !m.usable(now) || m.resting() {
			continue
		}
		cost := float64(m.expected(m.queue.bytes+int64(l.key.size))) / m.truth
		if best == nil || cost < least {
			best, least = m, cost
		}
	}
	return best, least
}

// relief returns a block that waits for a member that has much to do, and that m has as well; nil
// if there is none.
func (p *Pool) relief(m *member) *lookup {
	for _, o := range p.far {
		if o == m || o.queue.live < 2 || o.expected(o.queue.bytes) < 2*m.expected(int64(eris.BlockSize32KiB)) {
			continue
		}
		l := o.queue.First()
		for n := 0; l != nil && n < reliefSearch; n++ {
			if l.held&p.askable&m.bit != 0 && l.spent()&m.bit == 0 {
				return l
			}
			l = l.Next()
		}
	}
	return nil
}

// turnsOut takes note of whether a member had a block that it was asked for.
func (p *Pool) turnsOut(l *lookup, m *member, had bool) {
	f := l.family
	if f == nil {
		return
	}
	if f.origin == m && l.held&m.bit == 0 {
		toward(&p.kin, had, kinWeight)
	}
	if l.held&p.askable&m.bit == 0 {
		return
	}
	if toward(&m.truth, had, claimWeight); m.truth < leastTruth {
		p.disbelieve(m)
	}
}
