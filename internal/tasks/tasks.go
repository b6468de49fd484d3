// SPDX-License-Identifier: GPL-3.0-or-later

// Package tasks does things in the background, each once for all who want it. Start with [New].
package tasks

import (
	"context"
	"errors"
	"maps"
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

// Tasks are things that are done in the background. They are safe for concurrent use, and must be
// closed.
type Tasks struct {
	log     func(format string, a ...any)
	workers int
	wait    sync.WaitGroup // for those at work
	ctx     context.Context
	stop    context.CancelFunc

	mu     sync.Mutex
	atWork int
	queue  []*Task
	all    map[string]*Task // that wait, are under way or have failed, by key
}

// A Task is one of them. When Done is closed, Err is nil after a success.
type Task struct {
	Done chan struct{}
	Err  error

	key   string
	do    func(context.Context) error
	until time.Time // when what has failed may be tried again; zero before
}

// New returns tasks of which so many are done at a time. Failures go to log.
func New(workers int, log func(format string, a ...any)) *Tasks {
	t := &Tasks{log: log, workers: workers, all: map[string]*Task{}}
	t.ctx, t.stop = context.WithCancel(context.Background())
	return t
}

// Close ends what goes on, and waits for it. What is started from then on fails.
func (t *Tasks) Close() {
	t.mu.Lock()
	t.stop()
	t.mu.Unlock()
	t.wait.Wait()
}

// Waiting returns how many tasks have not begun.
func (t *Tasks) Waiting() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.queue)
}

// Start returns the task with a key. It is begun if there is none, or if it failed a minute ago, or
// a day ago with [ErrHopeless]. The context of do ends with the tasks.
func (t *Tasks) Start(key string, do func(context.Context) error) *Task {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.all[key]; e != nil && (e.until.IsZero() || time.Now().Before(e.until)) {
		return e
	}
	e := &Task{Done: make(chan struct{}), key: key, do: do}
	if e.Err = t.ctx.Err(); e.Err != nil {
		close(e.Done)
		return e
	}
	if len(t.all) >= maxKept {
		maps.DeleteFunc(t.all, func(_ string, e *Task) bool { return !e.until.IsZero() })
	}
	t.all[key] = e
	t.queue = append(t.queue, e)
	if t.atWork < t.workers {
		t.atWork++
		t.wait.Go(t.work)
	}
	return e
}

// work does what waits until there is nothing.
func (t *Tasks) work() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.queue) > 0 {
		e := t.queue[0]
		t.queue = t.queue[1:]
		t.mu.Unlock()
		if e.Err = t.ctx.Err(); e.Err == nil {
			e.Err = e.do(t.ctx)
		}
		if e.Err != nil && t.ctx.Err() == nil {
			t.log("%v", e.Err)
		}
		t.mu.Lock()
		switch {
		case e.Err == nil || t.ctx.Err() != nil:
			delete(t.all, e.key)
		case errors.Is(e.Err, ErrHopeless):
			e.until = time.Now().Add(retryHopelessAfter)
		default:
			e.until = time.Now().Add(retryAfter)
		}
		e.do = nil
		close(e.Done)
	}
	t.atWork--
}
