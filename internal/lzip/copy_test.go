// SPDX-License-Identifier: GPL-3.0-or-later

package lzip

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

func TestCopyMatch(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, 1500)
	for i := range buf {
		buf[i] = byte(r.Uint32())
	}
	for n := 1; n <= 300; n++ {
		for gap := -700; gap <= 400; gap++ {
			if gap == 0 {
				continue
			}
			got, want := bytes.Clone(buf), bytes.Clone(buf)
			pos := 450
			copyMatch(got, pos, pos-gap, n)
			for i := range n {
				want[pos+i] = want[pos-gap+i]
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("%d bytes from a distance of %d: wrong", n, gap)
			}
		}
	}
}
