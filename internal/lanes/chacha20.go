// SPDX-License-Identifier: GPL-3.0-or-later

package lanes

import (
	"unsafe"

	"golang.org/x/crypto/chacha20"
)

// stride divides every length that is accepted, and is a multiple of what a turn of each vector
// routine makes.
const stride = 1024

// XORKeyStream writes src xor the key stream to dst; the counter starts from 0, and the nonce is
// the given byte and then eleven zero bytes (ERIS 1.0.0, section "Encoding": the level of a node).
// Both must have the same length, a positive multiple of 1024 bytes, and be the same memory or not
// overlap; else it panics. It is safe for concurrent use.
func XORKeyStream(dst, src []byte, key *[32]byte, nonce byte) {
	if len(src) == 0 || len(src)%stride != 0 || len(dst) != len(src) {
		panic("lanes: not the length of a block")
	}
	if overlapInexactly(dst, src) {
		panic("lanes: source and destination overlap, but are not the same")
	}
	if !xorVector(dst, src, key, nonce) {
		xorPlain(dst, src, key, nonce)
	}
}

// xorPlain does the same with nothing but the package of x/crypto. The vector routines are tested
// against it.
func xorPlain(dst, src []byte, key *[32]byte, nonce byte) {
	cipher, err := chacha20.NewUnauthenticatedCipher(key[:], []byte{nonce, chacha20.NonceSize - 1: 0})
	if err != nil {
		panic("lanes: " + err.Error()) // only for wrong lengths of key or nonce
	}
	cipher.XORKeyStream(dst, src)
}

// overlapInexactly reports whether two slices of equal length share memory without being the same
// memory, in which case writing the one spoils what is still to be read of the other.
func overlapInexactly(x, y []byte) bool {
	a, b := uintptr(unsafe.Pointer(unsafe.SliceData(x))), uintptr(unsafe.Pointer(unsafe.SliceData(y)))
	return a != b && a < b+uintptr(len(y)) && b < a+uintptr(len(x))
}
