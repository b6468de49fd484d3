// SPDX-License-Identifier: GPL-3.0-or-later

// Package tasks does things in the background, each once for all who want it. Start with [New].
package tasks

import (
	"context"
	"errors"
	"maps"
	"runtime"
	"sync"
	"time"
)

const (
	// retryAfter is when what has failed may be tried again, and retryHopelessAfter when it is
	// hopeless.
	retryAfter         = time.Minute
	retryHopelessAfter = 24 * time.Hour
	// maxKept is how many tasks, most of them failures, are kept.
	maxKept = 100000
)

// ErrHopeless is wrapped by errors of what will hardly succeed the next time.
var ErrHopeless = errors.New("it will not be tried again soon")

// Tasks are things that are done in the background, with results. They are safe for concurrent use,
// and must be closed.
type Tasks[T any] struct {
	log     func(format string, a ...any)
	workers chan struct{}
	wait    sync.WaitGroup
	ctx     context.Context
	stop    context.CancelFunc

	mu     sync.Mutex
	closed bool
	all    map[string]*Task[T] // that are under way or have failed, by key
}

// A Task is one of them. When Done is closed, it has a Result or an Err.
type Task[T any] struct {
	Done   <-chan struct{}
	Result T
	Err    error

	until time.Time // when what has failed may be tried again; zero before
}

// New returns tasks of which as many are done at a time as there are cores. Failures go to log.
func New[T any](log func(format string, a ...any)) *Tasks[T] {
	t := &Tasks[T]{log: log, all: map[string]*Task[T]{}}
	t.ctx, t.stop = context.WithCancel(context.Background())
	t.SetWorkers(runtime.GOMAXPROCS(0))
	return t
}

// SetWorkers sets how many are done at a time, at least 1. It must be called before anything else.
func (t *Tasks[T]) SetWorkers(n int) { t.workers = make(chan struct{}, n) }

// Close ends what goes on, and waits for it. What is started from then on fails.
func (t *Tasks[T]) Close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.stop()
	t.wait.Wait()
}

// Start returns the task with a key. It is begun if there is none, or if it failed a minute ago, or
// a day ago with [ErrHopeless]. The context of do ends with the tasks.
func (t *Tasks[T]) Start(key string, do func(context.Context) (T, error)) *Task[T] {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.all[key]; e != nil && (e.until.IsZero() || time.Now().Before(e.until)) {
		return e
	}
	done := make(chan struct{})
	e := &Task[T]{Done: done}
	if t.closed {
		e.Err = context.Canceled
		close(done)
		return e
	}
	if len(t.all) >= maxKept {
		maps.DeleteFunc(t.all, func(_ string, e *Task[T]) bool { return !e.until.IsZero() })
	}
	t.all[key] = e
	t.wait.Go(func() {
		defer close(done)
		t.run(key, e, do)
	})
	return e
}

// run does a task when there is a worker for it.
func (t *Tasks[T]) run(key string, e *Task[T], do func(context.Context) (T, error)) {
	select {
	case t.workers <- struct{}{}:
		e.Result, e.Err = do(t.ctx)
		<-t.workers
	case <-t.ctx.Done():
		e.Err = t.ctx.Err()
	}
	if e.Err != nil && t.ctx.Err() == nil {
		t.log("%v", e.Err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case e.Err == nil || t.ctx.Err() != nil:
		delete(t.all, key)
	case errors.Is(e.Err, ErrHopeless):
		e.until = time.Now().Add(retryHopelessAfter)
	default:
		e.until = time.Now().Add(retryAfter)
	}
}
