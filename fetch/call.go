// SPDX-License-Identifier: GPL-3.0-or-later

package fetch

import "sync/atomic"

// A Call is a request that may be cancelled at any time, also while it is being started, and be
// used again and again: it has ended when Start of its source has returned and Done was called, in
// whichever order, so that nothing of one use meets the next. [Call.Init] comes first.
type Call struct {
	Request
	source Source
	ended  func()
	state  atomic.Int32
	left   atomic.Int32 // of the two that make the end
}

// States of a call, so that it is cancelled after it has been started.
const (
	starting int32 = iota
	started
	cancelled
)

// Init says what the call asks, and what is called at the end of each use, from any goroutine. That
// must not wait.
func (c *Call) Init(source Source, ended func()) {
	c.source, c.ended = source, ended
	c.Done = func(*Request) { c.step() }
	c.left.Store(2)
}

// Begin starts the request, which is set as for [Source.Start] but for Done.
func (c *Call) Begin() {
	c.source.Start(&c.Request)
	if !c.state.CompareAndSwap(starting, started) {
		c.source.Cancel(&c.Request)
	}
	c.step()
}

func (c *Call) step() {
	if c.left.Add(-1) == 0 {
		c.ended()
	}
}

// Cancel makes a call that has begun, or will, end soon. It never waits. One that has ended it does
// nothing to, but that it must be reset before it begins again.
func (c *Call) Cancel() {
	if c.state.Swap(cancelled) == started {
		c.source.Cancel(&c.Request)
	}
}

// Reset makes a call that has ended ready to begin again. What its sources hold on to may be of use
// then.
func (c *Call) Reset() {
	c.Request = Request{Done: c.Done, Held: c.Held, outer: c.outer}
	c.state.Store(starting)
	c.left.Store(2)
}
