// SPDX-License-Identifier: GPL-3.0-or-later

package fetch

import (
	"crypto/rand"
	"errors"
	mathrand "math/rand/v2"
	"slices"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// Kin is blocks of which one knows at the same time that they will be wanted, and which are mostly
// in the same places: the children of one node, or the roots of the files of one tree. All requests
// for them share one Kin, so that a pool can ask about all of them at once. It is for one pool at a
// time.
type Kin struct {
	Refs   []eris.Reference // never changed
	Origin any              // that of the request for what names them; nil if nobody knows
	Held   any              // the pool's own
}

// The question which blocks a store has: up to MaxHave prefixes of references, HavePrefix bytes
// each, one behind the other. The answer has a bit for each of them, in the same order, from the
// highest bit of the first byte on: 1 if the store has a block whose reference begins so. The bits
// behind the last are 0. An answer may be shorter; then the store says nothing about the rest.
// docs/formats.md describes how this travels.
const (
	HavePrefix = 8
	MaxHave    = 1024
)

// Question returns the question about up to MaxHave-1 references, in their order. At the place none
// there is one more, at random, of a block that nobody can have: who claims to have it lies.
func Question(refs []eris.Reference) (question []byte, none int) {
	var random eris.Reference
	rand.Read(random[:HavePrefix])
	none = mathrand.IntN(len(refs) + 1)
	question = make([]byte, 0, (len(refs)+1)*HavePrefix)
	for _, ref := range slices.Insert(slices.Clone(refs), none, random) {
		question = append(question, ref[:HavePrefix]...)
	}
	return question, none
}

// ErrCannotSay is wrapped by the error of a request with Have, of a source that does not understand
// it. It says nothing about any block.
var ErrCannotSay = errors.New("store cannot say what it has")

// A Haver is a source that knows what it has without getting it.
type Haver interface {
	// Have returns the answer to a question, which is valid. It may wait for a disk, but not long:
	// it rather says less. It is safe for concurrent use.
	Have(question []byte) []byte
}

// AnswerHave returns what a server answers to a question, which may be anything. It returns false
// if that is no question.
func AnswerHave(store Haver, question []byte) ([]byte, bool) {
	if n := len(question) / HavePrefix; n == 0 || n > MaxHave || len(question)%HavePrefix != 0 {
		return nil, false
	}
	return store.Have(question), true
}

// HaveBits makes an answer of what has returns for the prefixes, one by one, until it says that it
// does not know.
func HaveBits(question []byte, has func(prefix []byte) (has, known bool)) []byte {
	answer := make([]byte, 0, len(question)/HavePrefix/8+1)
	for i := 0; len(question) > 0; i++ {
		yes, known := has(question[:HavePrefix])
		if !known {
			return answer[:i/8] // what is left of a byte would say something
		}
		if i%8 == 0 {
			answer = append(answer, 0)
		}
		if yes {
			answer[i/8] |= 0x80 >> (i % 8)
		}
		question = question[HavePrefix:]
	}
	return answer
}

// Has returns what an answer, which may be anything, says about the i-th prefix.
func Has(answer []byte, i int) (has, known bool) {
	if i/8 >= len(answer) {
		return false, false
	}
	return answer[i/8]&(0x80>>(i%8)) != 0, true
}
