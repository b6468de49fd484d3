// SPDX-License-Identifier: GPL-3.0-or-later

package backoff_test

import (
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/backoff"
)

func TestLimit(t *testing.T) {
	now := time.Unix(1000, 0)
	var l backoff.Limit
	most := func(want int) {
		t.Helper()
		n := 0
		for n < 1000 && l.Allows(now, n) {
			n++
		}
		if n != want {
			t.Errorf("%v after the beginning it allows %d, want %d", now.Sub(time.Unix(1000, 0)), n, want)
		}
	}
	most(1000)
	l.Refuse(now, 7, 0)
	l.Refuse(now, 5, 0)
	l.Refuse(now, 6, 0)
	most(5)
	for _, want := range []int{7, 9, 12} {
		now = now.Add(1001 * time.Millisecond)
		most(want)
	}
	l.Refuse(now, 9, 10*time.Second)
	now = now.Add(39 * time.Second)
	most(9)
	now = now.Add(2 * time.Second)
	most(12)
	l.Refuse(now, 0, 0) // it refuses whatever there is
	most(1000)
}
