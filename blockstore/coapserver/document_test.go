// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver_test

import (
	"bytes"
	"slices"
	"testing"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/coaptest"
)

// TestDocuments gets documents, whole and in parts, where that is permitted.
func TestDocuments(t *testing.T) {
	long := bytes.Repeat([]byte("0123456789abcdef"), 2048)
	config := coapserver.Config{
		Resources: []coapserver.Resource{{Source: newMemory()}},
		Documents: []coapserver.Document{
			{Path: "short", Format: 50, Text: func() []byte { return []byte("{}") }},
			{Path: "a/long", Text: func() []byte { return long }},
			{Path: "empty", Text: func() []byte { return nil }},
		},
	}
	short := request(codes.GET, "", 11, "short")
	longRequest := func(block ...any) []byte {
		return request(codes.GET, "", append([]any{11, "a", 11, "long"}, block...)...)
	}
	access := coapserver.Access{Get: true, Documents: true}
	_, address := serveConfig(t, "tcp", access, config)
	c := dial(t, "tcp", address, csm...)
	c.write(short)
	if m := c.readAnswer(); m.Code != codes.Content || string(m.Payload) != "{}" {
		t.Errorf("%v %q", m.Code, m.Payload)
	}
	c.write(longRequest())
	if m := c.readAnswer(); m.Code != codes.Content || !bytes.Equal(m.Payload, long) || m.Block(message.Block2).Present {
		t.Errorf("%v, %d bytes", m.Code, len(m.Payload))
	}
	c.write(request(codes.GET, "", 11, "empty"))
	if m := c.readAnswer(); m.Code != codes.Content || len(m.Payload) != 0 {
		t.Errorf("%v %q", m.Code, m.Payload)
	}
	c.write(request(codes.PUT, "x", 11, "short"))
	if m := c.readAnswer(); m.Code != codes.NotFound {
		t.Errorf("PUT: %v", m.Code)
	}
	c.write(longRequest(23, "\x07")) // BERT
	if m := c.readAnswer(); m.Code != codes.Content || !bytes.Equal(m.Payload, long) {
		t.Errorf("BERT: %v", m.Code)
	}
	c.write(longRequest(23, "\x02\x06")) // NUM 32 of 0..31
	if m := c.readAnswer(); m.Code != codes.BadRequest {
		t.Errorf("part beyond the end: %v", m.Code)
	}

	// A client that takes small messages gets it in parts.
	small := dial(t, "tcp", address, coaptest.Capabilities(1152, true)...)
	small.write(longRequest())
	var got []byte
	for {
		m := small.readAnswer()
		if m.Code != codes.Content || !m.Block(message.Block2).Present || int(m.Block(message.Block2).Number)*1024 != len(got) {
			t.Fatalf("%v, %+v", m.Code, m.Options)
		}
		got = append(got, m.Payload...)
		if !m.Block(message.Block2).More {
			break
		}
		next := coap.Block{Number: m.Block(message.Block2).Number + 1, Exponent: 6}
		small.write(longRequest(23, string(coaptest.Block(nil, 0, 0, next)[1:])))
	}
	if !bytes.Equal(got, long) {
		t.Errorf("parts make %d bytes", len(got))
	}

	_, address = serveConfig(t, "tcp", readWrite, config)
	c = dial(t, "tcp", address, csm...)
	c.write(short)
	if m := c.readAnswer(); m.Code != codes.NotFound {
		t.Errorf("without permission: %v %q", m.Code, m.Payload)
	}
	config.Documents = slices.Clone(config.Documents) // those of the server stay
	config.Documents[1].Path = "/../x"
	if _, err := coapserver.New(config); err == nil {
		t.Error("a path with dots is taken")
	}
}
