// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/coaptest"
)

func newMemory() *sourcetest.Store { return sourcetest.NewBackend().Open(64) }

// pause waits a little for something that cannot be waited for otherwise.
func pause() { time.Sleep(5 * time.Millisecond) }

var readWrite = coapserver.Access{Get: true, Put: true}

// serve serves a store, and returns the address.
func serve(tb testing.TB, network string, store *sourcetest.Store) string {
	_, address := serveConfig(tb, network, readWrite, coapserver.Config{Source: store, Sink: store})
	return address
}

func serveConfig(tb testing.TB, network string, access coapserver.Access, config coapserver.Config) (*coapserver.Server, string) {
	server := coapserver.New(config)
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(tb.TempDir(), "s")
	}
	var group sync.WaitGroup
	if network == "udp" {
		conn, err := net.ListenPacket("udp", address)
		must(tb, err)
		address = conn.LocalAddr().String()
		group.Go(func() { server.ServePacket(conn, access) })
	} else {
		listener, err := net.Listen(strings.Replace(network, "ws", "tcp", 1), address)
		must(tb, err)
		address = listener.Addr().String()
		serve := server.Serve
		if network == "ws" {
			serve = server.ServeWebSocket
		}
		group.Go(func() {
			if err := serve(listener, access); err != nil {
				tb.Errorf("served until %v", err)
			}
		})
	}
	tb.Cleanup(func() {
		server.Close()
		group.Wait()
	})
	return server, address
}

// inNetwork runs a test in a bubble with a network.
func inNetwork(t *testing.T, test func(t *testing.T, network *sourcetest.Network)) {
	synctest.Test(t, func(t *testing.T) { test(t, new(sourcetest.Network)) })
}

// serveIn serves in a network; what it returns is as [dial].
func serveIn(t *testing.T, network *sourcetest.Network, config coapserver.Config) (open func(first ...byte) *client) {
	server, listener := coapserver.New(config), network.Listen()
	go server.Serve(listener, readWrite)
	t.Cleanup(func() { server.Close() })
	return func(first ...byte) *client {
		conn, err := network.Dial(t.Context(), "tcp", listener.Addr().String())
		must(t, err)
		return newClient(t, conn, first)
	}
}

// TestAnswers checks what is answered to what, byte for byte where the whole of the answer is
// known.
func TestAnswers(t *testing.T) {
	store := newMemory()
	small, smallBlock := store.Add(eris.BlockSize1KiB)
	large, largeBlock := store.Add(eris.BlockSize32KiB)
	newSmall, newSmallBlock := sourcetest.NewBlock(eris.BlockSize1KiB)
	serveThe := func(source fetch.Source, sink coapserver.Sink, access coapserver.Access) string {
		_, address := serveConfig(t, "tcp", access, coapserver.Config{Source: source, Sink: sink})
		return address
	}
	address := serveThe(store, store, readWrite)
	getOnly, putOnly := serveThe(store, store, coapserver.Access{Get: true}), serveThe(store, store, coapserver.Access{Put: true})
	noSource, noSink := serveThe(nil, store, readWrite), serveThe(store, nil, readWrite)
	failing := serveThe(failingSource{store, errors.New("disk broken")}, sink{errors.New("disk full")}, readWrite)
	readOnly := serveThe(nil, sink{fetch.ErrReadOnly}, readWrite)
	wellKnown := func(options ...any) []any {
		return append([]any{11, ".well-known", 11, "eris", 11, "blocks"}, options...)
	}
	for _, v := range []struct {
		name    string
		address string
		send    []byte
		code    codes.Code
		payload []byte
	}{
		{"GET, Base32, Size1", address, request(codes.GET, "", wellKnown(15, small.String(), 60, "\x04\x00")...), codes.Content, smallBlock},
		{"GET, Base32", address, request(codes.GET, "", wellKnown(15, small.String())...), codes.Content, smallBlock},
		{"GET, raw", address, request(codes.GET, "", wellKnown(15, string(small[:]))...), codes.Content, smallBlock},
		{"GET, raw, Size1", address, request(codes.GET, "", wellKnown(15, string(large[:]), 60, "\x80\x00")...), codes.Content, largeBlock},
		{"GET, large, no size", address, request(codes.GET, "", wellKnown(15, string(large[:]))...), codes.Content, largeBlock},
		{"GET, other size", address, request(codes.GET, "", wellKnown(15, small.String(), 60, "\x80\x00")...), codes.NotFound, nil},
		{"GET, size that is none", address, request(codes.GET, "", wellKnown(15, small.String(), 60, "\x04\x01")...), codes.BadRequest, nil},
		{"GET, missing", address, request(codes.GET, "", wellKnown(15, newSmall.String(), 60, "\x04\x00")...), codes.NotFound, nil},
		{"GET, no reference", address, request(codes.GET, "", wellKnown()...), codes.BadRequest, nil},
		{"GET, wrong reference", address, request(codes.GET, "", wellKnown(15, "hello")...), codes.BadRequest, nil},
		{"GET, other path", address, request(codes.GET, "", 11, ".well-known", 11, "core"), codes.NotFound, nil},
		{"GET, no path", address, request(codes.GET, ""), codes.NotFound, nil},
		{"GET, Uri-Host", address, request(codes.GET, "", append([]any{3, "localhost", 7, "\x16\x33"}, wellKnown(15, small.String())...)...), codes.Content, smallBlock},
		{"GET, no source", noSource, request(codes.GET, "", wellKnown(15, small.String())...), codes.MethodNotAllowed, nil},
		{"GET, failing", failing, request(codes.GET, "", wellKnown(15, small.String())...), codes.InternalServerError, nil},
		{"GET, not permitted", putOnly, request(codes.GET, "", wellKnown(15, small.String())...), codes.MethodNotAllowed, nil},
		{"GET, unknown critical option", address, request(codes.GET, "", wellKnown(15, small.String(), 2049, "")...), codes.BadOption, nil},
		{"GET, unknown elective option", address, request(codes.GET, "", wellKnown(15, small.String(), 2048, "")...), codes.Content, smallBlock},
		{"GET, part", address, request(codes.GET, "", wellKnown(15, large.String(), 23, "\x16")...), codes.Content, largeBlock[1024:2048]},
		{"GET, part of 16 bytes", address, request(codes.GET, "", wellKnown(15, large.String(), 23, "\x7f\xf0")...), codes.Content, largeBlock[32752:]},
		{"GET, BERT", address, request(codes.GET, "", wellKnown(15, large.String(), 23, "\x1f\x07"[1:])...), codes.Content, largeBlock},
		{"GET, part behind the end", address, request(codes.GET, "", wellKnown(15, large.String(), 23, "\x02\x06")...), codes.BadRequest, nil},
		{"PUT", address, request(codes.PUT, string(newSmallBlock), wellKnown()...), codes.Created, nil},
		{"PUT, again, with a query", address, request(codes.PUT, string(newSmallBlock), wellKnown(15, large.String())...), codes.Created, nil},
		{"POST", address, request(codes.POST, string(largeBlock), wellKnown()...), codes.Created, nil},
		{"PUT, no sink", noSink, request(codes.PUT, string(largeBlock), wellKnown()...), codes.MethodNotAllowed, nil},
		{"PUT, failing", failing, request(codes.PUT, string(largeBlock), wellKnown()...), codes.InternalServerError, nil},
		{"PUT, store is read-only", readOnly, request(codes.PUT, string(largeBlock), wellKnown()...), codes.MethodNotAllowed, nil},
		{"PUT, other path", address, request(codes.PUT, string(largeBlock), 11, "nowhere", 11, "blocks"), codes.NotFound, nil},
		{"PUT, not permitted", getOnly, request(codes.PUT, string(largeBlock), wellKnown()...), codes.MethodNotAllowed, nil},
		{"PUT, small, not permitted", getOnly, request(codes.PUT, string(smallBlock), wellKnown()...), codes.MethodNotAllowed, nil},
		{"PUT, no payload", address, request(codes.PUT, "", wellKnown()...), codes.BadRequest, nil},
		{"PUT, one byte less", address, request(codes.PUT, string(largeBlock[1:]), wellKnown()...), codes.BadRequest, nil},
		{"PUT, one byte more", address, request(codes.PUT, string(smallBlock)+"x", wellKnown()...), codes.BadRequest, nil},
		{"PUT, as much as fits", address, request(codes.PUT, strings.Repeat("x", 65000), wellKnown()...), codes.BadRequest, nil},
		{"PUT, unknown critical option", address, request(codes.PUT, string(largeBlock), wellKnown(2049, "")...), codes.BadOption, nil},
		{"PUT, the one and only part", address, request(codes.PUT, string(smallBlock), wellKnown(27, "\x06")...), codes.Created, nil},
		{"PUT, part that has no beginning", address, request(codes.PUT, string(smallBlock), wellKnown(27, "\x16")...), codes.RequestEntityIncomplete, nil},
		{"PUT, part of another length", address, request(codes.PUT, string(smallBlock[1:]), wellKnown(27, "\x0e")...), codes.BadRequest, nil},
		{"PUT, part of something large", address, request(codes.PUT, string(smallBlock), wellKnown(27, "\x0e", 60, "\x01\x00\x00")...), codes.RequestEntityTooLarge, nil},
		{"DELETE", address, request(codes.DELETE, "", wellKnown()...), codes.MethodNotAllowed, nil},
		{"FETCH", address, request(5, "", wellKnown()...), codes.MethodNotAllowed, nil},
		{"Proxy-Uri", address, request(codes.GET, "", 35, "coap://example.net"), codes.ProxyingNotSupported, nil},
	} {
		c := dial(t, "tcp", v.address, csm...)
		c.write(v.send)
		m := c.readAnswer()
		if m.Code != v.code || m.Token != coaptest.Token(1) {
			t.Errorf("%s: answer is %v, want %v", v.name, m.Code, v.code)
		} else if v.code == codes.Content && !bytes.Equal(m.Payload, v.payload) {
			t.Errorf("%s: wrong payload of %d bytes", v.name, len(m.Payload))
		} else if v.name == "PUT, failing" && !strings.Contains(string(m.Payload), "the log") {
			t.Errorf("%s: the client hears %q", v.name, m.Payload)
		}
		// The connection goes on.
		c.write(getRequest(2, small, eris.BlockSize1KiB, coap.Block{}))
		if m := c.readAnswer(); m.Token != coaptest.Token(2) {
			t.Errorf("%s: the connection does not go on: %v", v.name, m.Code)
		}
		c.conn.Close()
	}
	if !store.Has(newSmall) {
		t.Error("a block is not where it was put")
	}
	// The frames of RFC 8323, section 3.2, byte for byte.
	c := dial(t, "tcp", address, csm...)
	c.write(request(codes.PUT, string(smallBlock), wellKnown()...))
	c.readAnswer()
	c.write(getRequest(1, newSmall, eris.BlockSize32KiB, coap.Block{}))
	b := make([]byte, 3)
	if io.ReadFull(c.r, b); !bytes.Equal(b, []byte{0x01, 0x84, 0x01}) {
		t.Errorf("4.04 is % x", b)
	}
	c.write(request(codes.PUT, string(smallBlock), wellKnown()...))
	if io.ReadFull(c.r, b); !bytes.Equal(b, []byte{0x01, 0x41, 0x01}) {
		t.Errorf("2.01 is % x", b)
	}
}

// sink takes nothing.
type sink struct{ err error }

func (s sink) PutBatch(context.Context, []eris.Reference, [][]byte) error { return s.err }

// failingSource has no block, for a reason of its own.
type failingSource struct {
	fetch.Source
	err error
}

func (s failingSource) Start(r *fetch.Request) {
	r.Err = s.err
	r.Done(r)
}

// TestParts fetches and puts a block of 32 KiB with clients of different capabilities.
func TestParts(t *testing.T) {
	store := newMemory()
	ref, block := store.Add(eris.BlockSize32KiB)
	address := serve(t, "unix", store)
	for _, v := range []struct {
		name     string
		csm      []byte
		messages int // 0: refused
		exponent uint8
	}{
		{"whole", csm, 1, 0},
		{"says nothing", []byte{0, 0xe1}, 1, 0},
		{"base size", []byte{0x30, 0xe1, 0x22, 0x04, 0x80}, 0, 0},
		{"block-wise", []byte{0x10, 0xe1, 0x40}, 32, 6},
		{"block-wise, less than base size", []byte{0x40, 0xe1, 0x22, 0x02, 0x58, 0x20}, 64, 5},
		{"BERT of one unit", []byte{0x40, 0xe1, 0x22, 0x05, 0x00, 0x20}, 32, coap.BERT},
		{"BERT", []byte{0x40, 0xe1, 0x22, 0x10, 0x00, 0x20}, 11, coap.BERT},
	} {
		c := dial(t, "unix", address, v.csm...)
		var got []byte
		messages := 0
		for part := (coap.Block{}); ; {
			c.write(getRequest(7, ref, eris.BlockSize32KiB, part))
			m := c.readAnswer()
			if v.messages == 0 {
				if m.Code != codes.InternalServerError {
					t.Errorf("%s: code %v", v.name, m.Code)
				}
				break
			}
			messages++
			if m.Code != codes.Content || m.Block(message.Block2).Offset() != len(got) || m.Block(message.Block2).Exponent != v.exponent {
				t.Errorf("%s: answer %v, %+v", v.name, m.Code, m.Options)
				break
			}
			got = append(got, m.Payload...)
			if !m.Block(message.Block2).More {
				break
			}
			part = coap.Block{Exponent: v.exponent, Present: true}
			part.Number = uint32(len(got) / part.Unit())
		}
		if messages != v.messages || v.messages != 0 && !bytes.Equal(got, block) {
			t.Errorf("%s: %d bytes in %d messages", v.name, len(got), messages)
		}
	}
	for _, v := range []struct {
		exponent uint8
		most     int
	}{{6, 1024}, {2, 64}, {coap.BERT, 3072}, {coap.BERT, 32768}} {
		c := dial(t, "unix", address, csm...)
		ref, block := sourcetest.NewBlock(eris.BlockSize32KiB)
		for sent := 0; sent < len(block); {
			part := coap.Block{Exponent: v.exponent, Present: true}
			part.Number = uint32(sent / part.Unit())
			n := min(v.most, len(block)-sent)
			part.More = sent+n < len(block)
			c.write(putRequest(9, part, block[sent:sent+n]))
			sent += n
			want := codes.Continue
			if !part.More {
				want = codes.Created
			}
			if m := c.readAnswer(); m.Code != want || m.Block(message.Block1) != part {
				t.Fatalf("parts of %d: answer %v, %+v to %+v", v.most, m.Code, m.Options, part)
			}
		}
		if !store.Has(ref) {
			t.Errorf("parts of %d: the block is not there", v.most)
		}
	}
	// A gap, and what is too long in all.
	c := dial(t, "unix", address, csm...)
	for _, v := range []struct {
		part coap.Block
		want codes.Code
	}{
		{coap.Block{Number: 0, More: true, Exponent: 6, Present: true}, codes.Continue},
		{coap.Block{Number: 2, More: true, Exponent: 6, Present: true}, codes.RequestEntityIncomplete},
		{coap.Block{Number: 1, More: true, Exponent: 6, Present: true}, codes.Continue},
		{coap.Block{Number: 1, More: true, Exponent: 6, Present: true}, codes.Continue},
		{coap.Block{Number: 2, More: false, Exponent: 6, Present: true}, codes.BadRequest},
		{coap.Block{Number: 3, More: true, Exponent: 6, Present: true}, codes.RequestEntityIncomplete},
		{coap.Block{Number: 40, More: true, Exponent: 6, Present: true}, codes.RequestEntityIncomplete},
		{coap.Block{Number: 0, More: true, Exponent: 6, Present: true}, codes.Continue},
		{coap.Block{Number: 40, More: true, Exponent: 6, Present: true}, codes.RequestEntityTooLarge},
	} {
		c.write(putRequest(9, v.part, make([]byte, 1024)))
		if m := c.readAnswer(); m.Code != v.want {
			t.Errorf("part %+v: %v, want %v", v.part, m.Code, v.want)
		}
	}
}

// TestRelay checks from where a block comes where clients may have others asked, and what is
// answered to a request that may not go on (RFC 8768).
func TestRelay(t *testing.T) {
	own, others := newMemory(), newMemory()
	small, block := others.Add(eris.BlockSize1KiB)
	missing, _ := sourcetest.NewBlock(eris.BlockSize1KiB)
	seen := make(chan string, 1)
	access := coapserver.Access{Get: true, Relay: func(client string, hops int) fetch.Source {
		seen <- fmt.Sprint(client, " ", hops)
		if hops == 1 {
			return own
		}
		return others
	}}
	config := coapserver.Config{Source: own}
	_, address := serveConfig(t, "tcp", access, config)
	_, socket := serveConfig(t, "unix", access, config)
	_, plain := serveConfig(t, "tcp", coapserver.Access{Get: true}, config)
	for _, v := range []struct {
		network, address string
		ref              eris.Reference
		limit, size      string
		seen             string
		code             codes.Code
	}{
		{"tcp", address, small, "", "\x04\x00", "127.0.0.1/32 0", codes.Content},
		{"tcp", address, small, "\x02", "\x04\x00", "127.0.0.1/32 2", codes.Content},
		{"tcp", address, small, "\x02", "", "127.0.0.1/32 2", codes.Content},
		{"tcp", address, small, "\x01", "\x04\x00", "127.0.0.1/32 1", coap.HopLimitReached},
		{"tcp", address, small, "\x01", "", "127.0.0.1/32 1", coap.HopLimitReached},
		{"unix", socket, missing, "", "\x04\x00", " 0", codes.NotFound},
		{"tcp", plain, small, "\x02", "\x04\x00", "", codes.NotFound},
		{"tcp", plain, small, "\x01", "\x04\x00", "", codes.NotFound},
	} {
		options := []any{11, ".well-known", 11, "eris", 11, "blocks", 15, v.ref.String()}
		if v.limit != "" {
			options = append(options, 16, v.limit)
		}
		if v.size != "" {
			options = append(options, 60, v.size)
		}
		c := dial(t, v.network, v.address, csm...)
		c.write(request(codes.GET, "", options...))
		m := c.readAnswer()
		got := ""
		if v.seen != "" {
			got = <-seen
		}
		if m.Code != v.code || got != v.seen || m.Code == codes.Content && !bytes.Equal(m.Payload, block) {
			t.Errorf("%v: code %v from %q", v, m.Code, got)
		}
	}
}

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
		{"one of several, with tabs", askForSocket + "Sec-WebSocket-Protocol: chat,\tcoap\t, x\r\n\r\n", http.StatusSwitchingProtocols},
		{"another subprotocol", askForSocket + "Sec-WebSocket-Protocol: coap2, xcoap, co ap\r\n\r\n", http.StatusBadRequest},
		{"another path", strings.Replace(askForSocket, "/.well-known/coap", "/", 1) + protocol + "\r\n", http.StatusNotFound},
		{"path with dots", strings.Replace(askForSocket, "/.well-known/coap", "/x/../.well-known/coap", 1) + protocol + "\r\n", http.StatusNotFound},
		{"no WebSocket", "GET /.well-known/coap HTTP/1.1\r\nHost: x\r\n" + protocol + "\r\n", http.StatusUpgradeRequired},
		{"POST", strings.Replace(askForSocket, "GET", "POST", 1) + protocol + "\r\n", http.StatusMethodNotAllowed},
		{"old version", strings.Replace(askForSocket, "13", "8", 1) + protocol + "\r\n", http.StatusBadRequest},
		{"long header", askForSocket + protocol + "X: " + strings.Repeat("x", 1<<20) + "\r\n\r\n", http.StatusRequestHeaderFieldsTooLarge},
	} {
		t.Run(v.name, func(t *testing.T) {
			conn, err := net.Dial("tcp", address)
			must(t, err)
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
