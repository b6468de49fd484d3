// SPDX-License-Identifier: GPL-3.0-or-later

package image

import (
	"context"
	"slices"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// Nearby are blocks that can be had without waiting for anybody else: those of a cache, for
// example. They need not be verified: what is wrong spoils an estimate only.
type Nearby struct {
	fetch.Source
	// Has reports whether a block is there. It may be wrong at times.
	Has func(ctx context.Context, ref eris.Reference, size eris.BlockSize) bool
	// Stride is how many leaves there are for each that is looked for: 1 if Has takes no time.
	Stride int
}

// presentNodes bounds how many internal nodes are read to find out what is there.
const presentNodes = 4096

// Present estimates how many bytes of the contents of an image are in the leaves that nearby has.
// It finds only what can be reached by way of an index and of internal nodes that are there too. It
// ends with ctx, with what it has found by then.
func Present(ctx context.Context, nearby *Nearby, c eris.ReadCapability, limits erisfs.Limits) int64 {
	var leaves int
	var bytes int64
	if !nearby.Has(ctx, c.Root, c.BlockSize) {
		return 0
	}
	p := presence{ctx: ctx, source: nearby, has: nearby.Has, found: func(b Block, level int) {
		if level > 0 {
			return
		}
		if leaves++; leaves%nearby.Stride == 0 && nearby.Has(ctx, b.Reference, b.Size) {
			bytes += int64(b.Size) * int64(nearby.Stride)
		}
	}}
	p.walk(c, limits)
	return bytes
}

// A Block is one of the blocks of an image.
type Block struct {
	Reference eris.Reference
	Size      eris.BlockSize
}

// Blocks returns the blocks of the contents of an image, as far as they can be found by way of
// those that the source has, and the form, which is empty if the source has not even the first one.
// What is below a block that it does not have is left out, and so are blocks of an index but for
// its root. Each is in the list as often as in the image. It ends with ctx, with what it has by
// then.
func Blocks(ctx context.Context, source fetch.Source, c eris.ReadCapability, limits erisfs.Limits) ([]Block, Form) {
	blocks := []Block{{c.Root, c.BlockSize}}
	p := presence{ctx: ctx, source: source, found: func(b Block, _ int) {
		if b.Reference != c.Root { // the contents may be the image itself
			blocks = append(blocks, b)
		}
	}}
	p.has = func(context.Context, eris.Reference, eris.BlockSize) bool { return true }
	return blocks, p.walk(c, limits)
}

// presence goes through the blocks of an image.
type presence struct {
	ctx    context.Context
	source fetch.Source
	has    func(ctx context.Context, ref eris.Reference, size eris.BlockSize) bool
	found  func(b Block, level int)
	nodes  int // that have been read
	block  [eris.BlockSize32KiB]byte
}

// walk goes through all contents that an image consists of: the files of an index, or one archive.
// It returns the form, which is empty if they cannot be read.
func (p *presence) walk(c eris.ReadCapability, limits erisfs.Limits) Form {
	contents := slices.Values([]eris.ReadCapability{c})
	form, index, err := ReadIndex(p.ctx, p.source, c, limits, fetch.Window{Requests: 4})
	switch {
	case form != ERISFS:
	case err != nil:
		return form
	default:
		contents = index.Contents()
	}
	for c := range contents {
		p.add(eris.Pair{Reference: c.Root, Key: c.Key}, c.BlockSize, c.Level)
	}
	return form
}

// add goes through a block and those below it.
func (p *presence) add(pair eris.Pair, size eris.BlockSize, level int) {
	if p.ctx.Err() != nil {
		return
	}
	p.found(Block{pair.Reference, size}, level)
	if level == 0 {
		return
	}
	if p.nodes == presentNodes || !p.has(p.ctx, pair.Reference, size) {
		return
	}
	p.nodes++
	block, err := fetch.Get(p.ctx, p.source, pair.Reference, size, p.block[:0])
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
