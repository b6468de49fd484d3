// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver_test

import (
	"bufio"
	"net"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/coaptest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

// client is a client that does as it is told, and no more.
type client struct {
	tb   testing.TB
	conn net.Conn
	r    *bufio.Reader
}

var csm = coaptest.CSM

// dial connects, and says what it can receive unless that is to be left out.
func dial(tb testing.TB, network, address string, first ...byte) *client {
	conn, err := net.Dial(network, address)
	must(tb, err)
	return newClient(tb, conn, first)
}

func newClient(tb testing.TB, conn net.Conn, first []byte) *client {
	tb.Cleanup(func() { conn.Close() })
	c := &client{tb, conn, bufio.NewReaderSize(conn, 1<<16)}
	if len(first) > 0 {
		c.write(first)
	}
	return c
}

// write sends bytes, unless the server does not take them any more.
func (c *client) write(b []byte) bool {
	_, err := c.conn.Write(b)
	return err == nil
}

// read returns the next message; ok is false at the end.
func (c *client) read() (m coaptest.Message, ok bool) {
	c.conn.SetReadDeadline(time.Now().Add(3 * time.Minute))
	m, err := coaptest.Read(c.r)
	if err, isNet := err.(net.Error); isNet && err.Timeout() {
		c.tb.Error("the server hangs")
	}
	return m, err == nil
}

// readAnswer passes over signalling messages.
func (c *client) readAnswer() (m coaptest.Message) {
	for {
		m, ok := c.read()
		if !ok {
			return coaptest.Message{}
		}
		if !m.IsSignal() {
			return m
		}
	}
}

// want wants the next answer to have a code.
func (c *client) want(code codes.Code) {
	c.tb.Helper()
	if m := c.readAnswer(); m.Code != code {
		c.tb.Errorf("answer %v instead of %v", m.Code, code)
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

func getRequest(token uint32, ref eris.Reference, size eris.BlockSize, part coap.Block) []byte {
	return coaptest.Stream(codes.GET, coaptest.Token(token), coaptest.Get(ref, size, part), "")
}

func putRequest(token uint32, part coap.Block, payload []byte) []byte {
	return coaptest.Stream(codes.PUT, coaptest.Token(token), coaptest.Put(part), payload)
}

// request makes a request from options given as pairs of a number and a value.
func request(code codes.Code, payload string, options ...any) []byte {
	var b []byte
	var previous message.OptionID
	for i := 0; i < len(options); i += 2 {
		number := message.OptionID(options[i].(int))
		b = coaptest.Option(b, previous, number, options[i+1].(string))
		previous = number
	}
	return coaptest.Stream(code, coaptest.Token(1), b, payload)
}
