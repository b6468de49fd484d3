// SPDX-License-Identifier: GPL-3.0-or-later

// Package serverlog is the log of a server: lines for people, for the journal of systemd, or for
// programs as JSON; and a log of requests over HTTP.
package serverlog

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
)

// A Log is a logger of a server that keeps the last warnings for who looks at its status. It is
// safe for concurrent use.
type Log struct {
	*slog.Logger
	mu       sync.Mutex
	warnings []Warning
}

// A Warning is something that went wrong.
type Warning struct {
	Time time.Time
	Text string // clean, in one line
}

// mostWarnings is how many warnings are kept, and longestWarning how many bytes of each.
const (
	mostWarnings   = 10
	longestWarning = 500
)

// New returns a log on standard error. The format is "text" or "json"; text has the priorities of
// sd-daemon(3) before lines if the journal reads it.
func New(format string) (*Log, error) {
	if format != "text" && format != "json" {
		return nil, message.Usage("the option --log-format has the value %.20q: it must be text or json", format)
	}
	l := &Log{}
	l.Logger = slog.New(&handler{slog.NewJSONHandler(page.Escaped{Writer: os.Stderr}, nil), l, format == "text", journal()})
	return l, nil
}

// Warnf logs a warning without attributes, for packages that know no structured logs.
func (l *Log) Warnf(format string, a ...any) { l.Warn(message.Text(fmt.Sprintf(format, a...))) }

// WarnError does so with an error.
func (l *Log) WarnError(err error) { l.Warn(message.Plain(err)) }

// Warnings returns the last warnings, the newest first.
func (l *Log) Warnings() []Warning {
	l.mu.Lock()
	defer l.mu.Unlock()
	last := slices.Clone(l.warnings)
	slices.Reverse(last)
	return last
}

// journal reports whether standard error is what systemd has connected to its journal
// (systemd.exec(5), JOURNAL_STREAM).
func journal() bool {
	var s unix.Stat_t
	err := unix.Fstat(2, &s)
	return err == nil && os.Getenv("JOURNAL_STREAM") == fmt.Sprintf("%d:%d", s.Dev, s.Ino)
}

// handler writes a message with its attributes behind it: url, access (in parentheses) and error
// (after a colon) without their names.
type handler struct {
	slog.Handler // that writes unless text is wanted; servers do not use what makes handlers of it
	log          *Log
	text         bool
	journal      bool
}

// Handle implements slog.Handler.
func (h *handler) Handle(ctx context.Context, r slog.Record) error {
	var b strings.Builder
	b.WriteString(r.Message)
	r.Attrs(func(a slog.Attr) bool {
		switch a.Key {
		case "url":
			fmt.Fprintf(&b, " %v", a.Value)
		case "access":
			fmt.Fprintf(&b, " (%v)", a.Value)
		case "error":
			fmt.Fprintf(&b, ": %v", a.Value)
		default:
			fmt.Fprintf(&b, " %s=%v", a.Key, a.Value)
		}
		return true
	})
	text := page.Clean(b.String())
	if r.Level >= slog.LevelWarn {
		h.log.mu.Lock()
		h.log.warnings = append(h.log.warnings[max(0, len(h.log.warnings)-mostWarnings+1):], Warning{r.Time, text[:min(len(text), longestWarning)]})
		h.log.mu.Unlock()
	}
	if !h.text {
		return h.Handler.Handle(ctx, r)
	}
	prefix := "guix-substitute-eris: "
	if h.journal {
		prefix = map[slog.Level]string{slog.LevelInfo: "<6>", slog.LevelWarn: "<4>", slog.LevelError: "<3>"}[r.Level]
	}
	_, err := fmt.Fprintf(os.Stderr, "%s%s\n", prefix, text) // all of it in one call
	return err
}

// Counts counts the answers of an HTTP server. Its fields are for reading under the lock of
// [Requests.Counts].
type Counts struct {
	Found, Absent, Refused, Failed int64 // by the status: below 400, 404 and 410, other 4xx, 5xx
	Bytes                          int64 // of all bodies
}

// Requests counts the answers of a handler, and logs them where Log is not nil. The zero value with
// a handler is ready; it is safe for concurrent use.
type Requests struct {
	Handler http.Handler
	Log     *slog.Logger

	mu     sync.Mutex
	counts Counts
}

// Counts returns what has been answered so far.
func (q *Requests) Counts() Counts {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.counts
}

// ServeHTTP implements http.Handler.
func (q *Requests) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	begin := time.Now()
	answer := &answer{ResponseWriter: w, status: http.StatusOK}
	defer func() {
		q.add(answer)
		if q.Log != nil {
			q.Log.Info("request", "client", r.RemoteAddr, "method", r.Method, "path", r.URL.RequestURI(),
				"status", answer.status, "bytes", answer.bytes, "seconds", time.Since(begin).Seconds())
		}
	}()
	q.Handler.ServeHTTP(answer, r)
}

func (q *Requests) add(a *answer) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.counts.Bytes += a.bytes
	switch {
	case a.status >= 500:
		q.counts.Failed++
	case a.status == http.StatusNotFound || a.status == http.StatusGone:
		q.counts.Absent++
	case a.status >= 400:
		q.counts.Refused++
	default:
		q.counts.Found++
	}
}

// answer notes what is answered.
type answer struct {
	http.ResponseWriter
	status int
	bytes  int64
}

// Unwrap is for http.ResponseController.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// WriteHeader implements http.ResponseWriter.
func (a *answer) WriteHeader(status int) {
	a.status = status
	a.ResponseWriter.WriteHeader(status)
}

// Write implements io.Writer.
func (a *answer) Write(b []byte) (int, error) {
	n, err := a.ResponseWriter.Write(b)
	a.bytes += int64(n)
	return n, err
}
