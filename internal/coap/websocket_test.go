// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
)

// peer is the other end of a WebSocket. Its messages are read by the library, and frames, wrong
// ones as well, are written by hand (RFC 6455).
type peer struct {
	t      *testing.T
	socket *websocket.Conn
	conn   net.Conn
	client bool // its frames are masked

	received atomic.Int64 // by us, of what was requested
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

// frame makes a frame.
func (p *peer) frame(first byte, payload []byte) []byte {
	b, mask := []byte{first}, byte(0)
	if p.client {
		mask = 0x80
	}
	switch n := len(payload); {
	case n < 126:
		b = append(b, mask|byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, mask|126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, mask|127), uint64(n))
	}
	if p.client {
		b = append(b, 0, 0, 0, 0) // a key that changes nothing
	}
	return append(b, payload...)
}

func (p *peer) write(b ...[]byte) bool {
	_, err := p.conn.Write(bytes.Join(b, nil))
	return err == nil
}

// messages returns those that come, up to Release.
func (p *peer) messages() <-chan []byte {
	messages := make(chan []byte)
	go func() {
		defer close(messages)
		for last := false; !last; {
			kind, b, err := p.socket.Read(p.t.Context())
			if err != nil || kind != websocket.MessageBinary {
				p.t.Errorf("message is %v, %v", kind, err)
				return
			}
			last = bytes.Equal(b, []byte{0, 0xe4})
			messages <- b
		}
	}()
	return messages
}

// awaitEnd reads until the connection is over, and returns the status in the last frame if it was
// to say so, or else -1.
func (p *peer) awaitEnd() websocket.StatusCode {
	for {
		if _, _, err := p.socket.Read(p.t.Context()); err != nil {
			return websocket.CloseStatus(err)
		}
	}
}

type connKey struct{}

// open makes a WebSocket in a network in memory: client says whether the peer is the client.
func open(t *testing.T, client bool) (ours net.Conn, theirs *peer) {
	type end struct {
		socket *websocket.Conn
		conn   net.Conn
	}
	accepted := make(chan end, 1)
	var network sourcetest.Network
	server := &httptest.Server{Listener: network.Listen(), Config: &http.Server{}}
	server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		socket, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{WebSocketProtocol}})
		if err != nil {
			t.Error(err)
		}
		accepted <- end{socket, r.Context().Value(connKey{}).(net.Conn)}
	})
	server.Config.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		return context.WithValue(ctx, connKey{}, conn)
	}
	server.Start()
	t.Cleanup(server.Close)
	var near end
	transport := &http.Transport{DialContext: func(ctx context.Context, _, address string) (conn net.Conn, err error) {
		near.conn, err = network.Dial(ctx, "", address)
		return near.conn, err
	}}
	var err error
	near.socket, _, err = websocket.Dial(t.Context(), server.URL, &websocket.DialOptions{
		HTTPClient: &http.Client{Transport: transport}, Subprotocols: []string{WebSocketProtocol},
	})
	must(t, err)
	far := <-accepted
	if !client {
		near, far = far, near
	}
	near.socket.SetReadLimit(-1)
	return NewWebSocket(far.socket, far.conn), &peer{t: t, socket: near.socket, conn: near.conn, client: client}
}

// play makes a connection over a WebSocket, on which a block is requested. The channels have why it
// has ended, and the request when it is done.
func play(t *testing.T, client bool, timeout time.Duration) (c *Conn, p *peer, over chan error, done chan *Exchange) {
	ours, p := open(t, client)
	c = NewConn(ours, Config{Timeout: timeout, IdleTimeout: timeout, Window: 16, Pool: NewPool(), Received: &p.received})
	over, done = make(chan error, 1), make(chan *Exchange, 1)
	go func() { over <- c.Run() }()
	t.Cleanup(func() { p.conn.Close() })
	c.Start(&Exchange{Store: wellKnown, Size: eris.BlockSize32KiB, Dst: make([]byte, 32768), Done: func(x *Exchange) { done <- x }})
	return c, p, over, done
}

var wellKnown = NewRequests(WellKnownPath())

// csm is the capabilities as they go over WebSockets: the length is zero, all else as ever.
var csm = []byte{0, 0xe1, 0x23, 1, 0, 0, 0x20}

// path and options of the requests.
const (
	path   = "\xbb.well-known\x04eris\x06blocks"
	noHash = "\x4d\x27AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
	get    = "\x01\x01\x01" + path + noHash + "\xd2\x20\x80\x00"
)

// TestWebSocket has the messages of both sides byte for byte, as server and as client of HTTP; and
// checks that the end does not wait for a peer that does not agree to it.
func TestWebSocket(t *testing.T) {
	for _, client := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) { testWebSocket(t, client) })
	}
}

func testWebSocket(t *testing.T, client bool) {
	c, p, over, done := play(t, client, time.Minute)
	messages := p.messages()
	if m := <-messages; !bytes.Equal(m, csm) {
		t.Errorf("first message is %x, want %x", m, csm)
	}
	if m := <-messages; string(m) != get {
		t.Errorf("GET is %x, want %x", m, get)
	}
	// The answer comes in pieces, with a ping between them, whose answer comes between
	// messages.
	block := bytes.Repeat([]byte{1, 2, 3, 4}, 8192)
	answer := append([]byte{1, 0x45, 1, 0xff}, block...)
	p.write(p.frame(final|opBinary, csm), p.frame(opBinary, answer[:1]), p.frame(opContinuation, nil), p.frame(final|opPing, []byte("x")))
	p.write(p.frame(opContinuation, answer[1:20000]))
	for p.received.Load() != 20000 {
		time.Sleep(time.Millisecond)
	}
	p.write(p.frame(final|opContinuation, answer[20000:]))
	if x := <-done; x.Err != nil || !bytes.Equal(x.Dst, block) {
		t.Errorf("answer has not come: %v", x.Err)
	}
	// Put: head and payload are one message.
	c.Start(&Exchange{Store: wellKnown, Payload: block, Done: func(x *Exchange) { done <- x }})
	if m := <-messages; string(m) != "\x01\x03\x02"+path+"\xff"+string(block) {
		t.Errorf("PUT has %d bytes", len(m))
	}
	p.write(p.frame(final|opBinary, []byte{1, 0x41, 2}))
	if x := <-done; x.Err != nil || x.Code != 0x41 {
		t.Errorf("answer to PUT: %v, %v", x.Code, x.Err)
	}
	// Two requests of the peer, the second in pieces.
	p.write(p.frame(final|opBinary, []byte(get)), p.frame(opBinary, []byte(get[:1])), p.frame(final|opContinuation, []byte(get[1:])))
	for range 2 {
		if m := <-messages; !bytes.Equal(m, []byte{1, 0x84, 1}) {
			t.Errorf("answer to GET is %x", m)
		}
	}
	end, begin := errors.New("enough"), time.Now()
	c.Release(0, end)
	if m := <-messages; !bytes.Equal(m, []byte{0, 0xe4}) {
		t.Errorf("last message is %x, want Release", m)
	}
	if err := <-over; err != end || time.Since(begin) > 4*time.Second { // it is 5 s that WebSockets would wait
		t.Errorf("connection ended by %v after %v", err, time.Since(begin))
	}
}

// TestWebSocketHostile has peers, as clients and as servers of HTTP, that do not keep to the
// protocols: their connections end, they are told why, and what was requested from them fails.
func TestWebSocketHostile(t *testing.T) {
	const any = -2
	one := func(first byte, payload []byte) func(*peer) []byte {
		return func(p *peer) []byte { return p.frame(first, payload) }
	}
	nothing := func(*peer) []byte { return nil }
	answer := append([]byte{1, 0x45, 1, 0xff}, make([]byte, 1024)...)
	for _, v := range []struct {
		name   string
		before func(p *peer) []byte // nil for the capabilities
		send   func(p *peer) []byte
		repeat bool
		want   websocket.StatusCode // of the close frame
	}{
		{"text", nil, one(final|opText, answer), false, websocket.StatusUnsupportedData},
		{"length in the head", nil, one(final|opBinary, append([]byte{0x11}, answer[1:]...)), false, websocket.StatusPolicyViolation},
		{"empty message", nil, one(final|opBinary, nil), false, websocket.StatusPolicyViolation},
		{"token is cut", nil, one(final|opBinary, []byte{8, 0x45, 1}), false, websocket.StatusPolicyViolation},
		{"token of 9 bytes", nil, one(final|opBinary, append([]byte{9, 0x45}, make([]byte, 20)...)), false, websocket.StatusPolicyViolation},
		{"too large", nil, one(final|opBinary, append([]byte{1, 0x45, 1, 0xff}, make([]byte, 70000)...)), false, websocket.StatusMessageTooBig},
		{"answer before capabilities", nothing, one(final|opBinary, answer), false, websocket.StatusNormalClosure},
		{"closes", nil, one(final|opClose, []byte{0x03, 0xe8}), false, websocket.StatusNormalClosure},
		{"stops within a message", nil, func(p *peer) []byte { return p.frame(final|opBinary, answer)[:500] }, false, any},
		{"says nothing", nothing, nothing, false, any},
		{"endless message", one(opBinary, []byte{0}), one(opContinuation, make([]byte, 1000)), true, any},
		{"endless empty fragments", one(opBinary, []byte{0}), one(opContinuation, nil), true, any},
		{"endless pings", nil, one(final|opPing, []byte("x")), true, any},
		{"endless pongs", nil, one(final|opPong, []byte("x")), true, any},
		{"endless capabilities", nil, one(final|opBinary, csm), true, any},
		{"endless answers to nobody", nil, one(final|opBinary, append([]byte{1, 0x45, 9, 0xff}, make([]byte, 32768)...)), true, any},
	} {
		for _, client := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/client=%v", v.name, client), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					_, p, over, done := play(t, client, 300*time.Millisecond)
					before := one(final|opBinary, csm)
					if v.before != nil {
						before = v.before
					}
					var group sync.WaitGroup
					defer group.Wait()
					b := v.send(p)
					group.Go(func() {
						p.write(before(p))
						for p.write(b) && v.repeat {
							b = bytes.Repeat(v.send(p), 100)
							time.Sleep(time.Millisecond)
						}
					})
					if got := p.awaitEnd(); v.want != any && got != v.want {
						t.Errorf("status is %d, want %d", got, v.want)
					}
					p.conn.Close()
					if x := <-done; x.Err == nil {
						t.Error("the request does not fail")
					}
					if err := <-over; err == nil {
						t.Error("the connection does not say why it has ended")
					}
					if n := p.received.Load(); v.repeat && n != 0 {
						t.Errorf("%d bytes count that nobody has asked for", n)
					}
				})
			})
		}
	}
}

// FuzzWebSocket compares the head that a message over WebSockets is given with what is left when it
// is taken off.
func FuzzWebSocket(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{0, 0xe1, 0x23, 1, 0, 0, 0x20})
	f.Add([]byte{8, 0x45, 1, 2, 3, 4, 5, 6, 7, 8})
	f.Add([]byte{9, 0x45, 1, 2, 3, 4, 5, 6, 7, 8, 9})
	f.Add([]byte{0x10, 0x45})
	for _, n := range []int{12, 13, 268, 269, MessageSize - 2} {
		f.Add(append([]byte{1, 0x45, 7}, make([]byte, n)...))
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		if len(message) > MessageSize {
			return
		}
		b := append(make([]byte, headRoom), message...)
		start, err := fromWebSocket(b)
		if err != nil {
			if len(message) >= 2 && message[0] <= maxTokenSize && len(message) >= 2+int(message[0]) {
				t.Errorf("%x: %v", message, err)
			}
			return
		}
		head, err := ParseHead(b[start:], 2*MessageSize)
		if err != nil {
			t.Fatalf("%x: %v", message, err)
		}
		if head.Size+head.Length != len(b)-start {
			t.Errorf("%x: head says %d bytes of %d", message, head.Size+head.Length, len(b)-start)
		}
		back := bytes.Clone(b[start+head.Size-2-int(head.Token.Size):])
		back[0] = head.Token.Size
		if !bytes.Equal(back, message) {
			t.Errorf("%x has become %x", message, back)
		}
	})
}
