// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver_test

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
)

const askForSocket = "GET /.well-known/coap HTTP/1.1\r\nHost: x.example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
	"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"

// TestWebSocketHandshake has requests that are not for us.
func TestWebSocketHandshake(t *testing.T) {
	_, address := serveConfig(t, "ws", coapserver.Access{Get: true, Hosts: []string{"here.example"}}, coapserver.Config{Source: newMemory()})
	const protocol = "Sec-WebSocket-Protocol: coap\r\n"
	for _, v := range []struct {
		name, request string
		want          int
	}{
		{"as it should be", askForSocket + protocol + "\r\n", http.StatusSwitchingProtocols},
		{"one of several", askForSocket + "Sec-WebSocket-Protocol: chat, coap\r\n\r\n", http.StatusSwitchingProtocols},
		{"page of this address", strings.Replace(askForSocket, "x.example", address, 1) + protocol + "Origin: http://" + address + "\r\n\r\n", http.StatusSwitchingProtocols},
		{"page of localhost", strings.Replace(askForSocket, "x.example", "LocalHost:1", 1) + protocol + "Origin: http://localhost:1\r\n\r\n", http.StatusSwitchingProtocols},
		{"page of this host", strings.Replace(askForSocket, "x.example", "here.example", 1) + protocol + "Origin: http://here.example\r\n\r\n", http.StatusSwitchingProtocols},
		{"page of a name that leads here", askForSocket + protocol + "Origin: http://x.example\r\n\r\n", http.StatusForbidden},
		{"page of another address", strings.Replace(askForSocket, "x.example", "192.0.2.1", 1) + protocol + "Origin: http://192.0.2.1\r\n\r\n", http.StatusForbidden},
		{"page of another host", askForSocket + protocol + "Origin: http://evil.example\r\n\r\n", http.StatusForbidden},
		{"no subprotocol", askForSocket + "\r\n", http.StatusBadRequest},
		{"another subprotocol", askForSocket + "Sec-WebSocket-Protocol: coap2, xcoap\r\n\r\n", http.StatusBadRequest},
		{"another path", strings.Replace(askForSocket, "/.well-known/coap", "/", 1) + protocol + "\r\n", http.StatusNotFound},
		{"path with dots", strings.Replace(askForSocket, "/.well-known/coap", "/x/../.well-known/coap", 1) + protocol + "\r\n", http.StatusNotFound},
		{"no WebSocket", "GET /.well-known/coap HTTP/1.1\r\nHost: x\r\n" + protocol + "\r\n", http.StatusUpgradeRequired},
		{"POST", strings.Replace(askForSocket, "GET", "POST", 1) + protocol + "\r\n", http.StatusMethodNotAllowed},
		{"old version", strings.Replace(askForSocket, "13", "8", 1) + protocol + "\r\n", http.StatusBadRequest},
		{"long header", askForSocket + protocol + "X: " + strings.Repeat("x", 1<<20) + "\r\n\r\n", http.StatusRequestHeaderFieldsTooLarge},
	} {
		t.Run(v.name, func(t *testing.T) {
			conn, err := net.Dial("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			// The server may close before it has read everything, so that writing may fail.
			io.WriteString(conn, v.request)
			response, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if v.want == http.StatusRequestHeaderFieldsTooLarge && err != nil {
				return // the answer may get lost as well
			}
			if err != nil || response.StatusCode != v.want {
				t.Fatalf("answer is %v, %v; want %d", response, err, v.want)
			}
			if v.want == http.StatusSwitchingProtocols && (response.Header.Get("Sec-Websocket-Protocol") != "coap" ||
				response.Header.Get("Sec-Websocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=") { // RFC 6455, section 1.3
				t.Errorf("answer has the fields %v", response.Header)
			}
		})
	}
}
