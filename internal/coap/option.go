// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"encoding/binary"
	"errors"
	"math/bits"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// requestTag tells concurrent block-wise requests to one resource apart (RFC 9175, section 3.2).
// go-coap has no name for it.
const requestTag message.OptionID = 292

// hopLimit is how many proxies a request may pass (RFC 8768). go-coap has no name for it.
const hopLimit message.OptionID = 16

// HopLimitReached is the code 5.08 (RFC 8768, section 4): the request would have to go on, and may
// not.
const HopLimitReached codes.Code = 5<<5 | 8

// Errors of optionWalk. All but errTruncated say that the message is malformed whatever follows.
var (
	// errTruncated says that the message ends within an option.
	errTruncated       = errors.New("CoAP option is truncated")
	errReservedNibble  = errors.New("CoAP option has a reserved delta or length")
	errOptionNumber    = errors.New("CoAP option number is above 65535")
	errEmptyPayload    = errors.New("CoAP payload marker without a payload")
	errUintLength      = errors.New("CoAP option is too long for a number")
	errSignalOption    = errors.New("CoAP signalling message has an unknown critical option")
	errMessageTooShort = errors.New("CoAP message is too short")
	errVersion         = errors.New("not CoAP of version 1")
	errEmptyMessage    = errors.New("empty CoAP message is not empty")
)

// option is one option of a message. Its value is a part of the message.
type option struct {
	Number message.OptionID
	Value  []byte
	again  bool // not the first one of its number
}

// meaning returns the number of an option. One that occurs more often than it may is like one that
// nobody knows, and as critical (RFC 7252, section 5.4.5).
func (o option) meaning() message.OptionID {
	switch o.Number {
	case message.URIPath, message.URIQuery, requestTag:
		return o.Number
	}
	if o.again {
		return unknownOption | o.Number&1
	}
	return o.Number
}

// unknownOption is an option for experiments (RFC 7252, section 12.2), which has no meaning here.
const unknownOption message.OptionID = 65534

// critical reports whether a recipient that does not know the option must refuse the message: those
// with odd numbers (RFC 7252, section 5.4.1).
func (o option) critical() bool { return o.Number&1 == 1 }

// optionWalk walks through the options of a message (RFC 7252, section 3.1). Call next until it
// returns false, then look at err and payload.
type optionWalk struct {
	rest   []byte // of the message, at first all that is behind the token
	number int
	marker bool
	err    error // what is wrong with the options walked through so far
}

// next returns the next option, in the order of their numbers. It returns false at the payload
// marker, at the end of the message and after an error.
func (o *optionWalk) next() (option, bool) {
	b := o.rest
	if len(b) == 0 || o.err != nil || o.marker {
		return option{}, false
	}
	first, b := b[0], b[1:]
	if first == payloadMarker {
		o.marker, o.rest = true, b
		if len(b) == 0 {
			o.err = errEmptyPayload
		}
		return option{}, false
	}
	delta, b := o.extended(int(first>>4), b)
	length, b := o.extended(int(first&15), b)
	number := o.number + delta
	switch {
	case o.err != nil:
	case length > len(b):
		o.err = errTruncated
	case number > 0xffff:
		o.err = errOptionNumber
	default:
		o.number, o.rest = number, b[length:]
		return option{message.OptionID(number), b[:length:length], delta == 0}, true
	}
	return option{}, false
}

// extended reads the rest of a delta or a length.
func (o *optionWalk) extended(nibble int, b []byte) (int, []byte) {
	switch {
	case nibble == 15:
		o.err = errReservedNibble
	case nibble == 14 && len(b) >= 2:
		return 269 + int(binary.BigEndian.Uint16(b)), b[2:]
	case nibble == 13 && len(b) >= 1:
		return 13 + int(b[0]), b[1:]
	case nibble >= 13:
		o.err = errTruncated
	}
	return nibble, b
}

// payload returns what follows the payload marker; nil before the marker has been met, and if there
// is none.
func (o *optionWalk) payload() []byte {
	if !o.marker {
		return nil
	}
	return o.rest
}

const payloadMarker = 0xff

// parseUint returns the number in the value of an option of format uint (RFC 7252, section 3.2). It
// returns an error for values of more than 4 bytes, which none of the known options may have.
func parseUint(value []byte) (uint32, error) {
	if len(value) > 4 {
		return 0, errUintLength
	}
	var n uint32
	for _, b := range value {
		n = n<<8 | uint32(b)
	}
	return n, nil
}

// appendOption appends an option to a message. Previous is the number of the option before it, 0
// for the first; the number must not be less than that. The value must not be longer than 65804
// bytes.
func appendOption[T string | []byte](dst []byte, previous, number message.OptionID, value T) []byte {
	dst = appendOptionHead(dst, int(number)-int(previous), len(value))
	return append(dst, value...)
}

// AppendUintOption appends an option of format uint, in the shortest form.
func AppendUintOption(dst []byte, previous, number message.OptionID, value uint32) []byte {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], value)
	return appendOption(dst, previous, number, b[4-uintSize(value):])
}

func appendOptionHead(dst []byte, delta, length int) []byte {
	if delta < 0 {
		panic("coap: options out of order")
	}
	d, l := nibble(delta), nibble(length)
	dst = appendExtended(append(dst, byte(d<<4|l)), d, delta)
	return appendExtended(dst, l, length)
}

func nibble(n int) int {
	switch {
	case n < 13:
		return n
	case n < 269:
		return 13
	}
	return 14
}

func appendExtended(dst []byte, nibble, n int) []byte {
	switch nibble {
	case 13:
		return append(dst, byte(n-13))
	case 14:
		n -= 269
		return append(dst, byte(n>>8), byte(n))
	}
	return dst
}

// uintSize returns how many bytes the shortest form of a number takes.
func uintSize(n uint32) int { return (bits.Len32(n) + 7) / 8 }
