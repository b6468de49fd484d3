// SPDX-License-Identifier: GPL-3.0-or-later

package lzip

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/ulikunitz/xz/lzma"
)

// leastDictionary is the logarithm of the dictionary's size at level 0; each level doubles it, up
// to 32 MiB.
const leastDictionary, mostDictionary = 18, 25

// A Writer compresses what is written to it, as one member of lzip
// (https://www.nongnu.org/lzip/manual/lzip_manual.html#File-format). It makes the same bytes each
// time.
type Writer struct {
	w    *tail
	lzma *lzma.Writer
	crc  uint32
	size uint64
}

// NewWriter returns a writer to w. The level, from 1 to 9, says how far back it looks for what has
// been before: 512 KiB to 32 MiB. It takes some ten times as much memory. It must be closed.
func NewWriter(w io.Writer, level int) (*Writer, error) {
	if level < 1 || level > 9 {
		return nil, fmt.Errorf("lzip has levels from 1 to 9, and not %d", level)
	}
	bits := min(leastDictionary+level, mostDictionary)
	z := &Writer{w: &tail{w: w, skip: lzma.HeaderLen}}
	if _, err := w.Write(append([]byte(magic), byte(bits))); err != nil {
		return nil, err
	}
	var err error
	z.lzma, err = lzma.WriterConfig{DictCap: 1 << bits, EOSMarker: true}.NewWriter(z.w)
	return z, err
}

// Write implements [io.Writer].
func (z *Writer) Write(p []byte) (int, error) {
	n, err := z.lzma.Write(p)
	z.crc = crc32.Update(z.crc, crc32.IEEETable, p[:n])
	z.size += uint64(n)
	return n, err
}

// Close writes what is left, and the end of the member. The writer below is left open.
func (z *Writer) Close() error {
	if err := z.lzma.Close(); err != nil {
		return err
	}
	trailer := binary.LittleEndian.AppendUint32(nil, z.crc)
	trailer = binary.LittleEndian.AppendUint64(trailer, z.size)
	trailer = binary.LittleEndian.AppendUint64(trailer, headerSize+z.w.written+trailerSize)
	_, err := z.w.Write(trailer)
	return err
}

// A tail drops the first bytes that are written to it: the header of an LZMA file, in place of
// which lzip has its own.
type tail struct {
	w       io.Writer
	skip    int
	written uint64
}

// Write implements [io.Writer].
func (t *tail) Write(p []byte) (int, error) {
	dropped := min(t.skip, len(p))
	t.skip -= dropped
	n, err := t.w.Write(p[dropped:])
	t.written += uint64(n)
	return dropped + n, err
}
