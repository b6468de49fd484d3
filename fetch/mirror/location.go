// SPDX-License-Identifier: GPL-3.0-or-later

package mirror

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
)

// A location is a URL that can be fetched, together with how it was written: servers see percent
// signs as they were found, for %2B and + are not the same to all of them.
type location struct {
	scheme string // http, https or file
	host   string // name or address, without brackets, in lower case
	port   string // empty for http and https if it is the usual one
	user   *url.Userinfo
	// target is what follows the host, without a fragment: for file the name of a file, for http
	// and https a path, which begins with a slash, and a query.
	target string
}

// parse parses a server's URL or that of a nar. Its errors show no user information.
func parse(raw string) (*location, error) {
	whole := raw
	raw, _, _ = strings.Cut(raw, "#")
	l, err := parseURL(raw)
	switch {
	case err != nil && strings.Contains(whole, "@") && WithoutUser(whole) == whole:
		// What comes before a slash in a password is taken for a host and a port.
		return nil, errors.New("invalid URL; in a password a slash is written %2F, ? is %3F and # is %23")
	case err == ErrUnsupportedScheme:
		return nil, fmt.Errorf("%w in %.300q; it must be http://, https:// or file:///", err, WithoutUser(raw))
	case err != nil:
		return nil, fmt.Errorf("invalid URL %.300q: %w", WithoutUser(raw), err)
	}
	return l, nil
}

// parseURL is parse of a URL that has no fragment, with errors that do not name it.
func parseURL(raw string) (*location, error) {
	if scheme, name, _ := strings.Cut(raw, ":"); strings.EqualFold(scheme, "file") {
		// What looks like a host is part of the name, and so is a query (Guix,
		// guix/substitutes.scm, takes names as they stand too).
		if after, ok := strings.CutPrefix(name, "//"); ok {
			name = strings.TrimPrefix(after, "localhost")
		}
		if !strings.HasPrefix(name, "/") {
			return nil, errors.New("no absolute file name")
		}
		return &location{scheme: "file", target: name}, nil
	}
	if !strings.Contains(raw, "://") {
		return nil, ErrUnsupportedScheme // of a host and a port, for example
	}
	u, err := url.Parse(raw)
	if err != nil {
		return nil, plainError(err)
	}
	l := &location{scheme: strings.ToLower(u.Scheme), user: u.User}
	switch l.scheme {
	case "http", "https":
		l.host, l.port = strings.ToLower(u.Hostname()), u.Port()
		if l.host == "" {
			return nil, errors.New("no host")
		}
		if l.port == usualPorts[l.scheme] {
			l.port = ""
		}
		_, target, _ := strings.Cut(raw, "//")
		if i := strings.IndexAny(target, "/?"); i >= 0 {
			target = target[i:]
		} else {
			target = ""
		}
		if !strings.HasPrefix(target, "/") {
			target = "/" + target
		}
		l.target = visible(target)
	default:
		return nil, ErrUnsupportedScheme
	}
	return l, nil
}

// visible encodes the bytes that cannot stand in the first line of a request.
func visible(target string) string {
	var b strings.Builder
	for i := range len(target) {
		if c := target[i]; c <= ' ' || c >= 0x7f {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// redirected resolves the field Location of an answer (RFC 9110, section 10.2.2). User information
// stays with its server. An error says where it leads.
func (l *location) redirected(value string) (to *location, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("redirected to %.300q: %w", WithoutUser(value), err)
		}
	}()
	ref, err := url.Parse(value)
	if err != nil {
		return nil, plainError(err)
	}
	raw := value
	if !ref.IsAbs() {
		base, err := url.Parse(l.String())
		if err != nil {
			return nil, plainError(err)
		}
		raw = base.ResolveReference(ref).String()
	}
	raw, _, _ = strings.Cut(raw, "#")
	to, err = parseURL(raw)
	switch {
	case err != nil:
		return nil, err
	case to.scheme == "file":
		return nil, ErrUnsupportedScheme
	case to.scheme == l.scheme && to.hostField() == l.hostField():
		to.host = l.host // with its zone
		if to.user == nil {
			to.user = l.user
		}
	}
	return to, nil
}

// String is the URL without user information, for people and for requests.
func (l *location) String() string {
	if l.scheme == "file" {
		// As Guix shows it, unless what follows would be taken for a host.
		if strings.HasPrefix(l.target, "//") {
			return "file://" + l.target
		}
		return "file:" + l.target
	}
	return l.scheme + "://" + l.hostField() + l.target
}

// server identifies a server: connections to one are not used for another.
func (l *location) server() string { return l.scheme + "://" + l.address() }

// shown is the server for people.
func (l *location) shown() string { return strings.TrimSuffix(l.server(), ":"+usualPorts[l.scheme]) }

// address is the host and port to connect to.
func (l *location) address() string {
	return net.JoinHostPort(l.host, cmp.Or(l.port, usualPorts[l.scheme]))
}

var usualPorts = map[string]string{"http": "80", "https": "443"}

// hostField is the value of the field Host (RFC 9110, section 7.2). The zone of an address is
// nobody's business but ours (RFC 6874, section 4).
func (l *location) hostField() string {
	host, _, _ := strings.Cut(l.host, "%")
	if l.port != "" {
		return net.JoinHostPort(host, l.port)
	}
	if strings.Contains(host, ":") {
		return "[" + host + "]"
	}
	return host
}

// plainError is why a URL cannot be parsed, without the URL.
func plainError(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	return shortened(err)
}

// maxMessage bounds what a message shows of what a server has sent, in bytes.
const maxMessage = 200

// A shortError is an error whose message is not all that it could be.
type shortError struct {
	message string
	err     error
}

func (e *shortError) Error() string { return e.message }
func (e *shortError) Unwrap() error { return e.err }

// shortened bounds an error's message, which may quote what a server has sent, and makes it one
// line of ASCII. The end of a connection it tells in English, and of whose it is nothing.
func shortened(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op != "dial" && op.Err != nil {
		err = op.Err
		if call, ok := errors.AsType[*os.SyscallError](err); ok {
			err = call.Err
		}
	}
	whole := err.Error()
	if before, ok := strings.CutSuffix(whole, "EOF"); ok {
		err = &shortError{strings.TrimSuffix(before, "unexpected ") + "connection was closed too early", err}
		whole = err.Error()
	}
	message := strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f {
			return '?'
		}
		return r
	}, whole[:min(len(whole), maxMessage)])
	if message == whole {
		return err
	}
	return &shortError{message + "...", err}
}

// WithoutUser returns a URL without its user information, which may be a password, for messages.
// What is no URL it returns without what looks like that.
func WithoutUser(rawURL string) string {
	scheme, rest := "", rawURL // of what begins with a host
	if i := strings.Index(rawURL, "//"); i >= 0 {
		scheme, rest = rawURL[:i+2], rawURL[i+2:]
	}
	end := strings.IndexAny(rest+"/", "/?#")
	return scheme + rest[strings.LastIndexByte(rest[:end], '@')+1:]
}
