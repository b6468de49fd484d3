// SPDX-License-Identifier: GPL-3.0-or-later

package packs

import (
	"context"
	"io"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dump"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
)

// packer writes a pack.
type packer struct {
	ctx     context.Context
	source  fetch.Source
	stream  dump.Stream
	length  int64 // of what has been written
	seen    map[eris.Reference]bool
	entries []entry
	leaves  []leaf // that are to be written yet
}

type leaf struct {
	ref  eris.Reference
	size eris.BlockSize
}

// write writes a pack of all blocks of what c denotes, which the source must have: of its contents,
// and if that is the index of a tree, of all files.
func write(ctx context.Context, w io.Writer, source fetch.Source, c eris.ReadCapability) error {
	k := &packer{ctx: ctx, source: source, seen: map[eris.Reference]bool{}}
	k.stream.W = writerFunc(func(b []byte) (int, error) {
		n, err := w.Write(b)
		k.length += int64(n)
		return n, err
	})
	if err := k.content(c); err != nil {
		return err
	}
	if err := k.inside(c); err != nil {
		return err
	}
	if err := k.putLeaves(); err != nil {
		return err
	}
	return k.stream.EndWith(appendTable(nil, k.entries))
}

// inside writes the index of a tree, and what is not leaves of the files.
func (k *packer) inside(c eris.ReadCapability) error {
	limits := erisfs.Limits{NarSize: 1 << 60} // the blocks are our own
	x, err := image.Open(k.ctx, k.source, c, limits, fetch.Window{})
	if err != nil {
		return err
	}
	defer x.Close()
	if x.Form != image.ERISFS {
		return nil
	}
	index, err := x.Index()
	if err != nil {
		return err
	}
	if err := k.putLeaves(); err != nil {
		return err
	}
	for c := range index.Contents() {
		if err := k.content(c); err != nil {
			return err
		}
	}
	return nil
}

// content writes the inner nodes of a content, and notes the leaves.
func (k *packer) content(c eris.ReadCapability) error {
	pairs := []eris.Pair{{Reference: c.Root, Key: c.Key}}
	for level := c.Level; level > 0; level-- {
		var below []eris.Pair
		for _, pair := range pairs {
			if k.seen[pair.Reference] {
				continue
			}
			block, err := k.put(leaf{pair.Reference, c.BlockSize})
			if err != nil {
				return err
			}
			plain := make([]byte, len(block))
			eris.Decrypt(plain, block, pair.Key, level)
			node, err := eris.ParseNode(plain)
			if err != nil {
				return err
			}
			for i := range node.Len() {
				below = append(below, node.Pair(i))
			}
		}
		pairs = below
	}
	for _, pair := range pairs {
		k.leaves = append(k.leaves, leaf{pair.Reference, c.BlockSize})
	}
	return nil
}

func (k *packer) putLeaves() error {
	for _, l := range k.leaves {
		if k.seen[l.ref] {
			continue
		}
		if _, err := k.put(l); err != nil {
			return err
		}
	}
	k.leaves = nil
	return nil
}

func (k *packer) put(l leaf) ([]byte, error) {
	if len(k.entries) == maxBlocks {
		return nil, errTooMany
	}
	block, err := fetch.Get(k.ctx, k.source, l.ref, l.size, nil)
	if err != nil {
		return nil, err
	}
	k.seen[l.ref] = true
	if err := k.stream.Put(k.ctx, l.ref, block); err != nil {
		return nil, err
	}
	k.entries = append(k.entries, newEntry(l.ref, k.length-int64(len(block)), len(block)))
	return block, nil
}

// writerFunc is a function as an io.Writer.
type writerFunc func(b []byte) (int, error)

// Write implements io.Writer.
func (f writerFunc) Write(b []byte) (int, error) { return f(b) }
