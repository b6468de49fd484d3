// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import (
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// SourceStats is what a source has done, and what is known about it.
type SourceStats struct {
	URL        string        // without anything secret
	Requests   int64         // made
	Bytes      int64         // of blocks delivered
	Duplicates int64         // blocks delivered that another source had delivered before
	Misses     int64         // answers that it does not have the block
	Faults     int64         // answers with wrong bytes
	Failures   int64         // requests that failed otherwise
	Banned     bool          // because of a fault
	Resting    bool          // not used because of a failure, for now
	RoundTrip  time.Duration // the shortest; 0 if not known
	Rate       float64       // bytes per second; 0 if not known
	Window     int64         // bytes that may be in flight; 0 if that is not known
	Err        error         // the last failure or fault
}

// Stats returns what the sources have done so far, in the order in which they were given.
func (p *Pool) Stats() []SourceStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	stats := make([]SourceStats, len(p.members))
	for i, m := range p.members {
		stats[i] = SourceStats{
			URL: m.name, Requests: m.asked, Bytes: m.delivered, Duplicates: m.duplicates, Misses: m.misses, Faults: m.faults,
			Failures: m.failed, Banned: m.banned, Resting: m.restUntil > now || m.failures > 0 || m.silent,
			RoundTrip: m.minRoundTrip(), Rate: m.typical, Err: m.lastError,
		}
		if m.known {
			stats[i].Window = m.window()
		}
	}
	return stats
}

// Expectation is what blocks can be expected to cost.
type Expectation struct {
	// Rate is the sum of the rates of all sources in bytes per second, and RoundTrip the shortest time that one of them takes
	// for a block. They are 0 if nothing is known.
	Rate      float64
	RoundTrip time.Duration
	// Sources is how many sources can be used, and Known how many of these have a known rate.
	Sources, Known int
}

// Expect returns what is known about the sources that can be used, from this process and those before.
func (p *Pool) Expect() Expectation {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	var e Expectation
	for _, m := range p.members {
		if !m.usable(now) || m.failures > 0 || m.silent {
			continue
		}
		e.Sources++
		if !m.known {
			continue
		}
		if e.RoundTrip == 0 || m.minRoundTrip() < e.RoundTrip {
			e.RoundTrip = m.minRoundTrip()
		}
		if m.typical > 0 {
			e.Known++
			e.Rate += m.typical * m.score
		}
	}
	return e
}

// The window for readers: what is in memory for it must leave room for the rest of a process of 64 MiB. A request costs 4 KiB
// beside its block, for the stack of a goroutine that waits, unless it can be started without one.
const (
	leastReaderBytes    = 16 << 20
	usualReaderBytes    = 24 << 20
	usualReaderRequests = 4096
	mostReaderRequests  = 8192
	mostStartedRequests = 16384
)

// Window returns what a reader should keep in flight: what the sources hold in one round trip, twice, and room for blocks that
// wait for those before them. If nothing is known, it is enough for 1 Gbit/s at 70 ms.
func (p *Pool) Window() eris.Window {
	p.mu.Lock()
	defer p.mu.Unlock()
	product, known := 0.0, true
	for _, m := range p.members {
		if m.banned {
			continue
		}
		rate := m.typical
		if !m.known || rate == 0 {
			known = false
			continue
		}
		product += rate * (m.minRoundTrip() + slack).Seconds()
	}
	w := eris.Window{Requests: usualReaderRequests, Bytes: usualReaderBytes}
	most := mostReaderRequests
	if p.starts() {
		// Those that are not needed cost nothing.
		w.Requests, most = mostStartedRequests, mostStartedRequests
	}
	if known {
		w.Bytes = leastReaderBytes
	}
	// Half of it is for leaves.
	w.Bytes = min(p.options.MaxBytes, max(w.Bytes, int64(2*windowGain*product)))
	if requests := int(windowGain * product / float64(eris.BlockSize1KiB)); requests > w.Requests {
		w.Requests = min(requests, most)
	}
	w.Requests = min(w.Requests, p.options.MaxRequests)
	return w
}
