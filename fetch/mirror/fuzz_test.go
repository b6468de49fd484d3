// SPDX-License-Identifier: GPL-3.0-or-later

package mirror

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// FuzzContentRange checks that what is taken for a range is one.
func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-9/10", "bytes 5-9/*", "Bytes 1-2/3", "bytes */10", "bytes 9-0/10", "bytes 0-10/10", "bytes 1-99999999999999999999/*", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		first, last, total, ok := contentRange(s)
		if !ok {
			return
		}
		if first < 0 || first > last || total >= 0 && last >= total {
			t.Errorf("%q: %d-%d/%d", s, first, last, total)
		}
		of := "*"
		if total >= 0 {
			of = fmt.Sprint(total)
		}
		if f, l, n, ok := contentRange(fmt.Sprintf("bytes %d-%d/%s", first, last, of)); !ok || f != first || l != last || n != total {
			t.Errorf("%q does not come back", s)
		}
	})
}

// FuzzValidator checks that nothing that a server sends breaks a request.
func FuzzValidator(f *testing.F) {
	f.Add(`"a"`, "", "")
	f.Add(`W/"a"`, "Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:38 GMT")
	f.Add("\"\r\nX: y\"", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:39 1994")
	f.Fuzz(func(t *testing.T, tag, modified, date string) {
		for _, h := range []http.Header{
			{"Etag": {tag}},
			{"Last-Modified": {modified}, "Date": {date}},
		} {
			v := validator(h)
			if strings.ContainsAny(v, "\r\n\x00") || len(v) > maxValidator {
				t.Errorf("validator %q", v)
			}
		}
	})
}

// FuzzLocation checks that every URL that is accepted makes a request of one line, and that
// messages have no user information.
func FuzzLocation(f *testing.F) {
	for _, s := range []string{
		"http://user:password@example.org:80/a%2Bb?c d#e", "https://[::1%25lo]/", "file:///a b?c", "file:////a b?c", "file:%zz", "file:///%zz#x", "file://localhost/x", "ftp://a@b/",
		"http://a@b@c/", "//x/y", "http:/x", "http://\xc3\xa4/\xff", "../x", "?q", "http://x:y@z\\@w/",
	} {
		f.Add(s, s)
	}
	f.Add("http://example.org/", "/x#y")
	f.Fuzz(func(t *testing.T, raw, to string) {
		l, err := parse(raw)
		if err != nil {
			return
		}
		check := func(l *location) {
			for _, s := range []string{l.hostField(), l.target} {
				if l.scheme != "file" && strings.ContainsAny(s, " \r\n\x00") {
					t.Errorf("%q: %q stands in a request", raw, s)
				}
			}
			if l.scheme != "file" && !strings.HasPrefix(l.target, "/") {
				t.Errorf("%q: target %q", raw, l.target)
			}
			if again, err := parse(l.String()); err != nil || again.hostField() != l.hostField() || again.target != l.target || again.user != nil {
				t.Errorf("%q: %q is not the same, error %v", raw, l, err)
			}
		}
		check(l)
		if l.scheme == "file" {
			return
		}
		if r, err := l.redirected(to); err == nil {
			check(r)
			if r.user != nil && r.server() != l.server() && !strings.Contains(to, "@") {
				t.Errorf("%q to %q: user information goes along", raw, to)
			}
		}
	})
}

func TestMaxAge(t *testing.T) {
	for field, want := range map[string]time.Duration{
		"max-age=60":                         time.Minute,
		"public, max-age=60":                 time.Minute,
		`MAX-AGE="60"`:                       time.Minute,
		"max-age=0":                          0,
		"max-age=2147483648":                 1 << 31 * time.Second,
		"max-age=99999999999999999999999999": 1 << 31 * time.Second,
		"max-age=-1":                         -1,
		"max-age=+1":                         -1,
		"max-age=1e3":                        -1,
		"max-age=":                           -1,
		"max-age":                            -1,
		"max-age=x, max-age=5":               5 * time.Second,
		"s-maxage=5":                         -1,
		"":                                   -1,
	} {
		if got := maxAge(http.Header{"Cache-Control": {field}}); got != want {
			t.Errorf("%q: %v, want %v", field, got, want)
		}
	}
}
