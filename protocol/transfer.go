// SPDX-License-Identifier: GPL-3.0-or-later

package protocol

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// waitingAfter is when people are told that nothing comes.
const waitingAfter = 2 * time.Second

// A Transfer shows the progress of what a person has asked for, in one line that is drawn over and
// over, and says in another what came of it. Add and Total may be called at any time from any
// goroutine.
type Transfer struct {
	log        *Log
	name, from string
	begin      time.Time
	total, n   atomic.Int64

	// Of the goroutine that draws:
	shown   int64
	changed time.Time // when there was something new

	stop func()
}

// Transfer starts showing a transfer of bytes that are called name, and come from, or go to, what
// is called from: when nothing has come for two seconds, it is what is waited for, unless it is
// empty. Done or Stop must be called at the end.
func (l *Log) Transfer(name, from string) *Transfer {
	now := time.Now()
	t := &Transfer{log: l, name: l.oneLine(name), from: l.oneLine(from), begin: now, changed: now}
	t.stop = l.repeat(t.show)
	return t
}

// Total says how many bytes there will be, as far as is known.
func (t *Transfer) Total(bytes int64) { t.total.Store(bytes) }

// Add says that some bytes have come.
func (t *Transfer) Add(bytes int) { t.n.Add(int64(bytes)) }

// Stop takes the progress away.
func (t *Transfer) Stop() {
	t.stop()
	t.stop = func() {}
	l := t.log.lock()
	defer l.mu.Unlock()
	if l.line {
		io.WriteString(l.w, "\r\x1b[K")
		l.line = false
	}
}

// Done puts a last line in place of the progress, with the time that it took.
func (t *Transfer) Done(format string, a ...any) {
	t.Stop()
	t.log.Notef("%s in %s", fmt.Sprintf(format, a...), shownTime(time.Since(t.begin)))
}

func (t *Transfer) show(l *Log) {
	now := time.Now()
	n := t.n.Load()
	if n != t.shown {
		t.shown, t.changed = n, now
	}
	line := transferLine(t.name, t.total.Load(), n, now.Sub(t.begin), l.style.Columns)
	if t.from != "" && now.Sub(t.changed) >= waitingAfter {
		line = clip("waiting for "+t.from, l.style.Columns)
	}
	l.draw(line)
}

// transferLine is a line of at most so many characters, with what matters most in front. The total
// is 0 if it is not known.
func transferLine(name string, total, n int64, elapsed time.Duration, columns int) string {
	rate := float64(n) / max(elapsed, time.Millisecond).Seconds()
	line := byteCount(float64(n)) + "  " + shownTime(elapsed.Round(time.Second))
	if total > 0 {
		line = fmt.Sprintf("%.0f%% of %s", min(100, 100*float64(n)/float64(total)), byteCount(float64(total)))
	}
	if total > 0 && n > 0 {
		left := float64(max(0, total-n)) / rate
		line += "  " + shownTime(time.Duration(left*float64(time.Second)).Round(time.Second)) + " left"
	}
	return clip(line+"  "+byteCount(rate)+"/s  "+name, columns)
}

// clip leaves so many characters of a line, but at least one.
func clip(line string, columns int) string {
	characters := []rune(line)
	return string(characters[:min(len(characters), max(1, columns))])
}

// shownTime is a time for people.
func shownTime(d time.Duration) string {
	s := int(d.Seconds())
	switch {
	case d < 10*time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case s < 60:
		return fmt.Sprintf("%d s", s)
	case s < 3600:
		return fmt.Sprintf("%d min %d s", s/60, s%60)
	}
	return fmt.Sprintf("%d h %d min", s/3600, s/60%60)
}

// repeat draws progress now and then until stop is called, by a function that gets the log locked.
func (l *Log) repeat(show func(l *Log)) (stop func()) {
	done := make(chan struct{})
	var wait sync.WaitGroup
	wait.Go(func() {
		ticker := time.NewTicker(interval)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				l := l.lock()
				show(l)
				l.mu.Unlock()
			case <-done:
				return
			}
		}
	})
	return func() { close(done); wait.Wait() }
}
