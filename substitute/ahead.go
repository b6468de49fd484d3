// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"context"
	"runtime/debug"
)

// This file is for those who restore items before the daemon asks for them: by the same ways as
// others, but silently, to another place, and behind what the daemon waits for.

// An Item is an item that can be had, as the authorised narinfo has it.
type Item struct {
	// Path is the file name of the item.
	Path string
	// References are the file names of the items that it refers to; itself may be among them.
	References []string
	// NarHash is the field of that name, and NarSize the length of the archive in bytes.
	NarHash string
	NarSize uint64
}

// Known returns those of the items of which there are authorised narinfos that Substitute can use,
// in the order given. It shows nothing, and ends with the context. It is safe for concurrent use,
// also with Substitute.
func (s *Substituter) Known(ctx context.Context, paths []string) []Item {
	l := s.newLookup(paths, func(*record) {})
	l.run(ctx)
	var items []Item
	for _, f := range l.all() {
		if s.usable(f) != nil || !f.authorised.narinfo.NarSizeKnown {
			continue
		}
		n := f.authorised.narinfo
		items = append(items, Item{Path: n.StorePath, References: s.references(n), NarHash: n.NarHash, NarSize: n.NarSize})
	}
	return items
}

// A Restoration is a substitution that the daemon has not asked for yet.
type Restoration struct{ job job }

// Prepare returns the restoration of an item to a place, which [Restoration.Run] begins.
func (s *Substituter) Prepare(path, place string) *Restoration {
	log := s.Log.Hold()
	r := &Restoration{job{s: s, path: path, destination: place, log: log, progress: log.Download(path)}}
	r.job.ahead.Store(true)
	return r
}

// Run does what Substitute does, once and for all, and returns when that is over. It is safe for
// concurrent use with the methods of the Substituter.
func (r *Restoration) Run(ctx context.Context) (outcome Outcome) {
	defer r.job.progress.Pause()
	defer func() {
		if fault := recover(); fault != nil {
			r.job.log.Errorf("internal error: %v: %s", fault, debug.Stack())
			outcome = Outcome{}
		}
	}()
	l := r.job.s.newLookup([]string{r.job.path}, func(*record) {})
	l.run(ctx)
	outcome, _ = r.job.substitute(ctx, l)
	return outcome
}

// Show shows what has happened so far and what happens from now on: the daemon has asked for the
// item and waits for it.
func (r *Restoration) Show() {
	r.job.ahead.Store(false)
	r.job.log.Release()
}

// Finish shows the end, after Run and Show.
func (r *Restoration) Finish(success bool) { r.job.progress.Finish(success) }

// waited reports whether the daemon waits for the item.
func (j *job) waited() bool { return !j.ahead.Load() }
