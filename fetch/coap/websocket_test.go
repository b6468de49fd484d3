// SPDX-License-Identifier: GPL-3.0-or-later

package coap_test

import (
	"bufio"
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
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
)

// socketPeer is the server's end of a WebSocket, done by hand (RFC 6455): nothing of what is under
// test is used for it.
type socketPeer struct {
	t    *testing.T
	conn net.Conn
	r    *bufio.Reader
}

// Opcodes (RFC 6455, section 5.2).
const (
	opContinuation = 0
	opText         = 1
	opBinary       = 2
	opClose        = 8
	opPing         = 9
	opPong         = 10
	final          = 0x80
)

// frame makes a frame as a server sends it.
func frame(first byte, payload []byte) []byte {
	b := []byte{first}
	switch n := len(payload); {
	case n < 126:
		b = append(b, byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 127), uint64(n))
	}
	return append(b, payload...)
}

// read returns the next frame of the client, which must be masked and whole.
func (p *socketPeer) read() (first byte, payload []byte, ok bool) {
	var head [2]byte
	if _, err := io.ReadFull(p.r, head[:]); err != nil {
		return 0, nil, false
	}
	if head[1]&0x80 == 0 {
		p.t.Error("a frame of the client is not masked")
	}
	length := uint64(head[1] & 0x7f)
	extended := map[uint64]int{126: 2, 127: 8}[length]
	rest := make([]byte, extended+4)
	if _, err := io.ReadFull(p.r, rest); err != nil {
		return 0, nil, false
	}
	switch extended {
	case 2:
		length = uint64(binary.BigEndian.Uint16(rest))
	case 8:
		length = binary.BigEndian.Uint64(rest)
	}
	if length > 1<<17 {
		p.t.Errorf("a frame of the client has %d bytes", length)
		return 0, nil, false
	}
	payload = make([]byte, length)
	_, err := io.ReadFull(p.r, payload)
	for i := range payload {
		payload[i] ^= rest[extended+i&3]
	}
	return head[0], payload, err == nil
}

// readMessage passes over all but binary messages. It returns nil at the end.
func (p *socketPeer) readMessage() []byte {
	for {
		first, payload, ok := p.read()
		if !ok {
			return nil
		}
		if first == final|opBinary {
			return payload
		}
	}
}

func (p *socketPeer) write(b ...[]byte) bool {
	_, err := p.conn.Write(bytes.Join(b, nil))
	return err == nil
}

func (p *socketPeer) awaitEnd() {
	for {
		if _, _, ok := p.read(); !ok {
			return
		}
	}
}

// playSocket plays a server. Handshake answers the request for a WebSocket, and reports whether the
// script is to go on.
func playSocket(t *testing.T, handshake func(connection int, conn net.Conn, accept string) bool, play func(connection int, p *socketPeer)) (url string) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	var mu sync.Mutex
	conns := make(map[net.Conn]struct{})
	group.Go(func() {
		for n := 0; ; n++ {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns[conn] = struct{}{}
			mu.Unlock()
			group.Go(func() {
				defer conn.Close()
				r := bufio.NewReader(conn)
				request, err := http.ReadRequest(r)
				if err != nil {
					return
				}
				header := request.Header
				if request.Method != "GET" || request.URL.String() != "/.well-known/coap" || header.Get("Sec-Websocket-Protocol") != "coap" ||
					header.Get("Sec-Websocket-Version") != "13" || request.Host != listener.Addr().String() {
					t.Errorf("request is %+v", request)
				}
				sum := sha1.Sum([]byte(header.Get("Sec-Websocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
				if handshake(n, conn, base64.StdEncoding.EncodeToString(sum[:])) {
					play(n, &socketPeer{t: t, conn: conn, r: r})
				}
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		mu.Lock()
		for conn := range conns {
			conn.Close()
		}
		mu.Unlock()
		group.Wait()
	})
	return "coap+ws://" + listener.Addr().String()
}

const switching = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"

// agree is the handshake of a good server.
func agree(_ int, conn net.Conn, accept string) bool {
	fmt.Fprintf(conn, switching+"Sec-WebSocket-Accept: %s\r\nSec-WebSocket-Protocol: coap\r\n\r\n", accept)
	return true
}

// socketCSM is the capabilities as they go over WebSockets: the length is zero, all else as ever.
var socketCSM, _ = hex.DecodeString("00e12301000020")

// socketAnswer is 2.05 over WebSockets, with the token of a GET.
func socketAnswer(get []byte, payload []byte) []byte {
	tokenSize := get[0] & 15
	b := append([]byte{tokenSize, 0x45}, get[2:2+tokenSize]...)
	return append(append(b, 0xff), payload...)
}

// serveSocket answers all GETs with one block.
func (p *socketPeer) serveSocket(block []byte) {
	p.write(frame(final|opBinary, socketCSM))
	for {
		m := p.readMessage()
		if m == nil {
			return
		}
		if m[1] == 1 {
			p.write(frame(final|opBinary, socketAnswer(m, block)))
		}
	}
}

// TestWebSocketMessages has the messages of both sides byte for byte.
func TestWebSocketMessages(t *testing.T) {
	ref, block := newBlock(eris.BlockSize32KiB, 1)
	var group sync.WaitGroup
	group.Add(1)
	url := playSocket(t, agree, func(_ int, p *socketPeer) {
		defer group.Done()
		p.write(frame(final|opBinary, socketCSM))
		if m := p.readMessage(); !bytes.Equal(m, socketCSM) {
			t.Errorf("first message is %x, want %x", m, socketCSM)
		}
		m := p.readMessage()
		if m == nil || m[0] == 0 || m[0] > 8 {
			t.Errorf("GET is %x", m)
			return
		}
		want := append([]byte{m[0], 0x01}, m[2:2+m[0]]...)
		want = append(append(want, "\xbb.well-known\x04eris\x06blocks\x4d\x27"+ref.String()+"\xd2\x20\x80"...), 0)
		if !bytes.Equal(m, want) {
			t.Errorf("GET is %x, want %x", m, want)
		}
		// The answer comes in pieces, with a ping between them, whose answer comes between
		// messages.
		answer := socketAnswer(m, block)
		p.write(frame(opBinary, answer[:1]), frame(opContinuation, nil), frame(final|opPing, []byte("x")))
		if first, payload, _ := p.read(); first != final|opPong || string(payload) != "x" {
			t.Errorf("answer to a ping is %x %q", first, payload)
		}
		p.write(frame(opContinuation, answer[1:20000]), frame(final|opContinuation, answer[20000:]))
		// Put: head and payload are one message.
		m = p.readMessage()
		if m == nil {
			t.Error("no PUT")
			return
		}
		want = append([]byte{m[0], 0x03}, m[2:2+m[0]]...)
		want = append(append(want, "\xbb.well-known\x04eris\x06blocks\xff"...), block...)
		if !bytes.Equal(m, want) {
			t.Errorf("PUT has %d bytes, want %d", len(m), len(want))
		}
		p.write(frame(final|opBinary, append([]byte{m[0], 0x41}, m[2:2+m[0]]...)))
		if m := p.readMessage(); !bytes.Equal(m, []byte{0, 0xe4}) {
			t.Errorf("last message is %x, want Release", m)
		}
	})
	store := mustOpen(t, url, coap.Options{})
	if got, err := get(t, store, ref, eris.BlockSize32KiB); err != nil || !bytes.Equal(got, block) {
		t.Errorf("Get: %v", err)
	}
	if err := store.Put(t.Context(), ref, block); err != nil {
		t.Errorf("Put: %v", err)
	}
	store.Close()
	group.Wait()
}

// TestWebSocketHostile has servers that do not keep to the protocols. Each call must come to its
// end, and the store must work again as soon as the server does.
func TestWebSocketHostile(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	raw := func(text string) func(net.Conn, string) {
		return func(conn net.Conn, accept string) { io.WriteString(conn, strings.ReplaceAll(text, "ACCEPT", accept)) }
	}
	// reply sends frames when it has been asked.
	reply := func(make func(get []byte) []byte) func(*socketPeer) {
		return func(p *socketPeer) {
			p.write(frame(final|opBinary, socketCSM))
			p.readMessage()
			if m := p.readMessage(); m != nil {
				p.write(make(m))
				p.awaitEnd()
			}
		}
	}
	// flood sends the same bytes without end, after some others.
	flood := func(before, b []byte) func(*socketPeer) {
		return func(p *socketPeer) {
			var group sync.WaitGroup
			group.Go(p.awaitEnd)
			p.write(frame(final|opBinary, socketCSM), before)
			for p.write(bytes.Repeat(b, 100)) {
			}
			group.Wait()
		}
	}
	for _, v := range []struct {
		name      string
		handshake func(conn net.Conn, accept string)
		play      func(p *socketPeer)
		want      outcome
	}{
		{"not a WebSocket", raw("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), nil, fails},
		{"redirect", raw("HTTP/1.1 302 Found\r\nLocation: ws://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"), nil, fails},
		{"no subprotocol", raw(switching + "Sec-WebSocket-Accept: ACCEPT\r\n\r\n"), nil, fails},
		{"another subprotocol", raw(switching + "Sec-WebSocket-Accept: ACCEPT\r\nSec-WebSocket-Protocol: chat\r\n\r\n"), nil, fails},
		{"wrong key", raw(switching + "Sec-WebSocket-Accept: xxxx\r\nSec-WebSocket-Protocol: coap\r\n\r\n"), nil, fails},
		{"an extension", raw(switching + "Sec-WebSocket-Accept: ACCEPT\r\nSec-WebSocket-Protocol: coap\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n"), nil, fails},
		{"endless header", func(conn net.Conn, _ string) {
			io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nX: ")
			for {
				if _, err := conn.Write(bytes.Repeat([]byte("x"), 1<<16)); err != nil {
					return
				}
			}
		}, nil, fails},
		{"noise", func(conn net.Conn, _ string) { conn.Write(bytes.Repeat([]byte{0xff}, 1<<16)) }, nil, fails},
		{"never agrees", func(conn net.Conn, _ string) { io.Copy(io.Discard, conn) }, nil, fails},
		{"wrong bytes", nil, reply(func(get []byte) []byte { return frame(final|opBinary, socketAnswer(get, make([]byte, 1024))) }), wrong},
		{"says nothing", nil, func(p *socketPeer) { p.awaitEnd() }, fails},
		{"text", nil, reply(func(get []byte) []byte { return frame(final|opText, socketAnswer(get, block)) }), fails},
		{"length in the head", nil, reply(func(get []byte) []byte {
			b := socketAnswer(get, block)
			b[0] |= 0x10
			return frame(final|opBinary, b)
		}), fails},
		{"empty message", nil, reply(func([]byte) []byte { return frame(final|opBinary, nil) }), fails},
		{"token is cut", nil, reply(func([]byte) []byte { return frame(final|opBinary, []byte{8, 0x45, 1}) }), fails},
		{"token of 15 bytes", nil, reply(func([]byte) []byte { return frame(final|opBinary, append([]byte{15, 0x45}, make([]byte, 15)...)) }), fails},
		{"too large", nil, reply(func(get []byte) []byte { return frame(final|opBinary, socketAnswer(get, make([]byte, 70000))) }), fails},
		{"length of an exabyte", nil, reply(func([]byte) []byte { return []byte{final | opBinary, 127, 0x10, 0, 0, 0, 0, 0, 0, 0, 1} }), fails},
		{"stray continuation", nil, reply(func([]byte) []byte { return frame(final|opContinuation, []byte{0, 0}) }), fails},
		{"reserved bit", nil, reply(func(get []byte) []byte { return frame(final|0x40|opBinary, socketAnswer(get, block)) }), fails},
		{"fragmented ping", nil, reply(func([]byte) []byte { return frame(opPing, nil) }), fails},
		{"long ping", nil, reply(func([]byte) []byte { return frame(final|opPing, make([]byte, 126)) }), fails},
		{"closes", nil, reply(func([]byte) []byte { return frame(final|opClose, []byte{0x03, 0xe8}) }), fails},
		{"closes within a message", nil, func(p *socketPeer) {
			p.write(frame(final|opBinary, socketCSM))
			p.readMessage()
			m := p.readMessage()
			p.write(frame(final|opBinary, socketAnswer(m, block))[:500])
		}, fails},
		{"stops within a message", nil, reply(func(get []byte) []byte { return frame(final|opBinary, socketAnswer(get, block))[:500] }), fails},
		{"endless message", nil, flood(frame(opBinary, []byte{0}), frame(opContinuation, make([]byte, 100))), fails},
		{"endless empty fragments", nil, flood(frame(opBinary, []byte{0}), frame(opContinuation, nil)), fails},
		{"endless pings", nil, flood(nil, frame(final|opPing, []byte("x"))), fails},
		{"endless pongs", nil, flood(nil, frame(final|opPong, []byte("x"))), fails},
		{"endless capabilities", nil, flood(nil, frame(final|opBinary, socketCSM)), fails},
		{"pings, and takes no answers", nil, func(p *socketPeer) {
			p.write(frame(final|opBinary, socketCSM))
			for p.write(bytes.Repeat(frame(final|opPing, make([]byte, 125)), 100)) {
			}
		}, fails},
	} {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			options := short
			options.DialTimeout = time.Second
			store := mustOpen(t, playSocket(t, func(n int, conn net.Conn, accept string) bool {
				if n > 1 || v.handshake == nil {
					return agree(n, conn, accept)
				}
				v.handshake(conn, accept)
				return false
			}, func(n int, p *socketPeer) {
				if n > 1 { // a call tries two
					p.serveSocket(block)
				} else {
					v.play(p)
				}
			}), options)
			defer store.Close()
			_, err := get(t, store, ref, eris.BlockSize1KiB)
			v.want.check(t, err)
			recovers(t, store, ref, eris.BlockSize1KiB)
		})
	}
}

// TestWebSocketClose checks that Close does not wait for a server that does not agree that it is
// over.
func TestWebSocketClose(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	done := make(chan struct{})
	store := mustOpen(t, playSocket(t, agree, func(_ int, p *socketPeer) {
		p.write(frame(final|opBinary, socketCSM))
		p.readMessage()
		p.write(frame(final|opBinary, socketAnswer(p.readMessage(), block)))
		<-done
	}), coap.Options{})
	if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil {
		t.Error(err)
	}
	begin := time.Now()
	store.Close()
	if took := time.Since(begin); took > 4*time.Second { // it is 5 s that WebSockets would wait
		t.Errorf("Close took %v", took)
	}
	close(done)
}

// TestNginx has nginx between client and server, as a site would have that serves more than blocks.
func TestNginx(t *testing.T) {
	nginx, err := exec.LookPath("nginx")
	if err != nil {
		t.Skip("nginx is not installed")
	}
	server := startServer(t, "ws", newMemory(), readWrite)
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
	command := exec.Command(nginx, "-p", directory, "-c", "nginx.conf", "-e", filepath.Join(directory, "error.log"))
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		command.Process.Kill()
		command.Wait()
	})
	for range 1000 {
		if conn, err := net.Dial("tcp", address); err == nil {
			conn.Close()
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
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
