// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// StoreURL is the parsed URL of an ERIS store that is reached by CoAP.
type StoreURL struct {
	// Scheme is one of coap, coaps, coap+tcp, coaps+tcp, coap+ws, coaps+ws and coap+unix.
	Scheme string
	// Host is the name or address of the host, with the zone of an address if it has one, without brackets; or the path of
	// the socket.
	Host string
	// Port is the port, that of the scheme if none was given; 0 for coap+unix.
	Port uint16
	// Path is the path of the store, segment by segment, without "blocks".
	Path []string
	// Get and Put tell which operations the URL permits us. Both are true if it says nothing about them.
	Get, Put bool
}

// wellKnownPath is where the store of a whole endpoint is (https://eris.codeberg.page/eer/coap.xml).
var wellKnownPath = [...]string{".well-known", "eris"}

const (
	maxURLSize     = 4096
	maxPathSize    = 1024 // bytes in all segments
	maxSegments    = 32
	maxSegmentSize = 255 // RFC 7252, section 5.10
	// maxSocketPath is the longest path that the address of a Unix socket can hold, on Linux.
	maxSocketPath = 107
)

var (
	errURLSize     = errors.New("too long")
	errURLForm     = errors.New("not of the form scheme://authority/path?query")
	errURLText     = errors.New("has a space, a control character or a character that is not ASCII")
	errURLUser     = errors.New("user names are not used")
	errURLFragment = errors.New("fragments are not used")
	errURLEscape   = errors.New("wrong percent-encoding")
	errURLHost     = errors.New("wrong host")
	errURLPort     = errors.New("wrong port")
	errURLPath     = errors.New("path is too long or leads upwards by a segment of dots")
	errURLQuery    = errors.New("query may have the elements get and put only")
	errURLSocket   = errors.New("path of the socket must be absolute and have at most 107 bytes")
)

// defaultPort returns the port of a scheme (RFC 7252, section 6; RFC 8323, section 8; 80 and 443 for WebSockets).
func defaultPort(scheme string) (port uint16, ok bool) {
	switch scheme {
	case "coap", "coap+tcp":
		return 5683, true
	case "coaps", "coaps+tcp":
		return 5684, true
	case "coap+ws":
		return 80, true
	case "coaps+ws":
		return 443, true
	case "coap+unix":
		return 0, true
	}
	return 0, false
}

// ParseURL reads the URL of a store. An empty path stands for the well-known store of the endpoint, .well-known/eris. The
// elements "get" and "put" of the query restrict what may be done; they are for us and are not sent.
//
// Of coap+unix there are two forms. In coap+unix:///run/eris.sock the path is that of the socket, and the store is the
// well-known one. In coap+unix://%2Frun%2Feris.sock/store/path the authority is the percent-encoded path of the socket.
//
// The path of a store may be a secret, hence errors do not quote the URL.
func ParseURL(text string) (StoreURL, error) {
	u, err := parseURL(text)
	if err != nil {
		return StoreURL{}, fmt.Errorf("store URL: %w", err)
	}
	return u, nil
}

func parseURL(text string) (StoreURL, error) {
	if len(text) > maxURLSize {
		return StoreURL{}, errURLSize
	}
	for i := range len(text) {
		if text[i] <= ' ' || text[i] >= 0x7f {
			return StoreURL{}, errURLText
		}
	}
	scheme, rest, ok := strings.Cut(text, "://")
	if !ok {
		return StoreURL{}, errURLForm
	}
	scheme = strings.ToLower(scheme)
	port, ok := defaultPort(scheme)
	if !ok {
		return StoreURL{}, fmt.Errorf("scheme %.20q is not one of CoAP", scheme)
	}
	u := StoreURL{Scheme: scheme, Port: port}
	if strings.Contains(rest, "#") {
		return StoreURL{}, errURLFragment
	}
	rest, query, hasQuery := strings.Cut(rest, "?")
	if err := u.setQuery(query, hasQuery); err != nil {
		return StoreURL{}, err
	}
	authority, path := rest, ""
	if slash := strings.IndexByte(rest, '/'); slash >= 0 {
		authority, path = rest[:slash], rest[slash:]
	}
	if strings.Contains(authority, "@") {
		return StoreURL{}, errURLUser
	}
	if scheme == "coap+unix" {
		err := u.setSocket(authority, path)
		return u, err
	}
	if err := u.setAuthority(authority); err != nil {
		return StoreURL{}, err
	}
	err := u.setPath(path)
	return u, err
}

func (u *StoreURL) setQuery(query string, present bool) error {
	if !present || query == "" {
		u.Get, u.Put = true, true
		return nil
	}
	for element := range strings.SplitSeq(query, "&") {
		switch element {
		case "get":
			u.Get = true
		case "put":
			u.Put = true
		default:
			return errURLQuery
		}
	}
	return nil
}

// setSocket takes either form of coap+unix.
func (u *StoreURL) setSocket(authority, path string) error {
	socket := authority
	if authority == "" {
		socket, path = path, ""
	}
	socket, err := percentDecode(socket)
	if err != nil {
		return err
	}
	if len(socket) < 2 || len(socket) > maxSocketPath || socket[0] != '/' || strings.IndexByte(socket, 0) >= 0 {
		return errURLSocket
	}
	u.Host = socket
	return u.setPath(path)
}

func (u *StoreURL) setAuthority(authority string) error {
	var host, port string
	if inner, ok := strings.CutPrefix(authority, "["); ok {
		address, after, ok := strings.Cut(inner, "]")
		if !ok {
			return errURLHost
		}
		// A zone is separated by %25, which is a percent sign (RFC 6874).
		address, err := percentDecode(address)
		if err != nil {
			return err
		}
		if ip, err := netip.ParseAddr(address); err != nil || !ip.Is6() || !zoneText(ip.Zone()) {
			return errURLHost
		}
		if after != "" && after[0] != ':' {
			return errURLHost
		}
		host, port = address, strings.TrimPrefix(after, ":")
	} else {
		host, port, _ = strings.Cut(authority, ":")
		var err error
		if host, err = percentDecode(host); err != nil {
			return err
		}
		if !hostText(host) {
			return errURLHost
		}
	}
	u.Host = host
	if port == "" {
		return nil
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || port[0] < '0' || port[0] > '9' {
		return errURLPort
	}
	u.Port = uint16(n)
	return nil
}

// hostText reports whether the text can be the name or IPv4 address of a host.
func hostText(host string) bool {
	if host == "" || len(host) > 253 {
		return false
	}
	return zoneText(host)
}

func zoneText(text string) bool {
	for i := range len(text) {
		c := text[i]
		letter := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
		if !letter && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' {
			return false
		}
	}
	return true
}

func (u *StoreURL) setPath(path string) error {
	path = strings.TrimSuffix(strings.TrimPrefix(path, "/"), "/")
	if path == "" {
		u.Path = wellKnownPath[:]
		return nil
	}
	if len(path) > 3*maxPathSize || strings.Count(path, "/") >= maxSegments {
		return errURLPath
	}
	total := 0
	for segment := range strings.SplitSeq(path, "/") {
		segment, err := percentDecode(segment)
		if err != nil {
			return err
		}
		total += len(segment)
		if len(segment) > maxSegmentSize || total > maxPathSize || segment == "." || segment == ".." {
			return errURLPath
		}
		u.Path = append(u.Path, segment)
	}
	return nil
}

// percentDecode undoes the percent-encoding of RFC 3986, section 2.1.
func percentDecode(text string) (string, error) {
	if !strings.Contains(text, "%") {
		return text, nil
	}
	var b strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] != '%' {
			b.WriteByte(text[i])
			continue
		}
		if i+2 >= len(text) {
			return "", errURLEscape
		}
		n, err := strconv.ParseUint(text[i+1:i+3], 16, 8)
		if err != nil {
			return "", errURLEscape
		}
		b.WriteByte(byte(n))
		i += 2
	}
	return b.String(), nil
}

// ParsePath reads the path of a store as it stands in a URL, with or without a slash before it, into its segments. An empty
// path stands for .well-known/eris.
func ParsePath(path string) ([]string, error) {
	var u StoreURL
	if err := u.setPath(path); err != nil {
		return nil, fmt.Errorf("store path: %w", err)
	}
	return u.Path, nil
}

// Address returns the network and address to dial: "unix" and the path of the socket, or "tcp" or "udp" and host:port.
func (u StoreURL) Address() (network, address string) {
	switch u.Scheme {
	case "coap+unix":
		return "unix", u.Host
	case "coap", "coaps":
		network = "udp"
	default:
		network = "tcp"
	}
	return network, net.JoinHostPort(u.Host, strconv.Itoa(int(u.Port)))
}

// TLS reports whether the connection is secured by TLS (or DTLS).
func (u StoreURL) TLS() bool { return strings.HasPrefix(u.Scheme, "coaps") }

// WebSocket reports whether messages go over a WebSocket.
func (u StoreURL) WebSocket() bool { return u.Scheme == "coap+ws" || u.Scheme == "coaps+ws" }

// String returns the scheme and where to connect to, for messages. It does not show the path of the store, which may be a
// secret that lets its holder write.
func (u StoreURL) String() string {
	if u.Scheme == "coap+unix" {
		return "coap+unix://" + percentEncode(u.Host)
	}
	host := percentEncode(u.Host)
	if strings.Contains(u.Host, ":") {
		host = "[" + strings.ReplaceAll(u.Host, "%", "%25") + "]"
	}
	if port, _ := defaultPort(u.Scheme); port != u.Port {
		host += ":" + strconv.Itoa(int(u.Port))
	}
	return u.Scheme + "://" + host
}

// percentEncode leaves a slash as it is: it is for people to read.
func percentEncode(text string) string {
	const hex = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(text) {
		c := text[i]
		if c == '/' || zoneText(text[i:i+1]) || c == '~' || c == '+' || c == ',' || c == '=' {
			b.WriteByte(c)
			continue
		}
		b.WriteString("%" + string(hex[c>>4]) + string(hex[c&15]))
	}
	return b.String()
}
