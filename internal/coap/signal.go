// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// Capabilities is what a peer on a stream has said that it can receive (RFC 8323, section 5.3).
// Before the peer has said anything, MessageSize is 1152 and the rest false (section 5.3.1).
type Capabilities struct {
	// MessageSize is the greatest size in bytes of a message, from its first byte to its last.
	MessageSize uint32
	// BlockWise says that the peer understands block-wise transfer.
	BlockWise bool
	// Stated says that the peer gave a message size itself. Some peers send a capability message
	// without any option and take whole blocks of 32 KiB all the same.
	Stated bool
}

// BERT reports whether the peer takes several block units in a message (RFC 8323, section 6).
func (c Capabilities) BERT() bool { return c.BlockWise && c.MessageSize > baseMessageSize }

// update applies a capability message. What it does not mention stays as it was. Bad is the number
// of the option at fault if there is an error: an unknown critical option, or a number that is too
// long.
func (c *Capabilities) update(body []byte) (bad message.OptionID, err error) {
	next := *c
	options := walkOptions(body)
	for {
		option, ok := options.next()
		if !ok {
			break
		}
		switch option.Number {
		case message.TCPMaxMessageSize:
			n, err := parseUint(option.Value)
			if err != nil {
				return option.Number, err
			}
			next.MessageSize, next.Stated = n, true
		case message.TCPBlockWiseTransfer:
			next.BlockWise = true
		default:
			if option.critical() {
				return option.Number, errCSMOption
			}
		}
	}
	if err := options.err(); err != nil {
		return 0, err
	}
	*c = next
	return 0, nil
}

// checkSignal checks the options of a signalling message other than a capability message: they must
// be well-formed, and none of those that are defined is critical, so one that is cannot be
// understood; then the connection must be aborted (RFC 8323, section 5.2).
func checkSignal(body []byte) error {
	options := walkOptions(body)
	for {
		option, ok := options.next()
		if !ok {
			return options.err()
		}
		if option.critical() {
			return errSignalOption
		}
	}
}

// appendCapabilities appends the capability message that each side must send first: the given
// Max-Message-Size in bytes, and Block-Wise-Transfer, which together also announce BERT.
func appendCapabilities(dst []byte, messageSize uint32) []byte {
	dst = AppendHead(dst, codes.CSM, Token{}, 1+uintSize(messageSize)+1)
	dst = AppendUintOption(dst, 0, message.TCPMaxMessageSize, messageSize)
	return appendOption(dst, message.TCPMaxMessageSize, message.TCPBlockWiseTransfer, "")
}

// appendAbort appends an Abort (RFC 8323, section 5.6) with a diagnostic text for people.
// BadOption, unless 0, is the number of an option of a capability message that was not understood.
func appendAbort(dst []byte, badOption message.OptionID, diagnostic string) []byte {
	var options []byte
	if badOption != 0 {
		options = AppendUintOption(options, 0, message.TCPBadCSMOption, uint32(badOption))
	}
	return appendMessage(dst, codes.Abort, Token{}, options, diagnostic)
}

// appendMessage appends a message on a stream, from options as appendOption makes them and a
// payload, which may be empty.
func appendMessage[T string | []byte](dst []byte, code codes.Code, token Token, options []byte, payload T) []byte {
	length := len(options)
	if len(payload) > 0 {
		length += 1 + len(payload)
	}
	return appendPayload(append(AppendHead(dst, code, token, length), options...), payload)
}

// appendPayload appends a payload, which may be empty, to the options.
func appendPayload[T string | []byte](dst []byte, payload T) []byte {
	if len(payload) > 0 {
		dst = append(append(dst, payloadMarker), payload...)
	}
	return dst
}
