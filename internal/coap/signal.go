// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// Capabilities is what a peer on a stream has said that it can receive (RFC 8323, section 5.3). Set it to BaseCapabilities
// before the first message.
type Capabilities struct {
	// MessageSize is the greatest size in bytes of a message, from its first byte to its last.
	MessageSize uint32
	// BlockWise says that the peer understands block-wise transfer.
	BlockWise bool
	// Stated says that the peer gave a message size itself. Some peers send a capability message without any option and
	// take whole blocks of 32 KiB all the same.
	Stated bool
}

// BaseCapabilities holds for a peer that has said nothing (RFC 8323, section 5.3.1).
func BaseCapabilities() Capabilities {
	return Capabilities{MessageSize: BaseMessageSize}
}

// BERT reports whether the peer takes several block units in a message (RFC 8323, section 6).
func (c Capabilities) BERT() bool { return c.BlockWise && c.MessageSize > BaseMessageSize }

// Update applies a capability message. What it does not mention stays as it was. Bad is the number of the option at fault
// if there is an error: an unknown critical option, or a number that is too long.
func (c *Capabilities) Update(body []byte) (bad message.OptionID, err error) {
	next := *c
	options := ParseOptions(body)
	for {
		option, ok := options.Next()
		if !ok {
			break
		}
		switch option.Number {
		case message.TCPMaxMessageSize:
			n, err := Uint(option.Value)
			if err != nil {
				return option.Number, err
			}
			next.MessageSize, next.Stated = n, true
		case message.TCPBlockWiseTransfer:
			next.BlockWise = true
		default:
			if option.Critical() {
				return option.Number, errCSMOption
			}
		}
	}
	if err := options.Err(); err != nil {
		return 0, err
	}
	*c = next
	return 0, nil
}

// CheckSignal checks the options of a signalling message other than a capability message: they must be well-formed, and
// none of those that are defined is critical, so one that is cannot be understood, upon which the connection must be aborted
// (RFC 8323, section 5.2).
func CheckSignal(body []byte) error {
	options := ParseOptions(body)
	for {
		option, ok := options.Next()
		if !ok {
			return options.Err()
		}
		if option.Critical() {
			return errSignalOption
		}
	}
}

// AppendCapabilities appends the capability message that each side must send first: the given Max-Message-Size in bytes, and
// Block-Wise-Transfer, which together also announce BERT.
func AppendCapabilities(dst []byte, messageSize uint32) []byte {
	dst = AppendHead(dst, codes.CSM, Token{}, 1+uintSize(messageSize)+1)
	dst = AppendUintOption(dst, 0, message.TCPMaxMessageSize, messageSize)
	return AppendOption(dst, message.TCPMaxMessageSize, message.TCPBlockWiseTransfer, "")
}

// AppendAbort appends an Abort (RFC 8323, section 5.6) with a diagnostic text for people. BadOption, unless 0, is the number
// of an option of a capability message that was not understood.
func AppendAbort(dst []byte, badOption message.OptionID, diagnostic string) []byte {
	var options []byte
	if badOption != 0 {
		options = AppendUintOption(options, 0, message.TCPBadCSMOption, uint32(badOption))
	}
	return AppendMessage(dst, codes.Abort, Token{}, options, diagnostic)
}

// AppendMessage appends a message on a stream, from options as AppendOption makes them and a payload, which may be empty.
func AppendMessage[T string | []byte](dst []byte, code codes.Code, token Token, options []byte, payload T) []byte {
	length := len(options)
	if len(payload) > 0 {
		length += 1 + len(payload)
	}
	dst = AppendHead(dst, code, token, length)
	dst = append(dst, options...)
	if len(payload) > 0 {
		dst = append(dst, payloadMarker)
		dst = append(dst, payload...)
	}
	return dst
}
