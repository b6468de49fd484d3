// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/url"
	"sync"

	"github.com/coder/websocket"

	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// maxHandshake bounds the header with which a server answers that it speaks WebSockets, in bytes.
const maxHandshake = 16 << 10

var errSubprotocol = errors.New("server speaks WebSockets, but not CoAP over them")

// openWebSocket connects to where a CoAP endpoint is over WebSockets (RFC 8323, section 8.3 and 8.4), through the proxy that
// the environment names, if any. Dial and config are for the connection below.
func openWebSocket(ctx context.Context, u wire.StoreURL, dial *net.Dialer, config *tls.Config) (net.Conn, error) {
	_, host := u.Address()
	target := url.URL{Scheme: "http", Host: host, Path: wire.WebSocketPath}
	if u.TLS() {
		target.Scheme = "https"
		config.NextProtos = nil // HTTP/1.1 is what is spoken then, and WebSockets need
	}
	var mu sync.Mutex
	var conn net.Conn
	transport := &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := dial.DialContext(ctx, network, address)
			if err == nil {
				mu.Lock()
				conn = c
				mu.Unlock()
			}
			return c, err
		},
		TLSClientConfig:        config,
		MaxResponseHeaderBytes: maxHandshake,
	}
	defer transport.CloseIdleConnections()
	client := &http.Client{
		Transport: transport,
		// Stores are where their URLs say.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	socket, _, err := websocket.Dial(ctx, target.String(), &websocket.DialOptions{
		HTTPClient:   client,
		HTTPHeader:   http.Header{"User-Agent": {"guix-substitute-eris"}},
		Subprotocols: []string{wire.WebSocketProtocol},
	})
	if err != nil {
		return nil, err
	}
	mu.Lock()
	defer mu.Unlock()
	if socket.Subprotocol() != wire.WebSocketProtocol {
		_ = socket.CloseNow()
		return nil, errSubprotocol
	}
	return wire.NewWebSocket(socket, conn), nil
}
