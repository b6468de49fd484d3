// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"golang.org/x/crypto/blake2b"
)

// hashChunk is how many bytes one turn of BLAKE2b takes.
const hashChunk = blake2b.BlockSize

// sumBlocks writes the BLAKE2b-256 of each block to sums: keyed with the secret, which gives the keys of leaves, or without
// a key if secret is nil, which gives references and the keys of internal nodes. All blocks must have the same length, a
// positive multiple of 128 bytes; there must be as many sums. Blocks may be, or overlap, each other, but not the sums.
//
// A single hash cannot use a vector processor well, but several that go on side by side can. So on amd64 it takes much less
// time to hash many blocks in one call than one by one; elsewhere it makes no difference.
func sumBlocks(sums [][32]byte, blocks [][]byte, secret *ConvergenceSecret) {
	done := sumBlocksVector(sums, blocks, secret)
	sumBlocksPlain(sums[done:], blocks[done:], secret)
}

// SumAll writes the references of blocks, which [Sum] returns one by one, to refs, of which there must be as many. Blocks need
// be of neither block size, but many of the same size after one another take much less time than one by one.
func SumAll(refs []Reference, blocks [][]byte) {
	if len(refs) != len(blocks) {
		panic("eris: not as many references as blocks")
	}
	const most = 32
	var sums [most][32]byte
	for len(blocks) > 0 {
		n := 0
		for n < min(most, len(blocks)) && BlockSize(len(blocks[n])).Valid() && len(blocks[n]) == len(blocks[0]) {
			n++
		}
		if n == 0 {
			refs[0] = Sum(blocks[0])
			n = 1
		} else {
			sumBlocks(sums[:n], blocks[:n], nil)
			for i := range n {
				refs[i] = sums[i]
			}
		}
		refs, blocks = refs[n:], blocks[n:]
	}
}

// VerifyAll is [Verify] for several blocks, of which there must be as many as references. It returns the error for the first
// that is wrong.
func VerifyAll(refs []Reference, blocks [][]byte) error {
	var sums [32]Reference
	for len(blocks) > 0 {
		n := min(len(sums), len(blocks))
		SumAll(sums[:n], blocks[:n])
		for i, block := range blocks[:n] {
			if !BlockSize(len(block)).Valid() || sums[i] != refs[i] {
				return &BlockError{Reference: refs[i], Length: len(block)}
			}
		}
		refs, blocks = refs[n:], blocks[n:]
	}
	return nil
}

// sumBlocksPlain does what sumBlocks does with nothing but the blake2b package. The vector routines are tested against it.
func sumBlocksPlain(sums [][32]byte, blocks [][]byte, secret *ConvergenceSecret) {
	checkSumLengths(sums, blocks)
	if secret == nil {
		for i, block := range blocks {
			sums[i] = blake2b.Sum256(block)
		}
		return
	}
	if len(blocks) == 0 {
		return // and allocate nothing
	}
	keyed := newKeyedHash(secret)
	var sum [32]byte // so that the caller's sums need not be on the heap
	for i, block := range blocks {
		keyed.Reset()
		keyed.Write(block)
		keyed.Sum(sum[:0])
		sums[i] = sum
	}
}

// checkSumLengths panics if these are not arguments for sumBlocks: the vector routines trust in them.
func checkSumLengths(sums [][32]byte, blocks [][]byte) {
	if len(sums) != len(blocks) {
		panic("eris: not as many sums as blocks")
	}
	for _, block := range blocks {
		if len(block) == 0 || len(block)%hashChunk != 0 || len(block) != len(blocks[0]) {
			panic("eris: blocks to hash are not equally long, or not of whole chunks")
		}
	}
}
