// SPDX-License-Identifier: GPL-3.0-or-later

package image

import (
	"context"
	"iter"
	"slices"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
)

// Nearby are blocks that can be had without waiting for anybody else: those of a
// cache, for example.
type Nearby interface {
	eris.Blocks
	// Has tells whether a block is there. It may be wrong at times.
	Has(ctx context.Context, ref eris.Reference, size eris.BlockSize) bool
}

// presentNodes bounds how many internal nodes are read to find out what is there.
const presentNodes = 4096

// Present estimates how many bytes of the contents of an image are in the leaves
// that nearby has. It looks at one leaf of stride, and finds only what can be
// reached by way of an index and of internal nodes that are there too. It ends
// with ctx, with what it has found by then.
func Present(ctx context.Context, nearby Nearby, c eris.ReadCapability, limits erisfs.Limits, stride int) int64 {
	p := presence{ctx: ctx, nearby: nearby, stride: max(1, stride), nodes: presentNodes}
	if !nearby.Has(ctx, c.Root, c.BlockSize) {
		return 0
	}
	for content := range p.contents(c, limits) {
		p.add(eris.Pair{Reference: content.Root, Key: content.Key}, content.BlockSize, content.Level)
	}
	return p.bytes
}

// presence counts what is there.
type presence struct {
	ctx    context.Context
	nearby Nearby
	stride int
	leaves int // seen so far
	nodes  int // that may still be read
	bytes  int64
	block  [eris.BlockSize32KiB]byte
}

// contents are what an image consists of: the files of an index, or one archive.
func (p *presence) contents(c eris.ReadCapability, limits erisfs.Limits) iter.Seq[eris.ReadCapability] {
	x, err := Open(p.ctx, p.nearby, c, limits, eris.Window{Requests: 4})
	if err != nil || x.Form != ERISFS {
		return slices.Values([]eris.ReadCapability{c})
	}
	none := func(func(eris.ReadCapability) bool) {}
	if x.Content.Size() > limits.IndexLength() {
		return none
	}
	index, err := erisfs.ReadIndex(p.ctx, x.Content, limits)
	if err != nil {
		return none
	}
	return index.Contents()
}

// add counts the leaves below a block.
func (p *presence) add(pair eris.Pair, size eris.BlockSize, level int) {
	if p.ctx.Err() != nil {
		return
	}
	if level == 0 {
		if p.leaves++; p.leaves%p.stride == 0 && p.nearby.Has(p.ctx, pair.Reference, size) {
			p.bytes += int64(size) * int64(p.stride)
		}
		return
	}
	if p.nodes == 0 || !p.nearby.Has(p.ctx, pair.Reference, size) {
		return
	}
	p.nodes--
	block, err := p.nearby.Get(p.ctx, pair.Reference, size, p.block[:0])
	if err != nil || eris.Verify(pair.Reference, block) != nil || len(block) != int(size) {
		return
	}
	// The node is a view of its memory, which must last while its children are
	// looked at.
	node, err := eris.DecryptNode(make([]byte, size), block, pair.Key, level)
	if err != nil {
		return
	}
	for i := range node.Len() {
		p.add(node.Pair(i), size, level-1)
	}
}
