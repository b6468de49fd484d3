// SPDX-License-Identifier: GPL-3.0-or-later

package erisfs

import (
	"context"
	"io"
	"iter"
	"strings"
	"sync"
	"sync/atomic"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// ReadIndex reads the index that content holds. The content must not be longer
// than [Limits.IndexLength], which is for the caller to see to when it opens it.
// Errors are those of the content and of [Decode].
func ReadIndex(ctx context.Context, content *eris.Content, limits Limits) (*Index, error) {
	b := indexBuffer{size: int(min(content.Size(), maxIndex))}
	if _, err := content.WriteTo(ctx, &b); err != nil {
		return nil, err
	}
	return Decode(b.b, limits)
}

// indexBuffer collects an index. It takes memory for what has come, and at the end
// for no more than that.
type indexBuffer struct {
	b    []byte
	size int // how much there will be
}

// Write implements io.Writer.
func (b *indexBuffer) Write(p []byte) (int, error) {
	if need := len(b.b) + len(p); need > cap(b.b) {
		grown := make([]byte, len(b.b), max(need, min(2*cap(b.b), b.size), min(64<<10, b.size)))
		copy(grown, b.b)
		b.b = grown
	}
	b.b = append(b.b, p...)
	return len(p), nil
}

// A Tree is the tree of an index as [nar.Nodes], with contents fetched block by
// block. Many blocks are asked for at a time, ahead of what is read, over all
// files of the tree; they come in order. It must be closed.
type Tree struct {
	index    *Index
	next     int // entry
	sequence *eris.Sequence

	started bool
	path    string     // of the directory under way
	depth   int        // directories open
	queue   []nar.Node // up to the next entry, which is the last of them
	file    bool       // a Regular is under way
}

// Nodes returns the tree of the index. The window bounds what is in flight; no
// more than limits.NarSize bytes of contents are accepted. It ends with ctx.
func (x *Index) Nodes(ctx context.Context, blocks eris.Blocks, limits Limits, window eris.Window) *Tree {
	most := int64(min(limits.NarSize, 1<<63-1))
	return &Tree{
		index:    x,
		sequence: eris.NewSequence(ctx, blocks, x.wants(most), most, window),
	}
}

// wants are the files in NAR order.
func (x *Index) wants(limit int64) iter.Seq[eris.Want] {
	return func(yield func(eris.Want) bool) {
		for c := range x.Contents() {
			if !yield(eris.Want{Capability: c, Limit: limit}) {
				return
			}
		}
	}
}

// Close lets go of everything.
func (t *Tree) Close() error { return t.sequence.Close() }

// Next implements [nar.Nodes].
func (t *Tree) Next() (nar.Node, error) {
	n, ok := t.node()
	if !ok {
		return nar.Node{}, io.EOF
	}
	if t.file = n.Kind == nar.Regular; t.file {
		info, err := t.sequence.Next()
		if err != nil {
			return n, err
		}
		n.Size = uint64(info.Size)
	}
	return n, nil
}

// node returns the next node, without its size.
func (t *Tree) node() (n nar.Node, ok bool) {
	if len(t.queue) == 0 {
		t.plan()
	}
	if len(t.queue) == 0 {
		return nar.Node{}, false
	}
	n = t.queue[0]
	t.queue = t.queue[1:]
	return n, true
}

// plan queues the nodes up to the next entry, or to the end.
func (t *Tree) plan() {
	t.queue = t.queue[:0]
	if t.next == t.index.Len() {
		if !t.started { // the index of an empty directory
			t.started = true
			t.queue = append(t.queue, nar.Node{Kind: nar.Directory})
			t.depth = 1
		}
		for ; t.depth > 0; t.depth-- {
			t.queue = append(t.queue, nar.Node{Kind: nar.End})
		}
		return
	}
	e := t.index.Entry(t.next)
	t.next++
	node := nar.Node{Kind: e.Kind, Executable: e.Executable, Target: e.Target}
	if e.Path == "" {
		t.started = true
		t.queue = append(t.queue, node)
		return
	}
	if !t.started {
		t.started = true
		t.queue = append(t.queue, nar.Node{Kind: nar.Directory})
		t.depth = 1
	}
	directory := ""
	node.Name = e.Path
	if i := strings.LastIndexByte(e.Path, '/'); i >= 0 {
		directory, node.Name = e.Path[:i], e.Path[i+1:]
	}
	for !within(directory, t.path) {
		t.queue = append(t.queue, nar.Node{Kind: nar.End})
		t.depth--
		t.path = t.path[:max(0, strings.LastIndexByte(t.path, '/'))]
	}
	rest := directory[len(t.path):]
	if t.path != "" && rest != "" {
		rest = rest[1:]
	}
	if rest != "" {
		for name := range strings.SplitSeq(rest, "/") {
			t.queue = append(t.queue, nar.Node{Kind: nar.Directory, Name: name})
			t.depth++
		}
	}
	t.path = directory
	t.queue = append(t.queue, node)
}

// within tells whether path is root or in it.
func within(path, root string) bool {
	return root == "" || path == root || strings.HasPrefix(path, root) && path[len(root)] == '/'
}

// Contents implements [nar.Nodes].
func (t *Tree) Contents() (nar.Chunk, error) {
	if !t.file {
		return nar.Chunk{}, io.EOF
	}
	for {
		leaf, err := t.sequence.Leaf()
		if err != nil {
			return nar.Chunk{}, err
		}
		if len(leaf.Bytes) > 0 {
			return chunkOf(leaf), nil
		}
		leaf.Release()
	}
}

// sharedLeaf counts the users of a leaf.
type sharedLeaf struct {
	users atomic.Int32
	leaf  eris.Leaf
}

var sharedLeaves = sync.Pool{New: func() any { return new(sharedLeaf) }}

func chunkOf(leaf eris.Leaf) nar.Chunk {
	s := sharedLeaves.Get().(*sharedLeaf)
	s.users.Store(1)
	s.leaf = leaf
	return nar.NewChunk(leaf.Bytes, s)
}

// Retain implements [nar.Owner].
func (s *sharedLeaf) Retain() { s.users.Add(1) }

// Release implements [nar.Owner].
func (s *sharedLeaf) Release() {
	if s.users.Add(-1) == 0 {
		s.leaf.Release()
		sharedLeaves.Put(s)
	}
}
