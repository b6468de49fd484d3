// SPDX-License-Identifier: GPL-3.0-or-later

// Package turns keeps what is known of when a server may be asked: it rests after failures, gets as
// many requests at a time as it answers when it is busy, and is asked again if it was there just
// now. Start with [New].
package turns

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/backoff"
)

const (
	// maxWait is how long a request waits in all for a busy server before the caller hears of it.
	maxWait   = 4 * time.Second
	firstRest = 100 * time.Millisecond
	// longestPause is the longest time before a request is made again whose connection was lost, or
	// a connection to a server that was there just now.
	longestPause = 2 * time.Second
	// mostLost is how often a request is made again so, in two minutes: it may be the reason.
	mostLost = 64
	// LongestRest is the longest time for which a server is left alone, or is missed after it has
	// answered.
	LongestRest = 30 * time.Second
)

// A LostError is a failure of the connection, not of the request, which may have been carried out.
type LostError struct {
	Err error
	// Again says that the request should be made once more on a new connection, at once.
	Again bool
}

// Error is that of Err.
func (e *LostError) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *LostError) Unwrap() error { return e.Err }

// Turns are those of one server. They are safe for concurrent use.
type Turns struct {
	open context.Context

	mu    sync.Mutex
	rest  backoff.Backoff // after failed connections, and when the server has asked for it
	cause error           // of the rest
	last  time.Time       // when the server has answered

	// Of calls of Retry.
	limit    backoff.Limit
	calls    int       // that are not waiting
	answered int       // calls that were not refused
	turn     sync.Cond // what waits until there may be one more waits on it
}

// New returns the turns of a server that is asked until open ends.
func New(open context.Context) *Turns {
	t := &Turns{open: open, rest: backoff.Backoff{Min: firstRest, Max: LongestRest}}
	t.turn.L = &t.mu
	return t
}

// Retry calls f, which makes a request, and calls it again when its error is a [*fetch.BusyError]:
// with others, when it has its turn, of which there are fewer then; or by itself, as often as that
// fits into some seconds. It does so, too, when the error is a [*LostError], as long as the server
// has answered within the last half minute, for two minutes at most. Other errors are those of f.
func (t *Turns) Retry(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(t.open, func() { cancel(fetch.ErrClosed) })()
	defer context.AfterFunc(ctx, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.turn.Broadcast()
	})()
	pauses := backoff.Backoff{Min: firstRest, Max: longestPause}
	for waited := time.Duration(0); ; {
		answered, err := t.begin(ctx)
		if err != nil {
			return err
		}
		began := time.Now()
		err = t.Resting()
		rests := err != nil
		if !rests {
			err = f()
		}
		busy, _ := errors.AsType[*fetch.BusyError](err)
		lost, _ := errors.AsType[*LostError](err)
		others := t.end(answered, busy, rests || lost != nil)
		var pause time.Duration
		switch {
		case err == nil:
			t.Succeed()
			return nil
		case busy != nil:
			if others == 0 {
				waited += max(busy.After, firstRest)
			}
			if waited > maxWait {
				return err
			}
			pause = busy.After
		case lost == nil:
			return err
		case lost.Again && pauses.Failures() == 0:
			pauses.Fail(time.Now(), 0)
		case !t.Lately(), pauses.Failures() == mostLost:
			return err
		default:
			pause = pauses.Fail(time.Now(), 0)
			if !rests {
				t.miss(lost, began)
			}
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return err // which says why the time was not enough
			}
			return context.Cause(ctx)
		}
	}
}

// begin waits until there may be one more call. It returns how many have been answered.
func (t *Turns) begin(ctx context.Context) (answered int, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for !t.limit.Allows(time.Now(), t.calls) && ctx.Err() == nil {
		t.turn.Wait()
	}
	t.turn.Signal() // there may be room for another one
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	t.calls++
	return t.answered, nil
}

// end takes note of how a call has ended, without an answer perhaps, and returns how many others
// were under way or were answered meanwhile.
func (t *Turns) end(answered int, busy *fetch.BusyError, unanswered bool) (others int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.calls--
	others = max(t.calls, t.answered-answered)
	switch {
	case unanswered:
	case busy == nil:
		t.answered++
	default:
		now := time.Now()
		t.limit.Refuse(now, max(1, others), busy.After)
		if others == 0 {
			t.rest.Fail(now, busy.After)
			t.cause = busy
		}
	}
	t.turn.Signal()
	return others
}

// Resting returns why no request is made at present, or nil.
func (t *Turns) Resting() error {
	if t.open.Err() != nil {
		return fetch.ErrClosed
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	left := t.rest.Rest(time.Now())
	if left == 0 {
		return nil
	}
	if busy, ok := errors.AsType[*fetch.BusyError](t.cause); ok {
		return &fetch.BusyError{After: left, Err: busy.Err}
	}
	return fmt.Errorf("not asked again for %v: %w", left.Round(time.Millisecond), t.cause)
}

// Fail has the server rest for some time, which it returns: for at least after, if that is not too
// long.
func (t *Turns) Fail(err error, after time.Duration) time.Duration {
	most := LongestRest
	if errors.As(err, new(*LostError)) {
		most = t.MaxRest()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cause = err
	t.rest.Max = most
	return t.rest.Fail(time.Now(), after)
}

// miss has the server rest, of which the connection was lost of a request that began at that time:
// but not if it has answered another one since.
func (t *Turns) miss(lost *LostError, began time.Time) {
	t.mu.Lock()
	answers := t.last.After(began)
	t.mu.Unlock()
	if !answers {
		t.Fail(lost, 0)
	}
}

// Lately reports whether the server has answered within the last half minute: it, or the line, may
// be away for a moment only.
func (t *Turns) Lately() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return time.Since(t.last) < LongestRest
}

// MaxRest returns for how long no connection is made at most after failures: [LongestRest], but
// less if the server has answered lately.
func (t *Turns) MaxRest() time.Duration {
	if t.Lately() {
		return longestPause
	}
	return LongestRest
}

// Succeed takes note of an answer, which ends the row of failures; but not a rest, which an answer
// to an earlier request says nothing about.
func (t *Turns) Succeed() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = time.Now()
	if t.rest.Rest(time.Now()) == 0 {
		t.rest.Succeed()
	}
}
