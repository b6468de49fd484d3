// SPDX-License-Identifier: GPL-3.0-or-later

package memory

import (
	"testing"
	"time"
)

func TestMemory(t *testing.T) {
	var m Memory[string, int]
	now := time.Unix(1e9, 0)
	_, known, first, ours := m.Begin("a", false, now)
	if known || !ours {
		t.Fatal("an answer to what nobody has asked")
	}
	if _, known, second, ours := m.Begin("a", false, now); known || ours || second != first {
		t.Error("what is under way is requested twice")
	}
	m.Put("a", 7, 1, now.Add(time.Minute))
	m.End("a", first, true, 7)
	<-first.Done
	if !first.Answered || first.Answer != 7 {
		t.Errorf("whoever waits gets %v, %d", first.Answered, first.Answer)
	}
	for _, test := range []struct {
		at    time.Time
		anew  bool
		known bool
	}{
		{now, false, true}, {now.Add(time.Minute), false, true}, {now.Add(time.Hour), false, false},
		{now.Add(-time.Second), false, true}, {now, true, false},
	} {
		answer, known, r, _ := m.Begin("a", test.anew, test.at)
		if known != test.known || known && answer != 7 {
			t.Errorf("%v: %d, known %t", test, answer, known)
		}
		if r != nil {
			m.End("a", r, false, 0)
		}
	}
	m.Clear()
	if _, known, _, _ := m.Begin("a", false, now); known {
		t.Error("not forgotten")
	}
}

// TestBounded forgets all before there is too much.
func TestBounded(t *testing.T) {
	var m Memory[int, int]
	now := time.Unix(1e9, 0)
	for i := range 3 * maxAnswers {
		m.Put(i, i, maxBytes/1000, now.Add(time.Minute))
		if len(m.answers) > 1002 {
			t.Fatalf("%d answers of %d bytes", len(m.answers), m.bytes)
		}
	}
	for i := range 3 * maxAnswers {
		m.Put(i, i, 0, now.Add(time.Minute))
	}
	if len(m.answers) > maxAnswers {
		t.Errorf("%d answers", len(m.answers))
	}
}
