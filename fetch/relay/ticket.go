// SPDX-License-Identifier: GPL-3.0-or-later

package relay

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// view is the relay as a client sees it.
type view struct {
	relay  *Relay
	client string
	hops   int
}

// Start implements [fetch.Source].
func (v *view) Start(q *fetch.Request) {
	r := v.relay
	q.Held = nil
	if !r.find(q) || v.hops == 1 {
		q.Done(q)
		return
	}
	t := &ticket{relay: r, outer: q, began: time.Now()}
	asked := r.pools[0]
	if v.hops > 1 {
		asked = r.pools[len(r.pools)-1]
	}
	t.inner.Init(asked, t.finish)
	t.inner.Pair, t.inner.Size = q.Pair, q.Size
	q.Held = t
	r.mu.Lock()
	t.client = r.clientOf(v.client)
	switch {
	case t.client.refuses():
		r.stats.Absent++
		r.stats.Refused++
		t.answered = true
		r.mu.Unlock()
		q.Block, q.Err = nil, errRefused
		q.Done(q)
		return
	case t.client.underWay >= t.client.most:
		t.client.waiting = append(t.client.waiting, t)
	default:
		t.client.underWay++
		t.booked = true
	}
	booked := t.booked
	t.timer = time.AfterFunc(firstSilence, t.check)
	r.mu.Unlock()
	if booked {
		t.start()
	}
}

// Cancel implements [fetch.Source].
func (v *view) Cancel(q *fetch.Request) {
	if t, ok := q.Held.(*ticket); ok {
		t.cancel(context.Canceled)
	}
}

// String returns the names of the upstreams.
func (v *view) String() string { return v.relay.pools[0].String() }

// Close does nothing: the relay is closed as a whole.
func (v *view) Close() error { return nil }

// refuses reports whether the client has looked for too many blocks in vain. If it has not, one
// more is booked, until it is found.
func (c *client) refuses() bool {
	if c.misses == nil {
		return false
	}
	if c.misses.Take(1) > 0 {
		c.misses.Return(1)
		return true
	}
	return false
}

// finds takes back what refuses has booked.
func (c *client) finds(size eris.BlockSize) {
	n := 1
	if size == eris.BlockSize1KiB {
		n = 2 // who does not know the size has looked for the other first
	}
	c.misses.Return(n)
}

// ticket is a request of upstreams, made once. It has memory of its own: when nobody waits for it
// any more, the block may come nevertheless, and is kept.
type ticket struct {
	relay *Relay
	outer *fetch.Request // of the client; not to be touched once it has been answered
	inner fetch.Call     // of the pool
	began time.Time

	// Guarded by the lock of the relay.
	client   *client
	booked   bool // among those under way of the client
	answered bool // Done of the outer one has been or is being called
	timer    *time.Timer
}

// start asks the pool. Called without the lock.
func (t *ticket) start() {
	t.inner.Dst = make([]byte, 0, t.inner.Size)
	t.inner.Begin()
}

// check gives the request up if nobody has answered for too long, or else looks again later.
func (t *ticket) check() {
	r := t.relay
	r.mu.Lock()
	now := time.Now()
	age, quiet, allowed := now.Sub(t.began), now.Sub(r.received), silence
	if quiet > recentTime {
		allowed = firstSilence
	}
	left := min(allowed-min(age, quiet), longest-age)
	if left > 0 && !t.answered {
		t.timer.Reset(left)
	}
	r.mu.Unlock()
	if left <= 0 {
		t.answer(errLate)
	}
}

// answer answers the client with an error, if it has not been answered. What was asked of the pool
// goes on.
func (t *ticket) answer(err error) {
	r, q := t.relay, t.outer
	r.mu.Lock()
	if t.answered {
		r.mu.Unlock()
		return
	}
	t.answered = true
	t.timer.Stop()
	if !t.booked {
		i := slices.Index(t.client.waiting, t)
		t.client.waiting = slices.Delete(t.client.waiting, i, i+1)
	}
	if err == errLate {
		r.stats.Absent++
		r.stats.Late++
	}
	q.Block, q.Err = nil, err
	r.mu.Unlock()
	q.Done(q)
}

// cancel is answer, and has the pool do no more.
func (t *ticket) cancel(cause error) {
	t.answer(cause)
	t.inner.Cancel()
}

// finish is called when the pool is done.
func (t *ticket) finish() {
	r, c, q := t.relay, t.client, t.outer
	err := t.verdict()
	r.mu.Lock()
	c.underWay--
	if len(c.waiting) > 0 {
		next := c.waiting[0]
		c.waiting = c.waiting[1:]
		c.underWay++
		next.booked = true
		r.starts.Go(next.start)
	}
	if err == nil {
		r.received = time.Now()
		c.finds(t.inner.Size)
	}
	answer := !t.answered
	t.answered = true
	t.timer.Stop()
	switch {
	case !answer:
	case err == nil:
		r.stats.Found++
	default:
		r.stats.Absent++
	}
	r.mu.Unlock()
	if answer {
		q.Err = err
		if err == nil {
			q.Block = append(q.Dst[:0], t.inner.Block...)
		}
		q.Done(q)
	}
}

// verdict returns the error for the client.
func (t *ticket) verdict() error {
	err := t.inner.Err
	if err == nil || errors.Is(err, eris.ErrNotFound) || errors.Is(err, fetch.ErrClosed) || errors.Is(err, context.Canceled) {
		return err
	}
	return fmt.Errorf("%w (%v)", fetch.ErrUnanswered, err)
}
