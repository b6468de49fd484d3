// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver_test

import (
	"bytes"
	"encoding/hex"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/coaptest"
)

// TestHostile has clients that do not keep to the protocol. Each connection must come to its end
// within bounded time, and others must be served meanwhile.
func TestHostile(t *testing.T) {
	store := newMemory()
	ref, block := store.add(t, eris.BlockSize1KiB)
	_, address := serveConfig(t, "unix", readWrite, coapserver.Config{
		Resources:      []coapserver.Resource{{Source: store, Sink: store}},
		MessageTimeout: 200 * time.Millisecond,
		IdleTimeout:    400 * time.Millisecond,
	})
	fromHex := func(text string) []byte {
		b, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	csmAnd := func(text string) func(*client) {
		return func(c *client) { c.write(append(bytes.Clone(csm), fromHex(text)...)) }
	}
	flood := func(b []byte) func(*client) {
		return func(c *client) {
			c.write(csm)
			for c.write(bytes.Repeat(b, 100)) {
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
			c := dial(t, "unix", address)
			v.play(c)
			last := c.awaitEnd()
			if v.last != 0 && last != v.last {
				t.Errorf("last message is %v, want %v", last, v.last)
			}
			good := dial(t, "unix", address, csm...)
			good.write(getRequest(1, ref, eris.BlockSize1KiB, coap.Block{}))
			if m := good.readAnswer(); m.Code != codes.Content {
				t.Errorf("others are not served: %v", m.Code)
			}
		})
	}
}

// TestHostileMemory checks that lengths alone make the server allocate nothing.
func TestHostileMemory(t *testing.T) {
	address := serve(t, "unix", newMemory())
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	const calls = 20
	for range calls {
		c := dial(t, "unix", address, csm...)
		c.write([]byte{0xf0, 0xff, 0xff, 0xff, 0xff, 0x03})
		if last := c.awaitEnd(); last != codes.Abort {
			t.Errorf("last message is %v", last)
		}
	}
	runtime.ReadMemStats(&after)
	if most := uint64(calls * 1 << 20); after.TotalAlloc-before.TotalAlloc > most {
		t.Errorf("%d bytes were allocated", after.TotalAlloc-before.TotalAlloc)
	}
}

// holding is a source whose requests wait until release is closed.
type holding struct {
	*memory
	started chan struct{}
	release chan struct{}
}

func (h *holding) Start(r *fetch.Request) {
	go func() {
		h.started <- struct{}{}
		<-h.release
		h.memory.Start(r)
	}()
}

// TestMaxConnections checks that a connection beyond the limit is closed if all others are busy,
// which is logged, and that the one that has been idle the longest makes room otherwise.
func TestMaxConnections(t *testing.T) {
	source := &holding{newMemory(), make(chan struct{}), make(chan struct{})}
	ref, _ := source.add(t, eris.BlockSize1KiB)
	logged := make(chan error, 9)
	server, address := serveConfig(t, "unix", readWrite, coapserver.Config{
		Resources: []coapserver.Resource{{Source: source}}, MaxConnections: 3, Log: func(err error) { logged <- err },
	})
	get := getRequest(1, ref, eris.BlockSize1KiB, coap.Block{})
	var clients []*client
	for range 3 {
		c := dial(t, "unix", address, csm...)
		c.write(get)
		<-source.started
		clients = append(clients, c)
	}
	c := dial(t, "unix", address, csm...)
	c.write(get)
	if m := c.readAnswer(); m.Code != codes.Empty {
		t.Errorf("a connection beyond the limit is served: %v", m.Code)
	}
	if err := <-logged; !strings.Contains(err.Error(), "1 connections turned away") {
		t.Errorf("logged: %v", err)
	}
	close(source.release)
	for _, c := range clients {
		if m := c.readAnswer(); m.Code != codes.Content {
			t.Errorf("answer %v of a connection within the limit", m.Code)
		}
	}
	// They are idle in a moment, and make room for others, whatever these do.
	go func() {
		for range source.started {
		}
	}()
	defer close(source.started)
	for i := range 6 {
		for tries := 0; ; tries++ {
			c := dial(t, "unix", address, csm...)
			c.write(get)
			if m := c.readAnswer(); m.Code == codes.Content {
				break
			} else if tries == 1000 {
				t.Fatalf("there is no room for connection %d although others are idle", i)
			}
			pause()
		}
	}
	for i, c := range clients {
		if _, ok := c.read(); ok {
			t.Errorf("connection %d has not made room", i)
		}
	}
	if s := server.Stats(); s.Connections > 3 {
		t.Errorf("%d connections", s.Connections)
	}
}

// TestHalfClosed checks that a client that says all it has to say, and closes its side, still gets
// all its answers.
func TestHalfClosed(t *testing.T) {
	store := newMemory()
	ref, _ := store.add(t, eris.BlockSize1KiB)
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

// TestPipe serves a connection that is neither a socket of TCP nor a Unix socket, as one of a
// WebSocket is.
func TestPipe(t *testing.T) {
	store := newMemory()
	ref, want := store.add(t, eris.BlockSize32KiB)
	server, err := coapserver.New(coapserver.Config{Resources: []coapserver.Resource{{Source: store, Sink: store}}})
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := net.Pipe()
	var group sync.WaitGroup
	group.Go(func() { server.ServeConn(theirs, readWrite) })
	c := newClient(t, ours)
	group.Go(func() {
		c.write(csm)
		for i := range 50 {
			c.write(getRequest(uint32(i), ref, eris.BlockSize32KiB, coap.Block{}))
			c.write(putRequest(uint32(i), coap.Block{}, want))
		}
	})
	for range 100 {
		if m := c.readAnswer(); m.Code != codes.Created && (m.Code != codes.Content || !bytes.Equal(m.Payload, want)) {
			t.Fatalf("answer %v", m.Code)
		}
	}
	ours.Close()
	group.Wait()
	server.Close()
}
