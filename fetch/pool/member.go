// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import (
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

const (
	// windowGain is how many times the product of bandwidth and delay is in flight: more than once, or the bandwidth could
	// not be seen to be greater.
	windowGain = 2.0
	// leastWindow is what is in flight in any case to a source that works.
	leastWindow = 128 << 10
	// slack is added to round trips, for what the scheduler of this machine takes.
	slack = 2 * time.Millisecond
	// gentleRequests is how many requests are in flight to a source about which nothing is known.
	gentleRequests = 4
	// unprovenRequests is how many are to one that only earlier processes know.
	unprovenRequests = 16
	// rateAge is for how long a rate that was reached counts, in round trips, and at least.
	rateAge      = 10
	leastRateAge = 500 * time.Millisecond
	// hitWeight is the weight of one answer in the share of blocks that a source has.
	hitWeight = 1.0 / 32
	// typicalWeight is the weight of one delivery in the typical rate.
	typicalWeight = 1.0 / 64
	// firstTail, leastTail and greatestTail are of the 95th percentile of how long requests take, in units of what was
	// expected.
	firstTail, leastTail, greatestTail = 2.0, 1.2, 8.0
	tailStep                           = 0.05

	firstRest, lastRest = 100 * time.Millisecond, 30 * time.Second
	// failureAge is for how long a source that could not be reached by an earlier process is tried gently.
	failureAge = 10 * time.Minute

	maxMissing = 4096
	missingAge = 30 * time.Second
	// tellingBytes is what has to be delivered so that the rate says something about the source, not about what was asked; a
	// sixteenth of it will do after tellingTime.
	tellingBytes = 2 << 20
	tellingTime  = 2 * time.Second
)

// member is a source and what is known about it. All of it is guarded by the lock of the pool.
type member struct {
	pool    *Pool
	source  fetch.Source
	starter eris.Starter // the source, or nil
	name    string
	index   int
	bit     set
	score   float64

	banned    bool
	proven    bool // it has answered
	failures  int  // in a row
	failedAt  time.Duration
	restUntil time.Duration
	lastError error
	probing   bool
	silent    bool          // it does not answer, but perhaps a probe
	quiet     time.Duration // for how long there was no answer

	first, last *request // in flight, in order of start
	requests    int
	bytes       int64

	known       bool // roundTrip is
	roundTrip   windowed
	rate        windowed // bytes per second
	typical     float64  // rate, not the best but of late, when as much was asked as it can deliver
	measured    bool     // typical is, by this process
	firstAt     time.Duration
	hits        float64 // share of what was asked that it had
	tail        float64 // see firstTail
	delivered   int64   // bytes
	deliveredAt time.Duration

	missing      map[flightKey]struct{}
	missingSince time.Duration

	asked, duplicates, misses, faults, failed int64
	remembered                                int64 // of delivered, in the state
}

// windowed is the best of values of late: those of this period and the one before.
type windowed struct {
	present, before float64
	since           time.Duration
}

func (w *windowed) best(better func(a, b float64) float64) float64 {
	switch {
	case w.before == 0:
		return w.present
	case w.present == 0:
		return w.before
	}
	return better(w.present, w.before)
}

func larger(a, b float64) float64  { return max(a, b) }
func smaller(a, b float64) float64 { return min(a, b) }

// add takes a value; forget says that older ones may be forgotten after a time.
func (w *windowed) add(value float64, better func(a, b float64) float64, now, age time.Duration, forget bool) {
	if forget && now-w.since > age && w.present != 0 {
		w.before, w.present, w.since = w.present, 0, now
	}
	if w.present == 0 {
		w.present = value
	} else {
		w.present = better(w.present, value)
	}
}

func newMember(p *Pool, i int, s fetch.Source) *member {
	m := &member{
		pool: p, source: s, name: s.String(), index: i, bit: 1 << i, hits: 1, tail: firstTail,
		failedAt: -1, missing: map[flightKey]struct{}{},
	}
	m.starter, _ = s.(eris.Starter)
	record := p.options.State.Get(m.name)
	m.score = record.Score
	if record.RoundTrip > 0 {
		m.known = true
		m.roundTrip.present = record.RoundTrip.Seconds()
		m.rate.present, m.typical = record.Rate, record.Rate
	}
	if !record.Failure.IsZero() && p.epoch.Sub(record.Failure) < failureAge {
		m.failures = 1 // not yet again: the first request tells
	}
	return m
}

// usable reports whether anything may be asked.
func (m *member) usable(now time.Duration) bool { return !m.banned && m.restUntil <= now }

// trusted reports whether the source works, as far as is known.
func (m *member) trusted(now time.Duration) bool {
	return m.usable(now) && m.known && m.failures == 0 && !m.silent
}

func (m *member) minRoundTrip() time.Duration {
	return time.Duration(m.roundTrip.best(smaller) * float64(time.Second))
}

// speed returns the rate in bytes per second, or a careful guess.
func (m *member) speed() float64 {
	guess := 64e3 / (m.minRoundTrip() + slack).Seconds()
	return max(guess, m.rate.best(larger))
}

// expected returns after what time a further block would come. What is in flight to a source that is not known is no guide.
func (m *member) expected(size int64) time.Duration {
	if !m.known {
		return time.Hour
	}
	d := max(m.minRoundTrip(), time.Duration(float64(m.bytes+size)/m.speed()*float64(time.Second)))
	return time.Duration(float64(d) / m.score)
}

// window returns how many bytes may be in flight.
func (m *member) window() int64 {
	product := m.speed() * (m.minRoundTrip() + slack).Seconds()
	return min(m.pool.options.MaxBytes, leastWindow+int64(windowGain*product))
}

func (m *member) hasRoom() bool {
	if !m.known || m.failures > 0 || m.silent {
		return m.requests < gentleRequests
	}
	if !m.proven && m.requests >= unprovenRequests {
		return false
	}
	return m.requests < m.pool.options.MaxRequests && m.bytes < m.window()
}

// sent books a request.
func (m *member) sent(r *request, now time.Duration) {
	if m.requests == 0 {
		m.deliveredAt, m.quiet = now, 0
	}
	if m.asked == 0 {
		m.firstAt = now
	}
	r.start, r.delivered, r.deliveredAt = now, m.delivered, m.deliveredAt
	r.expected = m.expected(r.size)
	m.requests++
	m.bytes += r.size
	m.asked++
	r.full = m.bytes >= m.window()/2
}

// received books that it is over, whatever came of it.
func (m *member) received(r *request, _ time.Duration) {
	m.requests--
	m.bytes -= r.size
}

// list puts a request at the end of those in flight.
func (m *member) list(r *request) {
	r.previous = m.last
	if m.last == nil {
		m.first = r
	} else {
		m.last.next = r
	}
	m.last = r
}

func (m *member) unlist(r *request) {
	if r.previous == nil {
		m.first = r.next
	} else {
		r.previous.next = r.next
	}
	if r.next == nil {
		m.last = r.previous
	} else {
		r.next.previous = r.previous
	}
	r.next, r.previous = nil, nil
}

// answers takes note of an answer, with the block or not.
func (m *member) answers(r *request, now time.Duration) {
	took := max(now-r.start, time.Microsecond)
	m.roundTrip.add(took.Seconds(), smaller, now, 30*time.Second, true)
	if r.start >= m.failedAt {
		m.failures = 0
		m.restUntil = 0
	}
	m.known, m.proven, m.silent, m.quiet = true, true, false, 0
	if r.expected < time.Hour {
		if float64(took) > float64(r.expected)*m.tail {
			m.tail = min(greatestTail, m.tail*(1+0.95*tailStep))
		} else {
			m.tail = max(leastTail, m.tail*(1-0.05*tailStep))
		}
	}
}

// delivers takes note of a block.
func (m *member) delivers(r *request, now time.Duration) {
	m.answers(r, now)
	m.delivered += r.size
	m.pool.delivered += r.size
	m.hits += (1 - m.hits) * hitWeight
	// The rate between the last delivery before the request and now, as in BBR (draft-ietf-ccwg-bbr, section "Delivery Rate
	// Samples"), so that a burst does not count as speed.
	if interval := now - r.deliveredAt; interval > 0 {
		sample := float64(m.delivered-r.delivered) / interval.Seconds()
		m.rate.add(sample, larger, now, max(leastRateAge, rateAge*m.minRoundTrip()), r.full)
		if r.full && (m.delivered >= tellingBytes || m.delivered >= tellingBytes/16 && now-m.firstAt > tellingTime) {
			if m.typical == 0 {
				m.typical = sample
			}
			m.typical += (sample - m.typical) * typicalWeight
			m.measured = true
		}
	}
	m.deliveredAt = now
}

// late takes note of a request that was given up because another source was faster.
func (m *member) late(r *request, now time.Duration) {
	if r.expected < time.Hour && float64(now-r.start) > float64(r.expected)*m.tail {
		m.tail = min(greatestTail, m.tail*(1+0.95*tailStep))
	}
}

// fails takes note of a failure that says nothing about the block. All requests that were under way at the time of the first
// one fail for the same reason.
func (m *member) fails(r *request, err error, now time.Duration) {
	m.failed++
	m.lastError = err
	if r.start <= m.failedAt {
		return
	}
	m.failedAt = now
	rest := lastRest
	if m.failures < 9 {
		rest = min(lastRest, firstRest<<m.failures)
	}
	m.failures++
	m.restUntil = now + rest
	if !m.proven {
		m.pool.options.State.Failed(m.name)
	}
	m.pool.sweep()
}

// cut ends all requests of callers that are in flight.
func (m *member) cut(cause error) {
	for r := m.first; r != nil; r = r.next {
		r.cutOff(cause)
	}
}

// lacks reports whether the source has said lately that it does not have a block.
func (m *member) lacks(key flightKey) bool {
	if len(m.missing) == 0 {
		return false
	}
	_, ok := m.missing[key]
	if ok && m.pool.now()-m.missingSince > missingAge {
		clear(m.missing)
		return false
	}
	return ok
}

func (m *member) remembersMissing(key flightKey) {
	now := m.pool.now()
	if len(m.missing) >= maxMissing || now-m.missingSince > missingAge {
		clear(m.missing)
		m.missingSince = now
	}
	m.missing[key] = struct{}{}
}

// remember adds to the state what was learnt since the last time.
func (m *member) remember() {
	if !m.proven {
		return
	}
	bytes, took := m.delivered-m.remembered, time.Duration(0)
	if m.measured {
		took = time.Duration(float64(bytes) / m.typical * float64(time.Second))
	}
	m.remembered = m.delivered
	m.pool.options.State.Measured(m.name, bytes, took, m.minRoundTrip())
}

var _ eris.VerifiedBlocks = (*Pool)(nil)
