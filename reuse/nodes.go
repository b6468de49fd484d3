// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// leastLinked is the length in bytes of the smallest file that is worth a link.
const leastLinked = 8192

// Nodes is the old item, rewritten, as [nar.Nodes]. It only reads; all that it reads may be
// different at any time, or have gone, which is an error or shows in the hash of what it yields.
type Nodes struct {
	ctx      context.Context
	workshop *workshop
	tree     *nar.Tree
	root     string
	link     bool   // files without a hash are named, to be linked to
	useless  func() // called when it is found out that no attempt can succeed

	stream *stream   // of the Regular under way; nil if it is empty
	first  nar.Chunk // its first piece, if there are Bytes
}

func newNodes(ctx context.Context, w *workshop, link bool) *Nodes {
	root := w.store + "/" + w.old
	n := &Nodes{ctx: ctx, workshop: w, tree: nar.NewTree(root), root: root, link: link}
	n.tree.Rename = w.table.text
	return n
}

// Close ends the walk early. It need not be called after Next has returned an error.
func (n *Nodes) Close() {
	n.drop()
	n.tree.Close()
}

// drop lets go of the Regular under way.
func (n *Nodes) drop() {
	n.first.Release()
	n.first, n.stream = nar.Chunk{}, nil
}

// Next implements [nar.Nodes].
func (n *Nodes) Next() (nar.Node, error) {
	n.drop()
	if err := n.ctx.Err(); err != nil {
		return nar.Node{}, err
	}
	node, err := n.tree.Next()
	if err != nil {
		return node, err
	}
	switch node.Kind {
	case nar.Symlink:
		node.Target = n.workshop.table.text(node.Target)
	case nar.Regular:
		if node.Size > 0 {
			if err := n.open(&node); err != nil {
				n.Close()
				return node, err
			}
		}
	}
	return node, nil
}

// open begins with a file.
func (n *Nodes) open(node *nar.Node) error {
	f := n.tree.File()
	path := strings.TrimPrefix(strings.TrimPrefix(f.Name(), n.root), "/")
	patches, err := n.workshop.repairs(f, path, int64(node.Size))
	if err == nil {
		n.stream = n.workshop.stream(f, 0, int64(node.Size))
		n.stream.patches = patches
		n.first, err = n.stream.next()
	}
	if errors.Is(err, errGo) {
		n.useless()
	}
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	if node.Unique = len(patches) > 0 || n.stream.changed; node.Unique || !n.link || node.Size < leastLinked {
		return nil
	}
	// It is read twice if it has no hash, and up to the first hash.
	read := n.stream.offset
	if err := n.stream.each(func([]byte) {}, func() bool { return n.stream.changed || n.ctx.Err() != nil }); err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	if node.Unique = n.stream.changed; !node.Unique {
		node.Same = f
	}
	if n.stream.offset > read {
		n.drop()
		n.stream = n.workshop.stream(f, 0, int64(node.Size))
	}
	return nil
}

// Contents implements [nar.Nodes].
func (n *Nodes) Contents() (nar.Chunk, error) {
	if c := n.first; c.Bytes != nil {
		n.first = nar.Chunk{}
		return c, nil
	}
	if n.stream == nil {
		return nar.Chunk{}, io.EOF
	}
	if err := n.ctx.Err(); err != nil {
		return nar.Chunk{}, err
	}
	c, err := n.stream.next()
	if err != nil && err != io.EOF {
		err = fmt.Errorf("%s: %w", n.tree.File().Name(), err)
	}
	return c, err
}
