// SPDX-License-Identifier: GPL-3.0-or-later

package mirror

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const (
	// maxResumes bounds how often in a row a nar is resumed that makes no progress
	// between, and maxResumesInAll how often one is at all.
	maxResumes      = 5
	maxResumesInAll = 200
	// resumeProgress is what counts as progress, in bytes.
	resumeProgress = 256 << 10
	// resumableShare is the part of the time for which a server may be silent
	// before a nar after which one that can be resumed is.
	resumableShare = 3
	// maxValidator bounds what is sent back to a server, in bytes.
	maxValidator = 1024
)

// cut deals with an error in the middle of a body: where the server has said by
// what the contents can be recognised, the rest is asked for on another
// connection (RFC 9110, section 14). It returns nil if there is more to read.
func (n *Nar) cut(cause error) error {
	if n.validator == "" || n.draining {
		return cause
	}
	if n.offset-n.progress >= resumeProgress {
		n.tries, n.progress = 0, n.offset
	}
	n.Close()
	for {
		if n.tries >= maxResumes || n.resumes >= maxResumesInAll {
			return cause
		}
		if err := pause(n.ctx, n.client.o.ResumeDelay<<n.tries); err != nil {
			return err
		}
		n.tries++
		n.resumes++
		err := n.resume()
		switch {
		case err == nil:
			if n.client.o.OnResume != nil {
				n.client.o.OnResume(n.URL, n.offset, cause)
			}
			return nil
		case n.ctx.Err() != nil:
			return context.Cause(n.ctx)
		}
		var server *ServerError
		if !errors.As(err, &server) {
			return fmt.Errorf("%w, and no more of it: %w", cause, err)
		}
	}
}

// pause waits for a while.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// resume asks for what is missing. After a [*ServerError] it may be tried again.
func (n *Nar) resume() error {
	fields := fmt.Sprintf("Range: bytes=%d-\r\nIf-Range: %s\r\n", n.offset, n.validator)
	rest, response, err := n.client.get(n.ctx, n.location, fields, wish{patient: true, again: true})
	if err != nil {
		return err
	}
	if err := n.continues(response); err != nil {
		rest.Drain()
		rest.Close()
		return err
	}
	n.body, n.conn, n.close, n.ended = rest.body, rest.conn, rest.close, false
	n.conn.await(n.client.o.NarTimeout/resumableShare, 0)
	return nil
}

// continues tells why a response is not the rest of the nar, or nil.
func (n *Nar) continues(response *http.Response) error {
	switch code := response.StatusCode; {
	case code == http.StatusPartialContent:
	case code >= 500, code == http.StatusRequestTimeout, code == http.StatusTooManyRequests:
		return &ServerError{n.location.server(), &StatusError{n.URL, response.Status, code}}
	default:
		return &StatusError{n.URL, response.Status, code}
	}
	field := response.Header.Get("Content-Range")
	first, last, total, ok := contentRange(field)
	length := response.ContentLength
	switch {
	case !ok:
		return fmt.Errorf("Content-Range %.100q makes no sense", field)
	case first != n.offset || n.total >= 0 && total >= 0 && total != n.total:
		return fmt.Errorf("Content-Range %.100q instead of what was asked for", field)
	case length >= 0 && length != last-first+1:
		return fmt.Errorf("Content-Range %.100q for %d bytes", field, length)
	}
	if tag := response.Header.Get("ETag"); tag != "" && strings.HasPrefix(n.validator, `"`) && tag != n.validator {
		return errors.New("the contents have changed")
	}
	if n.total < 0 {
		n.total = total
	}
	return nil
}

// contentRange parses a field Content-Range of bytes (RFC 9110, section 14.4).
// total is negative if it is not known.
func contentRange(field string) (first, last, total int64, ok bool) {
	unit, value, _ := strings.Cut(field, " ")
	span, of, found := strings.Cut(value, "/")
	from, to, found2 := strings.Cut(span, "-")
	if !strings.EqualFold(unit, "bytes") || !found || !found2 {
		return 0, 0, 0, false
	}
	number := func(s string) int64 {
		n, err := strconv.ParseUint(s, 10, 63)
		ok = ok && err == nil
		return int64(n)
	}
	ok = true
	first, last, total = number(from), number(to), -1
	if of != "*" {
		total = number(of)
	}
	ok = ok && first <= last && (total < 0 || last < total)
	return first, last, total, ok
}

// validator returns what the contents of a response can be recognised by, as a
// value of the field If-Range (RFC 9110, section 13.1.5), or nothing. It is a
// strong entity tag, or, where there is none at all, the time of the last
// modification if that was a second ago at least (section 8.8.2.2).
func validator(h http.Header) string {
	if tag, ok := h["Etag"]; ok {
		if len(tag) == 1 && isStrong(tag[0]) {
			return tag[0]
		}
		return ""
	}
	modified := h.Get("Last-Modified")
	then, err := http.ParseTime(modified)
	if err != nil {
		return ""
	}
	now, err := http.ParseTime(h.Get("Date"))
	if err != nil || now.Sub(then) < time.Second {
		return ""
	}
	return modified
}

// isStrong tells whether s is a strong entity tag (RFC 9110, section 8.8.3).
func isStrong(s string) bool {
	if len(s) < 2 || len(s) > maxValidator || s[0] != '"' || s[len(s)-1] != '"' {
		return false
	}
	for _, c := range []byte(s[1 : len(s)-1]) {
		if c <= ' ' || c == '"' || c == 0x7f {
			return false
		}
	}
	return true
}

// Read reads the next bytes.
func (n *Nar) Read(p []byte) (int, error) {
	for {
		if n.ctx.Err() != nil {
			return 0, context.Cause(n.ctx)
		}
		if n.failed != nil {
			if n.failed = n.cut(n.failed); n.failed != nil {
				return 0, n.failed
			}
		}
		count, err := n.body.Read(p)
		n.offset += int64(count)
		switch {
		case err == nil:
		case err == io.EOF && n.offset >= n.total:
			n.ended = true
			return count, io.EOF
		case err == io.EOF:
			n.failed = io.ErrUnexpectedEOF
		default:
			n.failed = causeOf(n.ctx, shortened(err))
		}
		if n.total >= 0 && n.offset > n.total {
			n.validator = ""
			n.failed = fmt.Errorf("more than %d bytes", n.total)
			return 0, n.failed
		}
		if count > 0 || n.failed == nil {
			return count, nil
		}
	}
}
