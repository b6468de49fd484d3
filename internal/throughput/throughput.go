// SPDX-License-Identifier: GPL-3.0-or-later

// Package throughput has what is known, or assumed, of how fast bytes come.
package throughput

import (
	"fmt"
	"time"
)

// A Speed is how fast bytes come.
type Speed struct {
	Rate    float64       // bytes per second
	Latency time.Duration // of an answer
	Known   bool          // it has been measured
	None    bool          // nothing comes at the moment
}

// Unknown is what is expected of what has not been measured.
var Unknown = Speed{Rate: 10e6, Latency: 100 * time.Millisecond}

// Longest is the longest time that is expected of anything.
const Longest = 24 * time.Hour

// OrUnknown returns the speed, or [Unknown] where nothing, or nothing that makes sense, has been
// measured.
func (s Speed) OrUnknown() Speed {
	if s.None || s.Known && s.Rate > 0 && s.Latency < Longest {
		return s
	}
	return Unknown
}

// String tells a speed to people.
func (s Speed) String() string {
	if s.None {
		return "out of reach"
	}
	how := "measured"
	switch {
	case !s.Known:
		how = "not measured"
	case s.Latency == 0:
		how = "this machine"
	}
	return fmt.Sprintf("%.1f MB/s after %d ms (%s)", s.Rate/1e6, s.Latency.Milliseconds(), how)
}

// Seconds is a time of so many seconds, the longest one at most.
func Seconds(s float64) time.Duration {
	return time.Duration(min(s, Longest.Seconds()) * float64(time.Second))
}
