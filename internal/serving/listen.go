// SPDX-License-Identifier: GPL-3.0-or-later

package serving

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/systemd"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/unixsocket"
)

// An endpoint is where blocks are served, and to whom what is permitted there.
type endpoint struct {
	scheme  string // coap+unix, coap+tcp, coaps+tcp, coap+ws, coap (UDP) or http
	address string // host:port, or the path of a socket
	relay   bool   // what the store does not have may be got from elsewhere
	coapserver.Access

	listener net.Listener   // unless the scheme is coap
	packets  net.PacketConn // if it is
}

// serveNetworks are the schemes of endpoints, and the networks to listen on.
var serveNetworks = map[string]string{"coap+unix": "unix", "coap+tcp": "tcp", "coaps+tcp": "tcp", "coap+ws": "tcp", "coap": "udp", "http": "tcp"}

// parseEndpoint reads the URL of --listen; see [storeurl.ParseListen].
func parseEndpoint(text string) (endpoint, error) {
	u, err := storeurl.ParseListen(text)
	_, address := u.Address()
	// Browsers may know it by the host as it was given, too.
	access := coapserver.Access{Get: u.Get, Put: u.Put, Hosts: []string{u.Host}}
	return endpoint{scheme: u.Scheme, address: address, relay: u.Relay(), Access: access}, err
}

// passedEndpoint makes an endpoint of a socket that the service manager passed. Its name may say
// more than can be seen: a scheme, or a query like that of a URL, or both: "http",
// "coap+tcp?get&put".
func passedEndpoint(s systemd.Socket) (endpoint, error) {
	scheme, query, _ := strings.Cut(s.Name, "?")
	var address net.Addr
	if s.Packets != nil {
		address = s.Packets.LocalAddr()
	} else {
		address = s.Listener.Addr()
	}
	network := address.Network()
	if serveNetworks[scheme] == "" {
		scheme = map[string]string{"unix": "coap+unix", "tcp": "coap+tcp", "udp": "coap"}[network]
	}
	if serveNetworks[scheme] != network {
		return endpoint{}, fmt.Errorf("socket %.100q of the service manager: cannot serve this on %s", s.Name, network)
	}
	e, err := parseEndpoint(scheme + "://" + map[string]string{"unix": "/passed"}[network] + "?" + query)
	if err != nil {
		return endpoint{}, fmt.Errorf("socket %.100q of the service manager: %w", s.Name, err)
	}
	e.address, e.Hosts, e.listener, e.packets = address.String(), nil, s.Listener, s.Packets
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
		return r, message.Usage("mode of the socket is %.20q, and must be octal and at most 777", mode)
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
		return r, fmt.Errorf("--socket-group: there is no group %q", group)
	}
	r.group, err = strconv.Atoi(g.Gid)
	return r, err
}

func (e *endpoint) listen(rights socketRights) (err error) {
	switch network := serveNetworks[e.scheme]; network {
	case "unix":
		if !e.Put {
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
		e.listener, err = listenTCP(e.address)
		if err == nil {
			e.address = e.listener.Addr().String()
		}
	}
	return err
}

// listenTCP listens at an address by TCP, and not by Multipath TCP, whose sockets do not tell the
// zone of their address.
func listenTCP(address string) (net.Listener, error) {
	var c net.ListenConfig
	c.SetMultipathTCP(false)
	return c.Listen(context.Background(), "tcp", address)
}

// advertisedPort returns the port where others of the local network can get blocks.
func advertisedPort(endpoints []*endpoint) (uint16, error) {
	for _, e := range endpoints {
		address, err := netip.ParseAddrPort(e.address)
		if e.scheme == "coap+tcp" && e.Get && err == nil && !address.Addr().IsLoopback() {
			return address.Port(), nil
		}
	}
	return 0, message.Usage("--advertise: others cannot get blocks by coap+tcp at any address; name one by --listen=coap+tcp://[::]:5683")
}

// limit bounds what is sent.
func (e *endpoint) limit(limiter *ratelimit.Limiter) {
	if e.packets != nil {
		e.packets = ratelimit.PacketConn(coapserver.AnswerFromThere(e.packets), limiter)
	} else {
		e.listener = ratelimit.Listener(e.listener, limiter)
	}
}

// secure has TLS spoken where the scheme says so, with a certificate in the directory of the
// blocks.
func (e *endpoint) secure(directory string) error {
	if e.scheme != "coaps+tcp" {
		return nil
	}
	c, err := certificate(filepath.Join(directory, "tls.pem"))
	e.listener = tls.NewListener(e.listener, &tls.Config{Certificates: []tls.Certificate{c}, NextProtos: []string{"coap"}})
	return err
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
	url, access := e.describe()
	return url + " (" + access + ")"
}

func (e *endpoint) describe() (location, access string) {
	access = "nothing"
	switch {
	case e.Get && e.Put:
		access = "get, put"
	case e.Get:
		access = "get"
	case e.Put:
		access = "put"
	}
	address := (&url.URL{Path: e.address}).EscapedPath()
	if e.scheme != "coap+unix" {
		address = strings.ReplaceAll(e.address, "%", "%25") // before the zone of an address
	}
	return e.scheme + "://" + address, access
}

// maxCertificate bounds the file with the certificates and the key, in bytes.
const maxCertificate = 64 << 10

// certificate returns the certificates and the key in a file, which is made if there is none:
// signed by itself, since clients verify blocks. Whoever has a better one puts it there.
func certificate(path string) (tls.Certificate, error) {
	text, err := files.ReadRegular(path, maxCertificate)
	if errors.Is(err, fs.ErrNotExist) {
		text, err = newCertificate(path)
	}
	var c tls.Certificate
	if err == nil {
		c, err = tls.X509KeyPair(text, text)
	}
	if err != nil {
		err = fmt.Errorf("certificate and key in %s: %w", path, err)
	}
	return c, err
}

// newCertificate writes a key and a certificate that never ends (RFC 5280, section 4.1.2.5) to a
// file.
func newCertificate(path string) ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{NotAfter: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)}
	public, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: public})
	text = append(text, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})...)
	return text, files.Write(path, 0o600, files.Options{Sync: true}, text)
}
