// SPDX-License-Identifier: GPL-3.0-or-later

package web

import (
	"net/http"
	"net/url"
	"testing"
)

// FuzzRange reads where the bytes of any response begin. They begin where it was asked for, within
// the object.
func FuzzRange(f *testing.F) {
	f.Add("bytes 5-9/10", int64(5), int64(5), true)
	f.Add("bytes 7-9/10", int64(3), int64(-3), true)
	f.Add("bytes 0-9/*", int64(10), int64(0), true)
	f.Add("bytes -5-9223372036854775807/9223372036854775807", int64(-1), int64(-9223372036854775808), true)
	f.Add("", int64(10), int64(-10), false)
	f.Fuzz(func(t *testing.T, field string, length, from int64, partial bool) {
		r := &http.Response{StatusCode: http.StatusOK, ContentLength: length, Header: http.Header{"Content-Range": {field}}}
		if partial {
			r.StatusCode = http.StatusPartialContent
		}
		at, total, err := rangeOf(r, from)
		if err == nil && (at < 0 || at > total || from >= 0 && at != from || from < 0 && at != max(0, total+from)) {
			t.Errorf("%d of %d for %d", at, total, from)
		}
	})
}

// FuzzRedirection follows any redirection of a request. It leads to servers of HTTP only, and takes
// no password along.
func FuzzRedirection(f *testing.F) {
	base, _ := url.Parse("https://user:password@example.org/base/REFERENCE")
	for _, location := range []string{"/x", "//other.example/y#z", "http://a:b@[::1]:80/?q", "file:///etc/passwd", "http:", "../../..", "?x", "\x00"} {
		f.Add(location, http.StatusFound, http.MethodGet)
		f.Add(location, http.StatusTemporaryRedirect, http.MethodPut)
	}
	f.Fuzz(func(t *testing.T, location string, status int, method string) {
		r := &http.Response{StatusCode: status, Header: http.Header{"Location": {location}}}
		to, err := redirection(&http.Request{Method: method, URL: base}, r)
		if to == nil {
			return
		}
		if err != nil || to.User != nil || to.Hostname() == "" || to.Scheme != "http" && to.Scheme != "https" ||
			method != http.MethodGet && !sameServer(to, base) {
			t.Errorf("to %v: %v", to, err)
		}
	})
}
