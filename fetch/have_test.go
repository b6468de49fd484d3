// SPDX-License-Identifier: GPL-3.0-or-later

package fetch_test

import (
	"bytes"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// odd is a store of all blocks whose references begin with an odd number; it knows so many answers.
type odd int

func (o odd) Have(question []byte) []byte {
	n := 0
	return fetch.HaveBits(question, func(prefix []byte) (has, known bool) {
		n++
		return prefix[0]&1 == 1, n <= int(o)
	})
}

// TestHaveBits checks the bits of an answer, and one that was broken off.
func TestHaveBits(t *testing.T) {
	question := make([]byte, 11*fetch.HavePrefix)
	for _, i := range []int{0, 2, 7, 8, 10} {
		question[i*fetch.HavePrefix] = 1
	}
	if answer, ok := fetch.AnswerHave(odd(11), question); !ok || !bytes.Equal(answer, []byte{0b1010_0001, 0b1010_0000}) {
		t.Errorf("%b, %v", answer, ok)
	}
	for known, want := range map[int]int{10: 1, 8: 1, 7: 0, 0: 0} {
		if answer, _ := fetch.AnswerHave(odd(known), question); len(answer) != want {
			t.Errorf("%d known: %b", known, answer)
		}
	}
	for _, n := range []int{0, 1, 7, 9, fetch.HavePrefix*fetch.MaxHave + 8} {
		if _, ok := fetch.AnswerHave(odd(1<<20), make([]byte, n)); ok {
			t.Errorf("%d bytes are a question", n)
		}
	}
}

// FuzzHave gives anything for a question, and anything for an answer.
func FuzzHave(f *testing.F) {
	f.Add([]byte("12345678abcdefgh"), 2)
	f.Add(bytes.Repeat([]byte{1}, fetch.HavePrefix*fetch.MaxHave), 1000)
	f.Add([]byte{}, 0)
	f.Fuzz(func(t *testing.T, question []byte, known int) {
		answer, ok := fetch.AnswerHave(odd(known), question)
		n := len(question) / fetch.HavePrefix
		if ok != (n >= 1 && n <= fetch.MaxHave && len(question)%fetch.HavePrefix == 0) || len(answer) > (n+7)/8 {
			t.Fatalf("%d bytes for %d, %v", len(answer), len(question), ok)
		}
		for i := range 8 * len(answer) {
			has, said := fetch.Has(answer, i)
			if want := i < n && question[i*fetch.HavePrefix]&1 == 1; !said || has != want {
				t.Fatalf("bit %d is %v", i, has)
			}
		}
		for i := range 2*n + 1 {
			if has, said := fetch.Has(question, i); has && !said {
				t.Fatal("there is what is not known")
			}
		}
		if _, said := fetch.Has(answer, 8*len(answer)); said {
			t.Fatal("more is said than there is")
		}
	})
}
