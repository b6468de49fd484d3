// SPDX-License-Identifier: GPL-3.0-or-later

package items

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

const (
	// runEntries is after how many entries a run is complete, at least.
	runEntries = 1 << 18
	// period is how often it is looked whether there are other items.
	period = 2 * time.Second
	suffix = ".run"
)

// Table is the table of a store. It is a [fetch.Source], whose methods are safe for concurrent use.
// It must be closed.
type Table struct {
	directory, root string
	log             func(format string, a ...any)
	lock            *os.File

	// Of Update.
	loaded  bool
	skipped map[string]bool // items that could not be encoded
	last    int             // the greatest number of a run

	changed       atomic.Bool // an item, or a run, is not what it was
	found, absent atomic.Int64

	mu   sync.RWMutex // held for reading while blocks are looked up
	runs []*run

	queueMu sync.Mutex
	queue   []*fetch.Request
	workers int
	closed  bool
	group   sync.WaitGroup
}

// Open opens the table in a directory, which it makes if need be. The items are below root. It
// finds nothing before [Table.Update] has been called. The log is for items that cannot be read,
// and damage. The error wraps [files.ErrLocked] if the table is open already.
func Open(directory, root string, log func(format string, a ...any)) (*Table, error) {
	if err := files.MakeDirectory(directory); err != nil {
		return nil, err
	}
	lock, err := files.Lock(filepath.Join(directory, "lock"), 0)
	if err != nil {
		return nil, err
	}
	return &Table{directory: directory, root: root, log: log, lock: lock, skipped: map[string]bool{}}, nil
}

// Close ends requests, and closes the table. Update must not be under way.
func (t *Table) Close() error {
	t.queueMu.Lock()
	t.closed = true
	queue := t.queue
	t.queue = nil
	t.queueMu.Unlock()
	for _, r := range queue {
		r.Fail(fetch.ErrClosed)
	}
	t.group.Wait()
	for _, r := range t.runs {
		r.file.Close() // which was only read
	}
	t.runs = nil
	return t.lock.Close()
}

// Stats is what a [Table] has, and what it has done since it was opened.
type Stats struct {
	Items         int   // that are shared
	Entries       int64 // leaves and other blocks in the table
	Bytes         int64 // of the table on disk, with the blocks that it keeps
	Found, Absent int64 // blocks that were asked for
}

// Stats returns the statistics.
func (t *Table) Stats() Stats {
	t.mu.RLock()
	defer t.mu.RUnlock()
	s := Stats{Found: t.found.Load(), Absent: t.absent.Load()}
	for _, r := range t.runs {
		s.Items += r.live()
		s.Entries += r.entries
		s.Bytes += r.size
	}
	return s
}

// live returns how many items are not gone.
func (r *run) live() (n int) {
	for _, i := range r.items {
		if !i.gone.Load() {
			n++
		}
	}
	return n
}

// wasted reports whether most of a run is gone.
func (r *run) wasted() bool { return 2*r.live() < len(r.items) }

// Run keeps the table up to date until ctx is done. Names returns the file names of all items;
// stamp, which is called often, something that is another when they may be others, or what has
// failed is to be tried again. Shared is told when another number of them is shared than before.
func (t *Table) Run(ctx context.Context, stamp func() string, names func(ctx context.Context) ([]string, error), shared func(Stats)) {
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	seen, items := "", -1
	var failure error // the last time
	for {
		if now := stamp(); now != seen || t.changed.Load() {
			list, err := names(ctx)
			if err == nil {
				seen = now // what fails, on a full disk perhaps, is not begun again each time
				err = t.Update(ctx, list)
			}
			if ctx.Err() != nil {
				return
			}
			if err != nil && fmt.Sprint(err) != fmt.Sprint(failure) {
				t.log("%v", err)
			}
			failure = err
			if s := t.Stats(); s.Items != items {
				items = s.Items
				shared(s)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// Update makes the table one of the items with the given file names: it reads new ones, and those
// that were changed or whose part of the table was damaged, and forgets those that are gone. Items
// that cannot be read are logged, and left out until they have been gone. Blocks are served
// meanwhile. It must not be called by two goroutines at a time. If it returns an error, which is
// that of ctx or of the file system, the table is as useful as before.
func (t *Table) Update(ctx context.Context, names []string) error {
	if err := t.load(); err != nil {
		return err
	}
	t.changed.Store(false)
	wanted := map[string]bool{}
	for _, name := range names {
		if name != "." && filepath.IsLocal(name) && filepath.Base(name) == name && len(name) < 256 {
			wanted[name] = true
		}
	}
	t.forget(wanted)
	maps.DeleteFunc(t.skipped, func(name string, _ bool) bool { return !wanted[name] })
	for _, r := range t.runs {
		for _, i := range r.items {
			if !i.gone.Load() {
				delete(wanted, i.name)
			}
		}
	}
	maps.DeleteFunc(wanted, func(name string, _ bool) bool { return t.skipped[name] })
	missing := slices.Sorted(maps.Keys(wanted))
	for len(missing) > 0 || slices.ContainsFunc(t.runs, (*run).wasted) {
		var err error
		if missing, err = t.build(ctx, missing); err != nil {
			return err
		}
	}
	return nil
}

// damage notes that a run is not what it was.
func (t *Table) damage(r *run) {
	r.damaged.Store(true)
	t.changed.Store(true)
}

// load opens the runs, the first time, and removes what is of no use.
func (t *Table) load() error {
	if t.loaded {
		return nil
	}
	entries, err := os.ReadDir(t.directory)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(t.directory, e.Name())
		name, ok := strings.CutSuffix(e.Name(), suffix)
		if !ok {
			continue
		}
		number, err := strconv.Atoi(name)
		if err != nil { // what a process that was killed has left behind
			os.Remove(path)
			continue
		}
		t.last = max(t.last, number)
		r, err := load(path, number)
		if err != nil {
			t.log("%v; making it anew from the store items", err)
			os.Remove(path)
			continue
		}
		t.replace(nil, r)
	}
	t.loaded = true
	return nil
}

// forget marks items that are not wanted, or are in a newer run too, and removes damaged runs.
func (t *Table) forget(wanted map[string]bool) {
	runs := slices.Clone(t.runs)
	slices.SortFunc(runs, func(a, b *run) int { return b.number - a.number })
	seen := map[string]bool{}
	for _, r := range runs {
		if r.damaged.Load() {
			t.log("%s: %v; making it anew from the store items", r.file.Name(), errDamaged)
			t.replace([]*run{r}, nil)
			continue
		}
		for _, i := range r.items {
			if !wanted[i.name] || seen[i.name] {
				i.gone.Store(true)
			} else if !i.gone.Load() {
				seen[i.name] = true
			}
		}
	}
}

// replace removes runs, and has another one instead; nil is none.
func (t *Table) replace(old []*run, r *run) {
	t.mu.Lock()
	t.runs = slices.DeleteFunc(t.runs, func(r *run) bool { return slices.Contains(old, r) })
	if r != nil {
		t.runs = append(t.runs, r)
	}
	t.mu.Unlock()
	for _, o := range old {
		o.file.Close() // which was only read
		os.Remove(o.file.Name())
	}
}

// Start implements [fetch.Source]. Files are read by a worker for each core at most, several blocks
// at a time. The block has the reference that was asked for. The error wraps [eris.ErrNotFound] if
// no item has the block in that size, or [fetch.ErrClosed].
func (t *Table) Start(r *fetch.Request) {
	t.queueMu.Lock()
	if t.closed {
		t.queueMu.Unlock()
		r.Fail(fetch.ErrClosed)
		return
	}
	t.queue = append(t.queue, r)
	if t.workers == 0 || len(t.queue) >= batch && t.workers < runtime.GOMAXPROCS(0) {
		t.workers++
		t.group.Go(t.work)
	}
	t.queueMu.Unlock()
}

// Cancel implements [fetch.Source]. What a worker has taken is done soon.
func (t *Table) Cancel(r *fetch.Request) {
	t.queueMu.Lock()
	n := slices.Index(t.queue, r)
	if n >= 0 {
		t.queue = slices.Delete(t.queue, n, n+1)
	}
	t.queueMu.Unlock()
	if n >= 0 {
		r.Fail(context.Canceled)
	}
}

// String returns the directory of the items.
func (t *Table) String() string { return "store items in " + t.root }
