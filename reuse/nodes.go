// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// leastLinked is the length in bytes of the smallest file that is worth a link.
const leastLinked = 8192

// Nodes is the old item, rewritten, as [nar.Nodes]. It only reads; all that it reads may be
// different at any time, or have gone, which is an error or shows in the hash of what it yields.
type Nodes struct {
	ctx       context.Context
	candidate *Candidate
	workshop  *workshop
	tree      *nar.Tree

	contents contents // of the Regular under way
}

// Close ends the walk early. It need not be called after Next has returned an error.
func (n *Nodes) Close() {
	n.contents.drop()
	n.tree.Close()
}

// Next implements [nar.Nodes].
func (n *Nodes) Next() (nar.Node, error) {
	n.contents.drop()
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
		if node.Size == 0 {
			break
		}
		f := n.tree.File()
		path := strings.TrimPrefix(strings.TrimPrefix(f.Name(), n.candidate.String()), "/")
		if n.contents, err = n.workshop.open(n.ctx, f, path, n.candidate.info != nil, &node); err != nil {
			if errors.Is(err, errGo) {
				n.candidate.remember() // no attempt can succeed
			}
			n.Close()
			return node, fmt.Errorf("%s: %w", f.Name(), err)
		}
	}
	return node, nil
}

// contents are those of a file, rewritten. Without a stream there are none.
type contents struct {
	stream *stream
	first  nar.Chunk // the first piece, if there are Bytes
}

// drop lets go of what is in memory.
func (c *contents) drop() {
	c.first.Release()
	*c = contents{}
}

// Next implements [nar.Feeder].
func (c *contents) Next() (nar.Chunk, error) {
	if first := c.first; first.Bytes != nil {
		c.first = nar.Chunk{}
		return first, nil
	}
	if c.stream == nil {
		return nar.Chunk{}, io.EOF
	}
	return c.stream.Next()
}

// open begins with a file that is not empty, of the old item, where it is at a path below that.
// With link it fills in the node as well, for which the file is read as a whole.
func (w *workshop) open(ctx context.Context, f *os.File, path string, link bool, node *nar.Node) (c contents, err error) {
	patches, err := w.repairs(f, path, int64(node.Size))
	if err != nil {
		return c, err
	}
	c.stream = w.table.stream(f, 0, int64(node.Size))
	c.stream.patches = patches
	if c.first, err = c.stream.Next(); err != nil {
		return contents{}, err
	}
	if node.Unique = len(patches) > 0 || c.stream.changed; node.Unique || !link || node.Size < leastLinked {
		return c, nil
	}
	// It is read twice if it has no hash, and up to the first hash.
	read := c.stream.offset
	for _, err := range c.stream.pieces() {
		if err = cmp.Or(err, ctx.Err()); err != nil {
			c.drop()
			return c, err
		}
		if c.stream.changed {
			break
		}
	}
	if node.Unique = c.stream.changed; !node.Unique {
		node.Same = f
	}
	if c.stream.offset > read {
		c.drop()
		c.stream = w.table.stream(f, 0, int64(node.Size))
	}
	return c, nil
}

// Contents implements [nar.Nodes].
func (n *Nodes) Contents() (nar.Chunk, error) {
	if err := n.ctx.Err(); err != nil {
		return nar.Chunk{}, err
	}
	c, err := n.contents.Next()
	if err != nil && err != io.EOF {
		err = fmt.Errorf("%s: %w", n.tree.File().Name(), err)
	}
	return c, err
}
