// SPDX-License-Identifier: GPL-3.0-or-later

package dump

import (
	"errors"
	"hash/maphash"
	"io"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/local"
)

// maxBlocks is of how many blocks of a dump it is known where they are.
const maxBlocks = 1 << 21

// place is where a block is in the file, and its size.
type place int64

func placeOf(offset int64, size int) place {
	p := place(offset << 1)
	if size == int(eris.BlockSize32KiB) {
		p |= 1
	}
	return p
}

func (p place) offset() int64 { return int64(p >> 1) }

func (p place) size() int {
	if p&1 != 0 {
		return int(eris.BlockSize32KiB)
	}
	return int(eris.BlockSize1KiB)
}

// contents is what is known of a dump.
type contents struct {
	blocks map[uint64]place // by the hash of the reference, which nobody can foresee
	more   bool             // there are more

	end          ending // of the dump that can be continued
	capabilities []eris.ReadCapability
	whole        bool // the dumps are not cut off, and there is nothing behind them
	foreign      bool // there is something in them that would get lost if they were written anew
	damaged      bool // the dump to be continued is followed by something that has blocks but is not whole
}

// scan reads through a dump. It looks at the blocks themselves only where there are several for one reference, to keep one
// that is right. A dump that is cut off is no error.
func (s *Store) scan(file io.ReaderAt, size int64) (*contents, error) {
	c := &contents{blocks: make(map[uint64]place)}
	p := parser{in: &fileInput{file: file, size: size}}
	memory := s.pool.Get().(*[eris.BlockSize32KiB]byte)
	defer s.pool.Put(memory)
	right := func(ref eris.Reference, at place) bool {
		block := memory[:at.size()]
		n, _ := file.ReadAt(block, at.offset())
		return n == len(block) && eris.Verify(ref, block) == nil
	}
	behind := false // there are right blocks behind the first dump
	for n := 0; ; n++ {
		if n%1024 == 0 {
			select {
			case <-s.closing:
				return nil, local.ErrClosed
			default:
			}
		}
		l, err := p.next()
		if err != nil {
			return c, c.finish(&p, err, behind)
		}
		if l.offset+int64(l.size) > size {
			continue // the dump is cut off in this block
		}
		at := placeOf(l.offset, l.size)
		behind = behind || p.dumps > 1 && right(l.ref, at)
		key := maphash.Bytes(s.seed, l.ref[:])
		if known, ok := c.blocks[key]; ok && right(l.ref, known) {
			continue
		} else if !ok && len(c.blocks) == maxBlocks {
			c.more = true
			continue
		}
		c.blocks[key] = at
	}
}

// finish takes note of what the parser has found by the end.
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

// fileInput is an input that passes over blocks without reading them.
type fileInput struct {
	file   io.ReaderAt
	size   int64
	offset int64 // of the first byte in the buffer that has not been consumed
	buffer [8 << 10]byte
	start  int
	end    int
}

// Peek is the method of [input].
func (f *fileInput) Peek(n int) ([]byte, error) {
	if f.end-f.start < n {
		copy(f.buffer[:], f.buffer[f.start:f.end])
		f.end -= f.start
		f.start = 0
		from := f.offset + int64(f.end)
		room := min(int64(len(f.buffer)-f.end), f.size-from)
		read, err := f.file.ReadAt(f.buffer[f.end:f.end+int(max(room, 0))], from)
		f.end += read
		if err != nil && err != io.EOF {
			return nil, err
		}
	}
	if have := f.end - f.start; have < n {
		return f.buffer[f.start:f.end], io.EOF
	}
	return f.buffer[f.start : f.start+n], nil
}

// Discard is the method of [input].
func (f *fileInput) Discard(n int) (int, error) {
	var err error
	if left := f.size - f.offset; int64(n) > left {
		n, err = int(left), io.EOF
	}
	f.offset += int64(n)
	if n <= f.end-f.start {
		f.start += n
	} else {
		f.start, f.end = 0, 0
	}
	return n, err
}
