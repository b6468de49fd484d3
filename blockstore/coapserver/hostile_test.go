// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	fetchcoap "codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/coaptest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// TestHostile has clients that do not keep to the protocol. Each connection must come to its end
// within bounded time, and others must be served meanwhile.
func TestHostile(t *testing.T) {
	ref, block := sourcetest.NewBlock(eris.BlockSize1KiB)
	fromHex := func(text string) []byte {
		b, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
		must(t, err)
		return b
	}
	csmAnd := func(text string) func(*client) {
		return func(c *client) { c.write(append(bytes.Clone(csm), fromHex(text)...)) }
	}
	flood := func(b []byte) func(*client) {
		return func(c *client) {
			c.write(csm)
			for c.write(bytes.Repeat(b, 100)) {
				time.Sleep(time.Millisecond)
			}
		}
	}
	large := putRequest(1, coap.Block{}, make([]byte, eris.BlockSize32KiB))
	for _, v := range []struct {
		name string
		play func(c *client)
		last codes.Code // of what the server says last; 0: of no interest
	}{
		{"says nothing", func(*client) {}, codes.Release},
		{"says nothing after its capabilities", csmAnd(""), codes.Release},
		{"request first", func(c *client) { c.write(getRequest(1, ref, eris.BlockSize1KiB, coap.Block{})) }, codes.Abort},
		{"large request first", func(c *client) { c.write(large[:20000]) }, codes.Abort},
		{"noise", func(c *client) { c.write(block) }, codes.Abort},
		{"length of 4 GiB", csmAnd("f1 ffffffff 03 01"), codes.Abort},
		{"length above what was announced", csmAnd("e1 ffff 03 01"), codes.Abort},
		{"token of 9 bytes", csmAnd("09 01"), codes.Abort},
		{"unknown signal", csmAnd("00 ff"), codes.Abort},
		{"unknown class", csmAnd("00 20"), codes.Abort},
		{"unknown critical option in capabilities", csmAnd("10 e1 30"), codes.Abort},
		{"number of five bytes in capabilities", csmAnd("60 e1 250000000001"), codes.Abort},
		{"ping with an unknown critical option", csmAnd("10 e2 10"), codes.Abort},
		{"ping with a malformed option", csmAnd("10 e2 f0"), codes.Abort},
		{"pong with an unknown critical option", csmAnd("10 e3 30"), codes.Abort},
		{"Release with an unknown critical option", csmAnd("10 e4 10"), codes.Abort},
		{"half a head", csmAnd("d1"), codes.CSM},
		{"half a request", csmAnd("d1 31 01 01 bb"), codes.CSM},
		{"half a large request", func(c *client) { c.write(append(bytes.Clone(csm), large[:20000]...)) }, codes.CSM},
		{"head of a large request", func(c *client) { c.write(append(bytes.Clone(csm), large[:6]...)) }, codes.CSM},
		{"drips", func(c *client) {
			c.write(csm)
			for _, b := range large {
				if !c.write([]byte{b}) {
					return
				}
				time.Sleep(time.Millisecond)
			}
		}, 0},
		{"endless capabilities", flood(csm), 0},
		{"endless pings", flood(fromHex("01 e2 07")), 0},
		{"endless empty messages", flood(fromHex("00 00")), 0},
		{"endless answers", flood(fromHex("01 45 07")), 0},
		{"endless large answers", flood(coaptest.Stream(codes.Content, coaptest.Token(1), nil, make([]byte, 20000))), 0},
		{"endless requests, answers not read", flood(getRequest(1, ref, eris.BlockSize1KiB, coap.Block{})), 0},
		{"endless bad requests, answers not read", flood(fromHex("01 01 07")), 0},
		{"endless blocks, answers not read", flood(putRequest(1, coap.Block{}, block)), 0},
		{"Release", csmAnd("00 e4"), codes.CSM},
		{"Abort", csmAnd("00 e5"), 0},
	} {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			inNetwork(t, func(t *testing.T, network *sourcetest.Network) {
				store := newMemory()
				defer store.Close()
				store.Set(ref, block)
				open := serveIn(t, network, coapserver.Config{
					Source: store, Sink: store,
					MessageTimeout: 200 * time.Millisecond,
					IdleTimeout:    400 * time.Millisecond,
				})
				c := open()
				var group sync.WaitGroup
				defer group.Wait()
				group.Go(func() { v.play(c) })
				if v.last == 0 {
					group.Wait() // nobody reads meanwhile
				}
				last := c.awaitEnd()
				c.conn.Close()
				if v.last != 0 && last != v.last {
					t.Errorf("last message is %v, want %v", last, v.last)
				}
				good := open(csm...)
				good.write(getRequest(1, ref, eris.BlockSize1KiB, coap.Block{}))
				good.want(codes.Content) // others are served
			})
		})
	}
}

// TestHostileMemory checks that lengths alone make the server allocate nothing.
func TestHostileMemory(t *testing.T) {
	address := serve(t, "unix", newMemory())
	const calls = 20
	n := testhelp.Allocated(func() {
		for range calls {
			c := dial(t, "unix", address, csm...)
			c.write([]byte{0xf0, 0xff, 0xff, 0xff, 0xff, 0x03})
			c.awaitEnd() // with what as its last words, if there is time for them, TestHostile says
		}
	})
	if n > calls<<20 {
		t.Errorf("%d bytes were allocated", n)
	}
}

// TestUnserved has a further client come before one has been served at all: the connection of that
// makes room.
func TestUnserved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var network sourcetest.Network
		listener := network.Listen()
		server := coapserver.New(coapserver.Config{MaxConnections: 1})
		access := readWrite
		access.Connected = func(*coap.Conn, string) func() {
			time.Sleep(time.Minute)
			return func() {}
		}
		var group sync.WaitGroup
		group.Go(func() { must(t, server.Serve(listener, access)) })
		defer group.Wait()
		defer server.Close()
		for range 2 {
			conn, err := network.Dial(t.Context(), "tcp", listener.Addr().String())
			must(t, err)
			defer conn.Close()
			time.Sleep(time.Second)
		}
		if s := server.Stats(); s.TurnedAway != 0 {
			t.Errorf("%+v", s)
		}
	})
}

// TestMaxConnections checks that connections beyond the limit are closed as long as something is
// requested on all others, and that those where nothing is make room.
func TestMaxConnections(t *testing.T) {
	for _, network := range []string{"tcp", "ws"} {
		t.Run(network, func(t *testing.T) {
			store := &held{release: make(chan struct{})}
			logged := make(chan error, 9)
			config := coapserver.Config{Source: store.source(t), MaxConnections: 3, Log: func(err error) { logged <- err }}
			server, address := serveConfig(t, network, readWrite, config)
			ref, _ := sourcetest.NewBlock(eris.BlockSize1KiB)
			open := func() *fetchcoap.Store {
				client, err := fetchcoap.Open("coap+"+network+"://"+address, fetchcoap.Options{})
				must(t, err)
				t.Cleanup(func() { client.Close() })
				return client
			}
			done := make(chan *fetch.Request, 3)
			for i := range cap(done) {
				r := &fetch.Request{Size: eris.BlockSize1KiB, Dst: make([]byte, 0, 1024), Done: func(r *fetch.Request) { done <- r }}
				r.Pair.Reference = ref
				open().Start(r)
				for store.calls.Load() <= int64(i) {
					pause()
				}
			}
			other := open()
			if _, err := fetch.Get(t.Context(), other, ref, eris.BlockSize1KiB, nil); errors.Is(err, eris.ErrNotFound) || server.Stats().TurnedAway == 0 {
				t.Errorf("a connection beyond the limit is served: %v", err)
			}
			if err := <-logged; !strings.Contains(err.Error(), "connections turned away") {
				t.Errorf("logged: %v", err)
			}
			close(store.release)
			for range cap(done) {
				if r := <-done; !errors.Is(r.Err, eris.ErrNotFound) {
					t.Errorf("a connection within the limit is not served: %v", r.Err)
				}
			}
			for range 12000 {
				if _, err := fetch.Get(t.Context(), other, ref, eris.BlockSize1KiB, nil); errors.Is(err, eris.ErrNotFound) {
					return
				}
				pause()
			}
			t.Error("connections where nothing is requested do not make room")
		})
	}
}

// TestHalfClosed checks that a client that says all it has to say, and closes its side, still gets
// all its answers.
func TestHalfClosed(t *testing.T) {
	store := newMemory()
	ref, _ := store.Add(eris.BlockSize1KiB)
	address := serve(t, "tcp", store)
	c := dial(t, "tcp", address, csm...)
	for i := range 100 {
		c.write(getRequest(uint32(i), ref, eris.BlockSize1KiB, coap.Block{}))
		c.write(putRequest(uint32(1000+i), coap.Block{}, make([]byte, eris.BlockSize32KiB)))
	}
	c.conn.(*net.TCPConn).CloseWrite()
	for range 200 {
		if m := c.readAnswer(); m.Code != codes.Content && m.Code != codes.Created {
			t.Fatalf("answer %v", m.Code)
		}
	}
}
