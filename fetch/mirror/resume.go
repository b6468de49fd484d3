// SPDX-License-Identifier: GPL-3.0-or-later

package mirror

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"
)

const (
	// maxAgain bounds how often in a row a nar is requested again that makes no progress between.
	maxAgain = 6
	// maxRestarts bounds how often all of it is.
	maxRestarts = 3
	// againProgress is what counts as progress, in bytes.
	againProgress = 256 << 10
	// maxValidator bounds what is sent back to a server, in bytes.
	maxValidator = 1024
)

// cut deals with an error in the middle of a body: where the server has said by what the contents
// can be recognised, the rest is requested on another connection (RFC 9110, section 14), or else
// all of it. It returns nil if there is more to read.
func (n *Nar) cut(cause error) error {
	if n.final || n.client == nil {
		return cause
	}
	for {
		n.drop()
		if n.tries >= maxAgain {
			return cause
		}
		select {
		case <-time.After(n.client.o.ResumeDelay << n.tries):
		case <-n.parent.Done():
			return context.Cause(n.parent)
		}
		n.tries++
		err := n.goOn()
		switch {
		case err == nil:
			n.client.o.Note("%s: %v; going on after %d bytes", n.URL, cause, n.offset)
			return nil
		case n.parent.Err() != nil:
			return context.Cause(n.parent)
		case errors.Is(err, errRestarts):
			return cause
		case !errors.As(err, new(*ServerError)):
			return fmt.Errorf("%w, and no more of it: %w", cause, err)
		}
	}
}

var errRestarts = errors.New("restarted often enough")

// goOn requests what is missing. After a [*ServerError] it may be tried again.
func (n *Nar) goOn() error {
	var fields http.Header
	if n.validator == "" && n.restarts == maxRestarts {
		return errRestarts
	}
	if n.validator != "" {
		fields = http.Header{"Range": {fmt.Sprintf("bytes=%d-", n.offset)}, "If-Range": {n.validator}}
	}
	n.silence.Stop()
	response, err := n.request(fields)
	if err != nil {
		return err
	}
	if response.StatusCode == http.StatusOK {
		return n.restart(response)
	}
	return n.continues(response)
}

// restart reads all of the nar again, up to where it was cut off, and compares it.
func (n *Nar) restart(response *http.Response) error {
	if n.restarts++; n.restarts > maxRestarts {
		return errRestarts
	}
	if n.total >= 0 && response.ContentLength >= 0 && response.ContentLength != n.total {
		return ErrChanged
	}
	n.validator = ""
	if response.Header.Get("Content-Encoding") == "" {
		n.validator = validator(response.Header)
	}
	var again maphash.Hash
	again.SetSeed(n.had.Seed())
	left := n.offset
	buffer := make([]byte, 64<<10)
	for left > 0 {
		count, err := n.read(buffer[:min(left, int64(len(buffer)))])
		again.Write(buffer[:count])
		if n.Again != nil {
			n.Again(count)
		}
		left -= int64(count)
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil && left > 0 {
			return &ServerError{Server: n.location.shown(), Err: shortened(cmp.Or(context.Cause(n.ctx), err))}
		}
	}
	if again.Sum64() != n.had.Sum64() {
		return ErrChanged
	}
	return nil
}

// ErrChanged is why a nar that was cut off cannot go on: what comes now is another one.
var ErrChanged = errors.New("the contents have changed")

// continues returns why a response is not the rest of the nar, or nil.
func (n *Nar) continues(response *http.Response) error {
	if response.StatusCode != http.StatusPartialContent {
		status := statusError(n.location, response)
		if status.Temporary() {
			return &ServerError{Server: n.location.shown(), Err: status}
		}
		return status
	}
	field := response.Header.Get("Content-Range")
	first, last, total, ok := contentRange(field)
	length := response.ContentLength
	var err error
	switch {
	case !ok:
		err = fmt.Errorf("Content-Range %.100q makes no sense", field)
	case first != n.offset || n.total >= 0 && total >= 0 && total != n.total:
		err = fmt.Errorf("Content-Range %.100q instead of what was asked for", field)
	case length >= 0 && length != last-first+1:
		err = fmt.Errorf("Content-Range %.100q for %d bytes", field, length)
	}
	switch {
	case err == nil:
	case n.validator == "":
		return err
	default:
		n.validator = "" // perhaps a proxy that is not good at ranges can have all of it
		return &ServerError{Server: n.location.shown(), Err: err}
	}
	if tag := response.Header.Get("ETag"); tag != "" && strings.HasPrefix(n.validator, `"`) && tag != n.validator {
		return ErrChanged
	}
	if n.total < 0 {
		n.total = total
	}
	return nil
}

// contentRange parses a field Content-Range of bytes (RFC 9110, section 14.4). total is negative if
// it is not known.
func contentRange(field string) (first, last, total int64, ok bool) {
	m := regexp.MustCompile(`(?i)^bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)$`).FindStringSubmatch(field)
	if m == nil {
		return 0, 0, 0, false
	}
	first, _ = strconv.ParseInt(m[1], 10, 64)
	last, _ = strconv.ParseInt(m[2], 10, 64)
	total = -1
	if m[3] != "*" {
		total, _ = strconv.ParseInt(m[3], 10, 64)
	}
	return first, last, total, first <= last && (total < 0 || last < total)
}

// validator returns what the contents of a response can be recognised by, as a value of the field
// If-Range (RFC 9110, section 13.1.5), or nothing. It is a strong entity tag, or, where there is
// none at all, the time of the last modification if that was a second ago at least (section
// 8.8.2.2).
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

// isStrong reports whether s is a strong entity tag (RFC 9110, section 8.8.3).
func isStrong(s string) bool {
	return len(s) >= 2 && len(s) <= maxValidator && s[0] == '"' && s[len(s)-1] == '"' &&
		!strings.ContainsFunc(s[1:len(s)-1], func(r rune) bool { return r <= ' ' || r == '"' || r == 0x7f })
}

// Read reads the next bytes.
func (n *Nar) Read(p []byte) (int, error) {
	for {
		if n.failed != nil {
			if n.failed = n.cut(n.failed); n.failed != nil {
				return 0, n.failed
			}
		}
		if n.ctx.Err() != nil {
			return 0, context.Cause(n.ctx)
		}
		count, err := n.read(p)
		n.offset += int64(count)
		if n.offset-n.progress >= againProgress {
			n.tries, n.progress = 0, n.offset
		}
		n.had.Write(p[:count])
		switch {
		case err == nil:
		case err == io.EOF && n.offset >= n.total:
			n.ended = true
			return count, io.EOF
		case err == io.EOF:
			n.failed = shortened(io.ErrUnexpectedEOF)
		default:
			n.failed = shortened(cmp.Or(context.Cause(n.ctx), err))
		}
		if n.total >= 0 && n.offset > n.total {
			n.final = true
			n.failed = fmt.Errorf("more than %d bytes", n.total)
			return 0, n.failed
		}
		if count > 0 || n.failed == nil {
			return count, nil
		}
	}
}

// read reads from the body at hand, with an end to the silence of the server.
func (n *Nar) read(p []byte) (int, error) {
	if n.silence == nil {
		return n.body.Read(p)
	}
	timeout := n.timeout
	if n.validator != "" && n.restarts == 0 {
		timeout = min(timeout, n.soon(n.longest))
	}
	n.silence.Reset(timeout)
	defer n.silence.Stop()
	begin := time.Now()
	count, err := n.body.Read(p)
	if count > 0 {
		n.longest = max(n.longest, time.Since(begin))
	}
	return count, err
}
