// SPDX-License-Identifier: GPL-3.0-or-later

package erisfs

import (
	"context"
	"errors"
	"runtime"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// A Base is another tree on this machine, of which files, or parts of them, may be the same as in
// the tree of an index. It is safe for concurrent use.
type Base interface {
	// File opens what may have the contents of the file at a path of the tree; an error means that
	// there is nothing. Of the node the size counts and, with link, what a [nar.Node] says of its
	// contents besides. The caller must call done.
	File(path string, link bool) (node nar.Node, contents nar.Feeder, done func(), err error)
	// ReadPart reads up to a block of what may be in the file at an offset. It returns how many
	// bytes there are, which are fewer than p has only at the end of the file.
	ReadPart(path string, p []byte, offset int64) (n int, err error)
}

// baseWorkers bounds how many files are compared at a time; each takes about 400 KiB of memory.
const baseWorkers = 8

// Use finds out which files of the tree the base has: those that have the same capability when they
// are encoded. They come from there, and are not fetched. Of the others, leaves that stand in the
// base at the same place are not fetched either. It must be called before the first Next, and
// returns when all of the base has been read. Errors are that of the context, and that the base has
// no file of the tree.
//
// It costs about 1 s of a processor for each GB of files that the base has, and a byte of memory
// for each file. What the base gives later need not be what it had: whoever consumes the tree has
// to check it by a hash.
func (t *Tree) Use(ctx context.Context, base Base) error {
	t.base, t.whole = base, make([]bool, t.index.Len())
	var found atomic.Bool
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(min(runtime.GOMAXPROCS(0), baseWorkers))
	for i := range t.whole {
		e := t.index.Entry(i)
		if e.Kind != nar.Regular {
			continue
		}
		group.Go(func() error {
			node, contents, done, err := base.File(e.Path, false)
			if err != nil {
				return ctx.Err()
			}
			defer done()
			found.Store(true)
			c, err := eris.Encode(ctx, &contentsReader{next: contents.Next, length: node.Size}, nil,
				eris.EncodeOptions{BlockSize: e.Capability.BlockSize, Workers: 1})
			t.whole[i] = err == nil && c == e.Capability
			return ctx.Err()
		})
	}
	err := group.Wait()
	if err == nil && !found.Load() {
		err = errNoFile
	}
	return err
}

var errNoFile = errors.New("no file of the tree can be read in the older one")

// closeLocal ends with a file that comes from the base.
func (t *Tree) closeLocal() {
	if t.done != nil {
		t.done()
		t.contents, t.done = nil, nil
	}
}
