// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import (
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
)

const (
	// windowGain is how many times the product of bandwidth and delay is in flight: more than once,
	// or the bandwidth could not be seen to be greater.
	windowGain = 2.0
	// leastWindow is what is in flight in any case to a member that works.
	leastWindow = 128 << 10
	// slack is added to round trips, for what the scheduler of this machine takes.
	slack = 2 * time.Millisecond
	// gentleRequests is how many requests are in flight to a far member about which nothing is
	// known, if it is not the only one, or to one that has failed.
	gentleRequests = 4
	// unprovenRequests is how many are to one that only earlier processes know, then.
	unprovenRequests = 16
	// unknownBytes is what is in flight to a near member, or the only far one, before its first
	// answer. After that it is firstBytes and firstGain times what has been delivered, during some
	// round trips and at least firstTime: there is nobody else to give the blocks to, and a far one
	// would otherwise be found out slowly.
	unknownBytes = 512 << 10
	firstBytes   = 1 << 20
	firstGain    = 8
	firstTrips   = 3
	firstTime    = 500 * time.Millisecond
	// rateAge is for how long a rate that was reached counts, in round trips, and at least.
	rateAge      = 10
	leastRateAge = 500 * time.Millisecond
	// roundTripAge is for how long a round trip counts. When it is over the window drains, so that
	// it can be measured again.
	roundTripAge = 30 * time.Second
	// typicalWeight is the weight of one delivery in the typical rate.
	typicalWeight = 1.0 / 64
	// tellingBytes is what has to be delivered so that the rate says something about the member,
	// not about what was asked; a sixteenth of it will do after tellingTime.
	tellingBytes = 2 << 20
	tellingTime  = 2 * time.Second
	// believedFor is for how long a measured rate is a reason not to use a member, see
	// [Pool.Expect].
	believedFor = 10 * time.Minute
)

// speeds is how fast and how far a member is.
type speeds struct {
	known      bool          // roundTrip is
	answeredAt time.Duration // for the first time, if it was not known
	roundTrip  windowed      // seconds
	cleanAt    time.Duration // when roundTrip was last measured
	draining   bool          // it is to be measured
	rate       windowed      // bytes per second
	typical    float64       // rate, not the best but of late, when as much was asked as it can deliver
	typicalAt  time.Duration // when that was measured; negative: by an earlier process
	measured   bool          // it was by this process

	firstAt     time.Duration // of the first request
	delivered   int64         // bytes
	deliveredAt time.Duration
	remembered  int64 // of delivered, in the state
}

// windowed is the best of values of late: those of this period and the one before.
type windowed struct {
	present, before float64
	since           time.Duration
}

func (w *windowed) best(better func(a, b float64) float64) float64 {
	if w.before == 0 {
		return w.present
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

func seconds(s float64) time.Duration { return time.Duration(min(s, 1e9) * float64(time.Second)) }

func (s *speeds) recall(record sourcestate.Record, now time.Time) {
	if record.RoundTrip <= 0 {
		return
	}
	s.known = true
	s.roundTrip.present = record.RoundTrip.Seconds()
	s.rate.present, s.typical = record.Rate, record.Rate
	s.typicalAt = min(0, record.Measured.Sub(now))
}

// learnt returns how much has been delivered since the last call, and how long that took; 0 if it
// is not known.
func (s *speeds) learnt() (bytes int64, took time.Duration) {
	bytes = s.delivered - s.remembered
	s.remembered = s.delivered
	if s.measured {
		took = seconds(float64(bytes) / s.typical)
	}
	return bytes, took
}

func (s *speeds) minRoundTrip() time.Duration { return seconds(s.roundTrip.best(smaller)) }

// speed returns the rate in bytes per second, or a careful guess.
func (s *speeds) speed() float64 {
	if s.typical > 0 {
		return max(s.typical, s.rate.best(larger))
	}
	guess := 64e3 / (s.minRoundTrip() + slack).Seconds()
	return max(guess, s.rate.best(larger))
}

func (s *speeds) product() float64 { return s.speed() * (s.minRoundTrip() + slack).Seconds() }

// window returns how many bytes may be in flight. Alone says that there is nobody else who could be
// asked.
func (m *member) window(alone bool) int64 {
	w := leastWindow + int64(windowGain*m.product())
	if alone && m.proven && m.pool.now()-m.answeredAt < max(firstTime, firstTrips*m.minRoundTrip()) {
		w = max(w, firstBytes+firstGain*m.delivered)
	}
	return min(maxBytes, w)
}

// hasRoom reports whether the member may be asked for a further block.
func (m *member) hasRoom(alone bool, now time.Duration) bool {
	switch {
	case m.limiter != nil && now < m.pool.limitedUntil:
		return false
	case m.requests >= maxRequests, !m.limit.Allows(m.pool.epoch.Add(now), m.requests):
		return false
	case m.failures > 0 || m.silent:
		return m.requests < gentleRequests
	case !m.known && alone:
		return m.bytes < unknownBytes
	case !m.known:
		return m.requests < gentleRequests
	case !m.proven && !alone && m.requests >= unprovenRequests:
		return false
	}
	if m.proven && now-m.cleanAt > roundTripAge && !m.draining {
		m.draining, m.cleanAt = true, now
	}
	if m.draining && !m.isClean() {
		return false
	}
	return m.bytes < m.window(alone)
}

// isClean reports whether the answer to a request that is made now is not held up by those before
// it.
func (m *member) isClean() bool {
	return float64(m.bytes) <= m.rate.best(larger)*m.minRoundTrip().Seconds()/2
}

// measureRoundTrip takes note of how long an answer took. What a block itself takes on a slow line
// is no part of it.
func (m *member) measureRoundTrip(a *attempt, took, now time.Duration) {
	if !a.clean && m.known && m.proven {
		return
	}
	if m.measured {
		own := seconds(float64(a.request.Size) / m.rate.best(larger))
		took = max(took/64, took-own)
	}
	m.roundTrip.add(took.Seconds(), smaller, now, roundTripAge, true)
	m.known, m.cleanAt = true, now
}

// measureRate takes the rate between the last delivery before a request and its own, as in BBR
// (draft-ietf-ccwg-bbr, section "Delivery Rate Samples"), so that a burst does not count as speed.
func (m *member) measureRate(a *attempt, now time.Duration) {
	interval := now - a.deliveredAt
	if interval <= 0 {
		return
	}
	sample := float64(m.delivered-a.delivered) / interval.Seconds()
	m.rate.add(sample, larger, now, max(leastRateAge, rateAge*m.minRoundTrip()), a.full)
	if !a.full || m.delivered < tellingBytes && (m.delivered < tellingBytes/16 || now-m.firstAt <= tellingTime) {
		return
	}
	if m.typical == 0 || !m.measured && m.typicalAt < -believedFor {
		m.typical = sample
	}
	m.typical += (sample - m.typical) * typicalWeight
	m.measured, m.typicalAt = true, now
}
