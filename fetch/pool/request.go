// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import (
	"context"
	"time"
)

// request is a block that is being asked from a source.
type request struct {
	flight     *flight
	member     *member
	size       int64
	background bool // not run by the caller of Get
	probe      bool // made to learn about the source
	doubled    bool // in the background, because the first request is late
	hedged     bool // another one was made because this is late
	cut        error

	start    time.Duration
	expected time.Duration // how long it was to take
	// The state of the source at the start, for the rate of delivery.
	delivered   int64
	deliveredAt time.Duration
	full        bool // all that could be asked of the source had been

	next, previous *request // of the same source, in order of start
	ctx            requestContext
}

// requestContext ends with the context of the caller, or when the request is cut. It is a part of the request, and made once for
// each, because a source may keep it.
type requestContext struct {
	parent context.Context
	scope  *scope
	done   chan struct{}
	ended  bool
}

// begin makes the context, before the request is handed to the source.
func (r *request) begin(s *scope, parent context.Context) {
	r.ctx.parent, r.ctx.scope, r.ctx.done = parent, s, make(chan struct{})
	if r.cut != nil || parent.Err() != nil {
		r.ctx.end()
	}
}

// cutOff ends the request.
func (r *request) cutOff(cause error) {
	if r.cut == nil {
		r.cut = cause
		r.ctx.end()
		if s := r.flight.started; s != nil && r == &s.request {
			s.cutOff()
		}
	}
}

func (c *requestContext) end() {
	if !c.ended && c.done != nil {
		c.ended = true
		close(c.done)
	}
}

func (c *requestContext) Deadline() (time.Time, bool) { return c.parent.Deadline() }
func (c *requestContext) Done() <-chan struct{}       { return c.done }
func (c *requestContext) Value(key any) any           { return c.parent.Value(key) }

func (c *requestContext) Err() error {
	select {
	case <-c.done:
		if err := c.parent.Err(); err != nil {
			return err
		}
		return context.Canceled
	default:
		return nil
	}
}
