// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// serveSocket serves a store over WebSockets, and returns the address.
func serveSocket(t *testing.T, config coapserver.Config) (*coapserver.Server, string) {
	server, err := coapserver.New(config)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	access := readWrite
	access.Hosts = []string{"here.example"}
	var group sync.WaitGroup
	group.Go(func() {
		if err := server.ServeWebSocket(listener, access); err != coapserver.ErrServerClosed {
			t.Errorf("ServeWebSocket: %v", err)
		}
	})
	t.Cleanup(func() {
		server.Close()
		group.Wait()
	})
	return server, listener.Addr().String()
}

// socketClient is the client's end of a WebSocket, done by hand (RFC 6455).
type socketClient struct {
	t    *testing.T
	conn net.Conn
	r    *bufio.Reader
}

const askForSocket = "GET /.well-known/coap HTTP/1.1\r\nHost: x.example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
	"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"

// dialSocket makes a connection. The further fields of the request must end in an empty line. The
// status is that of the answer.
func dialSocket(t *testing.T, address, request string) (c *socketClient, status int) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(time.Minute))
	c = &socketClient{t, conn, bufio.NewReader(conn)}
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	response, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return c, 0
	}
	if response.StatusCode == http.StatusSwitchingProtocols && (response.Header.Get("Sec-Websocket-Protocol") != "coap" ||
		response.Header.Get("Sec-Websocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=") { // RFC 6455, section 1.3
		t.Errorf("answer has the fields %v", response.Header)
	}
	return c, response.StatusCode
}

// clientFrame makes a frame as a client sends it.
func clientFrame(first byte, payload []byte) []byte {
	b := []byte{first}
	switch n := len(payload); {
	case n < 126:
		b = append(b, 0x80|byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 0x80|126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 0x80|127), uint64(n))
	}
	key := [4]byte{1, 2, 3, 4}
	b = append(b, key[:]...)
	for i, c := range payload {
		b = append(b, c^key[i&3])
	}
	return b
}

func (c *socketClient) write(b ...[]byte) bool {
	_, err := c.conn.Write(bytes.Join(b, nil))
	return err == nil
}

// read returns the next frame; ok is false at the end of the connection.
func (c *socketClient) read() (first byte, payload []byte, ok bool) {
	var head [2]byte
	if _, err := io.ReadFull(c.r, head[:]); err != nil {
		return 0, nil, false
	}
	length := uint64(head[1])
	if extended := map[byte]int{126: 2, 127: 8}[head[1]]; extended > 0 {
		b := make([]byte, 8)
		if _, err := io.ReadFull(c.r, b[8-extended:]); err != nil {
			return 0, nil, false
		}
		length = binary.BigEndian.Uint64(b)
	}
	if length > 1<<17 {
		c.t.Errorf("a frame of the server has %d bytes", length)
		return 0, nil, false
	}
	payload = make([]byte, length)
	_, err := io.ReadFull(c.r, payload)
	return head[0], payload, err == nil
}

// awaitEnd reads until the connection is over, and returns the status in the last frame if it was
// to say so.
func (c *socketClient) awaitEnd() (status uint16) {
	for {
		first, payload, ok := c.read()
		if !ok {
			return status
		}
		if first == 0x88 && len(payload) >= 2 {
			status = binary.BigEndian.Uint16(payload)
		}
	}
}

var socketCSM = []byte{0, 0xe1, 0x23, 1, 0, 0, 0x20}

func TestWebSocketMessages(t *testing.T) {
	store := newMemory()
	ref, want := store.add(t, eris.BlockSize32KiB)
	server, address := serveSocket(t, coapserver.Config{Resources: []coapserver.Resource{{Source: store, Sink: store}}})
	c, status := dialSocket(t, address, askForSocket+"Sec-WebSocket-Protocol: chat, coap\r\n\r\n")
	if status != http.StatusSwitchingProtocols {
		t.Fatalf("status is %d", status)
	}
	message := func() []byte {
		first, payload, ok := c.read()
		if !ok || first != 0x82 {
			t.Fatalf("frame begins with %x: %v", first, ok)
		}
		return payload
	}
	if m := message(); !bytes.Equal(m, socketCSM) {
		t.Errorf("first message is %x, want %x", m, socketCSM)
	}
	c.write(clientFrame(0x82, socketCSM))
	path := "\xbb.well-known\x04eris\x06blocks"
	get := []byte("\x01\x01\x07" + path + "\x4d\x13" + string(ref[:]) + "\xd2\x20\x80\x00")
	answer := append([]byte{1, 0x45, 7, 0xff}, want...)
	// In one frame, and in several with a ping between.
	for _, b := range [][]byte{
		clientFrame(0x82, get),
		bytes.Join([][]byte{clientFrame(2, get[:1]), clientFrame(0, nil), clientFrame(0x89, []byte("x")), clientFrame(0x80, get[1:])}, nil),
	} {
		c.write(b)
		first, payload, ok := c.read()
		if first == 0x8a && string(payload) == "x" {
			first, payload, ok = c.read()
		}
		// Options before the payload are the server's choice.
		if !ok || first != 0x82 || !bytes.HasPrefix(payload, answer[:3]) || !bytes.HasSuffix(payload, answer[3:]) {
			t.Errorf("answer is %x, %d bytes", first, len(payload))
		}
	}
	newRef, block := newBlock(eris.BlockSize32KiB)
	c.write(clientFrame(0x82, []byte("\x01\x03\x08"+path+"\xff"+string(block))))
	if m := message(); !bytes.Equal(m, []byte{1, 0x41, 8}) || !store.has(newRef) {
		t.Errorf("answer to PUT is %x", m)
	}
	done := make(chan struct{})
	go func() {
		server.Shutdown(t.Context())
		close(done)
	}()
	if m := message(); !bytes.Equal(m, []byte{0, 0xe4}) {
		t.Errorf("last message is %x, want Release", m)
	}
	c.conn.Close()
	<-done
}

// TestWebSocketHandshake has requests that are not for us.
func TestWebSocketHandshake(t *testing.T) {
	_, address := serveSocket(t, coapserver.Config{Resources: []coapserver.Resource{{Source: newMemory()}}})
	const protocol = "Sec-WebSocket-Protocol: coap\r\n"
	for _, v := range []struct {
		name, request string
		want          int
	}{
		{"as it should be", askForSocket + protocol + "\r\n", http.StatusSwitchingProtocols},
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
			if v.want == http.StatusRequestHeaderFieldsTooLarge {
				// The server closes before it has read everything, so that writing may fail.
				conn, err := net.Dial("tcp", address)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(time.Minute))
				io.WriteString(conn, v.request)
				if answer, _ := io.ReadAll(conn); bytes.Contains(answer, []byte(" 101 ")) {
					t.Errorf("answer is %q", answer)
				}
				return
			}
			if _, status := dialSocket(t, address, v.request); status != v.want {
				t.Errorf("status is %d, want %d", status, v.want)
			}
		})
	}
}

// TestWebSocketHostile has clients that do not keep to the protocols: their connections end.
func TestWebSocketHostile(t *testing.T) {
	store := newMemory()
	_, address := serveSocket(t, coapserver.Config{
		Resources:      []coapserver.Resource{{Source: store, Sink: store}},
		IdleTimeout:    300 * time.Millisecond,
		MessageTimeout: 300 * time.Millisecond,
	})
	ref, _ := store.add(t, eris.BlockSize1KiB)
	get := []byte("\x01\x01\x07\xbb.well-known\x04eris\x06blocks\x4d\x13" + string(ref[:]) + "\xd2\x20\x04\x00")
	const (
		unsupported = 1003
		violation   = 1008
		tooLarge    = 1009
		malformed   = 1002
		normal      = 1000
		any         = 0
	)
	for _, v := range []struct {
		name   string
		send   []byte
		repeat bool
		want   uint16 // status of the close frame
	}{
		{"text", clientFrame(0x81, get), false, unsupported},
		{"length in the head", clientFrame(0x82, append([]byte{0x11}, get[1:]...)), false, violation},
		{"empty message", clientFrame(0x82, nil), false, violation},
		{"token is cut", clientFrame(0x82, []byte{8, 1, 1}), false, violation},
		{"token of 9 bytes", clientFrame(0x82, append([]byte{9, 1}, make([]byte, 20)...)), false, violation},
		{"too large", clientFrame(0x82, append([]byte{0, 3, 0xff}, make([]byte, 70000)...)), false, tooLarge},
		{"length of an exabyte", []byte{0x82, 0xff, 0x10, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4}, false, any},
		{"not masked", append([]byte{0x82, byte(len(get))}, get...), false, any},
		{"reserved bit", clientFrame(0xc2, get), false, malformed},
		{"stray continuation", clientFrame(0x80, get), false, malformed},
		{"fragmented ping", clientFrame(0x09, nil), false, malformed},
		{"GET before capabilities", clientFrame(0x82, get), false, normal},
		{"closes", clientFrame(0x88, []byte{0x03, 0xe8}), false, normal},
		{"stops within a message", clientFrame(0x82, get)[:20], false, any},
		{"says nothing", nil, false, any},
		{"endless message", clientFrame(0x00, make([]byte, 1000)), true, any},
		{"endless empty fragments", clientFrame(0x00, nil), true, any},
		{"endless pings", clientFrame(0x89, []byte("x")), true, any},
		{"endless pongs", clientFrame(0x8a, []byte("x")), true, any},
	} {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			c, status := dialSocket(t, address, askForSocket+"Sec-WebSocket-Protocol: coap\r\n\r\n")
			if status != http.StatusSwitchingProtocols {
				t.Fatalf("status is %d", status)
			}
			var group sync.WaitGroup
			defer group.Wait()
			if !strings.HasPrefix(v.name, "GET") {
				c.write(clientFrame(0x82, socketCSM))
			}
			if strings.HasSuffix(v.name, "message") || strings.HasSuffix(v.name, "fragments") {
				if v.repeat {
					c.write(clientFrame(0x02, []byte{0}))
				}
			}
			if !v.repeat {
				c.write(v.send)
			} else {
				group.Go(func() {
					for c.write(bytes.Repeat(v.send, 100)) {
					}
				})
			}
			if got := c.awaitEnd(); v.want != any && got != v.want {
				t.Errorf("status is %d, want %d", got, v.want)
			}
			c.conn.Close()
		})
	}
}

// TestWebSocketConnections checks that connections count whether or not a WebSocket has been
// requested on them, and that idle ones make room for others.
func TestWebSocketConnections(t *testing.T) {
	source := &holding{newMemory(), make(chan struct{}), make(chan struct{})}
	ref, _ := source.add(t, eris.BlockSize1KiB)
	_, address := serveSocket(t, coapserver.Config{Resources: []coapserver.Resource{{Source: source}}, MaxConnections: 2})
	request := askForSocket + "Sec-WebSocket-Protocol: coap\r\n\r\n"
	get := "\x01\x01\x07\xbb.well-known\x04eris\x06blocks\x4d\x13" + string(ref[:]) + "\xd2\x20\x04\x00"
	busy := func() *socketClient {
		c, status := dialSocket(t, address, request)
		if status != http.StatusSwitchingProtocols {
			t.Fatalf("status %d of a connection within the limit", status)
		}
		c.write(clientFrame(0x82, socketCSM), clientFrame(0x82, []byte(get)))
		<-source.started
		return c
	}
	first := busy()
	silent, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	second := busy() // the silent one has made room
	if n, err := silent.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the silent connection: %d bytes, error %v", n, err)
	}
	if _, status := dialSocket(t, address, request); status == http.StatusSwitchingProtocols {
		t.Error("a connection beyond the limit is served")
	}
	close(source.release)
	for _, c := range []*socketClient{first, second} {
		for i := range 2 {
			if _, payload, ok := c.read(); !ok || i == 1 && len(payload) < 1024 {
				t.Errorf("message %d: %d bytes", i, len(payload))
			}
		}
	}
	// Both are idle in a moment.
	for tries := 0; ; tries++ {
		if _, status := dialSocket(t, address, request); status == http.StatusSwitchingProtocols {
			return
		} else if tries == 1000 {
			t.Fatal("there is no room although others are idle")
		}
		pause()
	}
}
