// SPDX-License-Identifier: GPL-3.0-or-later

package coap_test

import (
	"bufio"
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
)

// TestWebSocketHandshake has servers that do not agree to speak CoAP over WebSockets. Each call
// must come to its end.
func TestWebSocketHandshake(t *testing.T) {
	ref, _ := newBlock(eris.BlockSize1KiB, 1)
	const switching = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
	raw := func(text string) func(net.Conn, string) {
		return func(conn net.Conn, accept string) { io.WriteString(conn, strings.ReplaceAll(text, "ACCEPT", accept)) }
	}
	for _, v := range []struct {
		name  string
		reply func(conn net.Conn, accept string)
	}{
		{"not a WebSocket", raw("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")},
		{"redirect", raw("HTTP/1.1 302 Found\r\nLocation: ws://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")},
		{"no subprotocol", raw(switching + "Sec-WebSocket-Accept: ACCEPT\r\n\r\n")},
		{"another subprotocol", raw(switching + "Sec-WebSocket-Accept: ACCEPT\r\nSec-WebSocket-Protocol: chat\r\n\r\n")},
		{"wrong key", raw(switching + "Sec-WebSocket-Accept: xxxx\r\nSec-WebSocket-Protocol: coap\r\n\r\n")},
		{"an extension", raw(switching + "Sec-WebSocket-Accept: ACCEPT\r\nSec-WebSocket-Protocol: coap\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n")},
		{"closes", raw(switching + "Sec-WebSocket-Accept: ACCEPT\r\nSec-WebSocket-Protocol: coap\r\n\r\n")},
		{"endless header", func(conn net.Conn, _ string) {
			io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nX: ")
			for {
				if _, err := conn.Write(bytes.Repeat([]byte("x"), 1<<16)); err != nil {
					return
				}
			}
		}},
		{"noise", func(conn net.Conn, _ string) { conn.Write(bytes.Repeat([]byte{0xff}, 1<<16)) }},
		{"never agrees", func(conn net.Conn, _ string) { io.Copy(io.Discard, conn) }},
	} {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			address := listen(t, "tcp", "127.0.0.1:0", func(_ int, conn net.Conn) {
				request, err := http.ReadRequest(bufio.NewReader(conn))
				if err != nil {
					return
				}
				header := request.Header
				if request.Method != "GET" || request.URL.String() != "/.well-known/coap" || header.Get("Sec-Websocket-Protocol") != "coap" ||
					header.Get("Sec-Websocket-Version") != "13" || request.Host != conn.LocalAddr().String() {
					t.Errorf("request is %+v", request)
				}
				sum := sha1.Sum([]byte(header.Get("Sec-Websocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
				v.reply(conn, base64.StdEncoding.EncodeToString(sum[:]))
			})
			options := short
			options.DialTimeout = time.Second
			store := mustOpen(t, "coap+ws://"+address, options)
			defer store.Close()
			_, err := get(t, store, ref, eris.BlockSize1KiB)
			fails.check(t, err)
		})
	}
}

// TestNginx has nginx between client and server, as a site would have that serves more than blocks.
func TestNginx(t *testing.T) {
	nginx, err := exec.LookPath("nginx")
	if err != nil {
		t.Skip("nginx is not installed")
	}
	server := startServer(t, "ws", sourcetest.NewBackend().Open(64), readWrite)
	directory := t.TempDir()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	listener.Close()
	configuration := `
daemon off; pid nginx.pid; error_log error.log; worker_processes 1; master_process off;
events {}
http {
	access_log off; client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
	server {
		listen ` + address + `;
		location = /.well-known/coap {
			proxy_pass http://` + server.address + `;
			proxy_http_version 1.1;
			proxy_set_header Upgrade $http_upgrade;
			proxy_set_header Connection "upgrade";
		}
	}
}`
	if err := os.WriteFile(filepath.Join(directory, "nginx.conf"), []byte(configuration), 0o666); err != nil {
		t.Fatal(err)
	}
	runServer(t, "tcp", address, nginx, "-p", directory, "-c", "nginx.conf", "-e", filepath.Join(directory, "error.log"))
	store := mustOpen(t, "coap+ws://"+address, coap.Options{})
	defer store.Close()
	var group sync.WaitGroup
	for i := range 200 {
		ref, block := newBlock(eris.BlockSize32KiB, i)
		group.Go(func() {
			if err := store.Put(t.Context(), ref, block); err != nil {
				t.Errorf("Put: %v", err)
			} else if got, err := get(t, store, ref, eris.BlockSize32KiB); err != nil || !bytes.Equal(got, block) {
				t.Errorf("Get: %v", err)
			}
		})
	}
	group.Wait()
}
