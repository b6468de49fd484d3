// SPDX-License-Identifier: GPL-3.0-or-later

// Package compress makes compressed archives as servers of narinfos have them; package decompress
// undoes it. A compression is one of the types that servers offer ("none", "gzip", "lzip", "zstd"),
// or one with a level behind it ("zstd:19").
package compress

import (
	"cmp"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lzip"
)

// Form must change whenever [NewWriter] makes other bytes of the same ones than before, as it may
// with another version of a library: what names them, like an ETag, has it.
const Form = "1"

// mostLevel has the highest level of each type; the lowest is 1.
var mostLevel = map[string]int{"none": 0, "gzip": gzip.BestCompression, "zstd": 22, "lzip": 9}

// Split splits a compression into its type and its level, which is 0 if it is not given, and
// reports whether there are such.
func Split(compression string) (kind string, level int, ok bool) {
	kind, number, given := strings.Cut(compression, ":")
	most, ok := mostLevel[kind]
	if given {
		n, err := strconv.ParseUint(number, 10, 8)
		level, ok = int(n), ok && err == nil && n > 0 && int(n) <= most
	}
	return kind, level, ok
}

// NewWriter returns a writer that compresses what it is given to w: equal bytes to equal ones each
// time. It must be closed, which leaves w open.
func NewWriter(w io.Writer, compression string) (io.WriteCloser, error) {
	kind, level, ok := Split(compression)
	level = cmp.Or(level, 3)
	switch {
	case !ok:
		return nil, fmt.Errorf("there is no compression %.100q", compression)
	case kind == "lzip":
		return lzip.NewWriter(w, level)
	case kind == "gzip":
		return gzip.NewWriterLevel(w, level)
	case kind == "zstd":
		return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(level)), zstd.WithWindowSize(1<<20))
	}
	return plain{w}, nil
}

// plain is a writer that changes nothing.
type plain struct{ io.Writer }

// Close implements io.Closer.
func (plain) Close() error { return nil }
