// SPDX-License-Identifier: GPL-3.0-or-later

package erisfs

import (
	"context"
	"runtime"

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
// returns when all of the base has been read; the error is that of the context.
//
// It costs about 1 s of a processor for each GB of files that the base has, and a byte of memory
// for each file. What the base gives later need not be what it had: whoever consumes the tree has
// to check it by a hash.
func (t *Tree) Use(ctx context.Context, base Base) error {
	t.base, t.whole = base, make([]bool, t.index.Len())
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(min(runtime.GOMAXPROCS(0), baseWorkers))
	for i := range t.whole {
		e := t.index.Entry(i)
		if e.Kind != nar.Regular {
			continue
		}
		group.Go(func() error {
			t.whole[i] = same(ctx, base, e)
			return ctx.Err()
		})
	}
	return group.Wait()
}

// same reports whether a base has a file.
func same(ctx context.Context, base Base, e Entry) bool {
	node, contents, done, err := base.File(e.Path, false)
	if err != nil {
		return false
	}
	defer done()
	c, err := eris.Encode(ctx, &contentsReader{next: contents.Next, length: node.Size}, nil,
		eris.EncodeOptions{BlockSize: e.Capability.BlockSize, Workers: 1})
	return err == nil && c == e.Capability
}

// openLocal begins with a file that comes from the base. What it says of the node is for others to
// use before the next one.
func (t *Tree) openLocal(n *nar.Node) error {
	node, contents, done, err := t.base.File(t.index.Entry(t.next-1).Path, true)
	if err != nil {
		return err
	}
	n.Size, n.Same, n.Unique = node.Size, node.Same, node.Unique
	t.contents, t.done = contents, done
	return nil
}

// closeLocal ends with it.
func (t *Tree) closeLocal() {
	if t.done != nil {
		t.done()
		t.contents, t.done = nil, nil
	}
}
