// SPDX-License-Identifier: GPL-3.0-or-later

package protocol

import (
	"fmt"
	"hash/maphash"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// A Log is what the user sees: messages and progress. The daemon passes it on from the
// substituter's standard error, but reads it only while it waits for a reply; so what is said
// between requests is kept for the next one, see [Log.Requests]. It is safe for concurrent use.
type Log struct {
	style  LogStyle
	behind *Log // of a log that Hold has made: where everything goes once it is released
	seed   maphash.Seed

	mu   sync.Mutex
	w    io.Writer       // nil if there is one behind
	line bool            // a progress line is drawn, without a newline at its end
	bar  bool            // clients have drawn one, of an event
	said map[uint64]bool // hashes of keys, which may be long

	held  bool
	kept  []message // while it is held
	bytes int       // of their texts
}

// A message is one line or more.
type message struct {
	key  uint64 // whoever shows it does so once; 0 is always
	text string
}

// A LogStyle says how a [Log] looks.
type LogStyle struct {
	// Program stands before each message: "guix substitute: warning: …".
	Program string
	// Traces asks for events that clients read instead of progress for people (Guix,
	// guix/progress.scm: progress-reporter/trace).
	Traces bool
	// Columns is the width of a progress line in characters.
	Columns int
	// Unicode allows other characters than ASCII. Without it, "?" stands for them.
	Unicode bool
	// Dynamic allows progress lines that are drawn over and over. Clients of the daemon take them;
	// a file that standard error was redirected to does not.
	Dynamic bool
}

// NewLog returns a log that writes to w, each line with a single call of Write.
func NewLog(w io.Writer, style LogStyle) *Log {
	return &Log{style: style, w: w, said: map[uint64]bool{}, seed: maphash.MakeSeed()}
}

// maxSaid bounds what WarnOnce remembers.
const maxSaid = 10000

// Warnf shows a warning. The message is one line; what comes from outside belongs in it with %q.
func (l *Log) Warnf(format string, a ...any) { l.say(0, "warning: ", format, a...) }

// Errorf shows an error. The rules of Warnf hold.
func (l *Log) Errorf(format string, a ...any) { l.say(0, "error: ", format, a...) }

// Notef shows a line that is neither.
func (l *Log) Notef(format string, a ...any) { l.say(0, "", format, a...) }

// WarnOnce shows a warning unless one with the same key has been shown before.
func (l *Log) WarnOnce(key, format string, a ...any) {
	l.say(l.key(key), "warning: ", format, a...)
}

// key is what stands for a key in said.
func (l *Log) key(key string) uint64 { return maphash.String(l.seed, key) | 1 }

// first reports whether a key has not been noted before, and notes it. The caller holds the lock.
func (l *Log) first(key uint64) bool {
	if l.said[key] || len(l.said) == maxSaid {
		return false
	}
	l.said[key] = true
	return true
}

func (l *Log) say(key uint64, kind, format string, a ...any) {
	m := message{key, l.style.Program + ": " + kind + l.oneLine(fmt.Sprintf(format, a...)) + "\n"}
	l = l.lock()
	defer l.mu.Unlock()
	l.put(m)
}

// lock locks the log that shows or keeps what this one is told, and returns it.
func (l *Log) lock() *Log {
	l.mu.Lock()
	if l.behind == nil || l.held {
		return l
	}
	l.mu.Unlock()
	return l.behind.lock()
}

// maxHeld bounds what a log keeps that is held, in bytes.
const maxHeld = 64 << 10

// put shows a message, or keeps it. The caller holds the lock.
func (l *Log) put(m message) {
	if m.key != 0 && !l.first(m.key) {
		return
	}
	switch {
	case !l.held:
		l.endLine()
		io.WriteString(l.w, m.text)
	case l.bytes+len(m.text) <= maxHeld:
		l.bytes += len(m.text)
		l.kept = append(l.kept, m)
	}
}

// hold has the log keep what it is told, as far as there is room.
func (l *Log) hold() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.endLine()
	l.held = true
}

// Hold returns a log that keeps what it is told, as far as there is room, until it is released. Of
// progress only the start is kept.
func (l *Log) Hold() *Log {
	held := NewLog(nil, l.style)
	held.behind, held.seed, held.held = l, l.seed, true
	return held
}

// Release shows what the log has kept, and from then on what it is told.
func (l *Log) Release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	kept := l.kept
	l.held, l.kept, l.bytes = false, nil, 0
	to := l
	if l.behind != nil {
		to = l.behind.lock()
		defer to.mu.Unlock()
	}
	for _, m := range kept {
		if to == l {
			m.key = 0 // that it is said has been noted
		}
		to.put(m)
	}
}

// maxLine bounds what stands in a line, in bytes, so that it is written at once.
const maxLine = 2000

// oneLine keeps a message from being taken for several, or for an event, from controlling a
// terminal, and from being no text in the user's locale. Errors that were joined stand in lines.
func (l *Log) oneLine(s string) string {
	s = strings.ReplaceAll(strings.TrimRight(s, "\n"), "\n", "; ")
	s = strings.Map(func(r rune) rune {
		switch {
		case !strconv.IsPrint(r):
			return ' '
		case r >= utf8.RuneSelf && !l.style.Unicode:
			return '?'
		}
		return r
	}, s)
	return cut(s, maxLine)
}

// cut cuts a text to a length in bytes.
func cut(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most-len("...")], "") + "..."
}

// endLine ends a progress line; the caller holds the lock.
func (l *Log) endLine() {
	if l.line || l.bar {
		io.WriteString(l.w, "\n")
		l.line, l.bar = false, false
	}
}

// draw shows text in place of the progress line; the caller holds the lock.
func (l *Log) draw(text string) {
	if !l.style.Dynamic || l.held {
		return
	}
	io.WriteString(l.w, "\r\x1b[K"+text)
	l.line = true
}

// A descriptorWriter writes to a descriptor that nobody may be reading. A write that would wait for
// longer than writeTimeout is dropped, for it is better to lose a message than to keep the daemon
// waiting for a reply.
type descriptorWriter struct {
	fd    int
	stuck bool
}

const (
	writeTimeout = 3 * time.Second
	// atomicWrite is how much a pipe takes without blocking when it is ready at all (PIPE_BUF).
	atomicWrite = 4096
)

// NewDescriptorWriter returns a writer to the file descriptor fd, usually standard error, that does
// not block for more than a few seconds in all when nobody reads the other end: it drops what it
// cannot write. It never returns an error. It is not safe for concurrent use.
func NewDescriptorWriter(fd int) io.Writer { return &descriptorWriter{fd: fd} }

func (w *descriptorWriter) Write(b []byte) (int, error) {
	total := len(b)
	for len(b) > 0 {
		if !w.ready() {
			return total, nil
		}
		n, err := unix.Write(w.fd, b[:min(len(b), atomicWrite)])
		if err == unix.EINTR {
			continue
		} else if err != nil {
			return total, nil
		}
		b = b[n:]
	}
	return total, nil
}

func (w *descriptorWriter) ready() bool {
	timeout := int(writeTimeout / time.Millisecond)
	if w.stuck {
		timeout = 0
	}
	deadline := time.Now().Add(writeTimeout)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLOUT}}, timeout)
		if err == unix.EINTR && time.Now().Before(deadline) {
			continue
		}
		w.stuck = n == 0
		return n > 0
	}
}
