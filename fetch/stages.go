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

// intercept has done called in place of Done, which must call proceed at its end.
func (r *Request) intercept(done func(r *Request)) {
	r.outer = append(r.outer, r.Done)
	r.Done = done
}

// proceed calls what intercept has replaced.
func (r *Request) proceed() {
	last := len(r.outer) - 1
	r.Done, r.outer = r.outer[last], r.outer[:last]
	r.Done(r)
}

// Within returns a source that says of all requests that the blocks are of the item with a root,
// and tells how many bytes each block has that has come. Got may be nil; it is called from any
// goroutine, and must not wait. Closing it closes the source.
func Within(source Source, root eris.Reference, got func(bytes int)) Source {
	w := &within{Source: source, root: root, got: got}
	w.done = w.count
	return w
}

type within struct {
	Source
	root eris.Reference
	got  func(bytes int)
	done func(r *Request) // count, as a value
}

func (w *within) Start(r *Request) {
	r.Root = w.root
	r.intercept(w.done)
	w.Source.Start(r)
}

func (w *within) count(r *Request) {
	if r.Err == nil && w.got != nil {
		w.got(len(r.Block))
	}
	r.proceed()
}

// Limited returns a source that asks another one for at most as many bytes per second as the
// limiter lets through, which may be shared by several sources. Blocks that do not come do not
// count; what a transport adds to a block does not either. Without a limiter it returns the source
// itself. To close it is to close the source.
func Limited(source Source, limiter *ratelimit.Limiter) Source {
	if limiter == nil {
		return source
	}
	l := &limited{Source: source, limiter: limiter, waiting: map[*Request]*time.Timer{}}
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
	waiting map[*Request]*time.Timer
}

func (l *limited) Start(r *Request) {
	wait := l.limiter.Take(int(r.Size))
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || wait <= 0 {
		l.pass(r)
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(wait, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.waiting[r] == timer {
			delete(l.waiting, r)
			l.pass(r)
		}
	})
	l.waiting[r] = timer
}

// pass hands a request to the source. The lock is held, so that nobody cancels it before.
func (l *limited) pass(r *Request) {
	r.intercept(l.done)
	l.Source.Start(r)
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
	timer := l.waiting[r]
	delete(l.waiting, r)
	if timer == nil {
		l.Source.Cancel(r)
	}
	l.mu.Unlock()
	if timer != nil {
		timer.Stop()
		l.limiter.Return(int(r.Size))
		r.Fail(context.Canceled)
	}
}

func (l *limited) Close() error {
	l.mu.Lock()
	l.closed = true
	waiting := l.waiting
	l.waiting = nil
	l.mu.Unlock()
	for r, timer := range waiting {
		timer.Stop()
		r.Fail(ErrClosed)
	}
	return l.Source.Close()
}
