// SPDX-License-Identifier: GPL-3.0-or-later

package erisfs

import (
	"context"
	"errors"
	"io"
	"iter"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/content"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// ReadIndex reads the index that a content holds, of which nothing must have been read. The content
// must not be longer than [Limits.IndexLength], which is for the caller to see to when it opens it.
// Errors are those of the content and of [Decode].
func ReadIndex(r *content.Reader, limits Limits) (*Index, error) {
	b, err := io.ReadAll(r) // takes memory for what has come, and at the end for no more than that
	if err != nil {
		return nil, err
	}
	x, err := Decode(b, limits)
	if err == nil {
		x.origin = r.Origin()
	}
	return x, err
}

// A Tree is the tree of an index as [nar.Nodes], with contents fetched block by block. Many blocks
// are requested at a time, ahead of what is read, over all files of the tree; they come in order.
// It must be closed.
type Tree struct {
	index    *Index
	next     func() (entry int, n nar.Node, ok bool)
	stop     func()
	sequence *content.Sequence

	base     Base               // nil if there is none
	local    []local            // what it has, by entry
	keys     map[int][]eris.Key // of the leaves of files that it has in part, by entry
	contents nar.Feeder         // of the file under way, if it comes from there
	done     func() bool
}

// Nodes returns the tree of the index. The window bounds what is in flight; no more than
// limits.NarSize bytes of contents are accepted. The source must verify, as [content.NewSequence]
// has it. It ends with ctx.
func (x *Index) Nodes(ctx context.Context, source fetch.Source, limits Limits, window fetch.Window) *Tree {
	most := int64(min(limits.NarSize, 1<<63-1))
	t := &Tree{index: x}
	t.next, t.stop = iter.Pull2(x.nodes())
	t.sequence = content.NewSequence(ctx, source, t.wants(most), most, window)
	return t
}

// wants are the files in NAR order that do not come from a base.
func (t *Tree) wants(limit int64) iter.Seq[content.Want] {
	return func(yield func(content.Want) bool) {
		for i := range t.index.begin {
			e := t.index.Entry(i)
			if e.Kind != nar.Regular || t.base != nil && t.local[i].whole {
				continue
			}
			want := content.Want{Capability: e.Capability, Limit: limit, Origin: t.index.origin}
			if t.base != nil {
				want.NearKeys = t.keys[i]
				want.Near = func(p []byte, offset int64) (int, error) { return t.base.ReadPart(e.Path, p, offset) }
			}
			if !yield(want) {
				return
			}
		}
	}
}

// Close lets go of everything.
func (t *Tree) Close() {
	t.stop()
	t.closeLocal()
	t.sequence.Close()
}

// Next implements [nar.Nodes].
func (t *Tree) Next() (nar.Node, error) {
	t.closeLocal()
	i, n, ok := t.next()
	if !ok {
		return nar.Node{}, io.EOF
	}
	switch {
	case n.Kind != nar.Regular:
	case t.base != nil && t.local[i].whole:
		node, contents, done, err := t.base.File(t.index.Entry(i).Path, !t.local[i].hashes)
		n.Size, n.Same, n.Unique = node.Size, node.Same, node.Unique
		t.contents, t.done = contents, done
		return n, err
	default:
		size, err := t.sequence.Next()
		if err != nil {
			return n, err
		}
		n.Size = uint64(size)
		n.Unique = t.base != nil && t.local[i].hashes
	}
	return n, nil
}

// nodes yields the nodes in NAR order, without sizes; files and links with the numbers of their
// entries.
func (x *Index) nodes() iter.Seq2[int, nar.Node] {
	return func(yield func(int, nar.Node) bool) {
		var open []string // names of the directories under way, of which that of the root is empty
		enter := func(directory []string) bool {
			same := 0
			for same < min(len(directory), len(open)) && directory[same] == open[same] {
				same++
			}
			for ; len(open) > same; open = open[:len(open)-1] {
				if !yield(-1, nar.Node{Kind: nar.End}) {
					return false
				}
			}
			for _, name := range directory[same:] {
				if !yield(-1, nar.Node{Kind: nar.Directory, Name: name}) {
					return false
				}
			}
			open = append(open, directory[same:]...)
			return true
		}
		for i := range x.begin {
			e := x.Entry(i)
			names := []string{""} // that of an item that is no directory
			if e.Path != "" {
				names = append(names, strings.Split(e.Path, "/")...)
			}
			last := len(names) - 1
			if !enter(names[:last]) || !yield(i, nar.Node{Kind: e.Kind, Name: names[last], Executable: e.Executable, Target: e.Target}) {
				return
			}
		}
		if x.Len() > 0 || enter([]string{""}) { // the index of an empty directory
			enter(nil)
		}
	}
}

// Contents implements [nar.Nodes].
func (t *Tree) Contents() (nar.Chunk, error) {
	if t.contents != nil {
		return t.contents.Next()
	}
	for {
		leaf, err := t.sequence.Leaf()
		if err != nil {
			return nar.Chunk{}, err
		}
		if len(leaf.Bytes) > 0 {
			return nar.NewChunk(leaf.Bytes, leaf), nil
		}
		leaf.Release()
	}
}

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
