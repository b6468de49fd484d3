// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
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

// answers reports whether an answer is the one that is wanted, or, if the machine is slow, its
// beginning.
func answers(got, want []byte) bool {
	return len(got) >= min(len(want), 7) && bytes.HasPrefix(want, got)
}

// TestHave asks a block store on disk what it has: as docs/formats.md says, and otherwise.
func TestHave(t *testing.T) {
	store, err := blockstore.Open(t.TempDir(), blockstore.Options{})
	must(t, err)
	defer store.Close()
	var question []byte
	want := make([]byte, fetch.MaxHave/8)
	for i := range fetch.MaxHave {
		ref, block := sourcetest.NewBlock([]eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB}[i%2])
		if i%37 == 0 {
			must(t, store.Put(t.Context(), ref, block))
			want[i/8] |= 0x80 >> (i % 8)
		}
		question = append(question, ref[:fetch.HavePrefix]...)
	}
	config := coapserver.Config{Source: store}
	relays := 0
	relay := func(string, int) fetch.Source { // which is not asked: the server answers for itself
		relays++
		return store
	}
	_, open := serveConfig(t, "tcp", coapserver.Access{Get: true, Relay: relay}, config)
	_, putOnly := serveConfig(t, "tcp", coapserver.Access{Put: true}, config)
	_, silent := serveConfig(t, "tcp", readWrite, coapserver.Config{Source: failingSource{}})
	have := []any{11, ".well-known", 11, "eris", 11, "have"}
	whole := string(question)
	for _, v := range []struct {
		name, address string
		code          codes.Code
		payload       string
		options       []any
		wantCode      codes.Code
		want          []byte
	}{
		{"all", open, codes.POST, whole, have, codes.Changed, want},
		{"one", open, codes.POST, whole[:8], have, codes.Changed, []byte{0x80}},
		{"nine", open, codes.POST, whole[:72], have, codes.Changed, []byte{0x80, 0}},
		{"nothing", open, codes.POST, "", have, codes.BadRequest, nil},
		{"half a prefix", open, codes.POST, whole[:12], have, codes.BadRequest, nil},
		{"too much", open, codes.POST, whole + whole[:8], have, codes.BadRequest, nil},
		{"GET", open, codes.GET, "", have, codes.MethodNotAllowed, nil},
		{"PUT", open, codes.PUT, whole[:8], have, codes.MethodNotAllowed, nil},
		{"in parts", open, codes.POST, strings.Repeat("x", 16), append(append([]any{}, have...), 27, "\x08"), codes.BadOption, nil},
		{"store that cannot say", silent, codes.POST, whole[:8], have, codes.NotFound, nil},
		{"no store", open, codes.POST, whole[:8], []any{11, "have"}, codes.NotFound, nil},
		{"not to be got", putOnly, codes.POST, whole[:8], have, codes.MethodNotAllowed, nil},
	} {
		c := dial(t, "tcp", v.address, csm...)
		c.write(request(v.code, v.payload, v.options...))
		if m := c.readAnswer(); m.Code != v.wantCode || !answers(m.Payload, v.want) {
			t.Errorf("%s: %v, %x", v.name, m.Code, m.Payload)
		}
	}
	if relays > 0 {
		t.Error("others are asked")
	}
	// Questions among requests for blocks, more than are read at a time.
	c := dial(t, "tcp", open, csm...)
	go func() {
		for range 300 {
			c.write(request(codes.POST, whole, have...))
		}
	}()
	for range 300 {
		if m := c.readAnswer(); !answers(m.Payload, want) {
			t.Fatalf("%v, %x", m.Code, m.Payload)
		}
	}
}
