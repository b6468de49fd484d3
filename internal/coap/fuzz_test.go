// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"
	"testing/iotest"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	tcp "github.com/plgd-dev/go-coap/v3/tcp/coder"
	udp "github.com/plgd-dev/go-coap/v3/udp/coder"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// streamMessage is a message as it was read.
type streamMessage struct {
	head Head
	body []byte
}

// readStream reads messages to the end.
func readStream(r io.Reader) (messages []streamMessage, err error) {
	reader := newReader(r)
	for {
		head, body, ok, err := reader.next()
		if err != nil {
			return messages, err
		}
		if ok {
			messages = append(messages, streamMessage{head, bytes.Clone(body)})
		} else if err := reader.fill(); err != nil {
			return messages, err
		}
	}
}

func streamSeeds(f *testing.F) [][]byte {
	requests := NewRequests(WellKnownPath())
	ref, _ := eris.ParseReference(helloReference)
	x := Exchange{Reference: ref, Size: 1024}
	get := encode(codes.GET, makeToken(1), requests.append(nil, &x), nil)
	answer := encode(codes.Content, makeToken(1), nil, make([]byte, 1024))
	large := encode(codes.Content, makeToken(70000), AppendUintOption(nil, 0, message.MaxAge, 60), make([]byte, 32768))
	csm := encode(codes.CSM, Token{}, ownCapabilities(), nil)
	return [][]byte{
		csm, get, answer, large, slices.Concat(csm, get, answer, large, answer), slices.Concat(large, large, large[:20000]),
		encode(codes.Abort, Token{}, (&protocolError{bad: 9}).option(), []byte("no")), {0, 0}, fromHex(f, "ff ffffffff"), fromHex(f, "f0 ffffffff 45"), fromHex(f, "e0 ffff 45"), fromHex(f, "0f 45"),
	}
}

// FuzzStream reads any bytes as a stream of messages: however they arrive, the result is the same;
// and where go-coap reads a message, it reads the same one.
func FuzzStream(f *testing.F) {
	for _, seed := range streamSeeds(f) {
		f.Add(seed, uint16(7))
	}
	f.Fuzz(func(t *testing.T, b []byte, cut uint16) {
		want, wantErr := readStream(bytes.NewReader(b))
		for _, other := range []io.Reader{
			iotest.OneByteReader(bytes.NewReader(b)),
			iotest.HalfReader(bytes.NewReader(b)),
			io.MultiReader(bytes.NewReader(b[:min(len(b), int(cut))]), bytes.NewReader(b[min(len(b), int(cut)):])),
		} {
			got, err := readStream(other)
			if !slices.EqualFunc(got, want, func(a, b streamMessage) bool { return a.head == b.head && bytes.Equal(a.body, b.body) }) {
				t.Fatalf("messages depend on how they arrive: %d and %d", len(got), len(want))
			}
			if err == nil || wantErr == nil || err.Error() != wantErr.Error() {
				t.Fatalf("errors depend on how bytes arrive: %v and %v", err, wantErr)
			}
		}
		at := 0
		for _, m := range want {
			whole := b[at : at+m.head.Size+m.head.Length]
			at += len(whole)
			if again := AppendHead(nil, m.head.Code, m.head.Token, m.head.Length); m.head.Length < 65805 && !bytes.Equal(again, whole[:m.head.Size]) {
				t.Fatalf("head % x is written as % x", whole[:m.head.Size], again)
			}
			compareStream(t, whole, m)
		}
		if wantErr == io.EOF && at != len(b) {
			t.Fatalf("%d of %d bytes were read", at, len(b))
		}
	})
}

// compareStream compares with go-coap.
func compareStream(t *testing.T, whole []byte, m streamMessage) {
	theirs := message.Message{Options: make(message.Options, 0, len(whole)+1)}
	n, err := tcp.DefaultCoder.Decode(whole, &theirs)
	options, payload, ourErr := allOptions(m.body)
	if err != nil {
		if ourErr == nil {
			t.Fatalf("go-coap refuses % x: %v", whole[:min(len(whole), 64)], err)
		}
		return
	}
	if n != len(whole) || theirs.Code != m.head.Code || !bytes.Equal(theirs.Token, m.head.Token.append(nil)) {
		t.Fatalf("go-coap reads % x as %v, %d bytes", whole[:min(len(whole), 64)], theirs, n)
	}
	if ourErr == nil {
		compareOptions(t, m.head.Code, options, theirs.Options)
		if !bytes.Equal(payload, theirs.Payload) {
			t.Fatal("go-coap reads another payload")
		}
	} else if ourErr != errEmptyPayload {
		t.Fatalf("go-coap takes options that we refuse: %v", ourErr)
	}
}

// compareOptions compares options with those of go-coap, which leaves out those whose value has a
// wrong length, and those with the number 0.
func compareOptions(t *testing.T, code codes.Code, ours []option, theirs message.Options) {
	for _, option := range theirs {
		for len(ours) > 0 && (ours[0].Number != option.ID || !bytes.Equal(ours[0].Value, option.Value)) {
			_, defined := message.CoapOptionDefs[ours[0].Number]
			if !defined && ours[0].Number != 0 && code>>5 != 7 {
				t.Fatalf("go-coap has no option %d", ours[0].Number)
			}
			ours = ours[1:]
		}
		if len(ours) == 0 {
			t.Fatalf("go-coap has an option %d more", option.ID)
		}
		ours = ours[1:]
	}
}

func allOptions(body []byte) (options []option, payload []byte, err error) {
	walk := optionWalk{rest: body}
	for {
		option, ok := walk.next()
		if !ok {
			return options, walk.payload(), walk.err
		}
		options = append(options, option)
	}
}

// FuzzOptions reads any bytes as options: they are written as they were, and the readers of
// requests, responses and capabilities agree on what is malformed.
func FuzzOptions(f *testing.F) {
	for _, text := range []string{
		"", wellKnownHex, wellKnownHex + "ff 00", "ff", "d0 03", "c1 2a ff 01", "23 010000 20", "e0 feff", "f0", "0f", "d1 03 0f d214 8000", "e1 000c 01",
		wellKnownHex + "4d13 3ffe034b0a056707d0ee1a67007ed97cec69cd4b887465b0bd3f76d228a9d969 82 01f6 d218 8000",
	} {
		f.Add(fromHex(f, text))
	}
	paths := Paths{wellKnownBlocks, {"pinned"}}
	f.Fuzz(func(t *testing.T, b []byte) {
		options, payload, err := allOptions(b)
		if err == nil {
			var again []byte
			var previous message.OptionID
			for _, option := range options {
				again = appendOption(again, previous, option.Number, option.Value)
				previous = option.Number
			}
			if len(payload) > 0 {
				again = append(append(again, payloadMarker), payload...)
			}
			if !bytes.Equal(again, b) {
				t.Fatalf("% x is written as % x", b, again)
			}
		}
		var request Request
		paths.parse(b, &request)
		// A Hop-Limit that is none is refused in the same way (RFC 8768, section 3).
		badHops := slices.ContainsFunc(options, func(o option) bool { return o.Number == hopLimit })
		if code := request.Refuse; (code == codes.BadRequest) != (err != nil) && !badHops && code != codes.ProxyingNotSupported {
			t.Fatalf("request gets code %v, error is %v", code, err)
		} else if code == codes.Empty && !bytes.Equal(request.Payload, payload) {
			t.Fatal("request has another payload")
		}
		if request.Block1.Offset() < 0 || request.Block2.Offset() >= 1<<30 {
			t.Fatal("offset of a part is out of range")
		}
		var response Response
		if _, responseErr := parseResponse(b, &response); (responseErr == nil) != (err == nil) {
			t.Fatalf("response has error %v, options have %v", responseErr, err)
		}
		capabilities := (Capabilities{MessageSize: BaseMessageSize})
		if _, bad, capErr := capabilities.parseSignal(codes.CSM, b); capErr == nil && err != nil || capErr != nil && capabilities != (Capabilities{MessageSize: BaseMessageSize}) || capErr == nil && bad != 0 {
			t.Fatalf("capabilities have error %v, options have %v", capErr, err)
		}
	})
}

// FuzzDatagram reads any bytes as a datagram, and compares with go-coap.
func FuzzDatagram(f *testing.F) {
	for _, text := range []string{
		"40 00 0001", "60 00 1234", "70 00 ffff", "42 01 0007 0102" + wellKnownHex, "61 45 0007 01 c1 2a ff 0102", "49 01 0001 010203040506070809", "00 01 0001", "44 01",
	} {
		f.Add(fromHex(f, text))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseDatagram(b)
		if err == nil {
			again := append(appendDatagramHead(nil, m.Type, m.Code, m.ID, m.Token), m.Body...)
			if !bytes.Equal(again, b) {
				t.Fatalf("% x is written as % x", b, again)
			}
		}
		theirs := message.Message{Options: make(message.Options, 0, len(b)+1)}
		_, theirErr := udp.DefaultCoder.Decode(b, &theirs)
		if err != nil {
			if theirErr == nil && !errors.Is(err, errEmptyMessage) {
				t.Fatalf("go-coap takes % x, we say %v", b, err)
			}
			return
		}
		options, payload, optionsErr := allOptions(m.Body)
		if theirErr != nil {
			if optionsErr == nil {
				t.Fatalf("go-coap refuses % x: %v", b, theirErr)
			}
			return
		}
		if theirs.Type != m.Type || theirs.Code != m.Code || theirs.MessageID != int32(m.ID) || !bytes.Equal(theirs.Token, m.Token.append(nil)) {
			t.Fatalf("go-coap reads % x as %v", b, theirs)
		}
		if optionsErr == nil {
			compareOptions(t, codes.Empty, options, theirs.Options)
			if !bytes.Equal(payload, theirs.Payload) {
				t.Fatal("go-coap reads another payload")
			}
		}
	})
}
