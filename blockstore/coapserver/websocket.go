// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver

import (
	"context"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/coder/websocket"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// handshakeTimeout is how long a client may take to ask for a WebSocket, or to agree on TLS.
const handshakeTimeout = 30 * time.Second

// ServeWebSocket is to WebSockets (RFC 8323, section 4) what Serve is to streams: it accepts HTTP
// connections, on which clients ask for a WebSocket at /.well-known/coap with the subprotocol
// "coap", and serves those. For TLS, the listener must be one of crypto/tls, with the protocol
// "http/1.1" or none.
//
// A browser may connect only from pages of the host that it connects to, which must be the address
// that is listened on, or one of access.Hosts: the name of another host may lead here, too. Clients
// that are no browsers do not say where they come from, and may always.
func (s *Server) ServeWebSocket(listener net.Listener, access Access) error {
	if !s.begin() {
		return listener.Close()
	}
	defer s.services.Done()
	gate := admission.New(s.config.MaxConnections, listener, &s.counts, s.config.Log)
	server := gate.Server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.serveWebSocket(w, r, access)
	}))
	server.WriteTimeout = handshakeTimeout
	server.IdleTimeout = handshakeTimeout
	defer context.AfterFunc(s.ctx, func() { server.Close() })()
	return gate.Serve(s.stopping, server)
}

// serveWebSocket serves one connection until it ends.
func (s *Server) serveWebSocket(w http.ResponseWriter, r *http.Request, access Access) {
	switch {
	case r.URL.Path != coap.WebSocketPath:
		http.Error(w, "there is nothing here but "+coap.WebSocketPath, http.StatusNotFound)
		return
	case !offersCoAP(r.Header):
		http.Error(w, `this is for WebSockets with the subprotocol "coap"`, http.StatusBadRequest)
		return
	case !admission.FromPageHere(r, access.Hosts):
		http.Error(w, "this is no host of that name", http.StatusForbidden)
		return
	}
	socket, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{coap.WebSocketProtocol}})
	if err != nil {
		return // the client has been told
	}
	conn := admission.ConnOf(r)
	conn.SetIdle(true)
	s.serveConn(coap.NewWebSocket(socket, conn), access, conn.SetIdle) // it closes the connection even if the server is closing
}

// offersCoAP reports whether a client wants to speak CoAP (RFC 6455, section 4.1, number 10).
func offersCoAP(header http.Header) bool {
	all := strings.Join(header.Values("Sec-Websocket-Protocol"), ",")
	return slices.ContainsFunc(strings.Split(all, ","), func(protocol string) bool {
		return strings.TrimSpace(protocol) == coap.WebSocketProtocol
	})
}
