// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"bytes"
	"encoding/hex"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

// helloReference is the reference of the only block of "Hello world!" (ERIS 1.0.0, test vector 0).
const helloReference = "H77AGSYKAVTQPUHODJTQA7WZPTWGTTKLRB2GLMF5H53NEKFJ3FUQ"

func fromHex(t testing.TB, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(text), ""))
	must(t, err)
	return b
}

var wellKnownBlocks = append(WellKnownPath(), BlocksSegment)

// encode returns a message on a stream.
func encode(code codes.Code, token Token, options, payload []byte) []byte {
	body := appendPayload(slices.Clip(options), payload)
	return append(AppendHead(nil, code, token, len(body)), body...)
}

const wellKnownHex = "bb 2e77656c6c2d6b6e6f776e 04 65726973 06 626c6f636b73 "

// TestVectors checks what is sent byte for byte: RFC 8323, sections 3.2, 5.3 to 5.6; RFC 7252,
// section 3.1; and the resource of https://eris.codeberg.page/eer/coap.xml.
func TestVectors(t *testing.T) {
	ref, err := eris.ParseReference(helloReference)
	must(t, err)
	text, limited := NewRequests(WellKnownPath()), NewRequests(WellKnownPath())
	limited.HopLimit = 2
	request := func(r *Requests, token uint32, x Exchange) []byte {
		return encode(r.method(&x), makeToken(token), r.append(nil, &x), x.Payload)
	}
	get := func(r *Requests, size eris.BlockSize, block Block) []byte {
		return request(r, 1, Exchange{Reference: ref, Size: size, Block: block})
	}
	put := func(block Block, total int, payload []byte) []byte {
		return request(text, 2, Exchange{Block: block, Total: total, Payload: payload})
	}
	helloHex := hex.EncodeToString([]byte(helloReference))
	large := bytes.Repeat([]byte{0xee}, 32768)
	for _, v := range []struct {
		name   string
		got    []byte
		want   string // the beginning
		length int
	}{
		{"CSM", encode(codes.CSM, Token{}, ownCapabilities(), nil), "50 e1 23010000 20", 7},
		{"GET, Base32", get(text, 1024, Block{}),
			"d1 45 01 01" + wellKnownHex + "4d27" + helloHex + "d220 0400", 4 + 82},
		{"GET, Hop-Limit", get(limited, 1024, Block{}),
			"d1 47 01 01" + wellKnownHex + "4d27" + helloHex + "11 02 d21f 0400", 0},
		{"GET of 32 KiB", get(text, 32768, Block{}),
			"d1 45 01 01" + wellKnownHex + "4d27" + helloHex + "d220 8000", 4 + 82},
		{"GET of a part", get(text, 32768, Block{Number: 31, Exponent: 6, Present: true}),
			"d1 48 01 01" + wellKnownHex + "4d27" + helloHex + "82 01f6 d218 8000", 4 + 85},
		{"GET of the first part of 16 bytes", get(text, 32768, Block{Present: true}),
			"d1 46 01 01" + wellKnownHex + "4d27" + helloHex + "80 d218 8000", 4 + 83},
		{"PUT of 32 KiB", put(Block{}, 0, large), "e1 7f0c 03 02" + wellKnownHex + "ff eeee", 32798},
		{"PUT of 1 KiB", put(Block{}, 0, large[:1024]), "e1 030c 03 02" + wellKnownHex + "ff eeee", 1054},
		{"PUT of a part", put(Block{More: true, Exponent: 7, Present: true}, 32768, large[:1024]),
			"e1 0313 03 02" + wellKnownHex + "d103 0f d214 8000 ff eeee", 0},
		{"2.05 of 32 KiB", encode(codes.Content, makeToken(1), AppendUintOption(nil, 0, message.ContentFormat, 42), large),
			"e1 7ef6 45 01 c1 2a ff eeee", 32776},
		{"2.05 of 1 KiB", encode(codes.Content, makeToken(1), nil, large[:1024]), "e1 02f4 45 01 ff eeee", 1030},
		{"2.01", AppendHead(nil, codes.Created, makeToken(2), 0), "01 41 02", 3},
		{"4.04", AppendHead(nil, codes.NotFound, makeToken(1), 0), "01 84 01", 3},
		{"Ping", AppendHead(nil, codes.Ping, Token{0xbeef, 2}, 0), "02 e2 beef", 4},
		{"Pong", AppendHead(nil, codes.Pong, Token{0xbeef, 2}, 0), "02 e3 beef", 4},
		{"Release", encode(codes.Release, Token{}, nil, nil), "00 e4", 2},
		{"Abort", encode(codes.Abort, Token{}, (&protocolError{bad: 9}).option(), []byte("no")), "50 e5 21 09 ff 6e6f", 7},
		{"empty", AppendHead(nil, codes.Empty, Token{}, 0), "00 00", 2},
		{"empty acknowledgement", emptyMessage(message.Acknowledgement, 0x1234), "60 00 1234", 4},
		{"reset", emptyMessage(message.Reset, 0xffff), "70 00 ffff", 4},
		{"confirmable GET", appendDatagramHead(nil, message.Confirmable, codes.GET, 7, Token{0x0102, 2}), "42 01 0007 0102", 6},
		{"length of 4 bytes", AppendHead(nil, codes.Content, makeToken(1), 65805), "f1 00000000 45 01", 7},
		{"length of 2 bytes", AppendHead(nil, codes.Content, makeToken(1), 65804), "e1 ffff 45 01", 5},
		{"length of 1 byte", AppendHead(nil, codes.Content, makeToken(1), 268), "d1 ff 45 01", 4},
		{"length in 4 bits", AppendHead(nil, codes.Content, makeToken(1), 12), "c1 45 01", 3},
	} {
		want := fromHex(t, v.want)
		if !bytes.HasPrefix(v.got, want) {
			t.Errorf("%s: begins % x, want % x", v.name, v.got[:min(len(v.got), len(want))], want)
		}
		if v.length != 0 && len(v.got) != v.length {
			t.Errorf("%s: %d bytes, want %d", v.name, len(v.got), v.length)
		}
	}
}

// TestParseVectors reads requests as other programs send them.
func TestParseVectors(t *testing.T) {
	ref, err := eris.ParseReference(helloReference)
	must(t, err)
	paths := Paths{{"pinned", "blocks"}, wellKnownBlocks, {".well-known", "blocks"}}
	rawQuery := "4d13 3ffe034b0a056707d0ee1a67007ed97cec69cd4b887465b0bd3f76d228a9d969"
	textQuery := "4d27" + hex.EncodeToString([]byte(helloReference))
	for _, v := range []struct {
		name string
		body string
		want Request
		code codes.Code
	}{
		{"raw reference", wellKnownHex + rawQuery + "d220 0400", Request{Resource: 1, Reference: ref, HasReference: true, Size: 1024}, 0},
		{"Base32", wellKnownHex + textQuery + "d220 8000", Request{Resource: 1, Reference: ref, HasReference: true, Size: 32768}, 0},
		{"Hop-Limit", wellKnownHex + textQuery + "11 ff", Request{Resource: 1, Reference: ref, HasReference: true, HopLimit: 255}, 0},
		{"Hop-Limit 0", wellKnownHex + textQuery + "10", Request{}, codes.BadRequest},
		{"Hop-Limit 256", wellKnownHex + textQuery + "12 0100", Request{}, codes.BadRequest},
		{"no Size1", wellKnownHex + textQuery, Request{Resource: 1, Reference: ref, HasReference: true}, 0},
		{"size that is none", wellKnownHex + textQuery + "d220 0401", Request{Resource: 1, Reference: ref, HasReference: true, Size: 1025}, 0},
		{"Size1 that is too long", wellKnownHex + textQuery + "d520 0000000400", Request{Resource: 1, Reference: ref, HasReference: true}, 0},
		{"Uri-Host and Uri-Port", "39 6c6f63616c686f7374 42 1633" + "4b 2e77656c6c2d6b6e6f776e 04 65726973 06 626c6f636b73",
			Request{Resource: 1}, 0},
		{"other store", "b6 70696e6e6564 06 626c6f636b73", Request{Resource: 0}, 0},
		{"path of another length", "bb 2e77656c6c2d6b6e6f776e 06 626c6f636b73", Request{Resource: 2}, 0},
		{"path that is longer", wellKnownHex + "00", Request{Resource: -1}, 0},
		{"path that is shorter", "bb 2e77656c6c2d6b6e6f776e 04 65726973", Request{Resource: -1}, 0},
		{"path of one segment", "bd 0a 2e77656c6c2d6b6e6f776e2f657269732f626c6f636b73", Request{Resource: -1}, 0},
		{"no path", "", Request{Resource: -1}, 0},
		{"reference in lower case", wellKnownHex + "4d27" + hex.EncodeToString([]byte(strings.ToLower(helloReference))), Request{Resource: 1}, 0},
		{"spare bits", wellKnownHex + "4d27" + hex.EncodeToString([]byte(helloReference[:51]+"R")), Request{Resource: 1}, 0},
		{"name in the query", wellKnownHex + "45 723d616263", Request{Resource: 1}, 0},
		{"two queries", wellKnownHex + textQuery + "00", Request{Resource: 1}, 0},
		{"Block2", wellKnownHex + textQuery + "82 01f6", Request{Resource: 1, Reference: ref, HasReference: true, Block2: Block{31, false, 6, true}}, 0},
		{"Block1", wellKnownHex + "d1 03 0f", Request{Resource: 1, Block1: Block{0, true, 7, true}}, 0},
		{"payload", wellKnownHex + "ff 0102", Request{Resource: 1, Payload: []byte{1, 2}}, 0},
		{"Accept octets", wellKnownHex + "61 2a", Request{Resource: 1}, 0},
		{"Accept CBOR", wellKnownHex + "61 3c", Request{}, codes.NotAcceptable},
		{"Content-Format and Observe", "60" + "5b 2e77656c6c2d6b6e6f776e 04 65726973 06 626c6f636b73 11 2a", Request{Resource: 1}, 0},
		{"If-None-Match", "50 6b 2e77656c6c2d6b6e6f776e 04 65726973 06 626c6f636b73", Request{}, codes.BadOption},
		{"unknown critical option", wellKnownHex + "e0 0001", Request{}, codes.BadOption},
		{"unknown elective option", wellKnownHex + "e0 0000", Request{Resource: 1}, 0},
		{"Block2 of 4 bytes", wellKnownHex + "c4 00000006", Request{}, codes.BadOption},
		{"Block2 twice", wellKnownHex + "c1 06 01 06", Request{}, codes.BadOption},
		{"Accept twice", wellKnownHex + "61 2a 01 2a", Request{}, codes.BadOption},
		{"Uri-Host twice", "31 61 01 61" + "8b 2e77656c6c2d6b6e6f776e 04 65726973 06 626c6f636b73", Request{}, codes.BadOption},
		{"Uri-Port twice", "71 01 01 01" + "4b 2e77656c6c2d6b6e6f776e 04 65726973 06 626c6f636b73", Request{}, codes.BadOption},
		{"Block1 twice", wellKnownHex + "d1 03 0f 01 0f", Request{}, codes.BadOption},
		{"Hop-Limit twice", wellKnownHex + textQuery + "11 02 01 03", Request{Resource: 1, Reference: ref, HasReference: true, HopLimit: 2}, 0},
		{"Size1 twice", wellKnownHex + "d224 0400 02 8000", Request{Resource: 1, Size: 1024}, 0},
		{"Proxy-Uri", wellKnownHex + "d1 0b 61", Request{}, codes.ProxyingNotSupported},
		{"marker without payload", wellKnownHex + "ff", Request{}, codes.BadRequest},
		{"reserved delta", wellKnownHex + "f0", Request{}, codes.BadRequest},
		{"reserved length", wellKnownHex + "0f", Request{}, codes.BadRequest},
		{"truncated value", wellKnownHex + "02 01", Request{}, codes.BadRequest},
		{"truncated delta", wellKnownHex + "e0 01", Request{}, codes.BadRequest},
		{"truncated length", wellKnownHex + "0d", Request{}, codes.BadRequest},
		{"number above 65535", wellKnownHex + "e0 ffff", Request{}, codes.BadRequest},
	} {
		var got Request
		paths.parse(fromHex(t, v.body), &got)
		code := got.Refuse
		if code != v.code {
			t.Errorf("%s: code %v, want %v", v.name, code, v.code)
			continue
		}
		if code == codes.Empty && !reflect.DeepEqual(got, v.want) {
			t.Errorf("%s: %+v, want %+v", v.name, got, v.want)
		}
	}
	var a, b Request
	paths.parse(fromHex(t, wellKnownHex+"ed 000c 00 01"), &a)
	paths.parse(fromHex(t, wellKnownHex+"e1 000c 01"), &a)
	paths.parse(fromHex(t, wellKnownHex+"e1 000c 02"), &b)
	if a.Tag == "" || a.Tag == b.Tag {
		t.Errorf("Request-Tags are not told apart: %q, %q", a.Tag, b.Tag)
	}
	paths.parse(fromHex(t, wellKnownHex+"e8 000c 0102030405060708"+strings.Repeat("08 0102030405060708", 5000)), &a)
	if len(a.Tag) > 64 {
		t.Errorf("many tags take %d bytes", len(a.Tag))
	}
}

// TestParseHead checks the heads of messages, above all that a length is refused before anything is
// done with it.
func TestParseHead(t *testing.T) {
	for _, v := range []struct {
		text  string
		want  Head
		fault error
	}{
		{"50 e1", Head{codes.CSM, Token{}, 2, 5}, nil},
		{"d1 31 01 01", Head{codes.GET, Token{1, 1}, 4, 62}, nil},
		{"e1 7f0c 03 02", Head{codes.PUT, Token{2, 1}, 5, 32793}, nil},
		{"08 45 0102030405060708", Head{codes.Content, Token{0x0102030405060708, 8}, 10, 0}, nil},
		{"02 45 0001", Head{codes.Content, Token{1, 2}, 4, 0}, nil},
		{"e0 feef 45", Head{codes.Content, Token{}, 4, MessageSize - 4}, nil},
		{"e0 fef0 45", Head{}, errMessageSize},
		{"e0 ffff 45", Head{}, errMessageSize},
		{"f0 00000000", Head{}, errMessageSize},
		{"f0 ffffffff", Head{}, errMessageSize},
		{"ff ffffffff", Head{}, errTokenSize},
		{"09 45", Head{}, errTokenSize},
		{"0f 45 0102030405060708090a0b0c0d0e0f", Head{}, errTokenSize},
		{"", Head{}, ErrShortHead},
		{"50", Head{}, ErrShortHead},
		{"01 45", Head{}, ErrShortHead},
		{"d1 31 01", Head{}, ErrShortHead},
		{"e1 7f", Head{}, ErrShortHead},
		{"f0 000000", Head{}, ErrShortHead},
	} {
		got, err := ParseHead(fromHex(t, v.text), MessageSize)
		if !errors.Is(err, v.fault) || err == nil && v.fault != nil {
			t.Errorf("%s: error %v, want %v", v.text, err, v.fault)
		}
		if got != v.want {
			t.Errorf("%s: %+v, want %+v", v.text, got, v.want)
		}
	}
}

func TestCapabilities(t *testing.T) {
	for _, v := range []struct {
		name string
		body string
		want Capabilities
		bad  message.OptionID
		ok   bool
	}{
		{"empty", "", Capabilities{MessageSize: 1152}, 0, true},
		{"both", "23 010000 20", Capabilities{65536, true, true}, 0, true},
		{"size only", "22 0480", Capabilities{1152, false, true}, 0, true},
		{"block-wise only", "40", Capabilities{1152, true, false}, 0, true},
		{"greatest", "24 ffffffff", Capabilities{MessageSize, false, true}, 0, true},
		{"size of 5 bytes", "25 0000000001", Capabilities{MessageSize: 1152}, 2, false},
		{"size twice", "22 0480 02 1000", Capabilities{1152, false, true}, 0, true},
		{"unknown elective", "e0 0001", Capabilities{MessageSize: 1152}, 0, true},
		{"unknown critical", "30", Capabilities{MessageSize: 1152}, 3, false},
		{"truncated", "24 ff", Capabilities{MessageSize: 1152}, 0, false},
		{"with a diagnostic payload", "40 ff 61", Capabilities{1152, true, false}, 0, true},
	} {
		c := Capabilities{MessageSize: BaseMessageSize}
		_, bad, err := c.parseSignal(codes.CSM, fromHex(t, v.body))
		if c != v.want || bad != v.bad || (err == nil) != v.ok {
			t.Errorf("%s: %+v, option %d, error %v; want %+v, option %d", v.name, c, bad, err, v.want, v.bad)
		}
	}
	c := Capabilities{MessageSize: BaseMessageSize}
	c.parseSignal(codes.CSM, fromHex(t, "40"))
	c.parseSignal(codes.CSM, fromHex(t, "22 1000"))
	if want := (Capabilities{4096, true, true}); c != want || !c.BERT() {
		t.Errorf("capabilities are not cumulative: %+v", c)
	}
}

func TestBlock(t *testing.T) {
	for _, v := range []struct {
		text string
		want Block
	}{
		{"", Block{0, false, 0, true}},
		{"06", Block{0, false, 6, true}},
		{"0e", Block{0, true, 6, true}},
		{"01f6", Block{31, false, 6, true}},
		{"fffffF", Block{1<<20 - 1, true, 7, true}},
	} {
		b := fromHex(t, v.text)
		var got Block
		if !got.Parse(b) || got != v.want {
			t.Errorf("%s: %+v", v.text, got)
		}
		if again := AppendUintOption(nil, 0, 0, got.uint()); !bytes.Equal(again[1:], b) {
			t.Errorf("%s: written as % x", v.text, again[1:])
		}
	}
	if new(Block).Parse(make([]byte, 4)) {
		t.Error("an option of four bytes is taken")
	}
	for _, v := range []struct {
		block  Block
		length int
		fits   bool
	}{
		{Block{0, true, 6, true}, 1024, true},
		{Block{0, true, 6, true}, 1023, false},
		{Block{0, true, 6, true}, 2048, false},
		{Block{1, false, 6, true}, 1024, true},
		{Block{1, false, 6, true}, 1025, false},
		{Block{1, false, 6, true}, 0, false},
		{Block{0, false, 6, true}, 0, true},
		{Block{0, true, 0, true}, 16, true},
		{Block{0, true, BERT, true}, 3072, true},
		{Block{0, true, BERT, true}, 3073, false},
		{Block{0, true, BERT, true}, 0, false},
		{Block{3, false, BERT, true}, 5000, true},
	} {
		if v.block.FitPart(v.length) != v.fits {
			t.Errorf("%+v with %d bytes: want %v", v.block, v.length, v.fits)
		}
	}
}
