// SPDX-License-Identifier: GPL-3.0-or-later

// Package storeurl reads the URLs that say where blocks are and where they are served, for
// commands, servers and transports. Start with [Parse]. The forms are described in docs/sources.md.
//
// The path of a store on a network, a user name and a password may be secrets. Neither errors nor
// [URL.String] show them; paths of files and sockets are shown.
package storeurl

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// URL is the parsed URL of a store, or of an endpoint where blocks are served.
type URL struct {
	// Scheme is in lower case, and one that is known; aliases are resolved.
	Scheme string
	// Host is the name or address of the host, without brackets and in lower case. It is the path
	// of the socket for coap+unix, and empty for file and dump.
	Host string
	// Port is the port; that of the scheme if none was given.
	Port uint16
	// User is nil if there is none. Only stores of HTTP and IPFS have it.
	User *url.Userinfo
	// Path is the path of the file or directory, percent-decoded, for file and dump; relative ones
	// are relative to the working directory. For HTTP and IPFS it is the path as it stands in the
	// URL, without slashes at its end.
	Path string
	// Segments is the path of a store of CoAP, percent-decoded; .well-known/eris if none was given.
	Segments []string
	// Endpoint is the address of the server of a bucket, or empty. Host is then the bucket.
	Endpoint string
	// Get and Put say which operations the URL permits us. Both are true if it says nothing about
	// them.
	Get, Put bool

	settings []string
}

// scheme is what the URLs of a scheme may have.
type scheme struct {
	name     string
	port     uint16
	settings []string // elements of the query beside get and put
	listen   bool     // blocks are served by it
}

var schemes = [...]scheme{
	{name: "coap+unix", listen: true},
	{name: "coap+tcp", port: 5683, listen: true}, // RFC 8323, section 8
	{name: "coaps+tcp", port: 5684, listen: true},
	{name: "coap", port: 5683, listen: true}, // RFC 7252, section 6
	{name: "coap+ws", port: 80, listen: true},
	{name: "coaps+ws", port: 443},
	{name: "http", port: 80, settings: []string{"static", "layout=flat", "layout=sharded", "h2c", "packed"}, listen: true},
	{name: "https", port: 443, settings: []string{"static", "layout=flat", "layout=sharded", "verify", "packed"}},
	{name: "file", settings: []string{"layout=flat", "layout=sharded", "packed"}},
	{name: "dump", settings: []string{"capability"}},
	{name: "s3", port: 443, settings: []string{endpoint}},
	{name: "ipfs+http", port: 80, settings: []string{"gateway", "rpc"}},
	{name: "ipfs+https", port: 443, settings: []string{"gateway", "rpc"}},
}

// aliases are schemes that eris-go has for what we have too.
var aliases = map[string]string{"dir+fs": "file", "cbor+file": "dump"}

// dumpSuffix is how the names of files end that are dumps, not directories.
const dumpSuffix = ".cbor"

const (
	maxSize        = 16384 // more than maxFilePath in percent-encoding
	maxFilePath    = 4095  // PATH_MAX of Linux without the zero byte
	maxPathSize    = 1024  // bytes in all segments of a path of CoAP
	maxSegments    = 32
	maxSegmentSize = 255 // RFC 7252, section 5.10
	// maxSocketPath is the longest path that the address of a Unix socket can hold, on Linux.
	maxSocketPath = 107
)

// An Error says that a URL is not as it should be: whoever has written it made a mistake.
type Error struct{ err error }

// Error implements error.
func (e *Error) Error() string { return e.err.Error() }

func wrong(format string, a ...any) error { return &Error{fmt.Errorf(format, a...)} }

// Parse reads the URL of a store. Errors say what was given, unless it may be secret, what is
// wrong, and what would be right; they wrap [Error]. The name of a file that ends in .cbor is taken
// for the URL of the dump.
//
// Of coap+unix there are two forms. In coap+unix:///run/eris.sock the path is that of the socket,
// and the store is the well-known one. In coap+unix://%2Frun%2Feris.sock/store/path the authority
// is the percent-encoded path of the socket.
func Parse(text string) (URL, error) { return parse("store URL", text, false) }

// ParseScheme is [Parse] for URLs that have one of the given schemes, which others are not.
func ParseScheme(text string, schemes ...string) (URL, error) {
	u, err := Parse(text)
	if err == nil && !slices.Contains(schemes, u.Scheme) {
		return URL{}, wrong("store URL %v: its scheme is not %s", u, strings.Join(schemes, " or "))
	}
	return u, err
}

// ParseListen reads the URL of an endpoint where blocks are served: scheme://host:port?get&put or
// coap+unix:///path?get&put. The host may be left out for all addresses of the machine, and the
// port may be 0 for any. Unless the query says get or put, blocks may be got, and put as well on a
// Unix socket. With "relay" in the query, or on a Unix socket, they are got from elsewhere if need
// be, see [URL.Relay].
func ParseListen(text string) (URL, error) {
	u, err := parse("endpoint", text, true)
	if err != nil {
		return URL{}, err
	}
	if u.Path != "" || u.isCoAP() && !slices.Equal(u.Segments, wellKnown()) {
		return URL{}, wrong("endpoint %s: blocks are always served at the same path; leave it out", shown(text))
	}
	return u, nil
}

func parse(what, text string, listen bool) (URL, error) {
	u, err := read(text, listen)
	if err != nil {
		return URL{}, wrong("%s %s: %w", what, shown(text), err)
	}
	return u, nil
}

func read(text string, listen bool) (URL, error) {
	if len(text) > maxSize {
		return URL{}, errors.New("too long")
	}
	if strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return URL{}, errors.New("has a control character")
	}
	s, rest, err := cutScheme(text, listen)
	if err != nil {
		return URL{}, err
	}
	if strings.Contains(rest, "#") {
		return URL{}, errors.New("has a number sign, which is written %23 in a name")
	}
	u := URL{Scheme: s.name, Port: s.port}
	rest, query, _ := strings.Cut(rest, "?")
	if err := u.setQuery(query, s, listen); err != nil {
		return URL{}, err
	}
	if u.isLocal() {
		return u, u.setFile(rest)
	}
	return u, u.setNetwork(rest, listen)
}

func cutScheme(text string, listen bool) (scheme, string, error) {
	name, rest, ok := strings.Cut(text, ":")
	if !ok && strings.HasSuffix(text, dumpSuffix) {
		name, rest, ok = "dump", (&url.URL{Path: text}).EscapedPath(), true
	}
	name = strings.ToLower(name)
	name = cmp.Or(aliases[name], name)
	path, _, _ := strings.Cut(rest, "?")
	if path, _ := url.PathUnescape(path); name == "file" && strings.HasSuffix(path, dumpSuffix) {
		name = "dump"
	}
	var names []string
	for _, s := range schemes {
		if listen && !s.listen {
			continue
		}
		if s.name == name && ok {
			return s, rest, nil
		}
		names = append(names, s.name)
	}
	list := "schemes are " + strings.Join(names, ", ")
	port, _, _ := strings.Cut(rest, "/")
	_, notPort := strconv.ParseUint(port, 10, 16)
	switch {
	case ok && notPort == nil && (!strings.Contains(name, "+") || name == ""):
		return scheme{}, "", fmt.Errorf("it begins with no scheme; write coap+tcp://%[1]s:%[2]s or http://%[1]s:%[2]s", name, port)
	case ok:
		return scheme{}, "", fmt.Errorf("the scheme is not understood; %s", list)
	case strings.HasSuffix(text, ".sock"):
		return scheme{}, "", fmt.Errorf("it begins with no scheme; write coap+unix:///%s with the whole path of the socket", strings.TrimLeft(text, "/"))
	case text == "" || listen:
		return scheme{}, "", fmt.Errorf("it begins with no scheme; %s", list)
	}
	return scheme{}, "", fmt.Errorf("it begins with no scheme; for a directory with blocks write file:%s; other %s", (&url.URL{Path: text}).EscapedPath(), list)
}

// relay is what the query of an endpoint has whose clients may cause requests of others.
const relay = "relay"

// Relay reports whether what the clients of an endpoint get may be got from elsewhere for them.
func (u *URL) Relay() bool { return u.Get && (u.Scheme == "coap+unix" || u.Has(relay)) }

// endpoint is how an element of the query begins that says which server has a bucket.
const endpoint = "endpoint="

func (u *URL) setQuery(query string, s scheme, listen bool) error {
	settings := s.settings
	if listen {
		settings = []string{relay}
	}
	for element := range strings.SplitSeq(query, "&") {
		switch {
		case element == "":
		case element == "get":
			u.Get = true
		case element == "put":
			u.Put = true
		case strings.HasPrefix(element, endpoint) && slices.Contains(settings, endpoint):
			var err error
			if u.Endpoint, err = decode(element[len(endpoint):]); err != nil {
				return err
			}
		case slices.Contains(settings, element):
			u.settings = append(u.settings, element)
		default:
			name, _, _ := strings.Cut(element, "=") // a value may be secret
			return fmt.Errorf("%.20q in the query is not understood; there may be %s", name, strings.Join(append([]string{"get", "put"}, settings...), ", "))
		}
	}
	if !u.Get && !u.Put {
		u.Get, u.Put = true, !listen || u.Scheme == "coap+unix"
	}
	return nil
}

// setFile takes the path of a file: ///path, /path, //localhost/path (RFC 8089), or a relative
// path.
func (u *URL) setFile(text string) error {
	path := text
	if authority, ok := strings.CutPrefix(text, "//"); ok {
		host, after, ok := strings.Cut(authority, "/")
		if host != "" && !strings.EqualFold(host, "localhost") {
			return fmt.Errorf("it names the host %.40q; a path has three slashes before it, or none: %s:///%s or %s:%s", host, u.Scheme, authority, u.Scheme, authority)
		}
		path = ""
		if ok {
			path = "/" + after
		}
	}
	var err error
	if u.Path, err = url.PathUnescape(path); err != nil {
		return errors.New("wrong percent-encoding; a percent sign in a name is written %25")
	}
	switch {
	case u.Path == "":
		return fmt.Errorf("it has no path; write %s:PATH", u.Scheme)
	case len(u.Path) > maxFilePath:
		return errors.New("too long")
	case strings.ContainsRune(u.Path, 0):
		return errors.New("has a control character")
	case u.Path == "~" || strings.HasPrefix(u.Path, "~/"):
		return fmt.Errorf("the shell does not replace ~ in it; write %s:$HOME%s", u.Scheme, path[1:])
	}
	return nil
}

func (u *URL) setNetwork(text string, listen bool) error {
	if strings.ContainsFunc(text, func(r rune) bool { return r == ' ' || r >= 0x80 }) {
		return errors.New("a space or a character that is not ASCII has to be percent-encoded")
	}
	rest, ok := strings.CutPrefix(text, "//")
	if !ok {
		if u.Scheme == "coap+unix" {
			return fmt.Errorf("write coap+unix:///%s with the whole path of the socket", strings.TrimLeft(text, "/"))
		}
		return fmt.Errorf("it is not of the form %s://host:port/path", u.Scheme)
	}
	authority, path := rest, ""
	if slash := strings.IndexByte(rest, '/'); slash >= 0 {
		authority, path = rest[:slash], rest[slash:]
	}
	if u.Scheme == "coap+unix" {
		return u.setSocket(authority, path)
	}
	if at := strings.LastIndexByte(authority, '@'); at >= 0 {
		if u.isCoAP() || listen || u.Scheme == "s3" {
			return errors.New("user names are not used")
		}
		if err := u.setUser(authority[:at]); err != nil {
			return err
		}
		authority = authority[at+1:]
	}
	if err := u.setAuthority(authority, listen); err != nil {
		return err
	}
	var err error
	if u.isCoAP() {
		u.Segments, err = ParsePath(path)
	} else {
		u.Path = strings.TrimRight(path, "/")
		_, err = decode(u.Path)
	}
	return err
}

func (u *URL) setSocket(authority, path string) error {
	socket := authority
	if authority == "" {
		socket, path = path, ""
	}
	socket, err := decode(socket)
	if err != nil {
		return err
	}
	if len(socket) < 2 || len(socket) > maxSocketPath || socket[0] != '/' || strings.ContainsRune(socket, 0) {
		return fmt.Errorf("the path of the socket must be absolute, with three slashes before it, and have at most %d bytes: coap+unix:///run/eris.sock", maxSocketPath)
	}
	u.Host = socket
	u.Segments, err = ParsePath(path)
	return err
}

func (u *URL) setUser(text string) error {
	name, password, has := strings.Cut(text, ":")
	name, err := decode(name)
	if err != nil {
		return err
	}
	if password, err = decode(password); err != nil {
		return err
	}
	if u.User = url.User(name); has {
		u.User = url.UserPassword(name, password)
	}
	return nil
}

func (u *URL) setAuthority(authority string, listen bool) error {
	host, port, hasPort := authority, "", false
	if inner, ok := strings.CutPrefix(authority, "["); ok {
		address, after, ok := strings.Cut(inner, "]")
		// A zone is separated by %25, which is a percent sign (RFC 6874); people write that one too.
		ip, err := netip.ParseAddr(strings.Replace(address, "%25", "%", 1))
		if !ok || err != nil || !ip.Is6() || !isName(ip.Zone()) || after != "" && after[0] != ':' {
			return errors.New("the address of the host is not one of IPv6 in brackets, with :port behind it")
		}
		host, port, hasPort = ip.String(), strings.TrimPrefix(after, ":"), after != ""
	} else {
		host, port, hasPort = strings.Cut(authority, ":")
		var err error
		if host, err = decode(host); err != nil {
			return err
		}
		host = strings.ToLower(host)
		if !isName(host) || len(host) > 253 || host == "" && !listen {
			return fmt.Errorf("the host is not a name or an address; the form is %s://host:port/path", u.Scheme)
		}
	}
	u.Host = host
	if !hasPort {
		return nil
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 && !listen {
		return errors.New("the port is not a number from 1 to 65535")
	}
	u.Port = uint16(n)
	return nil
}

// isName reports whether the text has no characters but those of names and addresses of hosts.
func isName(text string) bool {
	return !strings.ContainsFunc(text, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '.' && r != '_'
	})
}

// wellKnown is where the store of a whole endpoint is (https://eris.codeberg.page/eer/coap.xml).
func wellKnown() []string { return []string{".well-known", "eris"} }

// ParsePath reads the path of a store of CoAP as it stands in a URL, with or without a slash before
// it, into its segments. An empty path stands for .well-known/eris. Errors do not show the path.
func ParsePath(path string) ([]string, error) {
	path = strings.TrimSuffix(strings.TrimPrefix(path, "/"), "/")
	if path == "" {
		return wellKnown(), nil
	}
	if len(path) > 3*maxPathSize || strings.Count(path, "/") >= maxSegments {
		return nil, errors.New("the path of the store is too long")
	}
	var segments []string
	total := 0
	for segment := range strings.SplitSeq(path, "/") {
		segment, err := decode(segment)
		if err != nil {
			return nil, err
		}
		total += len(segment)
		if len(segment) > maxSegmentSize || total > maxPathSize || segment == "." || segment == ".." {
			return nil, errors.New("the path of the store is too long, or leads upwards by a segment of dots")
		}
		segments = append(segments, segment)
	}
	return segments, nil
}

// decode undoes percent-encoding. Its error does not quote the text.
func decode(text string) (string, error) {
	decoded, err := url.PathUnescape(text)
	if err != nil {
		return "", errors.New("wrong percent-encoding; a percent sign is written %25")
	}
	return decoded, nil
}

// shown returns what of the text of a URL may be shown, quoted.
func shown(text string) string {
	name, rest, ok := strings.Cut(text, ":")
	name = strings.ToLower(name)
	name = cmp.Or(aliases[name], name)
	authority, ok2 := strings.CutPrefix(rest, "//")
	host, _, _ := strings.Cut(authority, "/")
	host, _, _ = strings.Cut(host, "?")
	host = host[strings.LastIndexByte(host, '@')+1:]
	var u URL
	switch {
	case !ok, name == "file", name == "dump", name == "coap+unix" && (!ok2 || host == ""):
		return fmt.Sprintf("%.100q", text)
	case ok2 && u.setAuthority(host, true) == nil:
		return fmt.Sprintf("%.100q", name+"://"+host)
	}
	return fmt.Sprintf("%.40q", name+":…")
}

func (u *URL) isLocal() bool { return u.Scheme == "file" || u.Scheme == "dump" }

func (u *URL) isCoAP() bool { return strings.HasPrefix(u.Scheme, "coap") }

// Has reports whether the query has an element other than get and put, for example "layout=flat".
func (u URL) Has(setting string) bool { return slices.Contains(u.settings, setting) }

// Address returns the network and address to dial or to listen on: "unix" and the path of the
// socket, or "tcp" or "udp" and host:port. File and dump have none.
func (u URL) Address() (network, address string) {
	switch u.Scheme {
	case "file", "dump":
		return "", ""
	case "coap+unix":
		return "unix", u.Host
	case "coap":
		network = "udp"
	default:
		network = "tcp"
	}
	return network, net.JoinHostPort(u.Host, strconv.Itoa(int(u.Port)))
}

// TLS reports whether the connection is secured by TLS.
func (u URL) TLS() bool {
	return strings.HasPrefix(u.Scheme, "coaps") || strings.HasSuffix(u.Scheme, "https")
}

// authority returns the host, and the port unless it is that of the scheme.
func (u URL) authority() string {
	host := u.Host
	if strings.Contains(host, ":") {
		host = "[" + strings.ReplaceAll(host, "%", "%25") + "]"
	}
	for _, s := range schemes {
		if s.name == u.Scheme && s.port != u.Port {
			host += ":" + strconv.Itoa(int(u.Port))
		}
	}
	return host
}

// HTTP returns the address of HTTP that a URL of http, https, ipfs+http or ipfs+https leads to,
// without user name and query, with more behind its path, which must not need percent-encoding.
func (u URL) HTTP(more string) *url.URL {
	path, _ := decode(u.Path) // which Parse has tried
	return &url.URL{
		Scheme: strings.TrimPrefix(u.Scheme, "ipfs+"), Host: strings.ReplaceAll(u.authority(), "%25", "%"),
		Path: path + more, RawPath: u.Path + more,
	}
}

// String returns the URL without what may be secret, and without its query. [Parse] reads it.
func (u URL) String() string {
	switch {
	case u.isLocal() && !strings.HasPrefix(u.Path, "/"):
		return u.Scheme + ":" + (&url.URL{Path: u.Path}).EscapedPath()
	case u.isLocal():
		return u.Scheme + "://" + (&url.URL{Path: u.Path}).EscapedPath()
	case u.Scheme == "coap+unix":
		return u.Scheme + "://" + (&url.URL{Path: u.Host}).EscapedPath()
	}
	return u.Scheme + "://" + u.authority()
}
