// SPDX-License-Identifier: GPL-3.0-or-later

// Package ahead substitutes what the daemon will ask for before it asks, see "Ahead of the daemon"
// in docs/design.md. The query helper notes what it was asked about in a [Session]; the substitute
// helper reads that, and stages the next items: by the same code, from the same sources, with the
// same check of NarHash, but to another place. Start with [New].
package ahead

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

const (
	// pollInterval is how often it is looked what is to be done while a request is under way: the
	// daemon goes on to ask about items meanwhile. As long as each comes at once, none are staged,
	// for that would cost more than it gives.
	pollInterval = 5 * time.Millisecond
	// While an item is restored it takes leastMemory bytes of memory, and its NarSize, but
	// mostMemory in all at most.
	leastMemory = 512 << 10
	mostMemory  = 8 << 20
	// atOnceAtFirst is how many items are restored at the same time before any has been: each that
	// has been makes room for one more.
	atOnceAtFirst = 8
	// mostPassed is how many requests for others, for each item that may be staged, tell that the
	// daemon will not ask for an item that is staged.
	mostPassed = 2
	// othersWait is how long an item is waited for that another helper is staging.
	othersWait = time.Minute
	// maxRead is how many items are looked up at a time.
	maxRead = 1000
)

// Options says how [Ahead] works.
type Options struct {
	Session *Session // of the daemon process; nil stages nothing
	Items   int      // how many items are staged at most
	Bytes   int64    // the sum of their NarSize at most
	// AtOnce returns how many items are restored at the same time at most; they are fewer where
	// many fail. It must not wait.
	AtOnce  func() int
	Workers int // how many large ones; of others as many as take the same memory
}

// Ahead substitutes items, and those that come next ahead of the daemon. Its methods are to be
// called by one goroutine; there is one request at a time.
type Ahead struct {
	o        Options
	restorer *substitute.Substituter
	ctx      context.Context
	cancel   context.CancelFunc
	kick     chan struct{}
	group    sync.WaitGroup

	mu       sync.Mutex
	plan     *plan
	stage    stage
	staged   map[string]*staged // by the file name of the item
	bytes    int64              // the sum of their NarSize
	running  int                // of those, how many are being restored
	limit    int                // how many may be: more after successes, fewer after failures
	step     int                // how many successes make room for one more
	good     int                // successes since there was room for one more
	fewer    int                // how often there was made room for fewer
	memory   int64              // that these take
	request  bool               // one is under way
	requests int                // so far
	poll     *time.Timer        // while one is under way
	err      error              // why nothing is staged any more
}

// staged is an item that is staged or being staged.
type staged struct {
	item        substitute.Item
	restoration *substitute.Restoration
	cancel      context.CancelFunc
	request     int           // the one under way when it was begun
	fewer       int           // that of the Ahead when it was begun
	done        chan struct{} // closed when there is an outcome
	outcome     substitute.Outcome
}

// memory returns how many bytes of memory the item takes while it is restored.
func (s *staged) memory() int64 { return min(leastMemory+int64(s.item.NarSize), mostMemory) }

// key is the name of an item in the stage: the hash part of its file name, and the hash of its
// contents.
func key(item substitute.Item) string {
	hash, _, _ := strings.Cut(filepath.Base(item.Path), "-")
	return hash + "-" + strings.ReplaceAll(item.NarHash, "/", "_") // as base64 has them
}

// New returns an Ahead, which must be closed.
func New(restorer *substitute.Substituter, o Options) *Ahead {
	a := &Ahead{o: o, restorer: restorer, kick: make(chan struct{}, 1), staged: map[string]*staged{}, limit: atOnceAtFirst, step: 1}
	a.ctx, a.cancel = context.WithCancel(context.Background())
	a.plan = newPlan(exists)
	a.stage.store = restorer.StoreDir
	if o.Session != nil {
		a.stage.name = filepath.Base(o.Session.path)
		a.group.Go(a.run)
	}
	return a
}

// Close cancels what is under way and removes what is staged.
func (a *Ahead) Close() error {
	a.cancel()
	a.group.Wait()
	a.mu.Lock()
	defer a.mu.Unlock()
	clear(a.staged)
	return a.stage.close()
}

// Err returns why nothing is staged any more, or nil.
func (a *Ahead) Err() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

// Substitute restores an item to a destination, as [substitute.Substituter.Substitute] does.
func (a *Ahead) Substitute(ctx context.Context, path, destination string) substitute.Outcome {
	// What is repaired is restored from its sources: the daemon does not trust what is there.
	if a.o.Session == nil || path != destination {
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
	o := a.restorer.Substitute(ctx, path, destination)
	if o.Status == substitute.Success {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.plan.again()
	}
	return o
}

// begin begins a request, and returns what is staged for it, or nil.
func (a *Ahead) begin(path string) *staged {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.request = true
	a.requests++
	a.plan.take(path)
	a.poll = time.AfterFunc(pollInterval, a.look)
	if len(a.staged) > 0 {
		a.wake()
	}
	s := a.staged[path]
	if s != nil {
		a.forget(path, s)
	}
	return s
}

// look has the background look at what is to be done, again and again during a request.
func (a *Ahead) look() {
	a.wake()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.request {
		a.poll.Reset(pollInterval)
	}
}

// forget takes an item out of those that are staged. The caller holds the lock.
func (a *Ahead) forget(path string, s *staged) {
	delete(a.staged, path)
	a.bytes -= int64(s.item.NarSize)
}

// MakeRoom gives up what the helpers of the session have staged, for what the daemon waits for, and
// reports whether there was something. Nothing is staged any more then.
func (a *Ahead) MakeRoom() bool {
	if a.o.Session == nil {
		return false
	}
	a.mu.Lock()
	given := a.staged
	a.staged, a.bytes, a.err = map[string]*staged{}, 0, errFull
	a.mu.Unlock()
	for _, s := range given {
		s.cancel()
		<-s.done
	}
	return exists(a.stage.path()) && a.stage.collect() == nil
}

var errFull = errors.New("the file system of the store is full")

// used counts an item that was used.
func (a *Ahead) used(item substitute.Item) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.o.Session.counts
	c.add(&c.Used, &c.UsedBytes, item)
}

// end ends a request. The daemon may kill this process any time now, and nothing should be left.
func (a *Ahead) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.request = false
	a.poll.Stop()
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
		a.stage.remove(key(s.item))
		s.restoration.Finish(false)
		return substitute.Outcome{}, false
	}
	s.restoration.Finish(true)
	a.used(s.item)
	return s.outcome, true
}

// shared reports whether other helpers of the session may be staging items, too. Then there is a
// stage.
func (a *Ahead) shared() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err == nil && (a.plan.left > 0 || exists(a.stage.path())) && a.stage.open() == nil
}

// useOfOther gives an item its place that another helper of the session has staged or is staging.
// If that cannot be, it returns the right to restore it, so that no other helper begins to.
func (a *Ahead) useOfOther(ctx context.Context, path, destination string) (substitute.Outcome, *claim) {
	known := a.restorer.Known(ctx, []string{path})
	if len(known) == 0 {
		return substitute.Outcome{}, &claim{}
	}
	within, cancel := context.WithTimeout(ctx, othersWait)
	defer cancel()
	moved, c := a.stage.take(within, key(known[0]), destination)
	if moved {
		shown := a.restorer.Log.Download(destination)
		shown.From("file://"+filepath.Join(a.stage.path(), key(known[0])), 0)
		shown.Finish(true)
		a.used(known[0])
		return substitute.Outcome{Status: substitute.Success, NarHash: known[0].NarHash, NarSize: known[0].NarSize}, nil
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
	for {
		select {
		case <-a.kick:
		case <-a.ctx.Done():
			return
		}
		a.read()
		a.evict()
		for a.fill() {
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

// evict removes items that will not be asked for: the daemon has asked for many that come later, or
// there is one already, because another helper was asked.
func (a *Ahead) evict() {
	a.mu.Lock()
	var evicted []*staged
	for path, s := range a.staged {
		passed := a.requests-s.request > mostPassed*a.o.Items
		if s.outcome.Status == substitute.Success && (passed || exists(path)) {
			a.forget(path, s)
			evicted = append(evicted, s)
		}
	}
	a.mu.Unlock()
	for _, s := range evicted {
		a.stage.remove(key(s.item)) // unless another helper has taken it
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
	s := &staged{item: item, request: a.requests, fewer: a.fewer, done: make(chan struct{})}
	if len(a.staged) >= a.o.Items || a.bytes+size > a.o.Bytes || a.running >= min(a.limit, a.o.AtOnce()) ||
		a.memory+s.memory() > int64(a.o.Workers)*mostMemory {
		return false
	}
	// Running items need the room for themselves.
	if room, err := files.RoomIn(a.stage.store); a.err != nil || err != nil || !room.Holds(a.o.Bytes+size) {
		return false
	}
	if err := a.stage.open(); err != nil {
		if !errors.Is(err, unix.EWOULDBLOCK) {
			a.err = err
		}
		return false
	}
	a.plan.take(item.Path)
	c := a.stage.claim(key(item))
	if c == nil {
		return true // another helper stages it
	}
	// The daemon locks what it has asked a helper for, and nothing is there before the first bytes.
	if exists(item.Path) || exists(item.Path+".lock") {
		c.release()
		return true // another helper has been asked for it
	}
	ctx, cancel := context.WithCancel(a.ctx)
	s.cancel = cancel
	s.restoration = a.restorer.Prepare(item.Path, c.part)
	a.staged[item.Path] = s
	a.bytes += size
	a.running++
	a.memory += s.memory()
	a.group.Go(func() { c.watch(ctx, cancel) })
	a.group.Go(func() {
		defer cancel()
		a.restore(ctx, s, c)
	})
	return true
}

// restore stages an item.
func (a *Ahead) restore(ctx context.Context, s *staged, c *claim) {
	defer c.release()
	outcome := s.restoration.Run(ctx)
	// The narinfo may be another one than when the item was planned, but the key names a hash.
	if outcome.Status != substitute.Success || outcome.NarHash != s.item.NarHash || c.finish() != nil {
		outcome = substitute.Outcome{}
		restore.Remove(c.part)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	s.outcome = outcome
	a.running--
	a.memory -= s.memory()
	if outcome.Status == substitute.Success {
		if a.good++; a.good >= a.step {
			a.limit, a.good = min(a.limit+1, a.o.AtOnce()), 0
		}
		c := a.o.Session.counts
		c.add(&c.Staged, &c.StagedBytes, s.item)
		a.plan.again()
	} else {
		// What was begun together fails together: that counts once.
		if s.fewer == a.fewer {
			a.step, a.limit, a.good = a.limit, max(a.limit/2, 1), 0
			a.fewer++
		}
		if a.staged[s.item.Path] == s {
			a.forget(s.item.Path, s)
			a.plan.fail(s.item.Path)
		}
	}
	close(s.done)
	a.wake()
}
