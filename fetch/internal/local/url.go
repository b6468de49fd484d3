// SPDX-License-Identifier: GPL-3.0-or-later

package local

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
)

// URL is the parsed URL of a store that is a local file or directory.
type URL struct {
	// Scheme is the scheme in lower case.
	Scheme string
	// Path is the path of the file or directory, percent-decoded; relative ones are relative to the working directory.
	Path string
	// Get and Put tell which operations the URL permits us. Both are true if it says nothing about them.
	Get, Put bool
	// Settings are the other elements of the query, as they stand.
	Settings []string
}

const maxURLSize = 8192

var (
	errSize     = errors.New("too long")
	errForm     = errors.New("not of the form scheme:path")
	errText     = errors.New("has a control character")
	errEscape   = errors.New("wrong percent-encoding; a percent sign in a name is written %25")
	errHost     = errors.New("names another host; a local path has three slashes, or none, before it")
	errFragment = errors.New("fragments are not used; a number sign in a name is written %23")
	errPath     = errors.New("no path")
)

// ParseURL reads a URL with the given scheme: scheme:///path, scheme:/path, scheme://localhost/path (RFC 8089) or, for a path
// that is relative to the working directory, scheme:path. The elements "get" and "put" of the query restrict what may be
// done.
func ParseURL(text, scheme string) (URL, error) {
	u, err := parseURL(text, scheme)
	if err != nil {
		return URL{}, fmt.Errorf("store URL %.100q: %w", text, err)
	}
	return u, nil
}

func parseURL(text, scheme string) (URL, error) {
	if len(text) > maxURLSize {
		return URL{}, errSize
	}
	for i := range len(text) {
		if text[i] < ' ' || text[i] == 0x7f {
			return URL{}, errText
		}
	}
	start, rest, ok := strings.Cut(text, ":")
	if !ok || !strings.EqualFold(start, scheme) {
		return URL{}, errForm
	}
	if strings.Contains(rest, "#") {
		return URL{}, errFragment
	}
	u := URL{Scheme: scheme}
	path, query, _ := strings.Cut(rest, "?")
	u.setQuery(query)
	if authority, ok := strings.CutPrefix(path, "//"); ok {
		host, after, _ := strings.Cut(authority, "/")
		if host != "" && !strings.EqualFold(host, "localhost") {
			return URL{}, errHost
		}
		path = "/" + after
		if authority == host {
			path = ""
		}
	}
	var err error
	if u.Path, err = url.PathUnescape(path); err != nil {
		return URL{}, errEscape
	}
	if u.Path == "" {
		return URL{}, errPath
	}
	if strings.ContainsRune(u.Path, 0) {
		return URL{}, errText
	}
	return u, nil
}

func (u *URL) setQuery(query string) {
	for element := range strings.SplitSeq(query, "&") {
		switch element {
		case "get":
			u.Get = true
		case "put":
			u.Put = true
		case "":
		default:
			u.Settings = append(u.Settings, element)
		}
	}
	if !u.Get && !u.Put {
		u.Get, u.Put = true, true
	}
}

// String returns the URL without its query. [ParseURL] reads it.
func (u URL) String() string {
	escaped := (&url.URL{Path: u.Path}).EscapedPath()
	if strings.HasPrefix(u.Path, "/") {
		return u.Scheme + "://" + escaped
	}
	return u.Scheme + ":" + escaped
}
