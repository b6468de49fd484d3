// SPDX-License-Identifier: GPL-3.0-or-later

package web

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/httpclient"
)

var errRanges = errors.New("the server does not give parts of a file (RFC 9110, section 14)")

// Range reads at most n bytes of the object BASE/name from an offset on, or, if from is negative,
// its last -from, by one request. It calls use with the bytes, with where they begin, and with the
// length of the object, none of which is to be trusted. Errors are those of use; ones that wrap
// [eris.ErrNotFound] if there is no such object; and those of requests.
func (s *Store) Range(ctx context.Context, name string, from, n int64, use func(body io.Reader, from, total int64) error) error {
	if !s.url.Get {
		return eris.ErrNotFound
	}
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
			return eris.ErrNotFound
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
	if !s.url.Put {
		return fetch.ErrReadOnly
	}
	return s.do(ctx, outgoing{http.MethodPut, s.at("/"+name, ""), "", content, size, sum}, stored)
}
