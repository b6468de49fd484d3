// SPDX-License-Identifier: GPL-3.0-or-later

package image

import (
	"math"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// totalled is the nodes of a tree, and tells how many bytes its files should have in all. An index
// does not say how long they are, but how many levels of blocks they have, from which a guess of
// each follows; those that have come by say how far such guesses are off.
type totalled struct {
	nar.Nodes
	tell        func(bytes int64)
	guesses     []float64 // of the files still to come, in order
	come, left  float64   // sums of guesses
	bytesOfCome float64
}

func newTotalled(nodes nar.Nodes, index *erisfs.Index, tell func(bytes int64)) *totalled {
	t := &totalled{Nodes: nodes, tell: tell}
	for c := range index.Contents() {
		leaves := math.Pow(float64(c.BlockSize.Arity()), max(0, float64(c.Level)-0.5))
		t.guesses = append(t.guesses, leaves*float64(c.BlockSize))
		t.left += leaves * float64(c.BlockSize)
	}
	return t
}

// Next implements [nar.Nodes].
func (t *totalled) Next() (nar.Node, error) {
	node, err := t.Nodes.Next()
	if err == nil && node.Kind == nar.Regular {
		t.come, t.left = t.come+t.guesses[0], t.left-t.guesses[0]
		t.guesses = t.guesses[1:]
		t.bytesOfCome += max(float64(node.Size), 1<<10) // a block at least
		t.tell(int64(min(t.bytesOfCome*(1+t.left/t.come), 1<<60)))
	}
	return node, err
}
