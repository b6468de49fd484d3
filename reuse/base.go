// SPDX-License-Identifier: GPL-3.0-or-later

package reuse

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// A Base is an old item of which files, or parts of them, should be the same in the new one. It
// only reads, and what it reads may be different at any time, or have gone. It is safe for
// concurrent use.
type Base struct {
	item  string // file name
	table *Replacer
	link  bool      // see [Nodes]
	most  int64     // bytes of a file that are of use
	back  *Replacer // from names in the new item to those in the old one
}

// Base returns the old item as a base, which is of use where the item as a whole is not. Without a
// database the old item may be read to find out what it refers to; errors are those of that.
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
	back := make([]Replacement, len(c.pairs))
	for i, p := range c.pairs {
		back[i] = Replacement{p.New, p.Old}
	}
	return &Base{item: c.String(), table: c.table(), link: c.info != nil, most: most(c.want), back: NewReplacer(back)}, nil
}

// open opens the file in the old item of what is at a path of the new one, which is empty for an
// item that is a file.
func (b *Base) open(path string) (*os.File, int64, error) {
	name := filepath.Join(b.item, b.back.text(path))
	f, size, err := OpenRegular(name)
	if err != nil {
		err = fmt.Errorf("%s: %w", name, err)
	}
	return f, size, err
}

// File opens the file that is at a path below the old item, as it is when it has been rewritten. It
// is an [erisfs.Base]'s: of a plain file the node names the file with its contents, if the database
// says that the old item is complete.
func (b *Base) File(path string, plain bool) (node nar.Node, c nar.Feeder, done func() (plain bool), err error) {
	f, size, err := b.open(path)
	if err != nil {
		return node, nil, nil, err
	}
	size = min(size, b.most)
	node.Size, node.Unique = uint64(size), !plain
	if plain && b.link {
		node.Same = f
	}
	s := b.table.stream(f, size)
	return node, s, func() bool {
		f.Close()
		return !s.changed
	}, nil
}

// ReadPart reads up to 64 KiB at an offset of a file, rewritten. It returns how many bytes there
// are, which are fewer than p has at the end of the file.
func (b *Base) ReadPart(path string, p []byte, offset int64) (n int, err error) {
	f, size, err := b.open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	// With what there may be of a hash before and behind.
	table := b.table
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
	return copy(p, piece[offset-from:]), nil
}
