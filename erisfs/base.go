// SPDX-License-Identifier: GPL-3.0-or-later

package erisfs

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// A Base is another tree on this machine, of which files, or parts of them, may be the same as in
// the tree of an index. It is safe for concurrent use.
type Base interface {
	// File opens what may have the contents of the file at a path of the tree; an error means that
	// there is nothing. Of the node the size counts and, with plain, what a [nar.Node] says of its
	// contents besides. The caller must call done. If all has been read before, that reports
	// whether the file is plain: the base has it as it is, which is told when it is opened again.
	File(path string, plain bool) (node nar.Node, contents nar.Feeder, done func() (plain bool), err error)
	// ReadPart reads up to a block of what may be in the file at an offset. It returns how many
	// bytes there are, which are fewer than p has only at the end of the file.
	ReadPart(path string, p []byte, offset int64) (n int, err error)
}

const (
	// baseWorkers bounds how many files are compared at a time; each takes about 400 KiB of memory.
	baseWorkers = 8
	// mostKeys is how many keys of leaves are kept, of 32 bytes each.
	mostKeys = 1 << 17
)

// A local is what the base has of a file.
type local struct {
	whole  bool // all of it
	hashes bool // there is something of its own in it
}

// Use finds out which files of the tree the base has: those that have the same capability when they
// are encoded. They come from there, and are not fetched. Of the others, leaves that stand in the
// base at the same place are not fetched either. It must be called before the first Next, and
// returns when all of the base has been read. Errors are that of the context, and that the base has
// no file of the tree.
//
// It costs about 1 s of a processor for each GB of files that the base has, two bytes of memory for
// each file, and at most 4 MiB for leaves. What the base gives later need not be what it had:
// whoever consumes the tree has to check it by a hash.
func (t *Tree) Use(ctx context.Context, base Base) error {
	t.base, t.local, t.keys = base, make([]local, t.index.Len()), map[int][]eris.Key{}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(min(runtime.GOMAXPROCS(0), baseWorkers))
	u := &use{ctx: ctx, tree: t}
	for i := range t.local {
		if e := t.index.Entry(i); e.Kind == nar.Regular {
			group.Go(func() error { return u.file(i, e) })
		}
	}
	err := group.Wait()
	if err == nil && !u.found.Load() {
		err = errNoFile
	}
	return err
}

// A use is the comparison of a tree with its base.
type use struct {
	ctx   context.Context
	tree  *Tree
	found atomic.Bool // a file

	mu   sync.Mutex
	kept int // keys
}

// file finds out what the base has of a file.
func (u *use) file(i int, e Entry) error {
	if err := u.ctx.Err(); err != nil {
		return err
	}
	node, contents, done, err := u.tree.base.File(e.Path, false)
	if err != nil {
		return u.ctx.Err()
	}
	u.found.Store(true)
	var keys []eris.Key
	c, err := eris.Encode(u.ctx, &contentsReader{next: contents.Next, length: node.Size}, nil, eris.EncodeOptions{
		BlockSize: e.Capability.BlockSize, Workers: 1,
		Leaves: func(_ int64, pairs []eris.Pair) {
			for _, p := range pairs[:min(len(pairs), mostKeys-len(keys))] {
				keys = append(keys, p.Key)
			}
		},
	})
	whole := err == nil && c == e.Capability
	u.tree.local[i] = local{whole, !done()}
	u.mu.Lock()
	defer u.mu.Unlock()
	if !whole && u.kept+len(keys) <= mostKeys {
		u.tree.keys[i] = keys
		u.kept += len(keys)
	}
	return u.ctx.Err()
}

var errNoFile = errors.New("no file of the tree can be read in the older one")

// closeLocal ends with a file that comes from the base.
func (t *Tree) closeLocal() {
	if t.done != nil {
		t.done()
		t.contents, t.done = nil, nil
	}
}
