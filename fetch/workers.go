// SPDX-License-Identifier: GPL-3.0-or-later

package fetch

import (
	"cmp"
	"container/list"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// Workers makes requests of calls that wait, for transports that have no other (HTTP, files): a
// bounded number of goroutines, started as they are needed, which serve requests in the order in
// which these were started. They are a [Source], which others embed. They are safe for concurrent
// use.
type Workers struct {
	// Have, if not nil, is called for requests with Have, as get is for others. It must be set
	// before the first one.
	Have func(ctx context.Context, question, dst []byte) ([]byte, error)
	// Within, if not nil, is called in place of get, with the root of the item, and must be set
	// before the first request, too.
	Within func(ctx context.Context, root, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error)

	name   string
	get    func(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error)
	ctx    context.Context
	cancel context.CancelCauseFunc
	most   int

	mu      sync.Mutex
	wake    sync.Cond // workers that have nothing to do wait on it
	closed  bool
	waiting list.List          // of *task: those that no worker has taken, in order
	calls   map[*task]struct{} // that are under way
	running int
	idle    int
	group   sync.WaitGroup
}

// task is a request between Start and Done. Its call may last longer, and has what it needs of it.
type task struct {
	request   atomic.Pointer[Request] // nil once Done has been or is being called
	root      eris.Reference
	reference eris.Reference
	size      eris.BlockSize
	have      []byte
	waits     *list.Element // in the list of those that wait, or nowhere any more
	ctx       context.Context
	cancel    context.CancelFunc
}

// NewWorkers returns up to n workers, with a name for String and errors, that call get, which is as
// [Get] without verification: it returns an error that wraps [eris.ErrNotFound] for a block that
// the source does not have. It may write the block to dst, or return other memory that nobody
// changes; dst is the worker's until get returns, so that a call that does not end in time harms
// nobody. It should return soon after its context has ended; Close waits for it, but requests do
// not.
func NewWorkers(name string, n int, get func(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error)) *Workers {
	w := &Workers{name: name, get: get, most: n, calls: map[*task]struct{}{}}
	w.wake.L = &w.mu
	w.ctx, w.cancel = context.WithCancelCause(context.Background())
	return w
}

// String implements [Source].
func (w *Workers) String() string { return w.name }

// Start implements [Source].
func (w *Workers) Start(r *Request) {
	t := &task{root: r.Root, reference: r.Pair.Reference, size: r.Size, have: r.Have}
	t.request.Store(r)
	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		r.Fail(ErrClosed)
		return
	}
	r.Held = t
	t.waits = w.waiting.PushBack(t)
	switch {
	case w.idle > 0:
		w.idle--
		w.wake.Signal()
	case w.running < w.most:
		w.running++
		w.group.Go(w.work)
	}
	w.mu.Unlock()
}

// Cancel implements [Source].
func (w *Workers) Cancel(r *Request) {
	t, ok := r.Held.(*task)
	if !ok {
		return
	}
	w.mu.Lock()
	w.waiting.Remove(t.waits) // if it is there
	cancel := t.cancel
	w.mu.Unlock()
	if cancel != nil {
		cancel()
	}
	t.end(nil, context.Canceled)
}

// Close ends all requests and waits until the calls that are under way have returned. It always
// returns nil.
func (w *Workers) Close() error {
	w.mu.Lock()
	w.closed = true
	tasks := slices.Collect(maps.Keys(w.calls))
	for w.waiting.Len() > 0 {
		tasks = append(tasks, w.waiting.Remove(w.waiting.Front()).(*task))
	}
	w.wake.Broadcast()
	w.mu.Unlock()
	w.cancel(ErrClosed)
	for _, t := range tasks {
		t.end(nil, ErrClosed)
	}
	w.group.Wait()
	return nil
}

// end calls Done, if that has not been done.
func (t *task) end(block []byte, err error) {
	r := t.request.Swap(nil)
	if r == nil {
		return
	}
	// The block stands in memory of the worker, or of the source, which nobody changes.
	r.Block, r.Err = append(r.Dst[:0], block...), err
	r.Done(r)
}

func (w *Workers) work() {
	memory := make([]byte, 0, eris.BlockSize32KiB)
	for t := w.take(nil); t != nil; t = w.take(t) {
		block, err := w.serve(t.ctx, t, memory)
		if err != nil {
			block, err = nil, cmp.Or(context.Cause(t.ctx), fmt.Errorf("%s: %w", w.name, err))
		}
		t.cancel()
		t.end(block, err)
	}
}

func (w *Workers) serve(ctx context.Context, t *task, memory []byte) ([]byte, error) {
	switch {
	case t.have == nil && w.Within != nil:
		return w.Within(ctx, t.root, t.reference, t.size, memory)
	case t.have == nil:
		return w.get(ctx, t.reference, t.size, memory)
	case w.Have == nil:
		return nil, ErrCannotSay
	}
	return w.Have(ctx, t.have, memory)
}

// AsksHave reports whether requests with Have are understood.
func (w *Workers) AsksHave() bool { return w.Have != nil }

// take waits for the request after the last one of a worker. It returns nil when there will be
// none.
func (w *Workers) take(last *task) *task {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.calls, last)
	for w.waiting.Len() == 0 {
		if w.closed {
			return nil
		}
		w.idle++
		w.wake.Wait()
	}
	t := w.waiting.Remove(w.waiting.Front()).(*task)
	w.calls[t] = struct{}{}
	t.ctx, t.cancel = context.WithCancel(w.ctx)
	return t
}
