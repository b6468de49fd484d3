// SPDX-License-Identifier: GPL-3.0-or-later

package decompress

import (
	"bufio"
	"io"

	"github.com/klauspost/compress/gzip"
)

// freeGzip is freeInput for gzip: members may be empty, each of 20 bytes, which take a microsecond.
const freeGzip = 1 << 20

// A gzipReader decompresses gzip members (RFC 1952).
type gzipReader struct {
	in     *bufio.Reader
	z      *gzip.Reader
	inside bool // of a member
}

func newGzipReader(r io.Reader) *gzipReader {
	return &gzipReader{in: bufio.NewReaderSize(r, inputSize)}
}

func (g *gzipReader) Read(p []byte) (int, error) {
	for len(p) > 0 {
		if err := g.member(); err != nil {
			return 0, err
		}
		n, err := g.z.Read(p)
		if err == io.EOF {
			g.inside, err = false, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
	return 0, nil
}

// member reads the header of a member unless it is inside of one. It returns io.EOF if there was a
// member and what follows is not one.
func (g *gzipReader) member() (err error) {
	if g.inside {
		return nil
	}
	magic, err := g.in.Peek(2)
	if err == nil && (magic[0] != 0x1F || magic[1] != 0x8B) {
		err = gzip.ErrHeader
	}
	if g.z != nil && (err == io.EOF || err == gzip.ErrHeader) {
		return io.EOF
	}
	if err != nil {
		return noEOF(err)
	}
	if g.z == nil {
		g.z, err = gzip.NewReader(g.in)
	} else {
		err = g.z.Reset(g.in)
	}
	if err != nil {
		return noEOF(err)
	}
	g.z.Multistream(false)
	g.inside = true
	return nil
}
