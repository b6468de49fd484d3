// SPDX-License-Identifier: GPL-3.0-or-later

// Package coaptest makes and reads messages of CoAP, wrong ones as well, for tests that play the
// other end of a connection. It shares no code with what is under test.
package coaptest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// Message is a message that has been read.
type Message struct {
	Type    message.Type // of a datagram
	ID      uint16       // of a datagram
	Code    codes.Code
	Token   coap.Token
	Body    []byte // options, marker and payload
	Options map[message.OptionID][]string
	Payload []byte
}

var errMessage = errors.New("malformed message")

// CSM is a capability message with the size that this program announces.
var CSM = Capabilities(coap.MessageSize, true)

// Capabilities returns a capability message with the given Max-Message-Size, 0 for none.
func Capabilities(size uint32, blockWise bool) []byte {
	var options []byte
	if size != 0 {
		options = Uint(nil, 0, message.TCPMaxMessageSize, size)
	}
	if blockWise {
		previous := message.OptionID(0)
		if size != 0 {
			previous = message.TCPMaxMessageSize
		}
		options = Option(options, previous, message.TCPBlockWiseTransfer, "")
	}
	return Stream(codes.CSM, coap.Token{}, options, "")
}

// Token returns the shortest token with the given value, of at least one byte.
func Token(value uint32) coap.Token {
	return coap.Token{Value: uint64(value), Size: uint8(max(1, len(trim(value))))}
}

// Option appends an option, whose number is not below that of the previous.
func Option(dst []byte, previous, number message.OptionID, value string) []byte {
	option := message.Option{ID: number, Value: []byte(value)}
	b := make([]byte, len(value)+8)
	n, err := option.Marshal(b, previous)
	if err != nil {
		panic(err)
	}
	return append(dst, b[:n]...)
}

// Uint appends an option that is a number.
func Uint(dst []byte, previous, number message.OptionID, value uint32) []byte {
	return Option(dst, previous, number, string(trim(value)))
}

// Block appends an option Block1 or Block2.
func Block(dst []byte, previous, number message.OptionID, b coap.Block) []byte {
	n := b.Number<<4 | uint32(b.Exponent)
	if b.More {
		n |= 8
	}
	return Uint(dst, previous, number, n)
}

func trim(n uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, n)
	for len(b) > 0 && b[0] == 0 {
		b = b[1:]
	}
	return b
}

func extend(n int) (nibble int, more []byte) {
	switch {
	case n < 13:
		return n, nil
	case n < 269:
		return 13, []byte{byte(n - 13)}
	}
	return 14, binary.BigEndian.AppendUint16(nil, uint16(n-269))
}

func withPayload[T string | []byte](options []byte, payload T) []byte {
	body := append([]byte(nil), options...)
	if len(payload) > 0 {
		body = append(append(body, 0xff), payload...)
	}
	return body
}

// Stream returns a message on a stream.
func Stream[T string | []byte](code codes.Code, token coap.Token, options []byte, payload T) []byte {
	body := withPayload(options, payload)
	nibble, more := extend(len(body))
	if len(body) >= 65805 {
		nibble, more = 15, binary.BigEndian.AppendUint32(nil, uint32(len(body)-65805))
	}
	b := append([]byte{byte(nibble)<<4 | token.Size}, more...)
	b = append(append(b, byte(code)), tokenBytes(token)...)
	return append(b, body...)
}

// Datagram returns a message of UDP.
func Datagram[T string | []byte](kind message.Type, code codes.Code, id uint16, token coap.Token, options []byte, payload T) []byte {
	b := []byte{1<<6 | byte(kind)<<4 | token.Size, byte(code), byte(id >> 8), byte(id)}
	return append(append(b, tokenBytes(token)...), withPayload(options, payload)...)
}

func tokenBytes(t coap.Token) []byte {
	return binary.BigEndian.AppendUint64(nil, t.Value)[8-t.Size:]
}

// Path returns the options of the resource of the well-known store.
func Path() []byte {
	b := Option(nil, 0, message.URIPath, ".well-known")
	return Option(Option(b, message.URIPath, message.URIPath, "eris"), message.URIPath, message.URIPath, "blocks")
}

// Get returns the options of a GET.
func Get(ref eris.Reference, size eris.BlockSize, part coap.Block) []byte {
	b, previous := Option(Path(), message.URIPath, message.URIQuery, ref.String()), message.URIQuery
	if part.Present {
		b, previous = Block(b, previous, message.Block2, part), message.Block2
	}
	return Uint(b, previous, message.Size1, uint32(size))
}

// Put returns the options of a PUT.
func Put(part coap.Block) []byte {
	if !part.Present {
		return Path()
	}
	return Block(Path(), message.URIPath, message.Block1, part)
}

// Read reads a message from a stream.
func Read(r *bufio.Reader) (m Message, err error) {
	first, err := r.ReadByte()
	if err != nil {
		return m, err
	}
	length, token := int(first>>4), int(first&15)
	if length >= 13 {
		b := make([]byte, 1<<(length-13))
		if _, err := io.ReadFull(r, b); err != nil {
			return m, err
		}
		length = 0
		for _, c := range b {
			length = length<<8 | int(c)
		}
		length += []int{13, 269, 65805}[len(b)/2]
	}
	if token > 8 || length > 1<<20 {
		return m, errMessage
	}
	b := make([]byte, 1+token+length)
	if _, err := io.ReadFull(r, b); err != nil {
		return m, err
	}
	m.Code = codes.Code(b[0])
	return m, m.take(b[1:], token)
}

// ParseDatagram reads a message of UDP.
func ParseDatagram(b []byte) (m Message, err error) {
	if len(b) < 4 || b[0]>>6 != 1 || len(b) < 4+int(b[0]&15) {
		return m, errMessage
	}
	m.Type, m.Code, m.ID = message.Type(b[0]>>4&3), codes.Code(b[1]), binary.BigEndian.Uint16(b[2:])
	return m, m.take(b[4:], int(b[0]&15))
}

// take reads what follows the code: token, options and payload.
func (m *Message) take(b []byte, token int) error {
	m.Token.Size = uint8(token)
	for _, c := range b[:token] {
		m.Token.Value = m.Token.Value<<8 | uint64(c)
	}
	m.Body = append([]byte(nil), b[token:]...)
	options := make(message.Options, 0, len(m.Body)+1)
	n, err := options.Unmarshal(m.Body, nil)
	if err != nil {
		return err
	}
	m.Options = make(map[message.OptionID][]string)
	for _, option := range options {
		m.Options[option.ID] = append(m.Options[option.ID], string(option.Value))
	}
	m.Payload = m.Body[n:]
	return nil
}

// Block returns the value of an option Block1 or Block2.
func (m Message) Block(number message.OptionID) (b coap.Block) {
	if len(m.Options[number]) == 0 {
		return b
	}
	n := uint32(0)
	for _, c := range []byte(m.Options[number][0]) {
		n = n<<8 | uint32(c)
	}
	return coap.Block{Number: n >> 4, More: n&8 != 0, Exponent: uint8(n & 7), Present: true}
}

// IsSignal reports whether the message is about the connection.
func (m Message) IsSignal() bool { return m.Code>>5 == 7 }
