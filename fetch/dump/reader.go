// SPDX-License-Identifier: GPL-3.0-or-later

package dump

import (
	"bufio"
	"io"
	"slices"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// Reader reads a dump from a stream, such as a mail or a pipe: block by block, so that it needs little memory however long
// the dump is. It takes several dumps one after the other for one. It must not be used by several goroutines at a time.
type Reader struct {
	in     *bufio.Reader
	parser parser
	block  [eris.BlockSize32KiB]byte
	wrong  int64
}

// NewReader returns a Reader of r. It reads ahead.
func NewReader(r io.Reader) *Reader {
	in := bufio.NewReaderSize(r, 64<<10)
	return &Reader{in: in, parser: parser{in: in}}
}

// Next returns the next block and its reference. The bytes are valid until the next call. The block has been verified;
// those that are not what their reference says are passed over.
//
// It returns io.EOF at the end of the dump, a [*FormatError] if this is not a dump, or cut off, and otherwise the error of
// the stream. What was returned before an error is good nevertheless.
func (r *Reader) Next() (eris.Reference, []byte, error) {
	for {
		l, err := r.parser.next()
		if err != nil {
			return eris.Reference{}, nil, err
		}
		block := r.block[:l.size]
		if err := r.parser.read(block); err != nil {
			return eris.Reference{}, nil, err
		}
		if eris.Verify(l.ref, block) == nil {
			return l.ref, block, nil
		}
		r.wrong++
	}
}

// Skipped returns how much has been passed over so far: blocks that were not what their reference says, and things that have
// no place in a dump.
func (r *Reader) Skipped() int64 { return r.wrong + r.parser.skipped }

// Capabilities returns the read capabilities that have been read so far, at most 65536. They stand behind the blocks. Nothing
// vouches for them.
func (r *Reader) Capabilities() []eris.ReadCapability { return slices.Clone(r.parser.capabilities) }
