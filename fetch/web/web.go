// SPDX-License-Identifier: GPL-3.0-or-later

// Package web gets and puts ERIS blocks over HTTP. Start with [Open].
//
// There are two kinds of stores, and the query of the URL tells them apart:
//
//   - http://host/base is a server that is asked for references: GET
//     BASE/uri-res/N2R?urn:blake2b:REFERENCE (https://eris.codeberg.page/eer/http.xml, RFC 2169).
//   - http://host/base?static is any web server, content delivery network or bucket with one object
//     per block: BASE/REFERENCE, or BASE/RE/REFERENCE where RE is the first two characters. Both
//     are asked for, first the one that the last block was found by; "layout=flat" and
//     "layout=sharded" in the query say that there is only one, which makes it cheaper to learn
//     that a block is not there. Such names are those of package fetch/dir.
//
// With "packed" it keeps objects, for package fetch/packs: see [Store.Range] and [Store.PutObject].
//
// Other elements of the query are "get" and "put", which restrict what the store is used for; "h2c"
// for HTTP/2 without TLS, of which the server must be known to speak it; and "verify", which has
// the certificate of the server checked.
//
// HTTP/2 is spoken where the server offers it by TLS, with all requests on one connection; else
// there are a few dozen connections of HTTP/1.1, each of which carries one request at a time.
//
// # What is not trusted
//
// Certificates are not verified unless that is asked for: whoever asks for blocks verifies them by
// their references, so that nobody in between can do more than withhold them, and the bad clock of
// a freshly booted machine takes no source away. But whoever is in between can see what is asked
// for, and the path and password of the URL. What a server sends is bounded: the header, the body
// by the size of the block, the number of redirections, and the time.
package web

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/httpclient"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
)

// Options says how a [Store] behaves. Zero fields stand for the defaults.
type Options struct {
	// Connections is the most connections to one host, each of which carries one request of
	// HTTP/1.1 at a time; further requests wait for their turn. Default 32.
	Connections int
	// ConnectTimeout bounds the time to resolve and connect, and again that to shake hands. Default
	// 5 s.
	ConnectTimeout time.Duration
	// Timeout is how long a server may take to begin an answer. The rest of it may take three times
	// that. Default 20 s.
	Timeout time.Duration
	// HopLimit, if not 0, says in all requests for blocks how many servers they may go through that
	// ask others for what they do not have, the first one among them: by the header Max-Forwards
	// (RFC 9110, section 7.6.2), which does not count that one.
	HopLimit int
	// Sign, if not nil, signs all requests, whose body has the SHA-256 sum; its errors end them.
	Sign func(r *http.Request, sum [sha256.Size]byte) error
	// Getenv looks up the variables http_proxy, https_proxy and no_proxy, which mean what they mean
	// to package fetch/mirror. Default os.Getenv.
	Getenv func(string) string
}

const (
	// streams is the most requests by HTTP/2 at a time. There is one connection if the server
	// allows as many on one.
	streams = 256
	// idleTimeout is for how long a connection without requests is kept: servers commonly close
	// after 60 s.
	idleTimeout = 50 * time.Second
)

// Store is a store that is reached by HTTP. It implements [fetch.Store], and is safe for concurrent
// use.
type Store struct {
	httpclient.Store
	url     storeurl.URL
	base    *url.URL
	layouts []layout // that are asked; the first is that of new blocks
	sign    func(r *http.Request, sum [sha256.Size]byte) error
	header  http.Header  // of all requests; never changed
	hint    atomic.Int32 // index in layouts of the one in which the last block was found
}

var _ fetch.Store = (*Store)(nil)

// layout returns what stands behind the base of a store in the address of a block.
type layout func(ref eris.Reference) (path, query string)

// The first is the service of stores that are asked for references (RFC 2169, section 2.2;
// https://eris.codeberg.page/eer/http.xml).
func service(ref eris.Reference) (path, query string) {
	return servicePath, "urn:blake2b:" + ref.String()
}

func flat(ref eris.Reference) (path, query string) { return "/" + ref.String(), "" }

func sharded(ref eris.Reference) (path, query string) {
	name := ref.String()
	return "/" + name[:2] + "/" + name, ""
}

const (
	servicePath = "/uri-res/N2R"
	havePath    = "/.well-known/eris/have" // docs/formats.md
)

// maxRedirects bounds the redirections of one request, maxLocation the bytes of their addresses,
// and maxRefusal those of what a bucket says of a request that it refuses.
const (
	maxRefusal   = 4096
	maxRedirects = 10
	maxLocation  = 8192
)

var (
	errLayout    = errors.New("a layout is for static stores")
	errRedirect  = errors.New("server redirects to something that is no HTTP address")
	errRedirects = errors.New("server redirects too often")
	errRanges    = errors.New("the server does not give parts of a file (RFC 9110, section 14)")
)

// Open returns the store at a URL, whose form is in the package comment. It makes no connection:
// the first request does. Requests to a server that is busy fail with a [fetch.BusyError], so that
// it is not taken for silent; what is put waits for some seconds before. After a connection could
// not be made, requests fail at once for a time that gets longer with each such failure.
//
// The path and the user information of the URL may be secret; neither errors nor [Store.String]
// show them. The Store must be closed.
func Open(url string, options Options) (*Store, error) {
	u, err := storeurl.ParseScheme(url, "http", "https")
	if err != nil {
		return nil, err
	}
	connections, timeout := cmp.Or(options.Connections, 32), cmp.Or(options.Timeout, 20*time.Second)
	s := &Store{url: u, sign: options.Sign, layouts: []layout{service}, header: httpclient.Header()}
	if options.HopLimit > 0 {
		s.header.Set("Max-Forwards", strconv.Itoa(options.HopLimit-1))
	}
	name := u.String()
	for _, kind := range []string{"packed", "static"} {
		if u.Has(kind) {
			name = u.String() + "?" + kind
		}
	}
	switch {
	case u.Has("layout=flat"):
		s.layouts = []layout{flat}
	case u.Has("layout=sharded"):
		s.layouts = []layout{sharded}
	case u.Has("static"):
		s.layouts = []layout{flat, sharded}
	default:
		// Perhaps somebody gave the address of the service itself.
		u.Path = strings.TrimSuffix(u.Path, servicePath)
	}
	if (u.Has("layout=flat") || u.Has("layout=sharded")) && !u.Has("static") {
		return nil, fmt.Errorf("store URL %v: %w", name, errLayout)
	}
	s.base = u.HTTP("")
	bodyTimeout := 3 * timeout
	if u.Has("packed") { // a pack may be long, and the line slow
		bodyTimeout = 30 * timeout
	}
	s.Client = httpclient.New(s.base, httpclient.Options{
		Connections: connections, ConnectTimeout: cmp.Or(options.ConnectTimeout, 5*time.Second),
		Timeout: timeout, BodyTimeout: bodyTimeout, IdleTimeout: idleTimeout,
		Verify: u.Has("verify"), Cleartext: u.Has("h2c"), Getenv: options.Getenv,
	})
	workers := connections
	if u.TLS() || u.Has("h2c") {
		workers = streams
	}
	s.Workers = fetch.NewWorkers(name, workers, s.get)
	if u.Get && !u.Has("static") {
		s.Workers.Have = s.have
	}
	return s, nil
}

// AnySize reports whether a block that is not there in one size is not there in the other either:
// it is, because addresses do not tell the size.
func (s *Store) AnySize() bool { return true }

// get is what the workers call. It makes one request; of static stores with both layouts, up to
// two. Static servers that answer 403 do not have the block: buckets whose contents may not be
// listed answer so.
func (s *Store) get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) (block []byte, err error) {
	if !s.url.Get {
		return nil, eris.ErrNotFound
	}
	first := int(s.hint.Load())
	for i := range s.layouts {
		at := (first + i) % len(s.layouts)
		err = s.do(ctx, outgoing{method: http.MethodGet, url: s.address(ref, at)}, func(r *http.Response) (err error) {
			switch {
			case r.StatusCode == http.StatusOK:
				block, err = httpclient.ReadBlock(r, ref, size, dst)
				return err
			case r.StatusCode == http.StatusNotFound, r.StatusCode == http.StatusGone,
				r.StatusCode == http.StatusForbidden && s.url.Has("static"):
				return eris.ErrNotFound
			}
			return &httpclient.StatusError{Code: r.StatusCode}
		})
		if err == nil {
			s.hint.Store(int32(at))
			return block, nil
		}
		if !errors.Is(err, eris.ErrNotFound) {
			break
		}
	}
	return nil, err
}

func (s *Store) have(ctx context.Context, question, dst []byte) ([]byte, error) {
	n := 0
	err := s.do(ctx, outgoing{http.MethodPost, s.at(havePath, ""), "", bytes.NewReader(question), int64(len(question)), sha256.Sum256(question)}, func(r *http.Response) (err error) {
		if r.StatusCode != http.StatusOK {
			return fmt.Errorf("%w: %w", fetch.ErrCannotSay, &httpclient.StatusError{Code: r.StatusCode})
		}
		// One byte more than there can be says that something else has answered.
		n, err = io.ReadFull(r.Body, dst[:len(question)/fetch.HavePrefix/8+2])
		if err != io.EOF && err != io.ErrUnexpectedEOF {
			return fmt.Errorf("%w: answer is too long", fetch.ErrCannotSay)
		}
		return nil
	})
	return dst[:n], err
}

func (s *Store) address(ref eris.Reference, at int) *url.URL {
	return s.at(s.layouts[at](ref))
}

func (s *Store) at(path, query string) *url.URL {
	u := *s.base
	u.Path, u.RawPath, u.RawQuery = u.Path+path, u.RawPath+path, query
	return &u
}

// Put implements [fetch.Store]: it returns nil once the server has answered that it has the block.
func (s *Store) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	return s.PutBlock(ctx, s.url.Put, ref, block, func() error {
		// A copy, because what the transport writes from may still be in use when it has returned.
		body := bytes.NewReader(bytes.Clone(block))
		return s.do(ctx, outgoing{http.MethodPut, s.address(ref, 0), "", body, int64(len(block)), sha256.Sum256(block)}, s.stored)
	})
}

// refusal returns what a bucket finds wrong with a signed request, or with our clock; nil if it may
// be that there is nothing, of which buckets say, too, that access is denied.
func (s *Store) refusal(r *http.Response) error {
	if s.sign == nil || r.StatusCode != http.StatusForbidden {
		return nil
	}
	text, _ := io.ReadAll(io.LimitReader(r.Body, maxRefusal))
	// Compiled here, because most processes never need it.
	code := regexp.MustCompile(`<Code>([A-Za-z]{1,64})</Code>`).FindSubmatch(text)
	if code == nil || string(code[1]) == "AccessDenied" {
		return nil
	}
	return &httpclient.StatusError{Code: r.StatusCode, Text: string(code[1])}
}

func (s *Store) stored(r *http.Response) error {
	if err := s.refusal(r); err != nil {
		return err
	}
	err := &httpclient.StatusError{Code: r.StatusCode}
	switch r.StatusCode {
	case http.StatusOK, http.StatusCreated, http.StatusNoContent:
		return nil
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed,
		http.StatusNotImplemented:
		return fmt.Errorf("%w: %w", fetch.ErrReadOnly, err)
	}
	return err
}

// Range reads at most n bytes of the object BASE/name from an offset on, or, if from is negative,
// its last -from, by one request. It calls use with the bytes, with where they begin, and with the
// length of the object, none of which is to be trusted. Errors are those of use; ones that wrap
// [eris.ErrNotFound] if there is no such object; and those of requests.
func (s *Store) Range(ctx context.Context, name string, from, n int64, use func(body io.Reader, from, total int64) error) error {
	o := outgoing{method: http.MethodGet, url: s.at("/"+name, ""), bytes: fmt.Sprintf("bytes=%d-%d", from, from+n-1)}
	if from < 0 {
		o.bytes = fmt.Sprintf("bytes=%d", from)
	}
	length := int64(0)
	err := s.do(ctx, o, func(r *http.Response) error {
		switch r.StatusCode {
		case http.StatusOK, http.StatusPartialContent:
			at, total, err := rangeOf(r, from)
			if err != nil {
				length = total
				return err
			}
			return use(io.LimitReader(r.Body, n), at, total)
		case http.StatusNotFound, http.StatusGone, http.StatusForbidden:
			return cmp.Or(s.refusal(r), eris.ErrNotFound)
		}
		return &httpclient.StatusError{Code: r.StatusCode}
	})
	if from < 0 && length+from > 0 && errors.Is(err, errRanges) {
		return s.Range(ctx, name, length+from, n, use)
	}
	return err
}

// rangeOf returns where the bytes of a response begin, and how long the object is. It is an error
// if they do not begin where they should.
func rangeOf(r *http.Response, from int64) (at, total int64, err error) {
	if total = r.ContentLength; r.StatusCode == http.StatusPartialContent {
		var last int64
		if n, _ := fmt.Sscanf(r.Header.Get("Content-Range"), "bytes %d-%d/%d", &at, &last, &total); n != 3 {
			return 0, 0, errRanges
		}
	}
	want := from
	if from < 0 {
		want = max(0, total+from)
	}
	if total < 0 || at < 0 || at > total || at != want {
		return 0, total, errRanges
	}
	return at, total, nil
}

// PutObject stores the first size bytes of a file as the object BASE/name; sum is their SHA-256.
// Errors are as those of Put.
func (s *Store) PutObject(ctx context.Context, name string, content *os.File, size int64, sum [sha256.Size]byte) error {
	o := outgoing{http.MethodPut, s.at("/"+name, ""), "", content, size, sum}
	return s.Retry(ctx, func() error { return s.do(ctx, o, s.stored) })
}

// outgoing is a request to be made.
type outgoing struct {
	method string
	url    *url.URL
	bytes  string      // that are wanted of it, as in the field Range; empty for all
	body   io.ReaderAt // nil if there is none
	size   int64       // of the body
	sum    [sha256.Size]byte
}

// do makes a request, follows redirections, and has the response handled.
func (s *Store) do(ctx context.Context, o outgoing, handle func(r *http.Response) error) error {
	next := o.url
	for range maxRedirects + 1 {
		request, err := s.request(o, next)
		if err != nil {
			return err
		}
		next = nil
		err = s.Do(ctx, request, func(r *http.Response) (err error) {
			if next, err = redirection(request, r); next != nil || err != nil {
				return err
			}
			return handle(r)
		})
		if err != nil || next == nil {
			return err
		}
	}
	return errRedirects
}

// request makes a request. Only the server of the store gets the user name and password, or a
// signature.
func (s *Store) request(o outgoing, u *url.URL) (*http.Request, error) {
	r := &http.Request{Method: o.method, URL: u, Host: u.Host, Header: s.header.Clone(), Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1}
	own := sameServer(u, s.base)
	if own && s.url.User != nil {
		password, _ := s.url.User.Password()
		r.SetBasicAuth(s.url.User.Username(), password)
	}
	if o.bytes != "" {
		r.Header.Set("Range", o.bytes)
	}
	if o.body != nil {
		r.Header.Set("Content-Type", "application/octet-stream")
		r.ContentLength = o.size
		r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(io.NewSectionReader(o.body, 0, o.size)), nil }
	}
	if own && s.sign != nil {
		return r, s.sign(r, o.sum)
	}
	return r, nil
}

func sameServer(a, b *url.URL) bool { return a.Scheme == b.Scheme && a.Host == b.Host }

// redirection returns where a response redirects a request to, or nil. User information in it is
// not used. What is put goes nowhere but to the same server.
func redirection(request *http.Request, r *http.Response) (*url.URL, error) {
	isGet := request.Method == http.MethodGet
	switch r.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther:
		if !isGet {
			return nil, nil
		}
	case http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
	default:
		return nil, nil
	}
	location := r.Header.Get("Location")
	if location == "" || len(location) > maxLocation {
		return nil, errRedirect
	}
	to, err := request.URL.Parse(location)
	if err != nil || to.Hostname() == "" || to.Scheme != "http" && to.Scheme != "https" {
		return nil, errRedirect
	}
	if !isGet && !sameServer(to, request.URL) {
		return nil, nil
	}
	to.User, to.Fragment, to.RawFragment = nil, "", ""
	return to, nil
}
