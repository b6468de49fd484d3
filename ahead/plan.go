// SPDX-License-Identifier: GPL-3.0-or-later

package ahead

import (
	"cmp"
	"path"
	"slices"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// maxPlanned bounds how many items a plan knows. What is beyond is substituted when the daemon asks
// for it.
const maxPlanned = 20000

// maxFailed is how often an item comes again that could not be substituted.
const maxFailed = 2

// A plan knows the items that one daemon process will probably ask for, and in which order.
//
// The daemon substitutes an item once all of its references are valid. Of those that could be
// substituted it takes the first by name, and by file name where names are equal: goals that wait
// for the only build slot are woken together, and run in the order of their keys (Guix,
// nix/libstore/build.cc: SubstitutionGoal::key, Worker::run, Worker::childTerminated). So the order
// is known, as far as the items are.
//
// It is not safe for concurrent use.
type plan struct {
	items  map[string]*planned
	valid  func(path string) bool // reports whether an item is in the store
	ready  []*planned             // those that can be substituted, if what was taken is; in order
	left   int                    // not taken yet
	failed []*planned             // what next has returned and could not be substituted
}

// planned is an item of a plan, or a reference of one.
type planned struct {
	substitute.Item
	known   bool       // it can be had
	taken   bool       // by the daemon or from this plan, or it is valid
	waits   int        // for how many references
	waiters []*planned // that wait for it
	failed  int        // how often it could not be substituted after next
}

func newPlan(valid func(path string) bool) *plan {
	return &plan{items: map[string]*planned{}, valid: valid}
}

// item returns what the plan knows of a file name, and nil if it knows enough.
func (p *plan) item(path string) *planned {
	i := p.items[path]
	if i == nil && len(p.items) < maxPlanned {
		i = &planned{Item: substitute.Item{Path: path}, taken: p.valid(path)}
		p.items[path] = i
	}
	return i
}

// add adds an item, unless it is known or in the store.
func (p *plan) add(item substitute.Item) {
	i := p.item(item.Path)
	if i == nil || i.known || i.taken {
		return
	}
	i.Item, i.known = item, true
	p.left++
	for _, r := range item.References {
		if r == item.Path {
			continue
		}
		other := p.item(r)
		if other == nil {
			i.waits++ // for ever
		} else if !other.taken {
			i.waits++
			other.waiters = append(other.waiters, i)
		}
	}
	if i.waits == 0 {
		p.becomesReady(i)
	}
}

func (p *plan) becomesReady(i *planned) {
	at, _ := slices.BinarySearchFunc(p.ready, i, compare)
	p.ready = slices.Insert(p.ready, at, i)
}

// take says that an item is being substituted: because the daemon has asked for it, or because next
// has returned it.
func (p *plan) take(path string) {
	p.failed = slices.DeleteFunc(p.failed, func(i *planned) bool { return i.Path == path })
	i := p.item(path)
	if i == nil || i.taken {
		return
	}
	i.taken = true
	if i.known {
		p.left--
	}
	for _, w := range i.waiters {
		if w.waits--; w.waits == 0 && !w.taken {
			p.becomesReady(w)
		}
	}
	i.waiters = nil
}

// fail says that an item that next has returned could not be substituted.
func (p *plan) fail(path string) { p.failed = append(p.failed, p.items[path]) }

// again has next return what has failed once more, perhaps because a server was away, unless that
// is so too often.
func (p *plan) again() {
	for _, i := range p.failed {
		if i.failed++; i.failed <= maxFailed {
			i.taken = false
			p.left++
			p.becomesReady(i)
		}
	}
	p.failed = nil
}

// next returns the item that the daemon will ask for next, after all that have been taken, if each
// substitution succeeds. It is not taken. An item with a reference of which nothing is known, and
// which is not in the store, is never returned.
func (p *plan) next() (substitute.Item, bool) {
	for len(p.ready) > 0 {
		if first := p.ready[0]; !first.taken {
			return first.Item, true
		}
		p.ready = p.ready[1:]
	}
	return substitute.Item{}, false
}

// compare compares the keys of the goals of two items, each of which is "a$NAME$PATH".
func compare(a, b *planned) int { return cmp.Compare(name(a.Path)+"$"+a.Path, name(b.Path)+"$"+b.Path) }

// name returns the name of a store item, which stands behind the hash.
func name(file string) string {
	_, after, _ := strings.Cut(path.Base(file), "-")
	return after
}
