// SPDX-License-Identifier: GPL-3.0-or-later

package delta

import (
	"fmt"

	"github.com/klauspost/compress/zstd"
)

// A codec compresses pieces. The zero codec is ready for use.
type codec struct {
	small, large, alone *zstd.Encoder
	loaded              *zstd.Encoder // has the dictionary of the piece before
}

const (
	// smallSum is up to how many bytes of piece and dictionary the smaller tables are used: of
	// longer ones they would find a part of what is equal only.
	smallSum = 1 << 20
	// leastDictionary is the length in bytes of the shortest dictionary that is any help.
	leastDictionary = 16
)

// encode returns the frame of a piece, which is not empty. The dictionary may be the same, and in
// the same memory, as that of the piece before: much of the time goes into the tables of a new one.
func (c *codec) encode(piece, dictionary []byte, same bool) []byte {
	e, level, window := &c.large, zstd.SpeedBestCompression, 2*maxDictionary
	switch {
	case len(dictionary) < leastDictionary:
		if c.alone == nil {
			c.alone = newEncoder(zstd.SpeedBetterCompression, pieceSize)
		}
		c.loaded = nil
		return c.alone.EncodeAll(piece, nil)
	case len(piece)+len(dictionary) <= smallSum:
		e, level, window = &c.small, zstd.SpeedBetterCompression, smallSum
	}
	option := zstd.WithEncoderDictRaw(0, dictionary)
	switch {
	case *e == nil:
		*e = newEncoder(level, window, option)
	case same && c.loaded == *e:
	default:
		if err := (*e).ResetWithOptions(nil, option); err != nil {
			panic(fmt.Sprintf("delta: %v", err)) // the options are ours
		}
	}
	c.loaded = *e
	return (*e).EncodeAll(piece, nil)
}

// compressIndex returns a frame of a window that readers allow.
func compressIndex(b []byte) []byte {
	return newEncoder(zstd.SpeedBetterCompression, 1<<20, zstd.WithSingleSegment(false)).EncodeAll(b, nil)
}

// newEncoder returns an encoder of frames without checksums: the archive has a hash.
func newEncoder(level zstd.EncoderLevel, window int, more ...zstd.EOption) *zstd.Encoder {
	e, err := zstd.NewWriter(nil, append([]zstd.EOption{
		zstd.WithEncoderLevel(level), zstd.WithWindowSize(window), zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true), zstd.WithLowerEncoderMem(true),
	}, more...)...)
	if err != nil {
		panic(fmt.Sprintf("delta: %v", err))
	}
	return e
}
