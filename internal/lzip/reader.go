// SPDX-License-Identifier: GPL-3.0-or-later

package lzip

import "io"

// A Reader decompresses a stream of lzip members. It must be closed. It is not safe for concurrent
// use, and has no goroutines.
//
// A member's last piece comes after its trailer has been checked; what was handed out before is
// what the compressed data say, but not known to be whole.
//
// The errors are io.EOF after the last member, io.ErrUnexpectedEOF where the data end inside of a
// member or before the first, those of the source as they are, and others for data that are not
// sound and for dictionaries above the limit. An error is final.
type Reader struct {
	maxDictionary int
	d             decoder
	open          bool // d is inside of a member
	begun         bool // there was a member
	piece         []byte
	err           error
}

// NewReader returns a Reader of r. It reads from r only when data are wanted, and may read more of
// r than the members need. maxDictionary is the largest dictionary size accepted, in bytes. It
// bounds the window, which takes memory only as data arrive.
func NewReader(r io.Reader, maxDictionary int) *Reader {
	z := &Reader{maxDictionary: maxDictionary}
	z.d.src = r
	return z
}

// Read implements io.Reader.
func (z *Reader) Read(p []byte) (int, error) {
	for len(z.piece) == 0 && z.err == nil && len(p) > 0 {
		z.piece, z.err = z.next()
	}
	if z.err != nil {
		z.d.close()
		return 0, z.err
	}
	n := copy(p, z.piece)
	z.piece = z.piece[n:]
	return n, nil
}

// next returns the next piece of the data, which may be empty and is there until the next call, or
// an error.
func (z *Reader) next() ([]byte, error) {
	if !z.open {
		err := z.d.begin(z.maxDictionary)
		if err == io.EOF && !z.begun {
			err = io.ErrUnexpectedEOF
		}
		z.open, z.begun = err == nil, true
		return nil, err
	}
	p, err := z.d.next()
	if err == io.EOF { // of the member
		z.open, err = false, nil
	}
	return p, err
}

// Close gives the memory of the Reader back. It does not close the source. It may be called again.
func (z *Reader) Close() {
	z.err, z.piece = errClosed, nil
	z.d.close()
}
