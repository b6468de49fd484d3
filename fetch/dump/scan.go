// SPDX-License-Identifier: GPL-3.0-or-later

package dump

import (
	"errors"
	"hash/maphash"
	"io"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// maxBlocks is of how many blocks of a dump it is known where they are.
const maxBlocks = 1 << 21

// Position is where a block is in a file, and its size.
type Position int64

// PositionOf returns that of a block of a size that is valid.
func PositionOf(offset int64, size int) Position {
	p := Position(offset << 1)
	if size == int(eris.BlockSize32KiB) {
		p |= 1
	}
	return p
}

// Offset returns where the block begins, in bytes.
func (p Position) Offset() int64 { return int64(p >> 1) }

// Size returns how many bytes the block has.
func (p Position) Size() int {
	if p&1 != 0 {
		return int(eris.BlockSize32KiB)
	}
	return int(eris.BlockSize1KiB)
}

// End returns where the block ends.
func (p Position) End() int64 { return p.Offset() + int64(p.Size()) }

// contents is what is known of a dump.
type contents struct {
	blocks map[uint64]Position // by the hash of the reference, which nobody can foresee
	more   bool                // there are more

	end          ending // of the dump that can be continued
	capabilities []eris.ReadCapability
	whole        bool // the dumps are not cut off, and there is nothing behind them
	foreign      bool // there is something in them that would get lost if they were written anew
	damaged      bool // the dump to be continued is followed by something that has blocks but is not whole
}

// add takes note of where a block is, unless too many are known.
func (c *contents) add(key uint64, at Position) {
	if _, ok := c.blocks[key]; !ok && len(c.blocks) == maxBlocks {
		c.more = true
		return
	}
	c.blocks[key] = at
}

// scan reads through a dump. It looks at the blocks themselves only where there are several for one
// reference, to keep one that is right. A dump that is cut off is no error.
func (s *Store) scan(file io.ReaderAt, size int64) (*contents, error) {
	c := &contents{blocks: make(map[uint64]Position)}
	p := parser{file: file, size: size}
	memory := make([]byte, eris.BlockSize32KiB)
	right := func(ref eris.Reference, at Position) bool {
		block := memory[:at.Size()]
		n, _ := file.ReadAt(block, at.Offset())
		return n == len(block) && eris.Verify(ref, block) == nil
	}
	behind := false // there are right blocks behind the first dump
	for n := 0; ; n++ {
		if n%1024 == 0 && s.Closing() {
			return nil, fetch.ErrClosed
		}
		l, err := p.next()
		if err != nil {
			return c, c.finish(&p, err, behind)
		}
		if l.offset+int64(l.size) > size {
			continue // the dump is cut off in this block
		}
		at := PositionOf(l.offset, l.size)
		behind = behind || p.dumps > 1 && right(l.ref, at)
		key := maphash.Bytes(s.seed, l.ref[:])
		if known, ok := c.blocks[key]; !ok || !right(l.ref, known) {
			c.add(key, at)
		}
	}
}

func (c *contents) finish(p *parser, err error, behind bool) error {
	var format *FormatError
	if err != io.EOF && (!errors.As(err, &format) || p.dumps == 0) {
		return err
	}
	c.whole = err == io.EOF
	c.end = p.end
	if p.dumps > 1 && p.end.end == 0 {
		// What an interruption leaves behind a dump may look like the beginning of another one.
		c.end = p.before
		c.damaged = behind
	}
	c.capabilities = p.capabilities[c.end.first:c.end.last]
	c.foreign = p.skipped > 0 || p.more
	return nil
}
