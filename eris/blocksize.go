// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"fmt"
)

// BlockSize is the size in bytes of every block of one encoded content. ERIS 1.0.0, section "Block
// Size", knows two, and nothing else is valid.
type BlockSize int

// The two block sizes, in bytes.
const (
	BlockSize1KiB  BlockSize = 1 << 10
	BlockSize32KiB BlockSize = 1 << 15
)

// smallContent is the length in bytes from which on the larger block size is recommended.
const smallContent = 16 << 10

// pairSize is the size in bytes of a reference-key pair in an internal node.
const pairSize = 64

// BlockSizeFor returns the block size that ERIS 1.0.0 recommends for content of the given length in
// bytes: 1 KiB if it is below 16 KiB (16384 bytes), else 32 KiB. Publishers who follow it agree on
// the capability of equal content.
func BlockSizeFor(length int64) BlockSize {
	if length < smallContent {
		return BlockSize1KiB
	}
	return BlockSize32KiB
}

// Valid reports whether s is one of the two block sizes of ERIS 1.0.0. All other methods need a
// valid size.
func (s BlockSize) Valid() bool {
	return s == BlockSize1KiB || s == BlockSize32KiB
}

// Arity returns how many reference-key pairs fit an internal node: 16 for 1 KiB, 512 for 32 KiB.
func (s BlockSize) Arity() int {
	return int(s) / pairSize
}

// maxLevel returns the greatest level that content below 2⁶³ bytes needs: 14 for 1 KiB, 6 for 32
// KiB. The format has room for 255, but such content could not exist; this package refuses higher
// levels before any block is fetched.
func (s BlockSize) maxLevel() int {
	if s == BlockSize1KiB {
		return 14
	}
	return 6
}

// String returns "1KiB" or "32KiB", and the number of bytes of a size that is not valid.
func (s BlockSize) String() string {
	switch s {
	case BlockSize1KiB:
		return "1KiB"
	case BlockSize32KiB:
		return "32KiB"
	}
	return fmt.Sprintf("%d bytes", int(s))
}
