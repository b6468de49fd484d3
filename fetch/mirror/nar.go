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
// where the server has told its length.
type Nar struct {
	// URL is where the bytes come from, after all redirections.
	URL string
	// Size is how many there are, negative if the server has not said.
	Size int64

	body  io.ReadCloser
	close func(reuse bool)
	ended bool
	ctx   context.Context
}

// Read reads the next bytes.
func (n *Nar) Read(p []byte) (int, error) {
	count, err := n.body.Read(p)
	if err == io.EOF {
		n.ended = true
	} else if err != nil {
		err = causeOf(n.ctx, err)
	}
	return count, err
}

// Drain reads a short rest that nobody wants, if there is one, for the connection
// to be used again after Close.
func (n *Nar) Drain() {
	if !n.ended {
		io.Copy(io.Discard, io.LimitReader(n, maxDrain))
	}
}

// maxDrain is the length of the longest rest that is read, in bytes.
const maxDrain = 64 << 10

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
// system for file: URLs, or the cause of ctx.
func (c *Client) OpenNar(ctx context.Context, rawURL string) (*Nar, error) {
	u, err := parse(rawURL)
	if err != nil {
		return nil, err
	}
	if u.Scheme == "file" {
		return openNarFile(ctx, u)
	}
	for range maxRedirects {
		n, next, err := c.request(ctx, u)
		if err != nil || next == "" {
			return n, err
		}
		target, err := u.Parse(next)
		if err == nil {
			target, err = parse(target.String())
		}
		if err == nil && target.Scheme == "file" {
			err = ErrUnsupportedScheme
		}
		if err != nil {
			return nil, fmt.Errorf("%s: redirected to %.300q: %w", u.Redacted(), next, err)
		}
		u = target
		if c.o.OnRedirect != nil {
			c.o.OnRedirect(u.Redacted())
		}
	}
	return nil, fmt.Errorf("%s: more than %d redirections", rawURL, maxRedirects)
}

// request makes one request; it returns the nar, or where to ask instead.
func (c *Client) request(ctx context.Context, u *url.URL) (n *Nar, location string, err error) {
	if c.o.OnSlow != nil {
		slow := time.AfterFunc(c.o.SlowAfter, func() { c.o.OnSlow(u.Host) })
		defer slow.Stop()
	}
	for fresh := false; ; fresh = true {
		conn, err := c.connect(ctx, u, fresh)
		if err != nil {
			return nil, "", err
		}
		cancelled := context.AfterFunc(ctx, func() { conn.net.SetDeadline(time.Unix(1, 0)) })
		response, err := c.roundTrip(conn, u)
		if err != nil {
			cancelled()
			conn.net.Close()
			if ctx.Err() == nil && conn.reused && !errors.Is(err, os.ErrDeadlineExceeded) {
				continue // the server had closed it
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = fmt.Errorf("no answer within %v", c.o.NarTimeout)
			}
			if ctx.Err() != nil {
				return nil, "", context.Cause(ctx)
			}
			return nil, "", &ServerError{serverOf(u), err}
		}
		n := &Nar{URL: u.Redacted(), Size: response.ContentLength, body: response.Body, ctx: ctx}
		n.close = func(reuse bool) {
			if cancelled() && reuse && !response.Close {
				c.pool.put(conn)
			} else {
				conn.net.Close()
			}
		}
		switch response.StatusCode {
		case http.StatusOK:
			return n, "", nil
		case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
			http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
			location = response.Header.Get("Location")
		}
		n.Drain()
		n.Close()
		if location == "" {
			return nil, "", &StatusError{u.Redacted(), response.Status, response.StatusCode}
		}
		return nil, location, nil
	}
}

func (c *Client) roundTrip(conn *connection, u *url.URL) (*http.Response, error) {
	request := conn.requestLine(u) + "User-Agent: " + c.o.UserAgent + "\r\n"
	if u.User != nil {
		request += "Authorization: " + basic(u.User) + "\r\n"
	}
	if err := conn.net.SetWriteDeadline(time.Now().Add(c.o.NarTimeout)); err != nil {
		return nil, err
	}
	if _, err := io.WriteString(conn.net, request+"\r\n"); err != nil {
		return nil, err
	}
	conn.await(c.o.NarTimeout, 0)
	return conn.header()
}

// filePath is the file name of a file: URL, as it stands (Guix,
// guix/substitutes.scm, takes it so too). What looks like a host is part of the
// name.
func filePath(u *url.URL) (string, error) {
	path := u.Host + u.EscapedPath()
	if u.Host == "localhost" {
		path = u.EscapedPath()
	}
	if u.Opaque != "" {
		path = u.Opaque
	}
	if u.RawQuery != "" || u.ForceQuery {
		path += "?" + u.RawQuery
	}
	if !strings.HasPrefix(path, "/") {
		return "", fmt.Errorf("invalid URL %.300q: no absolute file name", u.String())
	}
	return path, nil
}

// openRegular opens a file that can be read without waiting for anybody.
func openRegular(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func openNarFile(ctx context.Context, u *url.URL) (*Nar, error) {
	path, err := filePath(u)
	if err != nil {
		return nil, err
	}
	f, err := openRegular(path)
	if errors.Is(err, fs.ErrNotExist) {
		// Servers name the same file with characters encoded.
		if decoded, err2 := url.PathUnescape(path); err2 == nil && decoded != path && !strings.Contains(decoded, "\x00") {
			if f2, err2 := openRegular(decoded); err2 == nil {
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
	return &Nar{URL: "file:" + path, Size: info.Size(), body: f, close: func(bool) { f.Close() }, ctx: ctx}, nil
}
