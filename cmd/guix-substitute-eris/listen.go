// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os/user"
	"strconv"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/systemd"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/unixsocket"
)

// An endpoint is where blocks are served, and to whom what is permitted there.
type endpoint struct {
	scheme   string // coap+unix, coap+tcp, coap+ws, coap (UDP) or http
	address  string // host:port, or the path of a socket
	get, put bool

	listener net.Listener   // unless the scheme is coap
	packets  net.PacketConn // if it is
}

// serveSchemes are the schemes of endpoints, and the networks to listen on.
var serveSchemes = map[string]string{"coap+unix": "unix", "coap+tcp": "tcp", "coap+ws": "tcp", "coap": "udp", "http": "tcp"}

// parseEndpoint reads the URL of --listen: scheme://host:port?get&put, or
// coap+unix:///path?get&put. Without a query, blocks may be got, and put as well on a Unix socket.
// The host may be left out for all addresses of the machine, and the port may be 0 for any.
func parseEndpoint(text string) (endpoint, error) {
	u, err := url.Parse(text)
	if err != nil {
		// The error would quote the URL once more.
		return endpoint{}, fmt.Errorf("%.200q is not a URL", text)
	}
	network, ok := serveSchemes[u.Scheme]
	if !ok {
		return endpoint{}, fmt.Errorf("cannot listen on %.200q: its scheme is none of coap+unix, coap+tcp, coap+ws, coap and http", text)
	}
	e := endpoint{scheme: u.Scheme}
	if err := e.setAccess(u.RawQuery, u.RawQuery != "" || u.ForceQuery); err != nil {
		return endpoint{}, fmt.Errorf("cannot listen on %.200q: %w", text, err)
	}
	switch {
	case u.User != nil, u.Fragment != "", u.Opaque != "":
		err = errors.New("it must be of the form scheme://host:port?get&put")
	case network == "unix" && (u.Host != "" || len(u.Path) < 2):
		err = errors.New("it must be of the form coap+unix:///path?get&put")
	case network == "unix":
		e.address = u.Path
	case strings.HasPrefix(u.Scheme, "coap") && u.Path != "" && u.Path != "/" && u.Path != "/.well-known/eris":
		err = errors.New("blocks are served at the path /.well-known/eris only")
	case u.Scheme == "http" && u.Path != "" && u.Path != "/":
		err = errors.New("blocks are served at the path /uri-res/N2R only; leave it out")
	default:
		port := u.Port()
		if port == "" {
			port = map[string]string{"http": "80", "coap+ws": "80", "coap": "5683", "coap+tcp": "5683"}[u.Scheme]
		}
		if _, convErr := strconv.ParseUint(port, 10, 16); convErr != nil {
			err = errors.New("its port is not a number below 65536")
		}
		e.address = net.JoinHostPort(u.Hostname(), port)
	}
	if err != nil {
		return endpoint{}, fmt.Errorf("cannot listen on %.200q: %w", text, err)
	}
	return e, nil
}

// setAccess reads the query of an endpoint.
func (e *endpoint) setAccess(query string, present bool) error {
	if !present {
		e.get, e.put = true, e.scheme == "coap+unix"
		return nil
	}
	for element := range strings.SplitSeq(query, "&") {
		switch element {
		case "get":
			e.get = true
		case "put":
			e.put = true
		default:
			return errors.New("its query may have the elements get and put only")
		}
	}
	return nil
}

// passedEndpoint makes an endpoint of a socket that the service manager passed. Its name may say
// more than can be seen: a scheme, or a query like that of a URL, or both: "http",
// "coap+tcp?get&put".
func passedEndpoint(s systemd.Socket) (endpoint, error) {
	scheme, query, hasQuery := strings.Cut(s.Name, "?")
	e := endpoint{scheme: scheme, listener: s.Listener, packets: s.Packets}
	network := ""
	switch {
	case s.Packets != nil:
		e.address = s.Packets.LocalAddr().String()
		network = s.Packets.LocalAddr().Network()
	default:
		e.address = s.Listener.Addr().String()
		network = s.Listener.Addr().Network()
	}
	if serveSchemes[scheme] == "" {
		e.scheme = map[string]string{"unix": "coap+unix", "tcp": "coap+tcp", "udp": "coap"}[network]
	}
	if serveSchemes[e.scheme] != network {
		return endpoint{}, fmt.Errorf("socket %.100q of the service manager: cannot serve this on %s", s.Name, network)
	}
	if err := e.setAccess(query, hasQuery); err != nil {
		return endpoint{}, fmt.Errorf("socket %.100q of the service manager: %w", s.Name, err)
	}
	return e, nil
}

// socketRights say who may connect to Unix sockets where blocks may be put.
type socketRights struct {
	mode  fs.FileMode
	group int
}

// parseSocketRights reads an octal mode and the name or number of a group, which may be empty.
func parseSocketRights(mode, group string) (socketRights, error) {
	r := socketRights{group: -1}
	n, err := strconv.ParseUint(mode, 8, 32)
	if err != nil || n > 0o777 {
		return r, fmt.Errorf("mode of the socket is %.20q, and must be octal and at most 777", mode)
	}
	r.mode = fs.FileMode(n)
	if group == "" {
		return r, nil
	}
	if id, err := strconv.Atoi(group); err == nil && id >= 0 {
		r.group = id
		return r, nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return r, fmt.Errorf("group of the socket: %w", err)
	}
	r.group, err = strconv.Atoi(g.Gid)
	return r, err
}

// listen begins to listen.
func (e *endpoint) listen(rights socketRights) (err error) {
	switch network := serveSchemes[e.scheme]; network {
	case "unix":
		if !e.put {
			// Nobody can do any harm there.
			rights = socketRights{0o666, -1}
		}
		e.listener, err = unixsocket.Listen(e.address, rights.mode, rights.group)
	case "udp":
		e.packets, err = net.ListenPacket(network, e.address)
		if err == nil {
			e.address = e.packets.LocalAddr().String()
		}
	default:
		e.listener, err = net.Listen(network, e.address)
		if err == nil {
			e.address = e.listener.Addr().String()
		}
	}
	return err
}

// limit bounds how fast bytes come and go.
func (e *endpoint) limit(in, out *ratelimit.Limiter) {
	if e.packets != nil {
		e.packets = ratelimit.PacketConn(e.packets, in, out)
		return
	}
	e.listener = ratelimit.Listener(e.listener, in, out)
}

func (e *endpoint) close() {
	switch {
	case e.listener != nil:
		e.listener.Close()
	case e.packets != nil:
		e.packets.Close()
	}
}

// String returns the URL, and what is permitted, for messages.
func (e *endpoint) String() string {
	access := "nothing is permitted"
	switch {
	case e.get && e.put:
		access = "get, put"
	case e.get:
		access = "get"
	case e.put:
		access = "put"
	}
	address := (&url.URL{Path: e.address}).EscapedPath()
	if e.scheme != "coap+unix" {
		address = strings.ReplaceAll(e.address, "%", "%25") // before the zone of an address
	}
	return fmt.Sprintf("%s://%s (%s)", e.scheme, address, access)
}
