// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"unsafe"

	"golang.org/x/crypto/chacha20"
)

// xorKeyStream writes src xor the ChaCha20 key stream (RFC 8439: counter from 0, nonce of the level and then eleven zero
// bytes) to dst. Both must have the same length, that of a block, and be the same memory or not overlap.
//
// It is the only place where the cipher is used. On amd64 most of the work is done by two small routines of our own,
// because there the chacha20 package is plain Go; elsewhere that package has vector code, or is all there is.
func xorKeyStream(dst, src []byte, key *Key, level byte) {
	if !BlockSize(len(src)).Valid() || len(dst) != len(src) {
		panic("eris: not the length of a block")
	}
	if overlapInexactly(dst, src) {
		panic("eris: source and destination overlap, but are not the same")
	}
	if xorKeyStreamVector(dst, src, key, level) {
		return
	}
	xorKeyStreamPlain(dst, src, key, level)
}

// xorKeyStreamPlain does the same with nothing but the chacha20 package. The vector routines are tested against it.
func xorKeyStreamPlain(dst, src []byte, key *Key, level byte) {
	nonce := [chacha20.NonceSize]byte{level}
	cipher, err := chacha20.NewUnauthenticatedCipher(key[:], nonce[:])
	if err != nil {
		panic("eris: " + err.Error()) // only for wrong lengths of key or nonce
	}
	cipher.XORKeyStream(dst, src)
}

// overlapInexactly reports whether two slices of equal length share memory without being the same memory, in which case
// writing the one spoils what is still to be read of the other.
func overlapInexactly(x, y []byte) bool {
	a, b := uintptr(unsafe.Pointer(unsafe.SliceData(x))), uintptr(unsafe.Pointer(unsafe.SliceData(y)))
	return a != b && a < b+uintptr(len(y)) && b < a+uintptr(len(x))
}
