// SPDX-License-Identifier: GPL-3.0-or-later

package list

import (
	"math/rand/v2"
	"slices"
	"testing"
)

type number struct {
	Links[number]
	n int
}

// TestList does the same to a list and to a slice.
func TestList(t *testing.T) {
	var l List[number, *number]
	var want []*number
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 10000 {
		x := &number{n: i}
		if r.IntN(5) < 3 {
			l.Push(x)
			want = append(want, x)
		} else if len(want) > 0 {
			at := r.IntN(len(want))
			l.Remove(want[at])
			if want[at].Next() != nil {
				t.Fatal("what was removed has a neighbour")
			}
			want = slices.Delete(want, at, at+1)
		}
		x = l.First()
		for _, w := range want {
			if x != w {
				t.Fatalf("step %d: another order", i)
			}
			x = x.Next()
		}
		if x != nil {
			t.Fatalf("step %d: there is more", i)
		}
		if len(want) > 50 {
			want = nil
			l = List[number, *number]{}
		}
	}
}
