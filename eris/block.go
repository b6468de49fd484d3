// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"errors"
	"fmt"

	"golang.org/x/crypto/blake2b"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lanes"
)

// Sum returns the reference of a block, given its encrypted bytes. It does not look at the length.
func Sum(block []byte) Reference {
	return blake2b.Sum256(block)
}

// SumAll writes the references of blocks, which [Sum] returns one by one, to refs, of which there
// must be as many. Blocks need be of neither block size, but many of the same size after one
// another take much less time than one by one.
func SumAll(refs []Reference, blocks [][]byte) {
	if len(refs) != len(blocks) {
		panic("eris: not as many references as blocks")
	}
	var sums [hashedAtOnce][32]byte
	for len(blocks) > 0 {
		n := 1
		for n < min(hashedAtOnce, len(blocks)) && len(blocks[n]) == len(blocks[0]) {
			n++
		}
		if BlockSize(len(blocks[0])).Valid() {
			lanes.Sum256(sums[:n], blocks[:n], nil)
		} else {
			n = 1
			sums[0] = Sum(blocks[0])
		}
		for i := range n {
			refs[i] = sums[i]
		}
		refs, blocks = refs[n:], blocks[n:]
	}
}

// Verify returns nil if block is the block with the given reference, and a [*BlockError] if it is
// of neither block size or has another hash.
func Verify(ref Reference, block []byte) error {
	if !BlockSize(len(block)).Valid() || Sum(block) != ref {
		return &BlockError{Reference: ref, Length: len(block)}
	}
	return nil
}

// Decrypt writes the plaintext of a block at the given level, from 0 to 255, to dst. It checks
// nothing: see [Verify] for the block and [ParseNode] for internal nodes. The block must have the
// length of a block, and dst the same; they must be the same memory or not overlap. The cipher is
// its own inverse: given the plaintext, it writes the block.
func Decrypt(dst, block []byte, key Key, level int) {
	if level < 0 || level > 255 {
		panic("eris: level does not fit a byte")
	}
	if !BlockSize(len(block)).Valid() {
		panic("eris: not the length of a block")
	}
	lanes.XORKeyStream(dst, block, (*[32]byte)(&key), byte(level))
}

// EncodeLeaves makes the blocks of leaves, which may be of different contents but must have the
// same block size: it encrypts leaves in place, and writes their references to refs, of which there
// must be as many. Many leaves at a time take much less time than one by one. The last leaf of a
// content must have been padded by [PadLeaf].
func EncodeLeaves(refs []Reference, leaves [][]byte, secret ConvergenceSecret) {
	keys, sums := make([][32]byte, len(leaves)), make([][32]byte, len(leaves))
	encodeNodes(keys, sums, leaves, (*[32]byte)(&secret), 0)
	for i, sum := range sums {
		refs[i] = sum
	}
}

// PadLeaf writes the padding of a last leaf of which the first n bytes are the end of the content.
func PadLeaf(leaf []byte, n int) {
	leaf[n] = padMark
	clear(leaf[n+1:])
}

// ErrNotFound is what a source of blocks or a store returns, wrapped or not, for a block that it
// does not have. Readers pass it on, wrapped with the reference.
var ErrNotFound = errors.New("block not found")

// ErrBlockSize is the error of stores that are given what has not the size of a block.
var ErrBlockSize = errors.New("block size is neither 1 KiB nor 32 KiB")

// BlockError says that bytes were offered as a block which they are not: their hash is not the
// reference, or their number is not the block size. The fault lies with who offered them, except in
// one case: a capability with the wrong block size makes a good block look wrong.
type BlockError struct {
	Reference Reference // the block that was requested
	Length    int       // how many bytes were offered
	Want      BlockSize // the block size that was requested; 0 if either would have done
}

// Error returns a text with the reference.
func (e *BlockError) Error() string {
	switch {
	case e.Want != 0 && e.Length != int(e.Want):
		return fmt.Sprintf("block %v: has %d bytes instead of %d", e.Reference, e.Length, int(e.Want))
	case e.Want == 0 && !BlockSize(e.Length).Valid():
		return fmt.Sprintf("block %v: %d bytes is not a block size", e.Reference, e.Length)
	}
	return fmt.Sprintf("block %v: its bytes do not have this hash", e.Reference)
}

// IsOtherSize reports whether what was offered has a valid block size, but another one than was
// requested. Then it may be the reader who is wrong: anyone can make a read capability with the
// wrong block size, and that must not turn a reader against those who have the block.
func (e *BlockError) IsOtherSize(requested BlockSize) bool {
	return e.Length != int(requested) && BlockSize(e.Length).Valid()
}
