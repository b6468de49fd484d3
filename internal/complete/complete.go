// SPDX-License-Identifier: GPL-3.0-or-later

// Package complete finds out whether a store has all blocks of what a read capability denotes, and
// gets those that it lacks from elsewhere. Start with [Check].
package complete

import (
	"cmp"
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
	// Got is told the length of each block that was got, from any goroutine.
	Got func(bytes int)
}

// A Report tells what a store has of something. Blocks that occur several times may count several
// times among those that are there, but only once among those that are not.
type Report struct {
	Form     string `json:"form,omitempty"` // "eris-fs", "nar" or another one; empty if the beginning is not there
	Blocks   int64  `json:"blocks"`         // that are there
	Bytes    int64  `json:"bytes"`
	Repaired int64  `json:"repaired"` // those of them that came from elsewhere
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
	// maxNoted bounds the inner nodes that are remembered, so that none is gone through twice,
	// which is enough for some hundred TiB; and the blocks that are missing or repaired.
	maxNoted = 1 << 22
)

// Check goes through all blocks of what c denotes: of its contents, and if that is the index of a
// tree, of all files. Errors are those of the stores, but for blocks that are not there or wrong,
// and the cause of ctx.
func Check(ctx context.Context, c eris.ReadCapability, o Options) (Report, error) {
	w := walk{o: o, seen: map[visit]bool{}, noted: map[eris.Reference]bool{}, affected: map[string]bool{}}
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
	form, index, err := image.ReadIndex(ctx, w.o.Store, c, limits, fetch.Window{Requests: workers, Bytes: workers * int64(eris.BlockSize32KiB)})
	w.report.Form = string(form)
	if err != nil || index == nil {
		return err
	}
	var files []visit
	for i := range index.Len() {
		if e := index.Entry(i); e.Kind == nar.Regular {
			files = append(files, root(e.Capability, cmp.Or(e.Path, ".")))
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

// walk goes through blocks, in as many goroutines as there are workers.
type walk struct {
	o Options

	mu       sync.Mutex
	seen     map[visit]bool          // inner nodes
	noted    map[eris.Reference]bool // blocks that are missing or repaired
	affected map[string]bool
	report   Report
}

// run goes through everything below some blocks.
func (w *walk) run(ctx context.Context, todo []visit) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	for _, v := range todo {
		g.Go(func() error { return w.visit(ctx, g, v) })
	}
	return g.Wait()
}

// visit looks at a block and those below it: by a goroutine each while there may be more of them,
// else itself.
func (w *walk) visit(ctx context.Context, g *errgroup.Group, v visit) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	block, err := w.get(ctx, v)
	if err != nil || block == nil || v.level == 0 {
		return err
	}
	plain := make([]byte, v.size)
	eris.Decrypt(plain, block, v.pair.Key, v.level)
	node, err := eris.ParseNode(plain)
	if err != nil {
		return fmt.Errorf("%s: %w", v.path, err)
	}
	var last eris.Pair
	for i := range node.Len() {
		if node.Pair(i) == last {
			continue // runs of equal contents
		}
		last = node.Pair(i)
		child := visit{last, v.size, v.level - 1, v.path}
		if !g.TryGo(func() error { return w.visit(ctx, g, child) }) {
			if err := w.visit(ctx, g, child); err != nil {
				return err
			}
		}
	}
	return nil
}

// first reports whether something is not in a set, and puts it there.
func first[T comparable](set map[T]bool, x T) bool {
	again := set[x]
	set[x] = true
	return !again
}

// get gets a block, from elsewhere if need be. It is nil if it is not to be had, or an inner node
// that has been met before.
func (w *walk) get(ctx context.Context, v visit) ([]byte, error) {
	ref := v.pair.Reference
	block, err := fetch.Get(ctx, w.o.Store, ref, v.size, nil)
	lacks := fetch.Lacks(err)
	repaired := false
	if lacks && w.o.From != nil {
		block, err = fetch.Get(ctx, w.o.From, ref, v.size, nil)
		if repaired = err == nil; repaired {
			err = w.o.Store.Put(ctx, ref, block)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	r := &w.report
	switch {
	case err == nil:
		w.o.Got(len(block))
		r.Blocks++
		r.Bytes += int64(v.size)
		if repaired && first(w.noted, ref) {
			r.Repaired++
		}
		if v.level > 0 && !first(w.seen, v) {
			block = nil
		}
	case !fetch.Lacks(err):
		return nil, err
	default:
		block = nil
		w.affected[v.path] = true
		if first(w.noted, ref) {
			r.Missing++
			r.MissingBytes += int64(v.size)
			if v.level > 0 {
				r.Inner++
			}
		}
	}
	if max(len(w.noted), len(w.seen)) > maxNoted {
		return nil, errors.New("this has too many blocks to be checked")
	}
	return block, nil
}
