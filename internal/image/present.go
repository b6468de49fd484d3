// SPDX-License-Identifier: GPL-3.0-or-later

package image

import (
	"context"
	"iter"
	"slices"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// Nearby are blocks that can be had without waiting for anybody else: those of a cache, for
// example. They need not be verified: what is wrong spoils an estimate only.
type Nearby interface {
	fetch.Source
	// Has reports whether a block is there. It may be wrong at times.
	Has(ctx context.Context, ref eris.Reference, size eris.BlockSize) bool
}

// presentNodes bounds how many internal nodes are read to find out what is there.
const presentNodes = 4096

// Present estimates how many bytes of the contents of an image are in the leaves that nearby has.
// It looks at one leaf of stride, and finds only what can be reached by way of an index and of
// internal nodes that are there too. It ends with ctx, with what it has found by then.
func Present(ctx context.Context, nearby Nearby, c eris.ReadCapability, limits erisfs.Limits, stride int) int64 {
	p := presence{ctx: ctx, nearby: nearby, stride: max(1, stride), nodes: presentNodes}
	if !nearby.Has(ctx, c.Root, c.BlockSize) {
		return 0
	}
	for c := range p.contents(c, limits) {
		p.add(eris.Pair{Reference: c.Root, Key: c.Key}, c.BlockSize, c.Level)
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
	x, err := Open(p.ctx, p.nearby, c, limits, fetch.Window{Requests: 4})
	if err != nil {
		return slices.Values([]eris.ReadCapability{c})
	}
	defer x.Close()
	if x.Form != ERISFS {
		return slices.Values([]eris.ReadCapability{c})
	}
	index, err := x.index()
	if err != nil {
		return func(func(eris.ReadCapability) bool) {}
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
	block, err := fetch.Get(p.ctx, p.nearby, pair.Reference, size, p.block[:0])
	if err != nil {
		return
	}
	// The node is a view of its memory, which must last while its children are looked at.
	plaintext := make([]byte, size)
	eris.Decrypt(plaintext, block, pair.Key, level)
	node, err := eris.ParseNode(plaintext)
	if err != nil {
		return
	}
	for i := range node.Len() {
		p.add(node.Pair(i), size, level-1)
	}
}
