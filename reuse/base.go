// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"context"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// A Base is an old item of which files, or parts of them, should be the same in the new one. It
// only reads, and what it reads may be different at any time, or have gone. It is safe for
// concurrent use.
type Base struct {
	ctx      context.Context
	workshop *workshop
	link     bool      // see [Nodes]
	back     *Replacer // from names in the new item to those in the old one
	patches  sync.Map  // []patch of the files that are repaired, by path
}

// Base returns the old item as a base, which is of use where the item as a whole is not. Programs
// of Go are rewritten like other files. Without a database the old item may be read to find out
// what it refers to; errors are those of that. The context ends all reading.
func (c *Candidate) Base(ctx context.Context) (*Base, error) {
	if c.Hopeless {
		var references []string
		var err error
		if c.info != nil {
			references = c.info.References
		} else if references, err = c.finder.references(ctx, c.old, c.want); err != nil {
			return nil, err
		}
		c.pairs = Replacements(c.old, filepath.Base(c.want.StorePath), references, c.want.References)
	}
	w := c.workshop()
	w.foreign = false
	back := make([]Replacement, len(c.pairs))
	for i, p := range c.pairs {
		back[i] = Replacement{p.New, p.Old}
	}
	return &Base{ctx: ctx, workshop: w, link: c.info != nil, back: NewReplacer(back)}, nil
}

// Differs notes that the base differs from the item in too much. It is no candidate any more, once
// it is hopeless, too.
func (c *Candidate) Differs() { c.finder.misses.add(newRecord(c.old, c.want.NarDigest, asBase)) }

// path returns the file name in the old item of what is at a path of the new one; both are empty
// for an item that is a file.
func (b *Base) path(path string) (relative, full string) {
	relative = b.back.text(path)
	return relative, filepath.Join(b.workshop.store, b.workshop.old, relative)
}

// File opens the file that is at a path below the old item, as it is when it has been rewritten and
// repaired. It is an [erisfs.Base]'s: of a plain file the node names the file with its contents, if
// the database says that the old item is complete.
func (b *Base) File(path string, plain bool) (node nar.Node, c nar.Feeder, done func() (plain bool), err error) {
	relative, full := b.path(path)
	f, size, err := OpenRegular(full)
	if err != nil {
		return node, nil, nil, fmt.Errorf("%s: %w", full, err)
	}
	node.Size = uint64(size)
	opened := &contents{}
	if plain {
		opened.stream = b.workshop.table.stream(f, 0, size)
		if b.link {
			node.Same = f
		}
	} else if size > 0 {
		*opened, err = b.workshop.open(b.ctx, f, relative, false, &node)
	}
	if err != nil {
		f.Close()
		return node, nil, nil, fmt.Errorf("%s: %w", full, err)
	}
	node.Unique = !plain
	if opened.stream != nil && len(opened.stream.patches) > 0 {
		b.patches.Store(path, opened.stream.patches)
	}
	return node, opened, func() bool {
		defer f.Close()
		defer opened.drop()
		return opened.stream == nil || !opened.stream.changed && len(opened.stream.patches) == 0
	}, nil
}

// ReadPart reads up to 64 KiB at an offset of a file, rewritten, and repaired as it was when File
// opened it. It returns how many bytes there are, which are fewer than p has at the end of the
// file.
func (b *Base) ReadPart(path string, p []byte, offset int64) (n int, err error) {
	_, full := b.path(path)
	f, size, err := OpenRegular(full)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	// With what there may be of a hash before and behind.
	table := b.workshop.table
	from := max(0, offset-int64(table.span-1))
	to := min(size, offset+int64(len(p)+table.span-1))
	if offset > size || to-from > nar.PieceSize {
		return 0, fs.ErrInvalid
	}
	c := table.pool.Get()
	defer c.Release()
	piece := c.Bytes[:to-from]
	if _, err := f.ReadAt(piece, from); err != nil {
		return 0, Unexpected(err)
	}
	table.rewrite(piece, len(piece))
	if patches, ok := b.patches.Load(path); ok {
		for _, x := range patches.([]patch) {
			x.apply(piece, from)
		}
	}
	return copy(p, piece[offset-from:]), nil
}
