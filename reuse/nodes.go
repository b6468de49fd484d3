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
	stream    *stream // of the Regular under way, nil if that is empty
}

// Close ends the walk early. It need not be called after Next has returned an error.
func (n *Nodes) Close() { n.tree.Close() }

// Next implements [nar.Nodes].
func (n *Nodes) Next() (nar.Node, error) {
	n.stream = nil
	if err := n.ctx.Err(); err != nil {
		return nar.Node{}, err
	}
	node, err := n.tree.Next()
	if err != nil {
		return node, err
	}
	f := n.tree.File()
	switch {
	case node.Kind == nar.Symlink:
		node.Target = n.workshop.table.text(node.Target)
	case f != nil:
		if err := n.open(f, &node); err != nil {
			if errors.Is(err, errGo) {
				n.candidate.remember() // no attempt can succeed
			}
			n.Close()
			return node, fmt.Errorf("%s: %w", f.Name(), err)
		}
	}
	return node, nil
}

// open begins with a file that is not empty. One that may be linked is read as a whole first, or up
// to its first hash.
func (n *Nodes) open(f *os.File, node *nar.Node) error {
	if int64(node.Size) > most(n.candidate.want) {
		return errLonger
	}
	path := strings.TrimPrefix(strings.TrimPrefix(f.Name(), n.candidate.String()), "/")
	patches, err := n.workshop.repairs(f, path, int64(node.Size))
	if err != nil {
		return err
	}
	n.stream = n.workshop.table.stream(f, int64(node.Size))
	n.stream.patches = patches
	node.Unique = len(patches) > 0
	if node.Unique || n.candidate.info == nil || node.Size < leastLinked {
		return nil
	}
	read := n.workshop.table.stream(f, int64(node.Size))
	for _, err := range read.pieces() {
		if err := cmp.Or(err, n.ctx.Err()); err != nil {
			return err
		}
		if read.changed {
			node.Unique = true
			return nil
		}
	}
	node.Same = f
	return nil
}

// Contents implements [nar.Nodes].
func (n *Nodes) Contents() (nar.Chunk, error) {
	if err := n.ctx.Err(); err != nil {
		return nar.Chunk{}, err
	}
	if n.stream == nil {
		return nar.Chunk{}, io.EOF
	}
	c, err := n.stream.Next()
	if err != nil && err != io.EOF {
		err = fmt.Errorf("%s: %w", n.tree.File().Name(), err)
	}
	return c, err
}
