// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import (
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// SourceStats is what a source has done, and what is known about it.
type SourceStats struct {
	URL       string        // without anything secret
	Near      bool          // as in Member
	Requests  int64         // made
	Bytes     int64         // of blocks delivered
	Misses    int64         // answers that it does not have the block
	Faults    int64         // answers with wrong bytes
	Failures  int64         // requests that failed otherwise, and silences
	Banned    bool          // because of a fault
	Resting   bool          // not used because it failed or was silent, for now
	RoundTrip time.Duration // the shortest; 0 if not known
	Rate      float64       // bytes per second; 0 if not known
	Err       error         // the last failure or fault
}

// Stats returns what the sources have done so far, in the order in which they were given.
func (p *Pool) Stats() []SourceStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	stats := make([]SourceStats, len(p.members))
	for i, m := range p.members {
		stats[i] = SourceStats{
			URL: m.name, Near: m.near, Requests: m.asked, Bytes: m.delivered, Misses: m.misses,
			Faults: m.faults, Failures: m.failed, Banned: m.banned, Resting: m.restUntil > now || m.failures > 0 || m.silent,
			RoundTrip: m.minRoundTrip(), Rate: m.typical, Err: m.lastError,
		}
	}
	return stats
}

// Expectation is what blocks that are not near can be expected to cost.
type Expectation struct {
	// Sources is how many sources can be used, those that rest not counted; if it is 0, blocks
	// cannot be had now, and there is no figure to show. Known is how many of these have a rate
	// that was measured lately: what is older, or was never measured, is no reason to prefer
	// another way.
	Sources, Known int
	// Rate is the sum of the rates of those that are known in bytes per second, and RoundTrip the
	// shortest time that one of them takes to answer. They are 0 if nothing is known.
	Rate      float64
	RoundTrip time.Duration
}

// Expect returns what is known about the sources, from this process and those before. Whoever
// prefers another way because of it should call [Pool.Probe], so that it is noticed when sources
// can be used again.
func (p *Pool) Expect() Expectation {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	var e Expectation
	for _, m := range p.far {
		if !m.usable(now) || m.failures > 0 || m.silent {
			continue
		}
		e.Sources++
		if !m.known || m.typical <= 0 || now-m.typicalAt > believedFor {
			continue
		}
		e.Known++
		e.Rate += m.typical
		if e.RoundTrip == 0 || m.minRoundTrip() < e.RoundTrip {
			e.RoundTrip = m.minRoundTrip()
		}
	}
	return e
}

// The window for readers: what is in memory for it must leave room for the rest of a process of 64
// MiB. Requests that are not needed cost nothing.
const (
	leastReaderBytes = 16 << 20
	usualReaderBytes = 24 << 20
	// localRequests and localBytes are enough if all sources are on this machine: what is more only
	// takes memory, the use of which costs more than the block.
	localRequests, localBytes = 512, 8 << 20
)

// Window returns what a reader should keep in flight: what the sources hold in one round trip,
// twice, and room for blocks that wait for those before them. If nothing is known, it is enough for
// 1 Gbit/s at 70 ms.
func (p *Pool) Window() fetch.Window {
	p.mu.Lock()
	defer p.mu.Unlock()
	product, known, local := 0.0, true, true
	for _, m := range p.far {
		if m.banned {
			continue
		}
		local = local && m.local
		if !m.known || m.typical == 0 {
			known = false
			continue
		}
		product += m.typical * (m.minRoundTrip() + slack).Seconds()
	}
	if local && len(p.members) > 0 {
		return fetch.Window{Requests: localRequests, Bytes: localBytes}
	}
	w := fetch.Window{Requests: maxRequests, Bytes: usualReaderBytes}
	if known {
		w.Bytes = leastReaderBytes
	}
	// Half of it is for leaves.
	w.Bytes = min(maxBytes, max(w.Bytes, int64(2*windowGain*product)))
	return w
}
