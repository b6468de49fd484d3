// SPDX-License-Identifier: GPL-3.0-or-later

// Package lanes hashes and encrypts what blocks of ERIS are made of, with the vectors of amd64:
// many messages of the same length side by side with BLAKE2b (RFC 7693), which then take a quarter
// to a ninth of the time that they take one by one, and whole blocks with the ChaCha20 of RFC 8439,
// for which golang.org/x/crypto/chacha20 is plain Go there. Elsewhere x/crypto does all.
package lanes

import (
	"golang.org/x/crypto/blake2b"
)

// chunk is how many bytes one turn of BLAKE2b takes.
const chunk = blake2b.BlockSize

// Sum256 writes the BLAKE2b-256 of each message to sums: keyed if key is not nil. All messages must
// have the same length, a positive multiple of 128 bytes, and there must be as many sums; else it
// panics. Messages may be, or overlap, each other, but not the sums. It is safe for concurrent use.
func Sum256(sums [][32]byte, messages [][]byte, key *[32]byte) {
	checkLengths(sums, messages)
	done := sumVector(sums, messages, key)
	sumPlain(sums[done:], messages[done:], key)
}

// sumPlain does what Sum256 does with nothing but the blake2b package. The vector routines are
// tested against it.
func sumPlain(sums [][32]byte, messages [][]byte, key *[32]byte) {
	if key == nil {
		for i, message := range messages {
			sums[i] = blake2b.Sum256(message)
		}
		return
	}
	if len(messages) == 0 {
		return // and allocate nothing
	}
	keyed, err := blake2b.New256(key[:])
	if err != nil {
		panic("lanes: " + err.Error()) // only for keys above 64 bytes
	}
	var sum [32]byte // so that the caller's sums need not be on the heap
	for i, message := range messages {
		keyed.Reset()
		keyed.Write(message)
		keyed.Sum(sum[:0])
		sums[i] = sum
	}
}

// checkLengths panics if these are not arguments for Sum256: the vector routines trust in them.
func checkLengths(sums [][32]byte, messages [][]byte) {
	if len(sums) != len(messages) {
		panic("lanes: not as many sums as messages")
	}
	for _, message := range messages {
		if len(message) == 0 || len(message)%chunk != 0 || len(message) != len(messages[0]) {
			panic("lanes: messages are not equally long, or not of whole chunks")
		}
	}
}
