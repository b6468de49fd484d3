// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/plgd-dev/go-coap/v3/message/codes"
)

const (
	// maxTokenSize is the greatest length in bytes of a token (RFC 7252, section 3; RFC 8323,
	// section 3.2).
	maxTokenSize = 8
	// maxHeadSize is the greatest length in bytes of what stands before the options of a message on
	// a stream: lengths, code and token.
	maxHeadSize = 1 + 4 + 1 + maxTokenSize
	// BaseMessageSize is the size in bytes of a message that every peer on a stream can receive
	// before it has said anything (RFC 8323, section 5.3.1).
	BaseMessageSize = 1152
	// MessageSize is the Max-Message-Size that this program announces: a message with a block of 32
	// KiB and any sensible options fits.
	MessageSize = 1 << 16
)

// Errors of ParseHead.
var (
	// ErrShortHead says that more bytes are needed.
	ErrShortHead = errors.New("head of CoAP message is not complete")
	// errTokenSize says that the token is longer than 8 bytes (RFC 8323, section 3.2).
	errTokenSize = errors.New("token of CoAP message is longer than 8 bytes")
	// errMessageSize is wrapped by the error for a message that is longer than the limit.
	errMessageSize = errors.New("CoAP message is too large")
)

// Token matches a response to its request. Tokens can be compared with ==.
type Token struct {
	Value uint64 // its bytes as a big-endian number
	Size  uint8  // their number, at most maxTokenSize
}

// makeToken returns the shortest token with the given value, of at least one byte.
func makeToken(value uint32) Token {
	return Token{uint64(value), uint8(max(1, uintSize(value)))}
}

// append appends the bytes of the token to dst.
func (t Token) append(dst []byte) []byte {
	var b [maxTokenSize]byte
	binary.BigEndian.PutUint64(b[:], t.Value)
	return append(dst, b[maxTokenSize-t.Size:]...)
}

// parseToken reads a token of at most maxTokenSize bytes.
func parseToken(b []byte) Token {
	t := Token{Size: uint8(len(b))}
	for _, c := range b {
		t.Value = t.Value<<8 | uint64(c)
	}
	return t
}

// Head is what stands before the options of a message on a stream (RFC 8323, section 3.2).
type Head struct {
	Code   codes.Code
	Token  Token
	Size   int // bytes of the head itself
	Length int // bytes behind it: options, payload marker and payload
}

// ParseHead reads the head of a message from the start of b, of which no more than maxHeadSize
// bytes are looked at. Limit is the greatest acceptable size in bytes of a message from its first
// byte to its last. It returns ErrShortHead if b is too short to tell, errTokenSize, or an error
// that wraps errMessageSize; the latter two as early as they can be known.
func ParseHead(b []byte, limit int) (Head, error) {
	if len(b) < 2 {
		return Head{}, ErrShortHead
	}
	token := int(b[0] & 15)
	if token > maxTokenSize {
		return Head{}, errTokenSize
	}
	length, at := uint64(b[0]>>4), 1
	switch {
	case length < 13:
	case length == 13:
		length, at = 13+uint64(b[1]), 2
	case length == 14 && len(b) >= 3:
		length, at = 269+uint64(binary.BigEndian.Uint16(b[1:])), 3
	case length == 15 && len(b) >= 5:
		length, at = 65805+uint64(binary.BigEndian.Uint32(b[1:])), 5
	default:
		return Head{}, ErrShortHead
	}
	size := at + 1 + token
	if total := uint64(size) + length; total > uint64(limit) {
		return Head{}, fmt.Errorf("%w: %d bytes, limit %d", errMessageSize, total, limit)
	}
	if len(b) < size {
		return Head{}, ErrShortHead
	}
	return Head{codes.Code(b[at]), parseToken(b[at+1 : size]), size, int(length)}, nil
}

// AppendHead appends the head of a message on a stream, of which length bytes follow: options,
// payload marker and payload.
func AppendHead(dst []byte, code codes.Code, token Token, length int) []byte {
	switch {
	case length < 13:
		dst = append(dst, byte(length)<<4|token.Size)
	case length < 269:
		dst = append(dst, 13<<4|token.Size, byte(length-13))
	case length < 65805:
		dst = append(dst, 14<<4|token.Size, byte((length-269)>>8), byte(length-269))
	default:
		dst = append(dst, 15<<4|token.Size)
		dst = binary.BigEndian.AppendUint32(dst, uint32(length-65805))
	}
	return token.append(append(dst, byte(code)))
}

// isRequest reports whether the code is one of a request: class 0, but not 0.00, the empty message.
func isRequest(code codes.Code) bool { return code>>5 == 0 && code != codes.Empty }

// isResponse reports whether the code is one of a response: classes 2, 4 and 5 (RFC 7252, section
// 3; class 3 is reserved).
func isResponse(code codes.Code) bool {
	class := code >> 5
	return class == 2 || class == 4 || class == 5
}
