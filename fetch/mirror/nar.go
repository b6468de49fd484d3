// SPDX-License-Identifier: GPL-3.0-or-later

package mirror

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"maps"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"strings"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/backoff"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/decompress"
)

// A Nar is the bytes of a nar, compressed as its narinfo says, while they arrive. It must be
// closed. A read fails when the context of OpenNar is done, and when the server is silent for too
// long; a nar that is cut off is io.ErrUnexpectedEOF where the server has told its length. Before
// that, reads request the rest, or all of it again and pass over what they have had already.
type Nar struct {
	// URL is where the bytes come from, after all redirections.
	URL string
	// Size is how many there are, negative if the server has not said.
	Size int64
	// Decoded tells that a Content-Encoding has been undone, which a proxy may have added; but some
	// servers say so of a file that is compressed itself.
	Decoded bool
	// Again, if it is set, is called with how many bytes have come a second time, of which a read
	// returns none.
	Again func(n int)

	client   *Client // nil for a file
	location *location
	ctx      context.Context // of the request at hand
	cancel   context.CancelCauseFunc
	parent   context.Context
	stop     context.CancelCauseFunc // of parent
	silence  *time.Timer             // ends ctx when the server is silent
	unframed bool                    // HTTP says neither how long it is nor where it ends
	timeout  time.Duration           // of silence in the middle
	longest  time.Duration           // silence that has ended
	hurried  bool                    // it was requested again because there was no answer soon
	body     io.ReadCloser

	total     int64        // as Size, but also what is learnt later
	offset    int64        // how many bytes have been read
	had       maphash.Hash // of them
	failed    error        // why the body cannot be read further
	validator string
	final     bool // it is not requested again
	ended     bool
	restarts  int // requests for all of it after the first
	tries     int // requests after the first, since the offset progress
	progress  int64
}

// Failed returns why not all could be read, nil if nothing was in the way.
func (n *Nar) Failed() error { return n.failed }

// Drain writes a short rest that nobody has read to w, if there is one, for the connection to be
// used again after Close. It takes a second at most, and reports whether that was the end.
func (n *Nar) Drain(w io.Writer) (ended bool) {
	if n.ended || n.client == nil {
		return n.ended
	}
	n.final = true
	n.Last()
	io.Copy(w, io.LimitReader(n, maxDrain))
	return n.ended
}

const (
	// maxDrain is the length of the longest rest that is read, in bytes.
	maxDrain = 64 << 10
	// drainTime is how long that may take.
	drainTime = time.Second
)

// Last tells, from any goroutine, that nothing but the end is still wanted: it is waited for for a
// second at most.
func (n *Nar) Last() {
	time.AfterFunc(drainTime, func() { n.stop(errSilent) })
}

// Whole tells, from any goroutine, that all of the nar has been read: its end is waited for as by
// Last, but not if it is that of the connection, which the server may keep (Guix,
// guix/scripts/publish.scm: http-write).
func (n *Nar) Whole() {
	if n.unframed {
		n.stop(errSilent)
		return
	}
	n.Last()
}

// Close lets go of the connection.
func (n *Nar) Close() error {
	n.stop(nil)
	return n.drop()
}

// drop lets go of the response at hand.
func (n *Nar) drop() error {
	n.cancel(nil)
	if n.silence != nil {
		n.silence.Stop()
	}
	return n.body.Close()
}

// A StatusError is a response other than the nar that was requested.
type StatusError struct {
	// URL is what was requested.
	URL string
	// Status is the HTTP status and its reason phrase.
	Status string
	// Code is the HTTP status.
	Code int
	// RetryAfter is for how long the server wants to be left alone, 0 if it has not said.
	RetryAfter time.Duration
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("%s: server answered %.100q", e.URL, e.Status)
}

// Temporary reports whether the same request may work later: the server is busy or has failed.
func (e *StatusError) Temporary() bool { return isTemporary(e.Code) }

// isOverload reports whether a status says that the server is busy or away, whatever is asked of
// it.
func isOverload(code int) bool {
	return code >= http.StatusBadGateway && code <= http.StatusGatewayTimeout || isTemporary(code) && code < 500
}

func isRedirection(code int) bool {
	return code > 300 && code <= 303 || code == http.StatusTemporaryRedirect || code == http.StatusPermanentRedirect
}

func isTemporary(code int) bool {
	return code >= 500 && code != http.StatusNotImplemented && code != http.StatusLoopDetected || code == http.StatusRequestTimeout ||
		code == http.StatusTooEarly || code == http.StatusTooManyRequests
}

// maxRedirects bounds the redirections of one request.
const maxRedirects = 10

// OpenNar asks for the nar at rawURL, following redirections to http and https URLs. Errors are a
// [*StatusError], a [*ServerError], an error of the file system for file: URLs, or the cause of
// ctx. None shows user information of a URL, which is sent to its server only (RFC 7617). Anew is
// past what caches on the way have, after that was of no use (RFC 9111, section 5.2.1.4).
func (c *Client) OpenNar(ctx context.Context, rawURL string, anew bool) (*Nar, error) {
	var fields http.Header
	if anew {
		fields = http.Header{"Cache-Control": {"no-cache"}}
	}
	l, err := parse(rawURL)
	if err != nil {
		return nil, err
	}
	if l.scheme == "file" {
		return c.openNarFile(ctx, l)
	}
	for range maxRedirects {
		n, next, err := c.openNar(ctx, l, fields)
		if err != nil || next == "" {
			return n, err
		}
		target, err := l.redirected(next)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", l, err)
		}
		l = target
		c.o.Note("following redirection to '%s'...", l)
	}
	return nil, fmt.Errorf("%s: more than %d redirections", WithoutUser(rawURL), maxRedirects)
}

// openNar makes one request, with some fields; it returns the nar, or where to ask instead.
func (c *Client) openNar(ctx context.Context, l *location, fields http.Header) (n *Nar, elsewhere string, err error) {
	if err := c.peer(l).resting(); err != nil {
		return nil, "", err
	}
	slow := time.AfterFunc(c.o.NarTimeout/slowShare, func() {
		c.o.Note("warning: %s: server is somewhat slow; try '--no-substitutes' if it does not get better", l.hostField())
	})
	defer slow.Stop()
	n = &Nar{URL: l.String(), client: c, location: l, timeout: c.o.NarTimeout / bodyShare}
	n.parent, n.stop = context.WithCancelCause(ctx)
	response, err := n.request(fields)
	if err != nil {
		n.stop(nil)
		return nil, "", err
	}
	n.Size, n.total = -1, -1
	n.unframed = response.ProtoMajor == 1 && response.ContentLength < 0 && len(response.TransferEncoding) == 0
	if n.Decoded = response.Header.Get("Content-Encoding") != ""; !n.Decoded {
		n.Size, n.total, n.validator = response.ContentLength, response.ContentLength, validator(response.Header)
	}
	if response.StatusCode == http.StatusOK {
		return n, "", nil
	}
	if isRedirection(response.StatusCode) {
		elsewhere = response.Header.Get("Location")
	}
	n.Drain(io.Discard)
	n.Close()
	if elsewhere == "" {
		return nil, "", statusError(l, response)
	}
	return nil, elsewhere, nil
}

func statusError(l *location, r *http.Response) *StatusError {
	return &StatusError{l.String(), r.Status, r.StatusCode, backoff.RetryAfter(r.Header.Get("Retry-After"), time.Now())}
}

// slowShare is the part of the time for which a server may be silent before a nar after which
// people are told.
const slowShare = 12

// bodyShare is the part of the time for which a server may be silent before a nar after which one
// in the middle is requested again.
const bodyShare = 3

// soonShare is the same, at first, for a server that has answered others before, or lets the rest
// be requested: after a change of network nothing comes by a connection from before, not even an
// error. Where the line is such that there were silences, it is soonFactor times the longest.
const soonShare, soonFactor = 20, 4

// dropIdleAfter is for how long a nar is waited for while there are idle connections for narinfos.
const dropIdleAfter = 200 * time.Millisecond

var errSilent = fmt.Errorf("server is silent: %w", os.ErrDeadlineExceeded)

// request sends a request with further fields and returns the response, whatever the status. The
// body of the nar is that of the response then.
func (n *Nar) request(fields http.Header) (*http.Response, error) {
	c, p := n.client, n.client.peer(n.location)
	// The server may have few workers, which stay with connections that nobody uses.
	defer time.AfterFunc(dropIdleAfter, p.dropIdle).Stop()
	ctx, cancel := context.WithCancelCause(n.parent)
	n.ctx, n.cancel = ctx, cancel
	p.mu.Lock()
	timeout := c.o.NarTimeout >> min(p.silent, 3) // of silence before a nar
	soon := min(timeout, n.soon(p.longest))
	hurry := p.longest > 0 && !n.hurried && soon < timeout
	p.mu.Unlock()
	if hurry {
		n.hurried, timeout = true, soon
	}
	connected, asked := false, time.Now()
	r := n.location.request(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) {
			connected, asked = true, time.Now()
			n.silence.Reset(timeout) // waiting for a connection of our own is not the server's silence
		},
	}))
	maps.Copy(r.Header, fields)
	r.Header.Set("Accept-Encoding", "identity")
	r.Header.Set("User-Agent", userAgent)
	n.silence = time.AfterFunc(timeout, func() {
		cancel(fmt.Errorf("no answer within %v: %w", timeout, os.ErrDeadlineExceeded))
	})
	n.silence.Stop() // until there is a connection, which has timeouts of its own
	response, err := c.transport.RoundTrip(r)
	n.silence.Stop()
	if err == nil && response.StatusCode == http.StatusSwitchingProtocols {
		response.Body.Close() // it is the connection, of which no end of a context is the end
		response.Body = http.NoBody
	}
	var body io.Reader
	if err == nil {
		n.body = response.Body
		body, err = decoded(response)
	}
	switch {
	case n.parent.Err() != nil:
		cancel(nil)
		return nil, context.Cause(n.parent)
	case err != nil && hurry && connected && errors.Is(cmp.Or(context.Cause(ctx), err), os.ErrDeadlineExceeded):
		return n.request(fields)
	case err != nil:
		return nil, p.narFailed(cmp.Or(context.Cause(ctx), err), connected)
	}
	n.longest = max(n.longest, time.Since(asked))
	p.reached(time.Since(asked))
	c.closing.Store(response.Close)
	n.body = struct {
		io.Reader
		io.Closer
	}{body, response.Body}
	n.silence = time.AfterFunc(n.timeout, func() { cancel(errSilent) })
	n.silence.Stop() // until somebody reads
	return response, nil
}

// soon is how long a server has that is asked again then, after silences of at most longest.
func (n *Nar) soon(longest time.Duration) time.Duration {
	return max(n.client.o.NarTimeout/soonShare<<n.tries, soonFactor*longest)
}

// narFailed notes why there is no response.
func (p *peer) narFailed(err error, connected bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if connected {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			p.silent++
		}
		return &ServerError{Server: p.server, Err: shortened(err)}
	}
	if p.workers > 0 && p.good {
		// It takes no more connections, but is there.
		return &ServerError{Server: p.server, Err: dialError(err)}
	}
	return p.fail(dialError(err))
}

// request returns a request for l, with the target as it was written.
func (l *location) request(ctx context.Context) *http.Request {
	r := &http.Request{Method: http.MethodGet, Host: l.hostField(), Header: http.Header{}}
	plain := l.scheme + "://" + l.hostField() + l.target
	u, err := url.Parse(plain)
	if err != nil || u.RequestURI() != l.target {
		u = &url.URL{Opaque: l.target}
		if strings.HasPrefix(l.target, "//") {
			u.Opaque = "//" + l.hostField() + l.target
		}
	}
	u.Scheme, u.Host, u.User = l.scheme, l.address(), nil
	r.URL = u
	if l.user != nil {
		r.Header.Set("Authorization", basic(l.user))
	}
	return r.WithContext(ctx)
}

// decoded undoes gzip, which we have not asked for, where it is, and takes any other
// Content-Encoding for one of the file itself (zstd), or left over from its upload (aws-chunked).
func decoded(r *http.Response) (io.Reader, error) {
	switch strings.ToLower(r.Header.Get("Content-Encoding")) {
	case "gzip", "x-gzip":
		if r.StatusCode == http.StatusOK {
			return decompress.Open(decompress.PerhapsGzip, r.Body)
		}
	default:
		r.Header.Del("Content-Encoding")
	}
	return r.Body, nil
}
