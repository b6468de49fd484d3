// SPDX-License-Identifier: GPL-3.0-or-later

// Package coaptest makes and reads messages of CoAP, wrong ones as well, for tests that play the
// other end of a connection. Options are made and read by go-coap.
package coaptest

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/bits"

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
	previous := message.OptionID(0)
	if size != 0 {
		options, previous = coap.AppendUintOption(nil, 0, message.TCPMaxMessageSize, size), message.TCPMaxMessageSize
	}
	if blockWise {
		options = Option(options, previous, message.TCPBlockWiseTransfer, "")
	}
	return Stream(codes.CSM, coap.Token{}, options, "")
}

// Token returns the shortest token with the given value, of at least one byte.
func Token(value uint32) coap.Token {
	return coap.Token{Value: uint64(value), Size: uint8(max(1, (bits.Len32(value)+7)/8))}
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

func withPayload[T string | []byte](options []byte, payload T) []byte {
	if len(payload) == 0 {
		return options
	}
	return append(append(bytes.Clone(options), 0xff), payload...)
}

// Stream returns a message on a stream.
func Stream[T string | []byte](code codes.Code, token coap.Token, options []byte, payload T) []byte {
	body := withPayload(options, payload)
	return append(coap.AppendHead(nil, code, token, len(body)), body...)
}

// Datagram returns a message of UDP.
func Datagram[T string | []byte](kind message.Type, code codes.Code, id uint16, token coap.Token, options []byte, payload T) []byte {
	b := []byte{1<<6 | byte(kind)<<4 | token.Size, byte(code), byte(id >> 8), byte(id)}
	b = append(b, binary.BigEndian.AppendUint64(nil, token.Value)[8-token.Size:]...)
	return append(b, withPayload(options, payload)...)
}

// path returns the options of the resource of the well-known store.
func path() []byte {
	b := Option(nil, 0, message.URIPath, ".well-known")
	return Option(Option(b, message.URIPath, message.URIPath, "eris"), message.URIPath, message.URIPath, "blocks")
}

// Get returns the options of a GET.
func Get(ref eris.Reference, size eris.BlockSize, part coap.Block) []byte {
	b, previous := Option(path(), message.URIPath, message.URIQuery, ref.String()), message.URIQuery
	if part.Present {
		b, previous = part.AppendOption(b, previous, message.Block2), message.Block2
	}
	return coap.AppendUintOption(b, previous, message.Size1, uint32(size))
}

// Put returns the options of a PUT.
func Put(part coap.Block) []byte {
	if !part.Present {
		return path()
	}
	return part.AppendOption(path(), message.URIPath, message.Block1)
}

// Read reads a message from a stream.
func Read(r *bufio.Reader) (m Message, err error) {
	var b []byte
	head := coap.Head{}
	for head.Size == 0 {
		c, err := r.ReadByte()
		if err != nil {
			return m, err
		}
		b = append(b, c)
		if head, err = coap.ParseHead(b, 1<<20); err != nil && err != coap.ErrShortHead {
			return m, err
		}
	}
	b = make([]byte, head.Length)
	if _, err := io.ReadFull(r, b); err != nil {
		return m, err
	}
	m.Code, m.Token = head.Code, head.Token
	return m, m.take(b)
}

// ParseDatagram reads a message of UDP.
func ParseDatagram(b []byte) (m Message, err error) {
	if len(b) < 4 || b[0]>>6 != 1 || len(b) < 4+int(b[0]&15) {
		return m, errMessage
	}
	m.Type, m.Code, m.ID = message.Type(b[0]>>4&3), codes.Code(b[1]), binary.BigEndian.Uint16(b[2:])
	m.Token.Size = b[0] & 15
	for _, c := range b[4 : 4+m.Token.Size] {
		m.Token.Value = m.Token.Value<<8 | uint64(c)
	}
	return m, m.take(bytes.Clone(b[4+m.Token.Size:]))
}

// take reads options and payload.
func (m *Message) take(body []byte) error {
	m.Body = body
	options := make(message.Options, 0, len(body)+1)
	n, err := options.Unmarshal(body, nil)
	if err != nil {
		return err
	}
	m.Options = make(map[message.OptionID][]string)
	for _, option := range options {
		m.Options[option.ID] = append(m.Options[option.ID], string(option.Value))
	}
	m.Payload = body[n:]
	return nil
}

// Block returns the value of an option Block1 or Block2.
func (m Message) Block(number message.OptionID) (b coap.Block) {
	if values := m.Options[number]; len(values) > 0 {
		b.Parse([]byte(values[0]))
	}
	return b
}

// IsSignal reports whether the message is about the connection.
func (m Message) IsSignal() bool { return m.Code>>5 == 7 }
