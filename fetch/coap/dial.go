// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/coder/websocket"

	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/dial"
)

const (
	// unixSocketBuffer is how many bytes the kernel shall buffer on Unix sockets.
	unixSocketBuffer = 1 << 20
	// datagramBuffer is how many bytes the kernel shall keep of answers by UDP, so that none are lost
	// while this process waits for a processor: a window of them.
	datagramBuffer = 4 << 20
	// firstAckTimeout is how long the first copies of the first requests by UDP wait for an answer:
	// a store that has not answered anything is given up soon, perhaps before the 2 s of RFC 7252
	// are over.
	firstAckTimeout = 500 * time.Millisecond
	// maxRetransmit is how often a request by UDP is sent again: of 300 on a line that loses three
	// datagrams of ten each way, ten are in vain after the four times of RFC 7252.
	maxRetransmit = 8
	// maxHandshake bounds the header with which a server answers that it speaks WebSockets, in
	// bytes.
	maxHandshake = 16 << 10
)

var (
	errSubprotocol = errors.New("server speaks WebSockets, but not CoAP over them")
	errNoStream    = errors.New("there are no connections by UDP")
)

// newConnection returns a connection that dial makes something for. Its Run must be called.
func (s *Store) newConnection(dial func() (net.Conn, error)) connection {
	o := &s.options
	if s.url.Scheme == "coap" && o.Dial == nil {
		config := o.Datagram
		config.Timeout, config.Dial = o.RequestTimeout, dial
		config.AckTimeout = cmp.Or(config.AckTimeout, firstAckTimeout)
		config.MaxRetransmit = cmp.Or(config.MaxRetransmit, maxRetransmit)
		return wire.NewEndpoint(nil, config)
	}
	return wire.NewConn(nil, wire.Config{
		Timeout: o.RequestTimeout, IdleTimeout: o.IdleTimeout, Greeting: o.DialTimeout, Window: o.Window, Pool: s.pool, Received: &s.received, Dial: dial,
	})
}

// Dial makes a stream of its own to the server of the store, which is the caller's: for whoever
// wants to be asked for blocks over it. By UDP there is none.
func (s *Store) Dial(ctx context.Context) (net.Conn, error) {
	if s.url.Scheme == "coap" {
		return nil, errNoStream
	}
	return dial.Within(ctx, s.options.DialTimeout, s.dial)
}

// dial makes a stream, or a socket of UDP, which makes no connection but may have to look a name
// up.
func (s *Store) dial(ctx context.Context) (net.Conn, error) {
	if s.options.Dial != nil {
		return s.options.Dial(ctx)
	}
	if strings.HasSuffix(s.url.Scheme, "+ws") {
		return s.dialWebSocket(ctx)
	}
	network, address := s.url.Address()
	var answers func(context.Context, net.Conn) error
	if network == "udp" {
		answers = ping
	}
	conn, err := dial.WithAnswer(&net.Dialer{}, answers)(ctx, network, address)
	switch socket := conn.(type) { // buffers are as large as the system allows
	case *net.UnixConn:
		_ = socket.SetWriteBuffer(unixSocketBuffer)
	case *net.UDPConn:
		_ = socket.SetReadBuffer(datagramBuffer)
	}
	if err != nil || !s.url.TLS() {
		return conn, err
	}
	secure := tls.Client(conn, &tls.Config{
		// Blocks are verified by their references: who is in between can withhold them, and see
		// what is requested, but no more.
		InsecureSkipVerify: true,
		ServerName:         s.url.Host,
		NextProtos:         []string{"coap"}, // RFC 8323, section 8.2
	})
	if err := secure.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return secure, nil
}

// ping asks a server by UDP for an answer, which it has to give to an empty message (RFC 7252,
// section 4.3), and closes the socket. It asks again, for datagrams get lost.
func ping(ctx context.Context, conn net.Conn) error {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	message := [4]byte{0x40}
	binary.BigEndian.PutUint16(message[2:], uint16(rand.Uint32()))
	for {
		if _, err := conn.Write(message[:]); err != nil {
			return err
		}
		if err := conn.SetReadDeadline(time.Now().Add(firstAckTimeout)); err != nil {
			return err
		}
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
	}
}

// dialWebSocket connects to where a CoAP endpoint is over WebSockets (RFC 8323, section 8.3 and
// 8.4), through the proxy that the environment names, if any.
func (s *Store) dialWebSocket(ctx context.Context) (net.Conn, error) {
	_, host := s.url.Address()
	target := url.URL{Scheme: "http", Host: host, Path: wire.WebSocketPath}
	if s.url.TLS() {
		target.Scheme = "https"
	}
	transport := &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            dial.With(&net.Dialer{}),
		TLSClientConfig:        &tls.Config{InsecureSkipVerify: true}, // without ForceAttemptHTTP2 it is HTTP/1.1
		MaxResponseHeaderBytes: maxHandshake,
	}
	defer transport.CloseIdleConnections()
	client := &http.Client{
		Transport: transport,
		// Stores are where their URLs say.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	var conn net.Conn
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) { conn = info.Conn }})
	socket, _, err := websocket.Dial(ctx, target.String(), &websocket.DialOptions{
		HTTPClient:   client,
		HTTPHeader:   http.Header{"User-Agent": {"guix-substitute-eris"}},
		Subprotocols: []string{wire.WebSocketProtocol},
	})
	if err != nil {
		return nil, err
	}
	if socket.Subprotocol() != wire.WebSocketProtocol {
		_ = socket.CloseNow()
		return nil, errSubprotocol
	}
	return wire.NewWebSocket(socket, conn), nil
}
