// SPDX-License-Identifier: GPL-3.0-or-later

package coap_test

import (
	"bufio"
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"errors"
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
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// libcoapServer starts the example server of libcoap, with dynamic resources, and returns its
// address. Such a server has one content per path, whatever the query.
func libcoapServer(t *testing.T, args ...string) (address string) {
	var name string
	for _, candidate := range []string{"coap-server", "coap-server-notls", "coap-server-openssl", "coap-server-gnutls"} {
		if path, err := exec.LookPath(candidate); err == nil {
			name = path
			break
		}
	}
	if name == "" {
		t.Skip("coap-server is not installed")
	}
	address = testhelp.FreeAddress() // it needs the same port for TCP and UDP
	host, port, _ := net.SplitHostPort(address)
	runServer(t, "tcp", address, name, append([]string{"-A", host, "-p", port, "-d", "100"}, args...)...)
	return address
}

// runServer runs a program until the end of the test, and waits until it listens at an address.
func runServer(t *testing.T, network, address, program string, args ...string) {
	t.Helper()
	command := exec.Command(program, args...)
	must(t, command.Start())
	t.Cleanup(func() {
		command.Process.Kill()
		command.Wait()
	})
	for range 12000 {
		if conn, err := net.Dial(network, address); err == nil {
			conn.Close()
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("%s does not listen", program)
}

// TestLibcoapServer puts blocks to the server of libcoap and gets them back, by TCP and UDP, with
// messages that it limits, and by a Unix socket through socat.
func TestLibcoapServer(t *testing.T) {
	address := libcoapServer(t)
	// This one takes no message of 32 KiB, and so forces BERT.
	limited := libcoapServer(t, "-X", "5000")
	urls := map[string]string{
		"tcp":          "coap+tcp://" + address + "/",
		"tcp, limited": "coap+tcp://" + limited + "/",
		"udp":          "coap://" + address + "/",
	}
	if socat, err := exec.LookPath("socat"); err == nil {
		socket := filepath.Join(t.TempDir(), "s")
		runServer(t, "unix", socket, socat, "UNIX-LISTEN:"+socket+",fork", "TCP:"+address)
		urls["unix"] = "coap+unix://" + escape(socket) + "/"
	} else {
		t.Log("without a Unix socket: socat is not installed")
	}
	for name, url := range urls {
		for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
			t.Run(name+"/"+size.String(), func(t *testing.T) {
				store := mustOpen(t, url+strings.ReplaceAll(name, ", ", "-")+size.String(), coap.Options{})
				defer store.Close()
				block := make([]byte, size)
				for i := range block {
					block[i] = byte(i>>4) ^ byte(i*7)
				}
				ref := eris.Sum(block)
				if err := store.Put(t.Context(), ref, block); err != nil {
					t.Fatalf("Put: %v", err)
				}
				var group sync.WaitGroup
				for range 20 {
					group.Go(func() {
						if got, err := get(t, store, ref, size); err != nil || !bytes.Equal(got, block) {
							t.Errorf("Get: %v", err)
						}
					})
				}
				group.Wait()
				// It has nothing that answers what it has, and says so, whatever else it does.
				done := make(chan struct{})
				r := &fetch.Request{
					Have: bytes.Repeat(ref[:fetch.HavePrefix], fetch.MaxHave), Size: 128, Dst: make([]byte, 0, 128),
					Done: func(*fetch.Request) { close(done) },
				}
				store.Start(r)
				if <-done; !errors.Is(r.Err, fetch.ErrCannotSay) {
					t.Errorf("answer is %x, %v", r.Block, r.Err)
				}
				if got, err := get(t, store, ref, size); err != nil || !bytes.Equal(got, block) {
					t.Errorf("Get after a question: %v", err)
				}
			})
		}
	}
}

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
	address := testhelp.FreeAddress()
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
	must(t, os.WriteFile(filepath.Join(directory, "nginx.conf"), []byte(configuration), 0o666))
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
