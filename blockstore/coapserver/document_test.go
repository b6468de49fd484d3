// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver_test

import (
	"bytes"
	"testing"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/coaptest"
)

// TestDocument gets a document, whole and in parts, where that is permitted.
func TestDocument(t *testing.T) {
	serveText := func(text []byte, permitted bool) string {
		_, address := serveConfig(t, "tcp", coapserver.Access{Get: true, Document: permitted}, coapserver.Config{
			Document: coapserver.Document{Path: []string{"a", "text"}, Format: 50, Text: func() []byte { return text }},
		})
		return address
	}
	long := bytes.Repeat([]byte("0123456789abcdef"), 2048)
	get := func(options ...any) []byte {
		return request(codes.GET, "", append([]any{11, "a", 11, "text"}, options...)...)
	}
	for _, v := range []struct {
		name          string
		permitted     bool
		text, request []byte
		want          codes.Code
	}{
		{"short", true, []byte("{}"), get(), codes.Content},
		{"empty", true, nil, get(), codes.Content},
		{"long", true, long, get(), codes.Content},
		{"BERT", true, long, get(23, "\x07"), codes.Content},
		{"part beyond the end", true, long, get(23, "\x02\x06"), codes.BadRequest}, // NUM 32 of 0..31
		{"PUT", true, nil, request(codes.PUT, "x", 11, "a", 11, "text"), codes.NotFound},
		{"without permission", false, long, get(), codes.NotFound},
	} {
		c := dial(t, "tcp", serveText(v.text, v.permitted), csm...)
		c.write(v.request)
		if m := c.readAnswer(); m.Code != v.want || m.Code == codes.Content && !bytes.Equal(m.Payload, v.text) {
			t.Errorf("%s: %v, %d bytes", v.name, m.Code, len(m.Payload))
		}
	}
	// A client that takes small messages gets it in parts.
	c := dial(t, "tcp", serveText(long, true), coaptest.Capabilities(1152, true)...)
	c.write(get())
	var got []byte
	for more := true; more; {
		m := c.readAnswer()
		part := m.Block(message.Block2)
		if m.Code != codes.Content || !part.Present || part.Offset() != len(got) {
			t.Fatalf("%v, %+v", m.Code, m.Options)
		}
		got = append(got, m.Payload...)
		more = part.More
		next := coap.Block{Number: part.Number + 1, Exponent: 6}
		c.write(get(23, string(next.AppendOption(nil, 0, 0)[1:])))
	}
	if !bytes.Equal(got, long) {
		t.Errorf("parts make %d bytes", len(got))
	}
}
