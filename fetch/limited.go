// SPDX-License-Identifier: GPL-3.0-or-later

package fetch

import (
	"context"
	"errors"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
)

// Limited returns a source that asks another one for at most as many bytes per second as the
// limiter lets through, which may be shared by several sources. Blocks that do not come do not
// count; what a transport adds to a block does not either. Without a limiter it returns the source
// itself. To close it is to close the source.
func Limited(source Source, limiter *ratelimit.Limiter) Source {
	if limiter == nil {
		return source
	}
	l := &limited{Source: source, limiter: limiter, waiting: map[*Request]struct{}{}}
	l.done = l.over
	return l
}

// limited holds requests back, so that what was asked for is never held up. Requests that were let
// through are the source's.
type limited struct {
	Source
	limiter *ratelimit.Limiter
	done    func(r *Request)

	mu      sync.Mutex
	closed  bool
	waiting map[*Request]struct{} // those of queue that were not cancelled
	queue   []delayed             // in the order in which they came
	timer   *time.Timer           // runs while there is a queue
}

// delayed is a request that may be started at a time.
type delayed struct {
	request *Request
	at      time.Time
}

func (l *limited) Start(r *Request) {
	wait := l.limiter.Take(int(r.Size))
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || wait <= 0 && len(l.queue) == 0 {
		l.pass(r)
		return
	}
	l.queue = append(l.queue, delayed{r, time.Now().Add(wait)})
	l.waiting[r] = struct{}{}
	if l.timer == nil {
		l.timer = time.AfterFunc(wait, l.passDue)
	}
}

// pass hands a request to the source. The lock is held, so that nobody cancels it before.
func (l *limited) pass(r *Request) {
	r.intercept(l.done)
	l.Source.Start(r)
}

// passDue hands those to the source whose time has come.
func (l *limited) passDue() {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	for len(l.queue) > 0 {
		d := l.queue[0]
		if _, wanted := l.waiting[d.request]; wanted {
			if d.at.After(now) {
				l.timer.Reset(d.at.Sub(now))
				return
			}
			delete(l.waiting, d.request)
			l.pass(d.request)
		}
		l.queue = l.queue[1:]
	}
	l.queue, l.timer = nil, nil
}

// over gives back what was taken for a block that has not come. Wrong ones have.
func (l *limited) over(r *Request) {
	var wrong *eris.BlockError
	if r.Err != nil && !errors.As(r.Err, &wrong) {
		l.limiter.Return(int(r.Size))
	}
	r.proceed()
}

func (l *limited) Cancel(r *Request) {
	l.mu.Lock()
	_, waits := l.waiting[r]
	delete(l.waiting, r)
	if !waits {
		l.Source.Cancel(r)
	}
	l.mu.Unlock()
	if waits {
		l.limiter.Return(int(r.Size))
		r.Err = context.Canceled
		r.Done(r)
	}
}

// Waits reports whether a request is held back, so that the source does not know of it yet.
func (l *limited) Waits(r *Request) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, waits := l.waiting[r]
	return waits
}

func (l *limited) Close() error {
	l.mu.Lock()
	l.closed = true
	waiting := l.waiting
	l.waiting = map[*Request]struct{}{}
	if l.timer != nil {
		l.timer.Stop()
	}
	l.mu.Unlock()
	for r := range waiting {
		r.Err = ErrClosed
		r.Done(r)
	}
	return l.Source.Close()
}
