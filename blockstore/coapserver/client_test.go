// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver_test

import (
	"bufio"
	"io"
	"net"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// client is a client that does as it is told, and no more.
type client struct {
	tb   testing.TB
	conn net.Conn
	r    *bufio.Reader
}

// reply is a message from the server.
type reply struct {
	coap.Head
	response coap.Response
	payload  []byte
}

var csm = coap.AppendCapabilities(nil, coap.MessageSize)

// dial connects, and says what it can receive unless that is to be left out.
func dial(tb testing.TB, network, address string, first ...byte) *client {
	conn, err := net.Dial(network, address)
	if err != nil {
		tb.Fatal(err)
	}
	c := newClient(tb, conn)
	if len(first) > 0 {
		c.write(first)
	}
	return c
}

func newClient(tb testing.TB, conn net.Conn) *client {
	tb.Cleanup(func() { conn.Close() })
	return &client{tb, conn, bufio.NewReaderSize(conn, 1<<16)}
}

// write sends bytes, unless the server does not take them any more.
func (c *client) write(b []byte) bool {
	_, err := c.conn.Write(b)
	return err == nil
}

// read returns the next message; ok is false at the end.
func (c *client) read() (m reply, ok bool) {
	c.conn.SetReadDeadline(time.Now().Add(30 * time.Second))
	for n := 2; ; n++ {
		b, err := c.r.Peek(n)
		if err != nil {
			if err, isNet := err.(net.Error); isNet && err.Timeout() {
				c.tb.Error("the server hangs")
			}
			return m, false
		}
		if m.Head, err = coap.ParseHead(b, coap.MessageSize); err == nil {
			break
		} else if err != coap.ErrShortHead {
			c.tb.Errorf("server sends nonsense: %v", err)
			return m, false
		}
	}
	c.r.Discard(m.Size)
	body := make([]byte, m.Length)
	if _, err := io.ReadFull(c.r, body); err != nil {
		return m, false
	}
	options := coap.ParseOptions(body)
	if !coap.IsSignal(m.Code) {
		if err := coap.ParseResponse(&options, &m.response); err != nil || m.response.Unusable {
			c.tb.Errorf("server sends nonsense: %v", err)
		}
	}
	m.payload = options.Payload()
	return m, true
}

// readAnswer passes over signalling messages.
func (c *client) readAnswer() (m reply) {
	for {
		m, ok := c.read()
		if !ok {
			return reply{}
		}
		if !coap.IsSignal(m.Code) {
			return m
		}
	}
}

// awaitEnd reads until the connection is over, and returns the code of the last message.
func (c *client) awaitEnd() (last codes.Code) {
	for {
		m, ok := c.read()
		if !ok {
			return last
		}
		last = m.Code
	}
}

var wellKnown = coap.NewRequests([]string{".well-known", "eris"}, false)

func getRequest(token uint32, ref eris.Reference, size eris.BlockSize, part coap.Block) []byte {
	return coap.AppendMessage(nil, codes.GET, coap.MakeToken(token), wellKnown.AppendGet(nil, &ref, size, part), "")
}

func putRequest(token uint32, part coap.Block, total int, payload []byte) []byte {
	b := coap.AppendHead(nil, codes.PUT, coap.MakeToken(token), wellKnown.PutSize(part, total, len(payload)))
	return wellKnown.AppendPut(b, part, total, payload)
}

// request makes a request from options given as pairs of a number and a value.
func request(code codes.Code, payload string, options ...any) []byte {
	var b []byte
	var previous message.OptionID
	for i := 0; i < len(options); i += 2 {
		number := message.OptionID(options[i].(int))
		b = coap.AppendOption(b, previous, number, options[i+1].(string))
		previous = number
	}
	return coap.AppendMessage(nil, code, coap.MakeToken(1), b, payload)
}
