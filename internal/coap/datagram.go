// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"encoding/binary"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// maxDatagramSize is the greatest size in bytes of a datagram that this program sends or takes: RFC
// 7252, section 4.6, recommends 1152 and some implementations send a little more.
const maxDatagramSize = 1500

// datagram is one message of RFC 7252, section 3. Body is a part of what it was parsed from.
type datagram struct {
	Type  message.Type
	Code  codes.Code
	ID    uint16
	Token Token
	Body  []byte // options, payload marker and payload: see optionWalk
}

// parseDatagram reads a message. It returns an error if the version is not 1, the token is longer
// than 8 bytes, the message is truncated, or its code is 0.00 and more than the first four bytes
// are there: [errVersion] if there is no more to know, else with the type and the ID. It does not
// look at the options.
func parseDatagram(b []byte) (datagram, error) {
	if len(b) < 4 || b[0]>>6 != 1 {
		return datagram{}, errVersion
	}
	m := datagram{Type: message.Type(b[0] >> 4 & 3), Code: codes.Code(b[1]), ID: binary.BigEndian.Uint16(b[2:])}
	token := int(b[0] & 15)
	switch {
	case token > maxTokenSize:
		return m, errTokenSize
	case len(b) < 4+token:
		return m, errMessageTooShort
	case m.Code == codes.Empty && len(b) > 4:
		return m, errEmptyMessage
	}
	m.Token, m.Body = parseToken(b[4:4+token]), b[4+token:]
	return m, nil
}

// appendDatagramHead appends what stands before the options of a datagram.
func appendDatagramHead(dst []byte, kind message.Type, code codes.Code, id uint16, token Token) []byte {
	dst = append(dst, 1<<6|byte(kind)<<4|token.Size, byte(code), byte(id>>8), byte(id))
	return token.append(dst)
}

// emptyMessage is an acknowledgement or a reset.
func emptyMessage(kind message.Type, id uint16) []byte {
	return appendDatagramHead(nil, kind, codes.Empty, id, Token{})
}

// appendPayload appends a payload, which may be empty, to the options.
func appendPayload(dst, payload []byte) []byte {
	if len(payload) > 0 {
		dst = append(append(dst, payloadMarker), payload...)
	}
	return dst
}
