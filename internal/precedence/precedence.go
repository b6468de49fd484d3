// SPDX-License-Identifier: GPL-3.0-or-later

// Package precedence lets what somebody waits for come first, where it shares a network connection
// of unknown speed with what is fetched ahead. Start with [Order].
package precedence

import (
	"context"
	"io"
	"sync/atomic"
	"time"
)

const (
	// noticeable is how long somebody has waited for bytes before others give way to them, if there
	// were some recently, and longestPause for how long at once. pauseStep is how often they look.
	noticeable   = 5 * time.Millisecond
	recently     = 200 * time.Millisecond
	longestPause = 100 * time.Millisecond
	pauseStep    = 2 * time.Millisecond
)

// An Order sees to it that what the daemon waits for comes first on a network that others use as
// well. Others give way while it keeps coming, but is waited for: then the network is what takes
// the time, and not a processor. The zero value is ready. It is safe for concurrent use.
type Order struct {
	since atomic.Int64 // when the call of Read began that somebody waits for, or 0; in nanoseconds
	last  atomic.Int64 // when one has brought bytes
}

// Read reads what the daemon waits for, which is one thing at a time.
func (o *Order) Read(r io.Reader, b []byte) (int, error) {
	o.since.Store(time.Now().UnixNano())
	n, err := r.Read(b)
	o.since.Store(0)
	if n > 0 {
		o.last.Store(time.Now().UnixNano())
	}
	return n, err
}

// waits reports whether somebody waits for bytes that keep coming.
func (o *Order) waits() bool {
	now, since := time.Now().UnixNano(), o.since.Load()
	return since != 0 && time.Duration(now-since) >= noticeable && time.Duration(now-o.last.Load()) < recently
}

// GiveWay waits while others wait for what keeps coming, but not for long at once, and no longer
// than ctx: what comes without pause must not keep others from coming at all.
func (o *Order) GiveWay(ctx context.Context) {
	for begin := time.Now(); o.waits() && time.Since(begin) < longestPause; {
		select {
		case <-time.After(pauseStep):
		case <-ctx.Done():
			return
		}
	}
}
