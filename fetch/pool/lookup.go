// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/list"
)

const (
	// maxRounds is how often one member is asked again for one block at most.
	maxRounds = 20
	// mostStopped is for how long a member that has worked and stops is worth waiting for.
	mostStopped = 15 * time.Second
	// waitForRest is how long a block waits for a member that failed to be tried again when there
	// is no other, and waitForBusy for one that has said when.
	waitForRest, waitForBusy = time.Second, 2500 * time.Millisecond
)

var (
	errNone     = errors.New("there is no source")
	errLate     = errors.New("source has not answered this request, but later ones")
	errNotFirst = errors.New("another source was faster")
	errBanned   = errors.New("source gave wrong bytes before")
)

// key is what makes requests equal.
type key struct {
	reference eris.Reference
	size      eris.BlockSize
}

// set is a set of members.
type set uint64

// lookup is a block that is wanted, from the first request for it until Done. It is guarded by the
// lock of the pool, and once it is over it belongs to the worker that calls Done.
type lookup struct {
	key       key
	pair      eris.Pair
	request   *fetch.Request   // the first: its Dst is used
	more      []*fetch.Request // others for the same block
	cancelled bool             // the first is

	family *family // if it is not nil, of those of which l is the one at index nth
	nth    int
	held   set // who says to have it
	denied set // who says not to: asked when nobody else is left, for it may have others to ask

	missed  set // who does not have it
	failed  set // who failed
	lied    set // who gave wrong bytes
	active  set // who is being asked
	rounds  int
	refused bool  // it has been asked for, and is the next one
	err     error // the last failure of those in failed; in the end that of the requests

	list.Links[lookup]
	queue      *queue // where it waits for a member, if it does
	foreground *attempt
	attempts   *attempt // all

	block []byte // the result
	from  any    // the far member that gave it
	over  bool
	next  *lookup // of those that are over, or spare
}

func (l *lookup) spent() set { return l.missed | l.failed | l.lied | l.active | l.denied }

// attempt is a request to a member for a lookup.
type attempt struct {
	request    fetch.Call
	member     *member
	lookup     *lookup       // nil if nobody waits for it any more
	background bool          // with memory of its own
	probe      bool          // to learn about the member
	directed   bool          // the member probably has it
	question   []asked       // what is asked instead of a block
	waited     time.Duration // for its answer
	cause      error         // why it was cancelled, if it was

	start    time.Duration
	expected time.Duration // how long it was to take
	// What was so at the start.
	delivered   int64
	answered    int64
	deliveredAt time.Duration
	full        bool // as much had been asked for as the member delivers in a round trip
	clean       bool // nothing was in front of it that would falsify the round trip

	list.Links[attempt]
	sibling   *attempt // of the same lookup
	following *attempt // to be started, or spare
}

// newLookup returns a lookup. The lock of the pool is held here and in all that follows, unless
// said otherwise.
func (p *Pool) newLookup(k key, r *fetch.Request) *lookup {
	l := p.spare
	if l != nil {
		p.spare, l.next = l.next, nil
	} else {
		l = &lookup{}
	}
	l.key, l.pair, l.request = k, r.Pair, r
	return l
}

// recycle takes back lookups that are over. There are never more than have been going on at a time.
func (p *Pool) recycle(l *lookup) {
	for l != nil {
		next := l.next
		*l = lookup{more: l.more[:0], next: p.spare}
		p.spare, l = l, next
	}
}

// proceed has a block that is not being asked for wait for a member, or ends the lookup if there is
// none.
func (p *Pool) proceed(l *lookup, now time.Duration) {
	for _, m := range p.near {
		if l.spent()&m.bit == 0 && m.usable(now) && !m.resting() {
			m.queue.push(l)
			return
		}
	}
	p.inquire(l, now)
	if p.candidates(l, now) == 0 {
		if l.awaits(nil, now) {
			return
		}
		if l.denied != 0 {
			l.denied = 0
			p.proceed(l, now)
			return
		}
		if !p.nextRound(l, now) {
			p.finish(l, p.verdict(l, now))
			return
		}
	}
	if m := p.holder(l, now); m != nil {
		m.queue.push(l)
		return
	}
	if l.family != nil && l.family.pending != 0 {
		return // told goes on with it
	}
	if l.refused || l.spent()&p.farSet != 0 {
		p.retries.push(l)
	} else {
		p.fresh.push(l)
	}
}

// awaits reports whether somebody is being asked of whom there is hope, but for one attempt: of
// members that rest there is only for a moment.
func (l *lookup) awaits(but *attempt, now time.Duration) bool {
	for a := l.attempts; a != nil; a = a.sibling {
		if a != but && (!a.member.resting() || now-a.start < probeWait) {
			return true
		}
	}
	return false
}

// advance goes on with a lookup after something has happened to it: an attempt has ended, or it was
// cancelled.
func (p *Pool) advance(l *lookup, now time.Duration) {
	if a := l.foreground; a != nil {
		// It uses the memory of the request.
		switch {
		case l.block != nil:
			a.cancel(errNotFirst)
		case l.cancelled:
			a.cancel(context.Canceled)
		}
		return
	}
	switch {
	case l.block != nil:
		p.finish(l, nil)
	case p.closed:
		p.finish(l, fetch.ErrClosed)
	case l.cancelled && len(l.more) == 0:
		p.finish(l, context.Canceled)
	default:
		if l.cancelled {
			p.finishAlone(l.request, context.Canceled)
			l.cancelled, l.request = false, l.more[0]
			l.more = append(l.more[:0], l.more[1:]...)
		}
		if l.queue == nil {
			p.proceed(l, now)
		}
	}
}

// finish ends a lookup. What goes on in the background is cancelled, but for requests that are to
// tell what a member is like.
func (p *Pool) finish(l *lookup, err error) {
	if l.queue != nil {
		l.queue.remove(l)
	}
	if p.lookups[l.key] == l {
		delete(p.lookups, l.key)
	}
	if l.family != nil && l.family.lookups[l.nth] == l {
		l.family.lookups[l.nth] = nil
	}
	for a := l.attempts; a != nil; {
		next := a.sibling
		a.lookup, a.sibling = nil, nil
		if !a.probe {
			a.cancel(errNotFirst)
		}
		a = next
	}
	l.attempts = nil
	l.err, l.over = err, true
	l.next, p.finished = p.finished, l
}

// finishAlone ends a request whose lookup goes on for others.
func (p *Pool) finishAlone(r *fetch.Request, err error) {
	p.finish(p.newLookup(key{}, r), err)
}

// send hands a block to a member, as soon as the lock is given up.
func (p *Pool) send(m *member, l *lookup, now time.Duration) {
	a := p.newAttempt(m, l.pair, l.key.size, now)
	a.request.Dst = l.request.Dst[:0]
	l.foreground = a
	p.attach(a, l)
}

// sendBehind asks a member for a block in the background. The lookup may be nil.
func (p *Pool) sendBehind(m *member, l *lookup, pair eris.Pair, size eris.BlockSize, now time.Duration) *attempt {
	a := p.newAttempt(m, pair, size, now)
	a.request.Dst = make([]byte, 0, size)
	a.background = true
	if l != nil {
		p.attach(a, l)
	}
	return a
}

func (p *Pool) attach(a *attempt, l *lookup) {
	a.lookup, a.sibling = l, l.attempts
	a.request.Root = l.request.Root
	l.attempts = a
	l.active |= a.member.bit
}

func (p *Pool) newAttempt(m *member, pair eris.Pair, size eris.BlockSize, now time.Duration) *attempt {
	a := m.spare
	if a != nil {
		m.spare, a.following = a.following, nil
	} else {
		a = &attempt{member: m}
		a.request.Init(m.source, func() { p.arrived.Add(a) })
	}
	a.request.Pair, a.request.Size = pair, size
	m.sent(a, now)
	p.inFlight++
	if p.lastOf == nil {
		p.starts = a
	} else {
		p.lastOf.following = a
	}
	p.lastOf = a
	return a
}

// startAll hands attempts to their members. Called without the lock.
func startAll(a *attempt) {
	for a != nil {
		next := a.following
		a.following = nil
		a.request.Begin()
		a = next
	}
}

// cancel makes an attempt end soon. Sources may call Done meanwhile, which does not need the lock.
func (a *attempt) cancel(cause error) {
	if a.cause == nil {
		a.cause = cause
		a.request.Cancel()
	}
}

// detach takes an attempt that is over from its lookup, and out of what is in flight to its member.
func (p *Pool) detach(a *attempt) {
	m := a.member
	m.received(a)
	p.inFlight--
	if a.probe {
		m.probing = false
	}
	l := a.lookup
	if l == nil {
		return
	}
	l.active &^= m.bit
	for at := &l.attempts; *at != nil; at = &(*at).sibling {
		if *at == a {
			*at = a.sibling
			break
		}
	}
	if l.foreground == a {
		l.foreground = nil
	}
}

// recycle takes back an attempt of which nothing is needed any more.
func (a *attempt) recycle() {
	a.request.Reset()
	a.lookup, a.sibling, a.cause, a.question = nil, nil, nil, nil
	a.waited = 0
	a.background, a.probe, a.directed = false, false, false
	a.following, a.member.spare = a.member.spare, a
}

// fail notes that a member could not deliver the block. That it gave wrong bytes is worth more to
// know than other failures.
func (l *lookup) fail(m *member, err error) {
	l.failed |= m.bit
	if l.err == nil || !errors.As(l.err, new(*eris.BlockError)) {
		l.err = m.named(err)
	}
}

// named has an error name the member, once.
func (m *member) named(err error) error {
	if strings.HasPrefix(err.Error(), m.name+": ") {
		return err
	}
	return fmt.Errorf("%s: %w", m.name, err)
}

// verdict returns why a block cannot be had. Members that were never reached, and those that lie,
// have no say in whether the block exists, nor have near ones if there are others. If a member that
// has worked a moment ago rests, it may be had after that.
func (p *Pool) verdict(l *lookup, now time.Duration) error {
	unsaid, missed, proven, rest := errNone, l.missed, false, time.Duration(0)
	if len(p.far) > 0 {
		for _, m := range p.near {
			missed &^= m.bit
		}
	}
	for _, m := range p.members {
		wrong := (*eris.BlockError)(nil)
		if m.banned && errors.As(m.lastError, &wrong) && wrong.Reference == l.key.reference {
			// Perhaps in answer to another request for this very block.
			l.err = m.named(m.lastError)
		}
		if m.lastError != nil && (m.banned || m.restUntil > now || m.failures > 0) {
			unsaid = m.named(m.lastError)
		}
		if m.proven && !m.banned {
			proven = proven || l.failed&m.bit != 0
			if m.wasHere(now) && (m.failures > 0 || m.restUntil > now) {
				rest = max(rest, failureRest, m.restUntil-now)
			}
		}
	}
	switch {
	case proven, missed == 0:
		err := cmp.Or(l.err, unsaid)
		if rest > 0 {
			return &fetch.BusyError{After: rest, Err: err, Stopped: true}
		}
		return err
	case unsaid != errNone:
		return fmt.Errorf("%w (%v)", eris.ErrNotFound, unsaid)
	}
	return eris.ErrNotFound
}

// queue is where blocks wait for a member, in the order in which they came. They may be taken from
// anywhere in it.
type queue struct {
	list.List[lookup, *lookup]
	live  int
	bytes int64
}

func (q *queue) push(l *lookup) {
	l.queue = q
	q.Push(l)
	q.live++
	q.bytes += int64(l.key.size)
}

func (q *queue) remove(l *lookup) {
	l.queue = nil
	q.Remove(l)
	q.live--
	q.bytes -= int64(l.key.size)
}
