// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"hash"

	"golang.org/x/crypto/blake2b"
)

// Encrypter makes blocks under one convergence secret. It exists to spare an allocation per block. It must not be used by
// several goroutines at a time.
type Encrypter struct {
	keyed hash.Hash
	sum   [32]byte
}

// NewEncrypter returns an Encrypter for the given secret.
func NewEncrypter(secret ConvergenceSecret) *Encrypter {
	return &Encrypter{keyed: newKeyedHash(&secret)}
}

// newKeyedHash returns the hash that makes the keys of leaves.
func newKeyedHash(secret *ConvergenceSecret) hash.Hash {
	keyed, err := blake2b.New256(secret[:])
	if err != nil {
		panic("eris: " + err.Error()) // only for keys above 64 bytes
	}
	return keyed
}

// leafKey returns the key of a leaf: the BLAKE2b-256 of its plaintext, keyed with the convergence secret.
func (e *Encrypter) leafKey(plaintext []byte) Key {
	e.keyed.Reset()
	e.keyed.Write(plaintext)
	e.keyed.Sum(e.sum[:0])
	return e.sum
}

// EncryptLeaf writes the block of a leaf to dst and returns its reference and key (ERIS 1.0.0, section "Encoding"). The
// plaintext must have the length of a block, and dst the same; they must be the same memory or not overlap.
func (e *Encrypter) EncryptLeaf(dst, plaintext []byte) Pair {
	return encryptWith(e.leafKey(plaintext), dst, plaintext, 0)
}

// EncryptNode writes the block of an internal node at the given level, from 1 on, to dst and returns its reference and
// key. The key is the unkeyed BLAKE2b-256 of the plaintext, so no secret is needed. The plaintext must have the length of a
// block, and dst the same; they must be the same memory or not overlap.
func EncryptNode(dst, plaintext []byte, level int) Pair {
	if level < 1 {
		panic("eris: internal node at level 0")
	}
	return encryptWith(blake2b.Sum256(plaintext), dst, plaintext, level)
}

func encryptWith(key Key, dst, plaintext []byte, level int) Pair {
	xorKeyStream(dst, plaintext, &key, levelByte(level))
	return Pair{Sum(dst), key}
}

// Decrypt writes the plaintext of a block at the given level to dst. It checks nothing: see [Verify] for the block and
// [DecryptNode] for internal nodes. The block must have the length of a block, and dst the same; they must be the same
// memory or not overlap.
func Decrypt(dst, block []byte, key Key, level int) {
	xorKeyStream(dst, block, &key, levelByte(level))
}

// Verify returns nil if block is the block with the given reference, and a [*BlockError] if it is of neither block size or
// has another hash.
func Verify(ref Reference, block []byte) error {
	if !BlockSize(len(block)).Valid() || Sum(block) != ref {
		return &BlockError{Reference: ref, Length: len(block)}
	}
	return nil
}

// verifySize is Verify for one of the two block sizes.
func verifySize(ref Reference, block []byte, size BlockSize) error {
	if len(block) != int(size) || Sum(block) != ref {
		return &BlockError{Reference: ref, Length: len(block), Want: size}
	}
	return nil
}

// levelByte returns the level as the nonce has it.
func levelByte(level int) byte {
	if level < 0 || level > 255 {
		panic("eris: level does not fit a byte")
	}
	return byte(level)
}
