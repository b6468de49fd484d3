// SPDX-License-Identifier: GPL-3.0-or-later

// Package web gets and puts ERIS blocks over HTTP. Start with [Open].
//
// There are two kinds of stores, and the query of the URL tells them apart:
//
//   - http://host/base is a server that is asked for references:
//     GET BASE/uri-res/N2R?urn:blake2b:REFERENCE (https://eris.codeberg.page/eer/http.xml, RFC 2169).
//   - http://host/base?static is any web server, content delivery network or bucket with one object per block:
//     BASE/REFERENCE, or BASE/RE/REFERENCE where RE is the first two characters. Both are asked for, first the one that the
//     last block was found by; "layout=flat" and "layout=sharded" in the query say that there is only one, which makes it
//     cheaper to learn that a block is not there. Such names are those of package fetch/dir.
//
// Other elements of the query are "get" and "put", which restrict what the store is used for; "h2c" for HTTP/2 without TLS,
// of which the server must be known to speak it; and "verify", which has the certificate of the server checked.
//
// HTTP/2 is spoken where the server offers it by TLS, with all requests on one connection; else there are a few dozen
// connections of HTTP/1.1, each of which carries one request at a time.
//
// # What is not trusted
//
// Certificates are not verified unless that is asked for: blocks are verified by their references, so that nobody in between
// can do more than withhold them, and the bad clock of a freshly booted machine takes no source away. But whoever is in
// between can see what is asked for, and the path and password of the URL. What a server sends is bounded: the header, the
// body by the size of the block, the number of redirections, and the time.
package web

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// Store is a store that is reached by HTTP. It implements [fetch.Store]. It is safe for concurrent use.
type Store struct {
	url    storeURL
	name   string
	client *client
	header http.Header  // of all requests; never changed
	hint   atomic.Int32 // the layout in which the last block was found
}

var (
	_ fetch.Store         = (*Store)(nil)
	_ eris.VerifiedBlocks = (*Store)(nil)
)

// Open returns the store at a URL, whose form is in the package comment. It makes no connection: Get and Put do. After a
// connection could not be made, calls fail at once for a time that gets longer with each such failure.
//
// The path and the user information of the URL may be secret; neither errors nor [Store.String] show them. The Store must be
// closed.
func Open(url string, options Options) (*Store, error) {
	u, err := parseURL(url)
	if err != nil {
		return nil, err
	}
	options = options.withDefaults()
	s := &Store{url: u, name: u.String(), client: newClient(&u, options)}
	s.header = http.Header{
		"User-Agent":      {options.UserAgent},
		"Accept-Encoding": {"identity"}, // blocks do not compress
	}
	if u.static {
		s.hint.Store(int32(u.layouts[0]))
	}
	return s, nil
}

// String returns the scheme, the host and the kind of the store.
func (s *Store) String() string { return s.name }

// Verified implements [eris.VerifiedBlocks].
func (s *Store) Verified() {}

// Close ends all connections. Calls that are under way fail.
func (s *Store) Close() error {
	s.client.close()
	return nil
}

// StatusError is an answer of the server that says neither that it has the block nor that it does not. Those of 429 and of
// 500 and more may be over later.
type StatusError struct {
	Code int // the HTTP status
}

// Error returns a text with the status.
func (e *StatusError) Error() string {
	if text := http.StatusText(e.Code); text != "" {
		return fmt.Sprintf("server answers %d %s", e.Code, text)
	}
	return fmt.Sprintf("server answers %d", e.Code)
}

var (
	errBlockSize = errors.New("block size is neither 1 KiB nor 32 KiB")
	errEncoded   = errors.New("server sends blocks in an encoding that was not asked for")
	errRedirect  = errors.New("server redirects to something that is no HTTP address")
	errRedirects = errors.New("server redirects too often")
)

func (s *Store) error(ref eris.Reference, err error) error {
	return fmt.Errorf("%s: block %v: %w", s.name, ref, err)
}

// Get implements [eris.Blocks]. It makes one request; of static stores with both layouts, up to two.
//
// The error wraps eris.ErrNotFound if the server says so, or may not be asked; *eris.BlockError if it gave other bytes;
// *StatusError if it gave another answer; or is the cause of ctx. Any other is a failure of the connection, which may be over
// the next time. Static servers that answer 403 do not have the block: buckets whose contents may not be listed answer so.
func (s *Store) Get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	if !size.Valid() {
		return nil, s.error(ref, errBlockSize)
	}
	if !s.url.get {
		return nil, s.error(ref, eris.ErrNotFound)
	}
	if cap(dst) < int(size) {
		dst = make([]byte, 0, size)
	}
	block := dst[:size]
	if err := s.find(ctx, ref, block); err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, s.error(ref, err)
	}
	return block, nil
}

// find gets a block by the layouts that there may be.
func (s *Store) find(ctx context.Context, ref eris.Reference, block []byte) error {
	first := layout(s.hint.Load())
	err := s.get(ctx, ref, first, block)
	if len(s.url.layouts) < 2 || !errors.Is(err, eris.ErrNotFound) {
		return err
	}
	err = s.get(ctx, ref, 1-first, block)
	if err == nil {
		s.hint.Store(int32(1 - first))
	}
	return err
}

// get gets and verifies a block.
func (s *Store) get(ctx context.Context, ref eris.Reference, l layout, block []byte) error {
	err := s.do(ctx, http.MethodGet, s.url.at(ref, l), nil, func(r *response) error {
		switch {
		case r.StatusCode == http.StatusOK:
			return s.read(r, ref, block)
		case r.StatusCode == http.StatusNotFound, r.StatusCode == http.StatusGone,
			r.StatusCode == http.StatusForbidden && s.url.static:
			return eris.ErrNotFound
		}
		return &StatusError{r.StatusCode}
	})
	if err != nil {
		return err
	}
	return eris.Verify(ref, block)
}

// read reads the block that a response brings.
func (s *Store) read(r *response, ref eris.Reference, block []byte) error {
	if coding := r.Header.Get("Content-Encoding"); coding != "" && coding != "identity" {
		return errEncoded
	}
	wrong := func(length int) error {
		return &eris.BlockError{Reference: ref, Length: length, Want: eris.BlockSize(len(block))}
	}
	if r.ContentLength >= 0 && r.ContentLength != int64(len(block)) {
		return wrong(int(min(r.ContentLength, 1<<30)))
	}
	n, err := r.readFull(block)
	if err == io.EOF {
		if r.ContentLength < 0 && r.ProtoMajor == 1 && len(r.TransferEncoding) == 0 {
			// Its end is that of the connection, for whatever reason.
			return io.ErrUnexpectedEOF
		}
		return wrong(n)
	}
	if err != nil {
		return err
	}
	var more [1]byte
	switch n, err := r.readFull(more[:]); {
	case n > 0:
		return wrong(len(block) + 1)
	case err != io.EOF:
		return err
	}
	return nil
}

// Put implements [fetch.Store]: it returns nil once the server has answered that it has the block. Errors wrap
// fetch.ErrReadOnly if the server takes no blocks from us, else they are those of Get, but for those of its blocks.
func (s *Store) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	if !eris.BlockSize(len(block)).Valid() {
		return s.error(ref, errBlockSize)
	}
	if !s.url.put {
		return s.error(ref, fetch.ErrReadOnly)
	}
	var l layout
	if s.url.static {
		l = s.url.layouts[0]
	}
	// A copy, because what the transport writes from may still be in use when it has returned.
	err := s.do(ctx, http.MethodPut, s.url.at(ref, l), bytes.Clone(block), func(r *response) error {
		switch r.StatusCode {
		case http.StatusOK, http.StatusCreated, http.StatusNoContent:
			return nil
		case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusNotImplemented:
			return fmt.Errorf("%w: %w", fetch.ErrReadOnly, &StatusError{r.StatusCode})
		}
		return &StatusError{r.StatusCode}
	})
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return s.error(ref, err)
	}
	return nil
}

// maxRedirects bounds the redirections of one request.
const maxRedirects = 10

// do makes a request, follows redirections, and has the response handled, of which what is left is thrown away.
func (s *Store) do(ctx context.Context, method string, u *url.URL, body []byte, handle func(r *response) error) error {
	return s.client.call(ctx, func(c *call) error {
		for range maxRedirects + 1 {
			next, err := s.request(c, method, u, body, handle)
			if err != nil || next == nil {
				return err
			}
			u = next
		}
		return errRedirects
	})
}

// request makes one request. It has the response handled, or returns where to ask instead.
func (s *Store) request(c *call, method string, u *url.URL, body []byte, handle func(r *response) error) (next *url.URL, err error) {
	request := &http.Request{
		Method: method, URL: u, Host: u.Host, Header: s.header,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}
	own := u.Scheme == s.url.base.Scheme && u.Host == s.url.base.Host
	if body != nil || s.url.user != nil && own {
		request.Header = s.header.Clone()
	}
	if s.url.user != nil && own {
		password, _ := s.url.user.Password()
		request.SetBasicAuth(s.url.user.Username(), password)
	}
	if body != nil {
		request.Header.Set("Content-Type", "application/octet-stream")
		request.Header["Idempotency-Key"] = nil // not sent; has the transport try again on a new connection
		request.ContentLength = int64(len(body))
		request.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
		request.Body, _ = request.GetBody()
	}
	r, err := c.roundTrip(request)
	if err != nil {
		return nil, err
	}
	defer r.finish()
	switch r.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther:
		if method == http.MethodGet {
			return redirection(u, r.Header.Get("Location"))
		}
	case http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		next, err := redirection(u, r.Header.Get("Location"))
		// A server shall not make us put something anywhere else.
		if method == http.MethodGet || err == nil && next.Host == u.Host && next.Scheme == u.Scheme {
			return next, err
		}
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		if seconds, err := strconv.ParseUint(r.Header.Get("Retry-After"), 10, 32); err == nil {
			s.client.pause(min(time.Duration(seconds)*time.Second, maxPause), &StatusError{r.StatusCode})
		}
	}
	return nil, handle(r)
}

// redirection returns where a redirection leads. User information in it is not used.
func redirection(from *url.URL, location string) (*url.URL, error) {
	if location == "" || len(location) > maxURLSize {
		return nil, errRedirect
	}
	to, err := from.Parse(location)
	if err != nil || to.Hostname() == "" || to.Scheme != "http" && to.Scheme != "https" {
		return nil, errRedirect
	}
	to.User, to.Fragment, to.RawFragment = nil, "", ""
	return to, nil
}
