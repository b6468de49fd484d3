// SPDX-License-Identifier: GPL-3.0-or-later

package web

import (
	"errors"
	"fmt"
	"net/url"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// storeURL is the parsed URL of a store. See the package comment for its form.
type storeURL struct {
	base      url.URL       // scheme, host and path, which does not end in a slash
	user      *url.Userinfo // nil if there is none
	static    bool
	layouts   []layout // of static stores: those that are asked, the first is that of new blocks
	get, put  bool
	cleartext bool // HTTP/2 without TLS
	verify    bool // the certificate
}

// layout is how objects of a static store are named.
type layout int

const (
	flat    layout = iota // REFERENCE
	sharded               // RE/REFERENCE
)

const maxURLSize = 8192

var (
	errURLSize     = errors.New("too long")
	errURLText     = errors.New("has a space or a control character")
	errURLForm     = errors.New("not of the form http://host/path or https://host/path")
	errURLFragment = errors.New("fragments are not used")
	errURLLayout   = errors.New("elements of the query do not go together: layout is for static stores, h2c for http and verify for https")
)

// parseURL reads the URL of a store. Errors do not quote what may be secret.
func parseURL(text string) (storeURL, error) {
	u, err := splitURL(text)
	if err != nil {
		return storeURL{}, fmt.Errorf("store URL: %w", err)
	}
	return u, nil
}

func splitURL(text string) (storeURL, error) {
	if len(text) > maxURLSize {
		return storeURL{}, errURLSize
	}
	for i := range len(text) {
		if text[i] <= ' ' || text[i] == 0x7f {
			return storeURL{}, errURLText
		}
	}
	if strings.Contains(text, "#") {
		return storeURL{}, errURLFragment
	}
	parsed, err := url.Parse(text)
	if err != nil || parsed.Opaque != "" || parsed.Hostname() == "" || parsed.Scheme != "http" && parsed.Scheme != "https" {
		return storeURL{}, errURLForm
	}
	s := storeURL{base: url.URL{Scheme: parsed.Scheme, Host: strings.ToLower(parsed.Host)}, user: parsed.User}
	layouts := []layout{flat, sharded}
	explicit := false
	for element := range strings.SplitSeq(parsed.RawQuery, "&") {
		switch element {
		case "":
		case "get":
			s.get = true
		case "put":
			s.put = true
		case "static":
			s.static = true
		case "layout=flat":
			layouts, explicit = []layout{flat}, true
		case "layout=sharded":
			layouts, explicit = []layout{sharded}, true
		case "h2c":
			s.cleartext = true
		case "verify":
			s.verify = true
		default:
			return storeURL{}, fmt.Errorf("element %.20q of the query is not understood", element)
		}
	}
	if explicit && !s.static || s.cleartext && parsed.Scheme != "http" || s.verify && parsed.Scheme != "https" {
		return storeURL{}, errURLLayout
	}
	if !s.get && !s.put {
		s.get, s.put = true, true
	}
	path := strings.TrimRight(parsed.EscapedPath(), "/")
	if s.static {
		s.layouts = layouts
	} else {
		// Perhaps somebody gave the address of the service itself.
		path = strings.TrimSuffix(path, servicePath) + servicePath
	}
	s.base.RawPath = path
	if s.base.Path, err = url.PathUnescape(path); err != nil {
		return storeURL{}, errURLForm
	}
	return s, nil
}

// servicePath is where a store answers to references (RFC 2169, section 2.2;
// https://eris.codeberg.page/eer/http.xml).
const servicePath = "/uri-res/N2R"

// at returns the address of a block.
func (s *storeURL) at(ref eris.Reference, l layout) *url.URL {
	u := s.base
	switch name := ref.String(); {
	case !s.static:
		u.RawQuery = "urn:blake2b:" + name
		return &u
	case l == sharded:
		u.Path += "/" + name[:2] + "/" + name
		u.RawPath += "/" + name[:2] + "/" + name
	default:
		u.Path += "/" + name
		u.RawPath += "/" + name
	}
	return &u
}

// String returns what of the URL is not secret: scheme, host and kind.
func (s *storeURL) String() string {
	text := s.base.Scheme + "://" + s.base.Host
	if s.static {
		text += "?static"
	}
	return text
}
