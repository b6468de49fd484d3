// SPDX-License-Identifier: GPL-3.0-or-later

package mirror

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A Nar is the bytes of a nar, compressed as its narinfo says, while they arrive.
// It must be closed. A read fails when the context of OpenNar is done, and when
// the server is silent for too long; a nar that is cut off is io.ErrUnexpectedEOF
// where the server has told its length. Before that, reads ask the server for the
// rest, on other connections, if it has said how to recognise the contents.
type Nar struct {
	// URL is where the bytes come from, after all redirections.
	URL string
	// Size is how many there are, negative if the server has not said.
	Size int64

	client   *Client
	location *location
	ctx      context.Context

	body  io.ReadCloser
	conn  *connection // nil for a file
	close func(reuse bool)
	ended bool

	total     int64 // as Size, but also what is learnt later
	offset    int64 // how many bytes have been read
	failed    error // why the body cannot be read further
	validator string
	draining  bool
	resumes   int // in all
	tries     int // since the offset progress
	progress  int64
}

// Drain reads a short rest that nobody wants, if there is one, for the connection
// to be used again after Close. It takes a second at most.
func (n *Nar) Drain() {
	if n.ended || n.close == nil {
		return
	}
	n.draining = true
	if n.conn != nil {
		n.conn.await(drainTime, drainTime)
	}
	io.Copy(io.Discard, io.LimitReader(n, maxDrain))
}

const (
	// maxDrain is the length of the longest rest that is read, in bytes.
	maxDrain = 64 << 10
	// drainTime is how long that may take.
	drainTime = time.Second
)

// Close lets go of the connection.
func (n *Nar) Close() error {
	if n.close != nil {
		n.close(n.ended)
		n.close = nil
	}
	return nil
}

// A StatusError is an answer other than the nar that was asked for.
type StatusError struct {
	// URL is what was asked for.
	URL string
	// Status is the HTTP status and its reason phrase.
	Status string
	// Code is the HTTP status.
	Code int
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("%s: server answered %.100q", e.URL, e.Status)
}

// maxRedirects bounds the redirections of one request.
const maxRedirects = 10

// OpenNar asks for the nar at rawURL, following redirections to http and https
// URLs. Errors are a [*StatusError], a [*ServerError], an error of the file
// system for file: URLs, or the cause of ctx. None shows user information of a
// URL, which is sent to its server only (RFC 7617).
func (c *Client) OpenNar(ctx context.Context, rawURL string) (*Nar, error) {
	l, err := parse(rawURL)
	if err != nil {
		return nil, err
	}
	if l.scheme == "file" {
		return openNarFile(ctx, l)
	}
	for range maxRedirects {
		n, next, err := c.request(ctx, l)
		if err != nil || next == "" {
			return n, err
		}
		target, err := l.redirected(next)
		if err != nil {
			return nil, fmt.Errorf("%s: redirected to %.300q: %w", l, WithoutUser(next), err)
		}
		l = target
		if c.o.OnRedirect != nil {
			c.o.OnRedirect(l.String())
		}
	}
	return nil, fmt.Errorf("%s: more than %d redirections", WithoutUser(rawURL), maxRedirects)
}

// request makes one request; it returns the nar, or where to ask instead.
func (c *Client) request(ctx context.Context, l *location) (n *Nar, elsewhere string, err error) {
	if c.o.OnSlow != nil {
		slow := time.AfterFunc(c.o.SlowAfter, func() { c.o.OnSlow(l.hostField()) })
		defer slow.Stop()
	}
	n, response, err := c.get(ctx, l, "", wish{patient: true})
	if err != nil {
		return nil, "", err
	}
	switch response.StatusCode {
	case http.StatusOK:
		if n.validator = validator(response.Header); n.validator != "" {
			n.conn.await(c.o.NarTimeout/resumableShare, 0)
		}
		return n, "", nil
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
		http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		elsewhere = response.Header.Get("Location")
	}
	n.Drain()
	n.Close()
	if elsewhere == "" {
		return nil, "", &StatusError{l.String(), response.Status, response.StatusCode}
	}
	return nil, elsewhere, nil
}

// get sends a request with further fields and returns its answer, whatever the
// status.
func (c *Client) get(ctx context.Context, l *location, fields string, w wish) (*Nar, *http.Response, error) {
	for ; ; w.fresh = true {
		conn, err := c.connect(ctx, l, w)
		if err != nil {
			return nil, nil, err
		}
		cancelled := context.AfterFunc(ctx, func() { conn.net.SetDeadline(time.Unix(1, 0)) })
		response, err := c.roundTrip(conn, l, fields)
		if err == nil {
			n := &Nar{
				URL: l.String(), Size: response.ContentLength, total: response.ContentLength,
				client: c, location: l, ctx: ctx, body: response.Body, conn: conn,
			}
			n.close = func(reuse bool) { c.release(conn, cancelled() && reuse && !response.Close) }
			return n, response, nil
		}
		cancelled()
		c.release(conn, false)
		if ctx.Err() != nil {
			return nil, nil, context.Cause(ctx)
		}
		if !conn.reused || errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, nil, &ServerError{conn.peer.server, err}
		}
		// The server had closed it.
	}
}

func (c *Client) roundTrip(conn *connection, l *location, fields string) (*http.Response, error) {
	request := conn.requestLine(l, l.target) + "User-Agent: " + c.o.UserAgent + "\r\n" + fields
	if l.user != nil {
		request += "Authorization: " + basic(l.user) + "\r\n"
	}
	patience := conn.peer.patience(c.o.NarTimeout)
	if err := conn.net.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	_, err := io.WriteString(conn.net, request+"\r\n")
	if err != nil {
		return nil, err
	}
	conn.await(patience, 2*patience)
	response, err := conn.header()
	silent := errors.Is(err, os.ErrDeadlineExceeded)
	conn.peer.answered(!silent)
	if silent {
		return nil, fmt.Errorf("no answer within %v: %w", patience, os.ErrDeadlineExceeded)
	}
	conn.await(c.o.NarTimeout, 0)
	return response, err
}

// patience is for how long the server may be silent before a nar.
func (p *peer) patience(timeout time.Duration) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return timeout >> min(p.silent, 3)
}

// answered notes whether the server has kept silent.
func (p *peer) answered(yes bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.silent++; yes {
		p.silent = 0
	}
}

// openRegular opens a file that can be read without waiting for anybody.
func openRegular(path string) (*os.File, error) {
	// Opening a device can do something, so that it must not be opened to see
	// what it is.
	info, err := os.Stat(path)
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	if info, err = f.Stat(); err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file any more", path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// decoded returns the name of a file with its percent signs interpreted, and
// whether that is another one. Guix takes names as they stand; but those who make
// URLs encode what cannot stand in one.
func decoded(path string) (string, bool) {
	d, err := url.PathUnescape(path)
	return d, err == nil && d != path && !strings.Contains(d, "\x00")
}

func openNarFile(ctx context.Context, l *location) (*Nar, error) {
	f, err := openRegular(l.target)
	if errors.Is(err, fs.ErrNotExist) {
		if d, ok := decoded(l.target); ok {
			if f2, err2 := openRegular(d); err2 == nil {
				f, err = f2, nil
			}
		}
	}
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &Nar{URL: l.String(), Size: info.Size(), total: -1, body: f, close: func(bool) { f.Close() }, ctx: ctx}, nil
}
