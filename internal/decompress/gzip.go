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
	z      gzip.Reader
	begun  bool
	inside bool // of a member
}

func newGzipReader(r io.Reader) *gzipReader {
	return &gzipReader{in: bufio.NewReaderSize(r, inputSize)}
}

func (g *gzipReader) Read(p []byte) (int, error) {
	for {
		if !g.inside {
			if err := g.member(); err != nil {
				return 0, err
			}
		}
		n, err := g.z.Read(p)
		if err == io.EOF {
			g.inside, err = false, nil
		}
		if n > 0 || err != nil || len(p) == 0 {
			return n, err
		}
	}
}

// member reads the header of a member. It returns io.EOF if there was a member and what follows is
// not one.
func (g *gzipReader) member() error {
	magic, err := g.in.Peek(2)
	if g.begun && (err == io.EOF || err == nil && string(magic) != "\x1F\x8B") {
		return io.EOF
	}
	if err == nil {
		err = g.z.Reset(g.in)
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return err
	}
	g.z.Multistream(false)
	g.begun, g.inside = true, true
	return nil
}
