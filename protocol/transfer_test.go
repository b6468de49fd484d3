// SPDX-License-Identifier: GPL-3.0-or-later

package protocol_test

import (
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
)

// terminal is what is written to it, from any goroutine.
type terminal struct {
	mu   sync.Mutex
	text string
}

func (w *terminal) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text += string(b)
	return len(b), nil
}

// drawn returns the lines that were drawn over each other.
func (w *terminal) drawn() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Split(w.text, "\r\x1b[K")
}

func (w *terminal) last() string { return w.drawn()[len(w.drawn())-1] }

func TestTransfer(t *testing.T) {
	for _, test := range []struct {
		columns int
		total   int64
		want    string
	}{
		{79, 10 << 20, "40% of 10.0MiB  6.0 s left  1.0MiB/s  out"},
		{26, 10 << 20, "40% of 10.0MiB  6.0 s left"},
		{4, 10 << 20, "40% "},
		{50, 0, "4.0MiB  4.0 s  1.0MiB/s  out"},
		{12, 0, "4.0MiB  4.0 "},
	} {
		synctest.Test(t, func(t *testing.T) {
			var w terminal
			transfer := protocol.NewLog(&w, protocol.LogStyle{Program: "p", Columns: test.columns, Dynamic: true}).Transfer("out", "host.example")
			transfer.Total(test.total)
			transfer.Add(2 << 20)
			time.Sleep(3900 * time.Millisecond)
			synctest.Wait()
			waiting := "waiting for host.example"
			if got := w.last(); got != waiting[:min(len(waiting), test.columns)] {
				t.Errorf("%d columns: when nothing comes: %q", test.columns, got)
			}
			transfer.Add(2 << 20)
			time.Sleep(101 * time.Millisecond)
			synctest.Wait()
			if got := w.last(); got != test.want {
				t.Errorf("%d columns: %q instead of %q", test.columns, got, test.want)
			}
			for _, text := range w.drawn() {
				if n := utf8.RuneCountInString(text); n > test.columns {
					t.Errorf("%d columns: %q has %d", test.columns, text, n)
				}
			}
			time.Sleep(3 * time.Second)
			transfer.Done("wrote %d MiB", 4)
			if got := w.last(); got != "p: wrote 4 MiB in 7.0 s\n" {
				t.Errorf("in the end: %q", got)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) {
		// A file, or a terminal that cannot, gets no line that is drawn over.
		var w terminal
		transfer := protocol.NewLog(&w, protocol.LogStyle{Program: "p", Columns: 80}).Transfer("out", "host")
		time.Sleep(75 * time.Second)
		transfer.Stop()
		transfer.Done("done")
		if got := w.last(); got != "p: done in 1 min 15 s\n" {
			t.Errorf("got %q", got)
		}
	})
}
