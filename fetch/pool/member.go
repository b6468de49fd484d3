// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import (
	"fmt"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/backoff"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/list"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
)

const (
	// hitWeight is the weight of one answer in the share of blocks that a member has.
	hitWeight = 1.0 / 32
	// firstTail, leastTail and greatestTail are of the 95th percentile of how long requests take,
	// in units of what was expected.
	firstTail, leastTail, greatestTail = 2.0, 1.2, 8.0
	tailStep                           = 0.05

	// unreachable is from how many failures in a row on other processes are told that a member
	// fails which has worked before.
	unreachable = 4
	// mostBusy is how often one that has never answered may be busy until it counts as failing.
	mostBusy = 6
	// restAge is for how long a member that was found to be silent by an earlier process is not
	// asked but by probes.
	restAge = 5 * time.Minute

	maxMissing = 4096
	missingAge = 30 * time.Second
)

// member is a source and what is known about it. All of it is guarded by the lock of the pool.
type member struct {
	pool    *Pool
	source  fetch.Source
	name    string
	near    bool
	local   bool
	limiter *ratelimit.Limiter // nil if there is none for it
	anySize bool               // see anySizer
	index   int
	bit     set
	keeper  *keep // of a near one
	queue   queue // of what is near, or what a far one probably has

	banned    bool
	bannedAt  time.Duration
	proven    bool // it has answered
	silent    bool // it does not answer, but perhaps a probe
	told      bool // OnRest has been called
	noted     bool // the state says that it rests
	failures  int  // in a row, and silences
	backoff   backoff.Backoff
	failedAt  time.Duration // before this no answer says that it works again
	heardAt   time.Duration // when it came
	restUntil time.Duration
	lastError error
	probing   bool
	quiet     time.Duration // for how long there has been no answer although something was asked
	doubted   bool          // a request was given up since the last answer
	progress  func() int64  // bytes that have come, also of blocks that are not whole; nil if not known
	renew     func()        // has further requests go over new connections
	moved     int64         // of them, at movedAt
	movedAt   time.Duration

	attempts list.List[attempt, *attempt] // in flight, in order of start
	spare    *attempt
	requests int
	bytes    int64
	limit    backoff.Limit // of requests
	answered int64         // of them
	speeds
	hits  float64 // share of what was asked that it had, but for what it was known to have
	truth float64 // less than 1 after claims that were false
	tail  float64 // see firstTail

	missing map[key]time.Duration // since when it is known not to have a block

	asked, misses, faults, failed int64
}

func newMember(p *Pool, i int, given Member) *member {
	m := &member{
		pool: p, source: given.Source, name: given.Source.String(), local: given.Near || given.Local,
		index: i, bit: 1 << i, renew: func() {}, hits: 1, truth: 1, tail: firstTail, failedAt: -1, missing: map[key]time.Duration{},
		backoff: backoff.Backoff{Min: failureRest, Max: longestRest},
	}
	s, ok := given.Source.(anySizer)
	m.anySize = ok && s.AnySize()
	if s, ok := given.Source.(interface{ Progress() int64 }); ok {
		m.progress = s.Progress
	}
	if s, ok := given.Source.(interface{ Renew() }); ok {
		m.renew = s.Renew
	}
	if !m.local {
		m.limiter = p.options.Limiter
	}
	record := p.options.State.Get(m.name)
	m.speeds.recall(record, p.epoch)
	if record.Rests > 0 && p.epoch.Sub(record.Rest) < restAge {
		m.failures, m.silent, m.noted = record.Rests, true, true
		m.restUntil = min(record.Rest.Sub(p.epoch), longestRest)
		m.lastError = errRested
		m.backoff.Resume(p.epoch.Add(max(0, m.restUntil)), record.Rests)
	}
	return m
}

func (m *member) usable(now time.Duration) bool { return !m.banned && m.restUntil <= now }

// isSoon reports whether the member may be asked now, or so soon that it is worth waiting for.
func (m *member) isSoon(now time.Duration) bool {
	return m.pauses(now) || m.restUntil-now <= waitForRest || m.failures == 0 && m.restUntil-now <= waitForBusy
}

// wasHere reports whether the member has answered a moment ago.
func (m *member) wasHere(now time.Duration) bool { return m.proven && now-m.heardAt < mostStopped }

// pauses reports whether the member, whatever it does now, is worth waiting for, because it was
// there a moment ago and there is nothing else.
func (m *member) pauses(now time.Duration) bool { return m.pool.options.Patient && m.wasHere(now) }

// resting reports whether the member is asked by probes only, at most.
func (m *member) resting() bool { return m.silent || m.failures > 0 && !m.proven }

func (m *member) trusted(now time.Duration) bool {
	return m.usable(now) && m.known && m.failures == 0 && !m.silent
}

// expected returns after what time a further block would come. What is in flight to a member that
// is not known is no guide.
func (m *member) expected(size int64) time.Duration {
	if !m.known {
		return time.Hour
	}
	return max(m.minRoundTrip(), seconds(float64(m.bytes+size)/m.speed()))
}

func (m *member) sent(a *attempt, now time.Duration) {
	size := int64(a.request.Size)
	if m.requests == 0 {
		m.deliveredAt = now
	}
	if m.asked == 0 {
		m.firstAt = now
	}
	a.start, a.delivered, a.deliveredAt, a.answered = now, m.delivered, m.deliveredAt, m.answered
	a.expected = m.expected(size)
	a.clean = m.isClean()
	if a.clean {
		m.draining = false
	}
	if m.limiter != nil {
		m.pool.limitedUntil = now + m.limiter.Take(int(size))
	}
	m.requests++
	m.bytes += size
	m.asked++
	a.full = m.bytes >= m.window(false)/2 || !m.limit.Allows(m.pool.epoch.Add(now), m.requests)
	m.attempts.Push(a)
}

// received books that it is over, whatever came of it.
func (m *member) received(a *attempt) {
	m.requests--
	m.bytes -= int64(a.request.Size)
	m.attempts.Remove(a)
}

// answers takes note of an answer, with the block or not.
func (m *member) answers(a *attempt, now time.Duration) {
	took := max(now-a.start, time.Microsecond)
	m.quiet, m.doubted = 0, false
	m.answered++
	if !m.proven && !m.known {
		m.answeredAt = now
	}
	m.proven, m.heardAt = true, now
	m.measureRoundTrip(a, took, now)
	if a.start >= m.failedAt && (m.failures > 0 || m.silent || m.backoff.Failures() > 0) {
		m.failures, m.silent, m.restUntil = 0, false, 0
		m.backoff.Succeed()
		m.pool.returns(m)
		if m.noted {
			m.noted = false
			m.remember()
			m.pool.tell(nil, "", nil)
		}
	}
	switch {
	case a.expected >= time.Hour:
	case float64(took) > float64(a.expected)*m.tail:
		m.tail = min(greatestTail, m.tail*(1+0.95*tailStep))
	default:
		m.tail = max(leastTail, m.tail*(1-0.05*tailStep))
	}
}

func (m *member) delivers(a *attempt, now time.Duration) {
	m.answers(a, now)
	m.delivered += int64(a.request.Size)
	m.pool.delivered += int64(a.request.Size)
	if !a.directed {
		toward(&m.hits, true, hitWeight)
	}
	m.measureRate(a, now)
	m.deliveredAt = now
}

// refuses takes note that the member is busy. While it answers others, that is how many it gets at
// a time, and the block waits for its turn; if not, it is a rest as long as it wants, a few short
// ones for a member that has never answered, or a failure.
func (m *member) refuses(a *attempt, busy *fetch.BusyError, now time.Duration) outcome {
	m.lastError = busy
	others := max(m.requests, int(m.answered-a.answered))
	after := busy.After
	m.limit.Refuse(m.pool.epoch.Add(now), others, after)
	switch {
	case after > 0:
	case others > 0 || a.question != nil:
		return refusal
	case !m.proven && m.backoff.Failures() < mostBusy: // it is there
		m.backoff.Min = busyRest
		after = m.backoff.Fail(m.pool.epoch.Add(now), 0)
	}
	if after > 0 {
		m.restUntil = max(m.restUntil, now+min(after, longestRest))
		m.pool.reroute(now)
		return failure
	}
	m.fails(a, busy.Err, busyRest, now)
	if m.proven && m.isSoon(now) {
		return refusal
	}
	a.request.Err = busy.Err
	return failure
}

// fails takes note of a failure that says nothing about the block. All requests that were under way
// at the time of the first one fail for the same reason.
func (m *member) fails(a *attempt, err error, least, now time.Duration) {
	m.failed++
	m.lastError = err
	if a.start > m.failedAt {
		m.rests(err, least, now)
	}
}

// fallsSilent gives up all that was asked of a member that does not answer.
func (m *member) fallsSilent(now time.Duration) {
	err := fmt.Errorf("source has not answered for %v", m.quiet.Round(100*time.Millisecond))
	m.silent, m.lastError = true, err
	m.failed++
	m.quiet = 0
	m.cancelAll(err)
	m.rests(err, failureRest, now)
}

// rests has a member be left alone for a while, which least is the first of in a row. Other
// processes are told at once.
func (m *member) rests(err error, least, now time.Duration) {
	m.failedAt = now
	m.failures++
	if m.backoff.Min = least; m.silent {
		m.backoff.Min = silentRest
	}
	if m.silent && m.proven {
		m.renew() // its network may be gone, of which a connection is not told
	}
	m.restUntil = now + m.backoff.Fail(m.pool.epoch.Add(now), 0)
	if m.pauses(now) {
		m.restUntil = min(m.restUntil, now+waitForRest)
	}
	if m.resting() || m.failures >= unreachable {
		m.noted = true
		m.pool.options.State.Rests(m.name, m.pool.epoch.Add(m.restUntil), m.failures)
		f := m.pool.options.OnRest
		if m.told {
			f = nil
		}
		m.told = true
		m.pool.tell(f, m.name, err)
	}
	m.pool.reroute(now)
}

func (m *member) cancelAll(cause error) {
	for a := m.attempts.First(); a != nil; a = a.Next() {
		a.cancel(cause)
	}
}

// empty has blocks that wait for the member go elsewhere, if they can.
func (m *member) empty(now time.Duration) {
	for range m.queue.live {
		l := m.queue.First()
		m.queue.remove(l)
		m.pool.proceed(l, now)
	}
}

// lacks reports whether the member has said lately that it does not have a block.
func (m *member) lacks(k key, now time.Duration) bool {
	at, ok := m.missing[k]
	return ok && now-at <= missingAge
}

// remembersMissing notes that the member does not have a block, or not in any size.
func (m *member) remembersMissing(k key, anySize bool, now time.Duration) {
	if len(m.missing) >= maxMissing {
		clear(m.missing)
	}
	m.missing[k] = now
	if anySize {
		m.missing[key{k.reference, eris.BlockSize1KiB}] = now
		m.missing[key{k.reference, eris.BlockSize32KiB}] = now
	}
}

// remember adds to the state what was learnt since the last time.
func (m *member) remember() {
	if !m.proven || m.noted {
		return
	}
	bytes, took := m.learnt()
	m.pool.options.State.Measured(m.name, bytes, took, m.minRoundTrip())
}
