// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// Capabilities is what a peer on a stream has said that it can receive (RFC 8323, section 5.3).
// Before the peer has said anything, MessageSize is 1152 and the rest false (section 5.3.1).
type Capabilities struct {
	// MessageSize is the greatest size in bytes of a message, from its first byte to its last, or
	// the constant of that name if it is greater: more is never sent.
	MessageSize int
	// BlockWise says that the peer understands block-wise transfer.
	BlockWise bool
	// Stated says that the peer gave a message size itself. Some peers send a capability message
	// without any option and take whole blocks of 32 KiB all the same.
	Stated bool
}

// BERT reports whether the peer takes several block units in a message (RFC 8323, section 6).
func (c Capabilities) BERT() bool { return c.BlockWise && c.MessageSize > BaseMessageSize }

// parseSignal reads the options of a signalling message. A capability message is applied; what it
// does not mention stays as it was. An error, with the number of the option of such a message that
// is at fault, if one is, means that the connection must be aborted (RFC 8323, section 5.2). No
// option that is defined for other messages is critical.
func (c *Capabilities) parseSignal(code codes.Code, body []byte) (payload []byte, bad message.OptionID, err error) {
	next := *c
	options := optionWalk{rest: body}
	for {
		option, ok := options.next()
		switch {
		case !ok:
			if options.err == nil {
				*c = next
			}
			return options.payload(), 0, options.err
		case code == codes.CSM && option.meaning() == message.TCPMaxMessageSize:
			n, err := parseUint(option.Value)
			if err != nil {
				return nil, option.Number, err
			}
			next.MessageSize, next.Stated = int(min(n, MessageSize)), true
		case code == codes.CSM && option.meaning() == message.TCPBlockWiseTransfer:
			next.BlockWise = true
		case option.critical() && code == codes.CSM:
			return nil, option.Number, errSignalOption
		case option.critical():
			return nil, 0, errSignalOption
		}
	}
}

// ownCapabilities returns the options of the capability message that each side must send first: the
// greatest size of a message, and Block-Wise-Transfer, which together also announce BERT.
func ownCapabilities() []byte {
	options := AppendUintOption(nil, 0, message.TCPMaxMessageSize, MessageSize)
	return appendOption(options, message.TCPMaxMessageSize, message.TCPBlockWiseTransfer, "")
}
