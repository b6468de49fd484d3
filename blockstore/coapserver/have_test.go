// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// answers reports whether an answer is the one that is wanted, or, if the machine is slow, its
// beginning.
func answers(got, want []byte) bool {
	return len(got) >= min(len(want), 7) && bytes.HasPrefix(want, got)
}

// TestHave asks a block store on disk what it has: as docs/formats.md says, and otherwise.
func TestHave(t *testing.T) {
	store, err := blockstore.Open(t.TempDir(), blockstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	var question []byte
	want := make([]byte, fetch.MaxHave/8)
	for i := range fetch.MaxHave {
		ref, block := newBlock([]eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB}[i%2])
		if i%37 == 0 {
			if err := store.Put(t.Context(), ref, block); err != nil {
				t.Fatal(err)
			}
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
