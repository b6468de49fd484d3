// SPDX-License-Identifier: GPL-3.0-or-later

package protocol

import (
	"fmt"
	"io"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// interval is the time between two progress reports (Guix, guix/progress.scm: %progress-interval).
const interval = 200 * time.Millisecond

// maxURL bounds what is shown of a URL, in bytes.
const maxURL = 1500

// A meter draws how much of something there is, now and then. Add may be called at any time from
// any goroutine; the other methods from one at a time.
type meter struct {
	log   *Log
	n     atomic.Int64
	shown int64  // of these; the log is locked
	stop  func() // ends the goroutine that draws; nil if there is none
}

// Add says that there are n more.
func (m *meter) Add(n int) { m.n.Add(int64(n)) }

// Pause keeps the display as it is.
func (m *meter) Pause() {
	if m.stop != nil {
		m.stop()
		m.stop = nil
	}
}

// draw has show draw until Pause. It gets the log locked.
func (m *meter) draw(show func(l *Log)) {
	done := make(chan struct{})
	var wait sync.WaitGroup
	wait.Go(func() {
		ticker := time.NewTicker(interval)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				l := m.log.lock()
				show(l)
				l.mu.Unlock()
			case <-done:
				return
			}
		}
	})
	m.stop = func() { close(done); wait.Wait() }
}

// A Download shows the progress of one "substitute" request, over all sources that are tried for
// it: clients of the daemon must see the success of an item exactly once, and a start for each way
// that is tried. Bytes are added to those of the current source.
type Download struct {
	meter
	item string

	started bool
	url     string
	size    int64 // of the current source, negative if unknown
	begin   time.Time
}

// Download starts showing a download. item is the destination that the daemon named in its request.
// Finish must be called at the end.
func (l *Log) Download(item string) *Download {
	return &Download{meter: meter{log: l}, item: l.oneLine(item)}
}

// From says that the bytes come from url from now on, and how many there will be; a negative size
// is unknown. What came from the source before counts no more.
func (d *Download) From(url string, size int64) {
	d.Pause()
	url = cut(strings.ReplaceAll(d.log.oneLine(url), " ", "%20"), maxURL)
	d.url, d.size, d.begin = url, size, time.Now()
	d.n.Store(0)
	d.shown = -1
	l := d.log.lock()
	text := "Downloading " + url + "...\n"
	if l.style.Traces {
		// Once more when another way is taken: the progress that follows at once makes clients
		// forget what they knew of the item (Guix, guix/status.scm: compute-status).
		text = "@ download-started " + d.item + " " + url + " " + d.sizeField() + "\n"
	}
	l.put(message{text: text})
	d.started = true
	d.show(l)
	l.mu.Unlock()
	d.draw(d.show)
}

// Finish ends the display, before the reply is sent. With success it says that the whole item has
// come.
func (d *Download) Finish(success bool) {
	d.Pause()
	if !d.started {
		return
	}
	l := d.log.lock()
	defer l.mu.Unlock()
	if success {
		d.show(l)
	}
	switch {
	case l.style.Traces && success:
		if d.size < 0 {
			d.size = d.n.Load()
		}
		d.n.Store(d.size)
		d.show(l)
		l.bar = false // it ends behind the event
		l.put(message{text: fmt.Sprintf("@ download-succeeded %s %s %d\n\n", d.item, d.url, d.size)})
	case l.style.Traces:
		l.endLine()
	case l.style.Dynamic:
		l.put(message{text: "\n"})
	}
}

func (d *Download) sizeField() string {
	if d.size < 0 {
		return "-"
	}
	return fmt.Sprint(d.size)
}

// show reports what has been transferred to l, which is locked, if that is news.
func (d *Download) show(l *Log) {
	n := d.n.Load()
	if n == d.shown || l.held {
		return
	}
	d.shown = n
	if l.style.Traces {
		bar := l.bar
		l.bar = false // the event is drawn over it
		l.put(message{text: fmt.Sprintf("@ download-progress %s %s %s %d\n", d.item, d.url, d.sizeField(), n)})
		l.bar = bar || d.size > 0 || n > 0 // Guix, guix/progress.scm: display-download-progress
		return
	}
	elapsed := time.Since(d.begin)
	l.draw(progressLine(d.name(), d.size, n, elapsed, l.style.Columns, l.style.Unicode))
}

// name is what is downloaded, for people: the base name of the URL, or of the item if the URL names
// no file, without the hash of a store item.
func (d *Download) name() string {
	name := d.item
	if !strings.HasPrefix(d.url, "urn:") {
		name = d.url
	}
	name = path.Base(name)
	if len(name) > 33 && name[32] == '-' {
		return name[33:]
	}
	return name
}

// progressLine is a line of about columns characters that shows a transfer (Guix,
// guix/progress.scm: display-download-progress).
func progressLine(name string, size, transferred int64, elapsed time.Duration, columns int, unicode bool) string {
	rate := "0B/s"
	if s := elapsed.Seconds(); s > 0 {
		rate = byteCount(float64(transferred)/s) + "/s"
	}
	seconds := int(elapsed.Seconds() + 0.5)
	clock := fmt.Sprintf("%02d:%02d", seconds/60%60, seconds%60)
	if seconds >= 3600 {
		clock = fmt.Sprintf("%02d:%s", seconds/3600, clock)
	}
	var left, right string
	if size > 0 {
		percent := min(100, 100*float64(transferred)/float64(size))
		left = " " + name + "  " + byteCount(float64(size))
		right = fmt.Sprintf("%s %s %s%6.1f%%", rate, clock, bar(percent, unicode), percent)
	} else {
		left = " " + name
		right = fmt.Sprintf("%s %s | %s transferred", rate, clock, byteCount(float64(transferred)))
	}
	space := max(1, columns-utf8.RuneCountInString(left)-utf8.RuneCountInString(right))
	return left + strings.Repeat(" ", space) + right
}

// byteCount is a number of bytes for people.
func byteCount(n float64) string {
	units, i := []string{"B", "KiB", "MiB", "GiB", "TiB"}, 0
	for ; n >= 1024 && i < len(units)-1; i++ {
		n /= 1024
	}
	return fmt.Sprintf("%.*f%s", max(0, i-1), n, units[i])
}

// bar draws how much of 100 percent is done.
func bar(percent float64, unicode bool) string {
	const width = 18
	filled := int(percent * width / 100)
	if !unicode {
		return "[" + strings.Repeat("#", filled) + strings.Repeat(" ", width-filled) + "]"
	}
	return "▕" + strings.Repeat("█", filled) + strings.Repeat(" ", width-filled) + "▏"
}

// A Lookup shows the progress of asking one server for narinfos, of which the answers are added.
type Lookup struct {
	meter
	url   string
	total int
}

// Lookup starts showing that a server is asked about total items over the network. End must be
// called at the end. Of the lookups of single items only the first one and those that take long
// have a line: clients ask for hundreds of them, one after the other.
func (l *Log) Lookup(url string, total int) *Lookup {
	p := &Lookup{meter: meter{log: l, shown: -1}, url: cut(l.oneLine(url), maxURL), total: total}
	shown := l.lock()
	if shown.first(l.key("looking on "+p.url)) || total > 1 {
		p.show(shown)
	}
	shown.mu.Unlock()
	p.draw(p.show)
	return p
}

// End ends the line.
func (p *Lookup) End() {
	p.Pause()
	l := p.log.lock()
	defer l.mu.Unlock()
	if p.shown >= 0 {
		p.show(l)
		l.endLine()
	}
}

// show draws the line in l, which is locked, if there is news.
func (p *Lookup) show(l *Log) {
	n := p.n.Load()
	if n == p.shown {
		return
	}
	p.shown = n
	percent := 100 * float64(n) / float64(max(1, p.total))
	l.draw(fmt.Sprintf("looking for substitutes on '%s'... %5.1f%%", p.url, percent))
}

// waitingAfter is when people are told that nothing comes.
const waitingAfter = 2 * time.Second

// A Transfer shows the progress of what a person has asked for, in one line that is drawn over and
// over, and says in another what came of it. Total may be called when Add may be.
type Transfer struct {
	meter
	name, from string
	begin      time.Time
	total      atomic.Int64
	changed    time.Time // when there was something new; the log is locked
}

// Transfer starts showing a transfer of bytes that are called name, and come from, or go to, what
// is called from: when nothing has come for two seconds, it is what is waited for, unless it is
// empty. Done or Stop must be called at the end.
func (l *Log) Transfer(name, from string) *Transfer {
	now := time.Now()
	t := &Transfer{meter: meter{log: l}, name: l.oneLine(name), from: l.oneLine(from), begin: now, changed: now}
	t.draw(t.show)
	return t
}

// Total says how many bytes there will be, as far as is known.
func (t *Transfer) Total(bytes int64) { t.total.Store(bytes) }

// Stop takes the progress away.
func (t *Transfer) Stop() {
	t.Pause()
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
