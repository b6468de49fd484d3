// SPDX-License-Identifier: GPL-3.0-or-later

// Package complete finds out whether a store has all blocks of what a read capability denotes, and
// gets those that it lacks from elsewhere. Start with [Check].
package complete

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// Options say what is checked, and how.
type Options struct {
	// Store is what is checked: each block is got from it and verified.
	Store fetch.Store
	// From is where blocks come from that Store lacks or has wrong; they are put into it. Nil
	// leaves it as it is.
	From fetch.Source
	// Got is told the length of each block that was got, from any goroutine; nil tells nobody.
	Got func(bytes int)
}

// A Report tells what a store has of something. Blocks that occur several times may count several
// times among those that are there, but only once among those that are not.
type Report struct {
	Form     string `json:"form,omitempty"` // "eris-fs", "nar" or another one; empty if the beginning is not there
	Blocks   int64  `json:"blocks"`         // that are there
	Bytes    int64  `json:"bytes"`
	Repaired int64  `json:"repaired"` // those of them that came from elsewhere
	Damaged  int64  `json:"damaged"`  // were there with wrong bytes
	// Missing and MissingBytes are of the blocks that the store lacks, or has wrong, and that could
	// not be got. Below those of them that are inner nodes there are more, of which nothing is
	// known.
	Missing      int64 `json:"missing"`
	MissingBytes int64 `json:"missingBytes"`
	Inner        int64 `json:"inner"`
	// Affected are the files of a tree that are not whole, in order; "." is the whole of it.
	Affected []string `json:"affected,omitempty"`
}

// Complete reports whether nothing is missing.
func (r *Report) Complete() bool { return r.Missing == 0 }

const (
	// workers is how many blocks are asked for at a time.
	workers = 64
	// maxSeen bounds the inner nodes that are remembered, so that none is gone through twice: that
	// many have some hundred TiB below them.
	maxSeen = 1 << 22
	// maxNoted bounds the blocks that are missing or repaired.
	maxNoted = 1 << 22
)

// Check goes through all blocks of what c denotes: of its contents, and if that is the index of a
// tree, of all files. Errors are those of the stores, but for blocks that are not there or wrong,
// and the cause of ctx.
func Check(ctx context.Context, c eris.ReadCapability, o Options) (Report, error) {
	w := walk{o: o, seen: map[visit]bool{}, noted: map[eris.Reference]uint8{}, affected: map[string]bool{}}
	w.more = sync.NewCond(&w.mu)
	err := w.run(ctx, []visit{root(c, ".")})
	if err == nil && w.report.Complete() {
		err = w.inside(ctx, c)
	}
	w.report.Affected = slices.Sorted(maps.Keys(w.affected))
	return w.report, err
}

// inside goes through the files of a tree, of which the index is there.
func (w *walk) inside(ctx context.Context, c eris.ReadCapability) error {
	// What has been verified a moment ago need not be verified again.
	limits := erisfs.Limits{NarSize: 1 << 60}
	x, err := image.Open(ctx, w.o.Store, c, limits, fetch.Window{Requests: workers, Bytes: workers * int64(eris.BlockSize32KiB)})
	if err != nil {
		return err
	}
	defer x.Close()
	w.report.Form = string(x.Form)
	if x.Form != image.ERISFS {
		return nil
	}
	index, err := x.Index()
	if err != nil {
		return err
	}
	var files []visit
	for i := range index.Len() {
		if e := index.Entry(i); e.Kind == nar.Regular {
			path := e.Path
			if path == "" {
				path = "."
			}
			files = append(files, root(e.Capability, path))
		}
	}
	return w.run(ctx, files)
}

// A visit is a block to be looked at: that of a file.
type visit struct {
	pair  eris.Pair
	size  eris.BlockSize
	level int
	path  string
}

func root(c eris.ReadCapability, path string) visit {
	return visit{eris.Pair{Reference: c.Root, Key: c.Key}, c.BlockSize, c.Level, path}
}

// walk goes through blocks, the deepest first, so that little has to be remembered.
type walk struct {
	o Options

	mu       sync.Mutex
	more     *sync.Cond // there is something to do, or nothing more
	todo     []visit
	busy     int // workers that may find more
	stopped  bool
	seen     map[visit]bool // inner nodes
	noted    map[eris.Reference]uint8
	affected map[string]bool
	report   Report
}

// run goes through everything below some blocks.
func (w *walk) run(ctx context.Context, todo []visit) error {
	slices.Reverse(todo)
	w.todo = todo
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(ctx, w.stop)()
	var g errgroup.Group
	for range workers {
		g.Go(func() error {
			err := w.work(ctx)
			if err != nil {
				cancel(err) // which is what the others return
			}
			return err
		})
	}
	return g.Wait()
}

func (w *walk) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stopped = true
	w.more.Broadcast()
}

func (w *walk) work(ctx context.Context) error {
	memory, plain := make([]byte, 0, eris.BlockSize32KiB), make([]byte, eris.BlockSize32KiB)
	for {
		v, ok := w.next()
		if !ok {
			return context.Cause(ctx)
		}
		block, err := w.get(ctx, v, memory)
		if err == nil && block != nil && v.level > 0 {
			err = w.children(v, block, plain[:v.size])
		}
		w.mu.Lock()
		w.busy--
		w.more.Broadcast()
		w.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// next waits for something to do, unless there is nothing more.
func (w *walk) next() (visit, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.todo) == 0 && w.busy > 0 && !w.stopped {
		w.more.Wait()
	}
	if len(w.todo) == 0 || w.stopped {
		return visit{}, false
	}
	v := w.todo[len(w.todo)-1]
	w.todo = w.todo[:len(w.todo)-1]
	w.busy++
	return v, true
}

// get gets a block, from elsewhere if need be; nil if it is not to be had.
func (w *walk) get(ctx context.Context, v visit, memory []byte) ([]byte, error) {
	ref := v.pair.Reference
	block, err := fetch.Get(ctx, w.o.Store, ref, v.size, memory)
	var wrong *eris.BlockError
	damaged, repaired := errors.As(err, &wrong), false
	if (damaged || errors.Is(err, eris.ErrNotFound)) && w.o.From != nil {
		if block, err = fetch.Get(ctx, w.o.From, ref, v.size, memory); err == nil {
			repaired = true
			if err := w.o.Store.Put(ctx, ref, block); err != nil {
				return nil, err
			}
		}
	}
	if err == nil && w.o.Got != nil {
		w.o.Got(len(block))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	r := &w.report
	if damaged && w.first(ref, wasDamaged) {
		r.Damaged++
	}
	switch {
	case err == nil:
		r.Blocks++
		r.Bytes += int64(v.size)
		if repaired && w.first(ref, wasRepaired) {
			r.Repaired++
		}
		return block, nil
	case !errors.As(err, &wrong) && !errors.Is(err, eris.ErrNotFound):
		return nil, err
	}
	w.affected[v.path] = true
	if w.first(ref, wasMissing) {
		r.Missing++
		r.MissingBytes += int64(v.size)
		if v.level > 0 {
			r.Inner++
		}
	}
	if len(w.noted) > maxNoted {
		return nil, fmt.Errorf("more than %d blocks are missing", maxNoted)
	}
	return nil, nil
}

// What is noted of blocks, so that each counts once.
const (
	wasMissing = 1 << iota
	wasDamaged
	wasRepaired
)

// first notes something of a block, and reports whether that is news.
func (w *walk) first(ref eris.Reference, what uint8) bool {
	news := w.noted[ref]&what == 0
	w.noted[ref] |= what
	return news
}

// children adds what is below an inner node to what is to be done.
func (w *walk) children(v visit, block, plain []byte) error {
	eris.Decrypt(plain, block, v.pair.Key, v.level)
	node, err := eris.ParseNode(plain)
	if err != nil {
		return fmt.Errorf("%s: %w", v.path, err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.seen[v] {
		return nil
	}
	if len(w.seen) == maxSeen {
		return errors.New("this has too many blocks to be checked")
	}
	w.seen[v] = true
	for i := node.Len() - 1; i >= 0; i-- {
		child := visit{node.Pair(i), v.size, v.level - 1, v.path}
		if last := len(w.todo) - 1; last < 0 || w.todo[last] != child { // runs of equal contents
			w.todo = append(w.todo, child)
		}
	}
	return nil
}
