// SPDX-License-Identifier: GPL-3.0-or-later

// Package ahead substitutes what the daemon will ask for before it asks. The daemon asks for one
// item after the other, so that line and processors are idle in between; but it has said before
// what it will need, and the order follows from references. Start with [New].
//
// # How it goes
//
// The query helper of a daemon process notes each item that the daemon asks about on its own in
// the [Session] of that process, if it can be had. The substitute helper of the same process reads
// that when the first request comes, finds out in which order the items will be asked for, and
// restores the next ones in the background, in a directory of its own in the store: by the same
// code, from the same sources, with the same check of NarHash, but to another place. When the
// daemon asks for one of them, it is renamed to its destination if it is complete, and waited for
// if it is under way. Whatever is wrong with a staged item means that it is not staged.
package ahead

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

const (
	// pollInterval is how often the session is looked at while a request is under way: the daemon
	// goes on to ask about items meanwhile.
	pollInterval = 20 * time.Millisecond
	// smallItem is the length of an archive in bytes up to which an item takes little of anything
	// but round trips, so that as many are restored at the same time as may be staged.
	smallItem = 256 << 10
	// othersWait is how long an item is waited for that another helper is staging.
	othersWait = time.Minute
	// maxRead is how many items are looked up at a time.
	maxRead = 1000
)

// A Restorer is what substitutes: a [substitute.Substituter].
type Restorer interface {
	// Known returns those of the items that can be had, in any order.
	Known(ctx context.Context, paths []string) []substitute.Item
	// Substitute restores an item to a destination and shows what happens.
	Substitute(ctx context.Context, path, destination string) substitute.Outcome
	// Prepare returns the restoration of an item to another place, of which nothing is shown before
	// that is asked for.
	Prepare(path, place string) *substitute.Restoration
}

// Options says how [Ahead] works.
type Options struct {
	StoreDir string   // the store directory, an absolute file name
	Session  *Session // of the daemon process
	Items    int      // how many items are staged at most
	Bytes    int64    // the sum of their NarSize at most
	Workers  int      // how many items that are not small are restored at the same time
}

// Stats tells what was staged.
type Stats struct {
	Staged, Used           int   // items
	StagedBytes, UsedBytes int64 // the sums of their NarSize
}

// Ahead substitutes items, and those that come next ahead of the daemon. Its methods are to be
// called by one goroutine; there is one request at a time.
type Ahead struct {
	o        Options
	restorer Restorer
	ctx      context.Context
	cancel   context.CancelFunc
	kick     chan struct{}
	group    errgroup.Group
	started  bool // what runs in the background

	mu      sync.Mutex
	plan    *plan
	stage   stage
	staged  map[string]*staged // by the file name of the item
	bytes   int64              // the sum of their NarSize
	large   int                // of those being restored
	request bool               // one is under way
	stats   Stats
}

// staged is an item that is staged or being staged.
type staged struct {
	item        substitute.Item
	restoration *substitute.Restoration
	cancel      context.CancelFunc
	done        chan struct{} // closed when there is an outcome
	outcome     substitute.Outcome
}

// key is the name of an item in the stage: the hash part of its file name, and the hash of its
// contents.
func key(item substitute.Item) string {
	hash, _, _ := strings.Cut(filepath.Base(item.Path), "-")
	return hash + "-" + strings.ReplaceAll(item.NarHash, "/", "_") // as base64 has them
}

// New returns an Ahead, which must be closed.
func New(restorer Restorer, o Options) *Ahead {
	a := &Ahead{o: o, restorer: restorer, kick: make(chan struct{}, 1), staged: map[string]*staged{}}
	a.ctx, a.cancel = context.WithCancel(context.Background())
	a.plan = newPlan(exists)
	a.stage.store = o.StoreDir
	if o.Session != nil {
		a.stage.name = filepath.Base(o.Session.path)
	}
	return a
}

// Close cancels what is under way and removes what is staged.
func (a *Ahead) Close() error {
	a.cancel()
	err := a.group.Wait()
	a.mu.Lock()
	defer a.mu.Unlock()
	clear(a.staged)
	if failed := a.stage.close(); err == nil {
		err = failed
	}
	return err
}

// Stats returns what has been staged so far.
func (a *Ahead) Stats() Stats {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.stats
}

// Substitute restores an item to a destination, as [substitute.Substituter.Substitute] does.
func (a *Ahead) Substitute(ctx context.Context, path, destination string) substitute.Outcome {
	// What is repaired is restored from its sources: the daemon does not trust what is there.
	if a.o.Items <= 0 || a.o.Session == nil || path != destination {
		return a.restorer.Substitute(ctx, path, destination)
	}
	s := a.begin(path)
	defer a.end()
	if s != nil {
		if o, ok := a.use(ctx, s, destination); ok {
			return o
		}
	} else if a.shared() {
		o, c := a.useOfOther(ctx, path, destination)
		if c == nil {
			return o
		}
		defer c.release()
	}
	return a.restorer.Substitute(ctx, path, destination)
}

// begin begins a request, and returns what is staged for it, or nil.
func (a *Ahead) begin(path string) *staged {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.request = true
	a.plan.take(path)
	s := a.staged[path]
	if s != nil {
		delete(a.staged, path)
		a.bytes -= int64(s.item.NarSize)
	}
	if !a.started {
		a.started = true
		a.group.Go(func() error {
			a.run()
			return nil
		})
	}
	a.wake()
	return s
}

// end ends a request. The daemon may kill this process any time now, and nothing should be left.
func (a *Ahead) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.request = false
	if len(a.staged) == 0 {
		a.stage.close()
	}
}

// use waits for a staged item and gives it its place.
func (a *Ahead) use(ctx context.Context, s *staged, destination string) (substitute.Outcome, bool) {
	s.restoration.Show()
	select {
	case <-s.done:
	case <-ctx.Done():
		s.cancel()
		<-s.done
	}
	if s.outcome.Status != substitute.Success || a.stage.move(key(s.item), destination) != nil {
		s.restoration.Finish(false)
		return substitute.Outcome{}, false
	}
	s.restoration.Finish(true)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stats.Used++
	a.stats.UsedBytes += int64(s.item.NarSize)
	return s.outcome, true
}

// shared reports whether other helpers of the session may be staging items, too. Then there is a
// stage.
func (a *Ahead) shared() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return (a.plan.left > 0 || exists(a.stage.path())) && a.stage.open() == nil
}

// useOfOther gives an item its place that another helper of the session has staged or is staging.
// If that cannot be, it returns the right to restore it, so that no other helper begins to.
func (a *Ahead) useOfOther(ctx context.Context, path, destination string) (substitute.Outcome, *claim) {
	known := a.restorer.Known(ctx, []string{path})
	if len(known) == 0 {
		return substitute.Outcome{}, &claim{}
	}
	moved, c := a.stage.take(key(known[0]), destination, othersWait)
	if moved {
		return known[0].Outcome(), nil
	}
	return substitute.Outcome{}, c
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// wake has the background look at what is to be done.
func (a *Ahead) wake() {
	select {
	case a.kick <- struct{}{}:
	default:
	}
}

// run keeps the stage full until the end.
func (a *Ahead) run() {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		a.read()
		for a.fill() {
		}
		var tick <-chan time.Time
		a.mu.Lock()
		if a.request {
			tick = ticker.C
		}
		a.mu.Unlock()
		select {
		case <-a.kick:
		case <-tick:
		case <-a.ctx.Done():
			return
		}
	}
}

// read adds to the plan what the daemon has asked about.
func (a *Ahead) read() {
	noted := a.o.Session.New()
	for len(noted) > 0 && a.ctx.Err() == nil {
		n := min(len(noted), maxRead)
		items := a.restorer.Known(a.ctx, noted[:n])
		noted = noted[n:]
		a.mu.Lock()
		for _, item := range items {
			a.plan.add(item)
		}
		a.mu.Unlock()
	}
}

// fill begins to stage the next item. It returns false if none can be.
func (a *Ahead) fill() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	item, ok := a.plan.next()
	if !ok || a.ctx.Err() != nil {
		return false
	}
	size := int64(min(item.NarSize, 1<<62))
	if size > a.o.Bytes {
		a.plan.take(item.Path)
		return true
	}
	large := item.NarSize > smallItem
	if len(a.staged) >= a.o.Items || a.bytes+size > a.o.Bytes || large && a.large >= a.o.Workers {
		return false
	}
	// Running items need the room for themselves.
	if a.stage.free() < a.o.Bytes+size || a.stage.open() != nil {
		return false
	}
	a.plan.take(item.Path)
	c := a.stage.claim(key(item))
	if c == nil {
		return true // another helper stages it
	}
	if exists(item.Path) {
		c.release()
		return true // another helper has been asked for it
	}
	ctx, cancel := context.WithCancel(a.ctx)
	s := &staged{item: item, cancel: cancel, done: make(chan struct{})}
	s.restoration = a.restorer.Prepare(item.Path, c.part())
	a.staged[item.Path] = s
	a.bytes += size
	if large {
		a.large++
	}
	a.group.Go(func() error {
		defer cancel()
		a.restore(ctx, s, c, large)
		return nil
	})
	return true
}

// restore stages an item.
func (a *Ahead) restore(ctx context.Context, s *staged, c *claim, large bool) {
	defer c.release()
	s.outcome = s.restoration.Run(ctx)
	// The narinfo may be another one than when the item was planned, but the key names a hash.
	if s.outcome.Status != substitute.Success || s.outcome.NarHash != s.item.NarHash || c.finish() != nil {
		s.outcome = substitute.Outcome{}
		if c.holds() {
			restore.Remove(c.part())
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if large {
		a.large--
	}
	if s.outcome.Status == substitute.Success {
		a.stats.Staged++
		a.stats.StagedBytes += int64(s.item.NarSize)
	} else if a.staged[s.item.Path] == s {
		delete(a.staged, s.item.Path)
		a.bytes -= int64(s.item.NarSize)
	}
	close(s.done)
	a.wake()
}
