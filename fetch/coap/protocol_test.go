// SPDX-License-Identifier: GPL-3.0-or-later

package coap_test

import (
	"bytes"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/coaptest"
)

// TestWindow checks that no more requests are without an answer than the window allows, that all
// come to their turn, and that answers may come in another order, small and large.
func TestWindow(t *testing.T) {
	const window, calls = 7, 98
	blocks := make(map[string][]byte)
	var refs []eris.Reference
	for i := range calls {
		ref, block := newBlock([]eris.BlockSize{eris.BlockSize32KiB, eris.BlockSize1KiB, eris.BlockSize1KiB}[i%3], i)
		refs, blocks[ref.String()] = append(refs, ref), block
	}
	store := openPeer(t, coap.Options{Window: window}, func(_ int, p *peer) {
		p.write(csm)
		for range calls / window {
			var answers [][]byte
			for range window {
				m, ok := p.readUntil(codes.GET)
				if !ok {
					return
				}
				answers = append([][]byte{answer(m, blocks[m.Options[message.URIQuery][0]])}, answers...)
			}
			p.conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
			if m, ok := p.read(); ok {
				t.Errorf("message %v beyond the window", m.Code)
			}
			p.conn.SetReadDeadline(time.Time{})
			p.write(answers...)
		}
		p.awaitEnd()
	})
	var group sync.WaitGroup
	for _, ref := range refs {
		group.Go(func() {
			want := blocks[ref.String()]
			if got, err := get(t, store, ref, eris.BlockSize(len(want))); err != nil || !bytes.Equal(got, want) {
				t.Errorf("Get: %v", err)
			}
		})
	}
	group.Wait()
}

// TestSignals checks that pings and requests of the peer are answered, with their tokens, whatever
// they are (RFC 8323, section 5.4; an ERIS server may ask its clients).
func TestSignals(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	token := wire.Token{Value: 0xdeadbeef01020304, Size: 8}
	path := coaptest.Get(ref, eris.BlockSize1KiB, wire.Block{})
	done := make(chan struct{})
	store := openPeer(t, coap.Options{}, func(_ int, p *peer) {
		defer close(done)
		m := p.begin(codes.GET)
		for _, v := range []struct {
			send []byte
			want codes.Code
		}{
			{coaptest.Stream(codes.Ping, token, []byte{0x20}, ""), codes.Pong},
			{coaptest.Stream(codes.GET, token, path, ""), codes.NotFound},
			{coaptest.Stream(codes.PUT, token, nil, block), codes.NotImplemented},
			{coaptest.Stream(codes.PUT, token, nil, make([]byte, 40000)), codes.NotImplemented},
			{coaptest.Stream(31, token, nil, ""), codes.NotImplemented},
		} {
			p.write([]byte{0, 0}, coaptest.Stream(codes.Pong, token, nil, ""), v.send)
			if reply, ok := p.read(); !ok || reply.Code != v.want || reply.Token != token || len(reply.Body) != 0 {
				t.Errorf("reply is %v, want %v", reply.Code, v.want)
			}
		}
		p.write(answer(m, block))
		p.awaitEnd()
	})
	if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil {
		t.Error(err)
	}
	store.Close()
	<-done
}

// TestRelease checks that a connection that the peer wants to end is used to its end, and no
// further; and that Close says Release.
func TestRelease(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	asked, again := make(chan struct{}), make(chan struct{})
	var last codes.Code
	var group sync.WaitGroup
	group.Add(2)
	store := openPeer(t, coap.Options{}, func(connection int, p *peer) {
		defer group.Done()
		m := p.begin(codes.GET)
		if connection == 0 {
			p.write(coaptest.Stream(codes.Release, wire.Token{}, nil, ""), coaptest.Stream(codes.Ping, wire.Token{}, nil, ""))
			p.readUntil(codes.Pong)
			close(asked)
			<-again
			p.write(answer(m, block))
			if m, ok := p.read(); ok {
				t.Errorf("message %v after Release", m.Code)
			}
			return
		}
		p.write(answer(m, block))
		close(again)
		last = p.awaitEnd()
	})
	first := make(chan error)
	go func() {
		_, err := get(t, store, ref, eris.BlockSize1KiB)
		first <- err
	}()
	<-asked
	if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil {
		t.Error(err)
	}
	must(t, <-first)
	store.Close()
	group.Wait()
	if last != codes.Release {
		t.Errorf("last message is %v", last)
	}
}

// takePut receives a block in one or more messages, with parts of at most the given size, and
// returns how many there were.
func (p *peer) takePut(most uint8) (block []byte, messages int) {
	var token wire.Token
	for {
		m, ok := p.readUntil(codes.PUT)
		if !ok {
			return nil, 0
		}
		messages++
		part := m.Block(message.Block1)
		if messages > 1 && m.Token != token {
			p.t.Errorf("part %+v has another token: there are servers that know a transfer by it", part)
		}
		token = m.Token
		values, payload := m.Options, m.Payload
		if len(values[message.URIQuery]) != 0 || len(values[message.URIPath]) != 3 {
			p.t.Errorf("PUT has a query or a wrong path: %q", values)
		}
		if !part.Present {
			p.write(coaptest.Stream(codes.Created, m.Token, nil, ""))
			return payload, messages
		}
		if part.Offset() != len(block) || !part.FitPart(len(payload)) {
			p.t.Errorf("part %+v with %d bytes after %d", part, len(payload), len(block))
		}
		if size := values[message.Size1]; part.Number == 0 && (len(size) != 1 || size[0] != "\x80\x00") {
			p.t.Errorf("Size1 is %x", size)
		}
		reply := part
		if part.Exponent > most {
			// Of what came, only the first unit counts; but this test server takes all of it.
			reply.Exponent = most
		}
		option := reply.AppendOption(nil, 0, message.Block1)
		block = append(block, payload...)
		if !part.More {
			p.write(coaptest.Stream(codes.Changed, m.Token, option, ""))
			return block, messages
		}
		p.write(coaptest.Stream(codes.Continue, m.Token, option, ""))
	}
}

// TestPutForms checks how blocks of 32 KiB are put to peers of different capabilities.
func TestPutForms(t *testing.T) {
	ref, block := newBlock(eris.BlockSize32KiB, 1)
	for _, v := range []struct {
		name     string
		csm      []byte
		most     uint8 // greatest exponent that the peer takes
		messages int   // 0: the block cannot be put
	}{
		{"whole", coaptest.Capabilities(65536, true), 7, 1},
		{"whole, by the greatest size", coaptest.Capabilities(1<<32-1, false), 7, 1},
		{"just whole", coaptest.Capabilities(32830, false), 7, 1},
		{"base size, block-wise", coaptest.Capabilities(0, true), 7, 32},
		{"stated base size, block-wise", coaptest.Capabilities(1152, true), 7, 32},
		{"smaller parts", coaptest.Capabilities(1152, true), 4, 1 + 124},
		{"BERT of 2 units", coaptest.Capabilities(2400, true), 7, 16},
		{"BERT of 31 units", coaptest.Capabilities(32000, true), 7, 2},
		{"less than base size, block-wise", coaptest.Capabilities(600, true), 7, 64},
		{"BERT of one unit is none", coaptest.Capabilities(1300, true), 7, 32},
		{"says nothing", coaptest.Capabilities(0, false), 7, 1},
		{"says no", coaptest.Capabilities(1152, false), 7, 0},
	} {
		t.Run(v.name, func(t *testing.T) {
			type result struct {
				block    []byte
				messages int
			}
			results := make(chan result, 4)
			store := openPeer(t, coap.Options{}, func(_ int, p *peer) {
				p.write(v.csm)
				if v.messages == 0 {
					p.awaitEnd()
					return
				}
				block, messages := p.takePut(v.most)
				results <- result{block, messages}
				p.awaitEnd()
			})
			err := store.Put(t.Context(), ref, block)
			if (err == nil) != (v.messages != 0) {
				t.Fatalf("Put: %v", err)
			}
			if err != nil {
				return
			}
			got := <-results
			if !bytes.Equal(got.block, block) {
				t.Error("another block was put")
			}
			if got.messages != v.messages {
				t.Errorf("%d messages, want %d", got.messages, v.messages)
			}
		})
	}
}

// TestPutRestarts has a server drop what it has received so far: the client begins again, but not
// for ever.
func TestPutRestarts(t *testing.T) {
	ref, block := newBlock(eris.BlockSize32KiB, 1)
	for _, drops := range []int32{2, 1000} {
		var dropped atomic.Int32
		store := openPeer(t, coap.Options{}, func(_ int, p *peer) {
			p.write(coaptest.Capabilities(1152, true))
			for {
				m, ok := p.readUntil(codes.PUT)
				if !ok {
					return
				}
				part := m.Block(message.Block1)
				code := codes.Continue
				if part.Number == 7 && dropped.Load() < drops {
					dropped.Add(1)
					code = codes.RequestEntityIncomplete
				} else if !part.More {
					code = codes.Created
				}
				p.write(coaptest.Stream(code, m.Token, part.AppendOption(nil, 0, message.Block1), ""))
			}
		})
		err := store.Put(t.Context(), ref, block)
		if (err == nil) != (drops == 2) || dropped.Load() > 4 {
			t.Errorf("server dropped it %d times: %v", dropped.Load(), err)
		}
	}
}

// TestPutWaits checks that a block of 32 KiB waits for the capabilities of the peer, and one of 1
// KiB does not; and that one is put in parts, too, when the peer has said that it takes no more.
func TestPutWaits(t *testing.T) {
	smallRef, small := newBlock(eris.BlockSize1KiB, 1)
	largeRef, large := newBlock(eris.BlockSize32KiB, 2)
	store := openPeer(t, coap.Options{}, func(_ int, p *peer) {
		m, _ := p.readUntil(codes.PUT)
		if payload := m.Payload; !bytes.Equal(payload, small) {
			t.Error("the large block came first")
		}
		p.write(coaptest.Capabilities(600, true), coaptest.Stream(codes.Created, m.Token, nil, ""))
		if _, messages := p.takePut(7); messages != 64 {
			t.Errorf("%d messages", messages)
		}
		m, _ = p.readUntil(codes.PUT)
		if part := m.Block(message.Block1); part != (wire.Block{More: true, Exponent: 5, Present: true}) || len(m.Payload) != 512 {
			t.Errorf("part %+v with %d bytes", part, len(m.Payload))
		}
		p.write(coaptest.Stream(codes.Forbidden, m.Token, nil, ""))
	})
	var group sync.WaitGroup
	group.Go(func() {
		if err := store.Put(t.Context(), largeRef, large); err != nil {
			t.Error(err)
		}
	})
	time.Sleep(10 * time.Millisecond)
	must(t, store.Put(t.Context(), smallRef, small))
	group.Wait()
	if err := store.Put(t.Context(), smallRef, small); !errors.Is(err, fetch.ErrReadOnly) {
		t.Error(err)
	}
}

// TestPutAnswers checks what the answers to a PUT mean.
func TestPutAnswers(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	for _, v := range []struct {
		code     codes.Code
		ok       bool
		readOnly bool
	}{
		{codes.Created, true, false}, {codes.Changed, true, false},
		{codes.MethodNotAllowed, false, true}, {codes.NotFound, false, true}, {codes.Forbidden, false, true}, {codes.Unauthorized, false, true},
		{codes.Content, false, false}, {codes.BadRequest, false, false}, {codes.NotAcceptable, false, false},
		{codes.InternalServerError, false, false}, {codes.RequestEntityTooLarge, false, false}, {codes.Continue, false, false},
	} {
		store := openPeer(t, coap.Options{}, func(_ int, p *peer) {
			m := p.begin(codes.PUT)
			p.write(coaptest.Stream(v.code, m.Token, nil, "why"))
			p.awaitEnd()
		})
		err := store.Put(t.Context(), ref, block)
		if (err == nil) != v.ok || errors.Is(err, fetch.ErrReadOnly) != v.readOnly || !v.ok && !strings.Contains(err.Error(), "peer answers ") {
			t.Errorf("%v: error is %v", v.code, err)
		}
		if said := err != nil && strings.Contains(err.Error(), `: "why"`); said == (v.ok || v.code == codes.Content) || err != nil && strings.Contains(err.Error(), `\x00`) {
			t.Errorf("%v: error %v does not have the text alone", v.code, err)
		}
	}
}

// TestPutTooEarly has servers say that they have a block of which they have got a part: they keep
// parts as if these were blocks.
func TestPutTooEarly(t *testing.T) {
	ref, block := newBlock(eris.BlockSize32KiB, 1)
	for _, code := range []codes.Code{codes.Created, codes.Changed} {
		store := openPeer(t, coap.Options{}, func(_ int, p *peer) {
			p.write(coaptest.Capabilities(1152, true))
			for m, ok := p.readUntil(codes.PUT); ok; m, ok = p.readUntil(codes.PUT) {
				p.write(coaptest.Stream(code, m.Token, m.Block(message.Block1).AppendOption(nil, 0, message.Block1), ""))
			}
		})
		if err := store.Put(t.Context(), ref, block); err == nil {
			t.Errorf("%v to the first part of a block counts as success", code)
		}
	}
}

// TestGetInParts has peers answer in parts although they were not asked to.
func TestGetInParts(t *testing.T) {
	for _, v := range []struct {
		name     string
		exponent uint8
		payload  int
		size     eris.BlockSize
		requests int
	}{
		{"1024 bytes", 6, 1024, eris.BlockSize32KiB, 32},
		{"16 bytes", 0, 16, eris.BlockSize1KiB, 64},
		{"BERT", wire.BERT, 5 * 1024, eris.BlockSize32KiB, 7},
		{"all in the first", 6, 1024, eris.BlockSize1KiB, 1},
		{"all in the first, BERT", wire.BERT, 32 * 1024, eris.BlockSize32KiB, 1},
	} {
		t.Run(v.name, func(t *testing.T) {
			_, block := newBlock(v.size, 1)
			for i := range block {
				block[i] = byte(i / 16 * 7)
			}
			ref := eris.Sum(block)
			var requests atomic.Int32
			store := openPeer(t, coap.Options{}, func(_ int, p *peer) {
				p.serve(codes.GET, func(m coaptest.Message) []byte {
					requests.Add(1)
					part := m.Block(message.Block2)
					if part.Present && part.Exponent != v.exponent {
						t.Errorf("asked in another unit: %+v", part)
					}
					part.Exponent, part.Present = v.exponent, true
					end := min(part.Offset()+v.payload, len(block))
					part.More = end < len(block)
					return coaptest.Stream(codes.Content, m.Token, part.AppendOption(nil, 0, message.Block2), block[part.Offset():end])
				})
			})
			got, err := get(t, store, ref, v.size)
			if err != nil || !bytes.Equal(got, block) {
				t.Errorf("Get: %v", err)
			}
			if n := requests.Load(); int(n) != v.requests {
				t.Errorf("%d requests, want %d", n, v.requests)
			}
		})
	}
}

// TestPermissions checks that the query of the URL restricts what is done.
func TestPermissions(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	url := playPeer(t, func(_ int, p *peer) { t.Error("a connection was made"); p.awaitEnd() })
	getOnly, putOnly := mustOpen(t, url+"?get", coap.Options{}), mustOpen(t, url+"?put", coap.Options{})
	defer getOnly.Close()
	defer putOnly.Close()
	if err := getOnly.Put(t.Context(), ref, block); !errors.Is(err, fetch.ErrReadOnly) {
		t.Errorf("Put: %v", err)
	}
	if _, err := get(t, putOnly, ref, eris.BlockSize1KiB); !errors.Is(err, eris.ErrNotFound) {
		t.Errorf("Get: %v", err)
	}
	for _, url := range []string{"coaps://example.net", "http://example.net", ""} {
		if _, err := coap.Open(url, coap.Options{}); err == nil {
			t.Errorf("%q is taken", url)
		}
	}
}

// TestIdle checks that a connection that is not used is closed in an orderly way.
func TestIdle(t *testing.T) { synctest.Test(t, testIdle) }

func testIdle(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	over := make(chan codes.Code, 10)
	store := openInNetwork(t, coap.Options{RequestTimeout: 2 * time.Second, IdleTimeout: 20 * time.Millisecond}, func(_ int, p *peer) {
		p.write(answer(p.begin(codes.GET), block))
		over <- p.awaitEnd()
	})
	for range 2 {
		if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil {
			t.Error(err)
		}
		if last := <-over; last != codes.Release {
			t.Errorf("last message is %v", last)
		}
	}
}

// TestCloseWhileReleased checks that closing a store ends connections, too, that the peer has
// released and that still owe an answer, which would come in an hour.
func TestCloseWhileReleased(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	released := make(chan struct{})
	store := openPeer(t, coap.Options{RequestTimeout: time.Hour}, func(connection int, p *peer) {
		m := p.begin(codes.GET)
		if connection == 0 {
			p.write(coaptest.Stream(codes.Release, wire.Token{}, nil, ""), coaptest.Stream(codes.Ping, wire.Token{}, nil, ""))
			p.readUntil(codes.Pong)
			close(released)
		} else {
			p.write(answer(m, block))
		}
		p.awaitEnd()
	})
	first := make(chan error, 1)
	go func() {
		_, err := get(t, store, ref, eris.BlockSize1KiB)
		first <- err
	}()
	<-released
	if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil {
		t.Error(err)
	}
	must(t, store.Close())
	if err := <-first; err == nil {
		t.Error("a request without an answer has succeeded")
	}
}
