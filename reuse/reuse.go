// SPDX-License-Identifier: GPL-3.0-or-later

// Package reuse makes a store item from an older one that is in the store already, with nothing
// fetched. An item that is built again with other dependencies is the same but for the hashes of
// their names, if its build is reproducible; the narinfo says which hashes it has. Start with [New]
// and [Finder.Find].
//
// What it yields is a proposal, like what comes from any server: whoever restores it compares the
// hash with the NarHash of an authorised narinfo. The old item decides nothing and is never
// changed.
package reuse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"path/filepath"
	"slices"
	"sync"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// ErrNoDatabase is wrapped by the error of a [Database] that cannot be read as a whole.
var ErrNoDatabase = errors.New("no database of store items")

// A Database returns what the daemon's database says about the item whose name begins with the
// given hash part: its NarDigest, NarSize and References. It fails for what is no valid item, and
// with [ErrNoDatabase] if it knows about none; in that case the old item is read once more, to find
// its references in it, and nothing is linked to it. It is not called before there is an item that
// may be of use, so what is behind it may be opened then.
type Database func(ctx context.Context, hashPart string) (*narinfo.Narinfo, error)

// Config is what a [Finder] works with.
type Config struct {
	// StoreDir is the store directory, an absolute file name without a slash at its end.
	StoreDir string
	// Database knows the items of the store.
	Database Database
	// MissesFile is a file of at most 64 KiB that remembers for all processes which attempts have
	// failed. Its directory must exist when it is needed. Empty is nothing is remembered.
	MissesFile string
}

// A Finder finds old items. It is safe for concurrent use.
type Finder struct {
	Config
	listing *Listing
	misses  misses
	pool    nar.Pool
}

// New returns a finder. It reads nothing yet.
func New(c Config) *Finder {
	return &Finder{Config: c, listing: &Listing{Directory: c.StoreDir}, misses: misses{c.MissesFile}}
}

// A Candidate is an old item and what to replace in it.
type Candidate struct {
	// Hopeless tells that it is known not to become the whole item: that has been tried, or the
	// length is another one, or references have no counterpart. See [Candidate.Base].
	Hopeless bool

	finder  *Finder
	old     string           // name
	info    *narinfo.Narinfo // of the old item; nil without a database
	want    *narinfo.Narinfo
	pairs   []Replacement // nil if it is hopeless
	records []record      // what to remember if it fails; a later one may replace another
}

// Find yields what the item of an authorised narinfo may be made of, the best first: items of the
// same name, the newest first, at most four candidates that are not hopeless, and one for each of
// the items of which all are. The best ones have the same length, and references that can be told
// to belong to those of want. It looks for each when it is asked for, which costs a query of the
// database; without one the old item is read then. Failures are no candidates.
func (f *Finder) Find(ctx context.Context, want *narinfo.Narinfo) iter.Seq[*Candidate] {
	return func(yield func(*Candidate) bool) {
		item := filepath.Base(want.StorePath)
		if narinfo.CheckStorePath(f.StoreDir, want.StorePath) != nil || want.CheckHash() != nil {
			return
		}
		names, err := f.listing.named(item)
		if err != nil {
			return
		}
		tries := 0
		for _, name := range names[:min(len(names), maxTries)] {
			for _, c := range f.candidates(ctx, name, item, want) {
				if tries == maxTries || !yield(c) {
					return
				}
				if !c.Hopeless {
					tries++
				}
			}
		}
	}
}

// candidates returns the ways to make an item of the old one of the given name, or a hopeless one.
func (f *Finder) candidates(ctx context.Context, name, item string, want *narinfo.Narinfo) []*Candidate {
	useless := newRecord(name, want.NarDigest, noOrder)
	info, err := f.Database(ctx, name[:HashLength])
	var ways [][]Replacement
	switch {
	case errors.Is(err, ErrNoDatabase):
		// Nothing can be known before it has been read, which is not done in vain twice.
		if err = nil; !f.misses.has(useless) {
			var references []string
			references, err = f.references(ctx, name, want)
			if ways = mappings(name, item, references, want.References); err == nil && len(ways) == 0 {
				f.misses.add(useless)
			}
		}
	case err == nil:
		// Rewriting keeps the length.
		if !want.NarSizeKnown || !info.NarSizeKnown || want.NarSize == info.NarSize {
			ways = mappings(name, item, info.References, want.References)
		}
	}
	if err != nil {
		return nil
	}
	var found []*Candidate
	for order, pairs := range ways {
		r := newRecord(name, want.NarDigest, order)
		if !f.misses.has(r) {
			found = append(found, &Candidate{false, f, name, info, want, pairs, []record{r}})
		}
	}
	if len(found) > 0 {
		last := found[len(found)-1]
		last.records = []record{useless, last.records[0]}
		return found
	}
	return []*Candidate{{true, f, name, info, want, nil, nil}}
}

var errLonger = errors.New("longer than what is wanted")

// most is how long a file can be that is of use. One may be much longer, if the disk is damaged.
func most(want *narinfo.Narinfo) int64 { return int64(min(max(want.NarSize, 1<<20), 1<<61)) }

// references finds out which items of the store an item mentions. One that is much longer than what
// is wanted is of no use, and may take long to read.
func (f *Finder) references(ctx context.Context, name string, want *narinfo.Narinfo) ([]string, error) {
	all, err := f.listing.all()
	if err != nil {
		return nil, err
	}
	found := map[string]bool{}
	left := 2 * most(want)
	all.found = func(p Replacement) { found[p.Old] = true }
	tree := nar.NewTree(f.StoreDir + "/" + name)
	defer tree.Close()
	err = nar.Walk(tree, func(n nar.Node) error {
		if left -= int64(n.Size); left < 0 {
			return errLonger
		}
		all.text(n.Name)
		all.text(n.Target)
		for _, err := range all.stream(tree.File(), int64(n.Size)).pieces() {
			if err = cmp.Or(err, ctx.Err()); err != nil {
				return err
			}
		}
		return nil
	})
	return slices.Collect(maps.Keys(found)), err
}

// String returns the file name of the old item.
func (c *Candidate) String() string { return c.finder.StoreDir + "/" + c.old }

// Nodes returns what the new item should be. What goes wrong is an error of its Next and Contents,
// and means that this candidate is of no use: the old item may be deleted or be found to be broken
// at any time. Files of 8 KiB and more without a hash in them are named, see [nar.Node.Same], if
// the database says that the old item is complete. The caller must call Close unless it has seen an
// error or the end.
func (c *Candidate) Nodes(ctx context.Context) *Nodes {
	n := &Nodes{ctx: ctx, candidate: c, workshop: c.workshop(), tree: nar.NewTree(c.String())}
	n.tree.Rename = n.workshop.table.text
	return n
}

func (c *Candidate) table() *Replacer {
	t := NewReplacer(c.pairs)
	t.pool = &c.finder.pool
	return t
}

func (c *Candidate) workshop() *workshop {
	return &workshop{
		store: c.finder.StoreDir, old: c.old, new: filepath.Base(c.want.StorePath),
		foreign: len(c.pairs) > 1, table: c.table(),
		debug:  sync.OnceValue(func() []string { return c.finder.listing.debug(c.old) }),
		unread: leastSummed + summedFactor*int64(min(c.want.NarSize, 1<<56)),
	}
}

func (c *Candidate) remember() {
	for _, r := range c.records {
		c.finder.misses.add(r)
	}
}

// Missed notes that what Nodes has yielded has another NarHash than it should have, so that it is
// not tried again. Then the old item itself may be wrong: it is compared with its own hash, once if
// that is right, and the error names it if it is not. A large one is not, because that costs as
// much again as the attempt.
func (c *Candidate) Missed(ctx context.Context) error {
	defer c.remember() // after the other record, which may belong to the same place
	if c.info == nil || c.want.NarSize > mostChecked {
		return nil
	}
	right := newRecord(c.old, c.info.NarDigest, noOrder)
	if c.finder.misses.has(right) {
		return nil
	}
	sum, _, err := nar.HashTree(ctx, c.String())
	if ctx.Err() != nil || errors.Is(err, fs.ErrNotExist) {
		return nil // it is being deleted
	} else if err != nil {
		return fmt.Errorf("an old store item is corrupt: %w", err)
	}
	if sum == c.info.NarDigest {
		c.finder.misses.add(right)
		return nil
	}
	return fmt.Errorf("%s is corrupt: its hash is %s instead of %s; \"guix gc --verify=contents,repair\" looks for more", c,
		nixbase32.EncodeToString(sum[:]), nixbase32.EncodeToString(c.info.NarDigest[:]))
}

// mostChecked is the length in bytes of the largest archive that is hashed to find out whether an
// old item is corrupt.
const mostChecked = 4 << 20
