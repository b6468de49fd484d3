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
// member or before the first, errors with [ErrFormat] or [ErrDictionary] in their chain, and those
// of the source as they are. An error is final.
type Reader struct {
	maxDictionary int
	d             decoder
	open          bool // d is inside of a member
	begun         bool // there was a member
	piece         []byte
	err           error
}

// NewReader returns a Reader of r. It reads from r only when data are wanted, and may read more of
// r than the members need. maxDictionary is the largest dictionary size accepted, in bytes.
// It bounds the window, which takes memory only as data arrive.
func NewReader(r io.Reader, maxDictionary int) *Reader {
	z := &Reader{maxDictionary: maxDictionary}
	z.d.src = r
	return z
}

// next returns the next piece of the data. It is never empty, and is there until the next call of
// any method.
func (z *Reader) next() ([]byte, error) {
	if p := z.piece; len(p) > 0 {
		z.piece = nil
		return p, nil
	}
	for z.err == nil {
		if !z.open {
			z.err = z.begin()
			continue
		}
		p, err := z.d.next()
		if err == io.EOF {
			z.open = false
		} else if err != nil {
			z.err = err
			break
		}
		if len(p) > 0 {
			return p, nil
		}
	}
	z.d.close()
	return nil, z.err
}

// begin reads the header of a member; io.EOF says that there are no more.
func (z *Reader) begin() error {
	err := z.d.begin(z.maxDictionary)
	if err == io.EOF && !z.begun {
		err = io.ErrUnexpectedEOF
	}
	z.open, z.begun = err == nil, true
	return err
}

// Read implements io.Reader.
func (z *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	piece, err := z.next()
	n := copy(p, piece)
	z.piece = piece[n:]
	return n, err
}

// Close gives the memory of the Reader back. It does not close the source. It returns nil, and may
// be called again.
func (z *Reader) Close() error {
	z.err, z.piece = errClosed, nil
	z.d.close()
	return nil
}
