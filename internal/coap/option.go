// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"errors"

	"github.com/plgd-dev/go-coap/v3/message"
)

// Option numbers that go-coap has no names for.
const (
	// HopLimit is elective and of no interest to a server that does not forward (RFC 8768).
	HopLimit message.OptionID = 16
	// RequestTag tells concurrent block-wise requests to one resource apart (RFC 9175, section 3.2).
	RequestTag message.OptionID = 292
)

// Errors of [Options.Err]. All but ErrTruncated say that the message is malformed whatever follows.
var (
	// ErrTruncated says that the message ends within an option.
	ErrTruncated       = errors.New("CoAP option is truncated")
	errReservedNibble  = errors.New("CoAP option has a reserved delta or length")
	errOptionNumber    = errors.New("CoAP option number is above 65535")
	errEmptyPayload    = errors.New("CoAP payload marker without a payload")
	errUintLength      = errors.New("CoAP option is too long for a number")
	errCSMOption       = errors.New("CoAP capability message has an unknown critical option")
	errSignalOption    = errors.New("CoAP signalling message has an unknown critical option")
	errMessageTooShort = errors.New("CoAP message is too short")
	errVersion         = errors.New("CoAP version is not 1")
	errEmptyMessage    = errors.New("empty CoAP message is not empty")
)

// Option is one option of a message. Its value is a part of the message.
type Option struct {
	Number message.OptionID
	Value  []byte
}

// Critical reports whether a recipient that does not know the option must refuse the message: those with odd numbers (RFC
// 7252, section 5.4.1).
func (o Option) Critical() bool { return o.Number&1 == 1 }

// Options walks through the options of a message (RFC 7252, section 3.1). Call Next until it returns false, then look at Err
// and Payload.
type Options struct {
	rest   []byte
	number int
	marker bool
	err    error
}

// ParseOptions starts to walk through the given part of a message, which must begin behind the token.
func ParseOptions(body []byte) Options {
	return Options{rest: body}
}

// Next returns the next option, in the order of their numbers. It returns false at the payload marker, at the end of the
// message and after an error.
func (o *Options) Next() (Option, bool) {
	b := o.rest
	if len(b) == 0 || o.err != nil || o.marker {
		return Option{}, false
	}
	first := b[0]
	if first == payloadMarker {
		if len(b) == 1 {
			o.err = errEmptyPayload
			return Option{}, false
		}
		o.marker, o.rest = true, b[1:]
		return Option{}, false
	}
	b = b[1:]
	delta, length := int(first>>4), int(first&15)
	if delta >= 13 || length >= 13 {
		var ok bool
		if delta, b, ok = o.extended(delta, b); !ok {
			return Option{}, false
		}
		if length, b, ok = o.extended(length, b); !ok {
			return Option{}, false
		}
	}
	if length > len(b) {
		o.err = ErrTruncated
		return Option{}, false
	}
	number := o.number + delta
	if number > 0xffff {
		o.err = errOptionNumber
		return Option{}, false
	}
	o.number, o.rest = number, b[length:]
	return Option{message.OptionID(number), b[:length:length]}, true
}

// extended reads the rest of a delta or a length.
func (o *Options) extended(nibble int, b []byte) (int, []byte, bool) {
	switch nibble {
	case 15:
		o.err = errReservedNibble
		return 0, nil, false
	case 14:
		if len(b) < 2 {
			o.err = ErrTruncated
			return 0, nil, false
		}
		return 269 + (int(b[0])<<8 | int(b[1])), b[2:], true
	case 13:
		if len(b) < 1 {
			o.err = ErrTruncated
			return 0, nil, false
		}
		return 13 + int(b[0]), b[1:], true
	}
	return nibble, b, true
}

// Err returns what is wrong with the options walked through so far, or nil.
func (o *Options) Err() error { return o.err }

// Marker reports whether the walk has passed the payload marker, so that a payload of at least one byte follows.
func (o *Options) Marker() bool { return o.marker }

// Payload returns what follows the payload marker; nil before the marker has been met, and if there is none.
func (o *Options) Payload() []byte {
	if !o.marker {
		return nil
	}
	return o.rest
}

const payloadMarker = 0xff

// Uint returns the number in the value of an option of format uint (RFC 7252, section 3.2). It returns an error for values
// of more than 4 bytes, which none of the known options may have.
func Uint(value []byte) (uint32, error) {
	if len(value) > 4 {
		return 0, errUintLength
	}
	var n uint32
	for _, b := range value {
		n = n<<8 | uint32(b)
	}
	return n, nil
}

// AppendOption appends an option to a message. Previous is the number of the option before it, 0 for the first; the number
// must not be less than that. The value must not be longer than 65804 bytes.
func AppendOption[T string | []byte](dst []byte, previous, number message.OptionID, value T) []byte {
	dst = appendOptionHead(dst, int(number)-int(previous), len(value))
	return append(dst, value...)
}

// AppendUintOption appends an option of format uint, in the shortest form.
func AppendUintOption(dst []byte, previous, number message.OptionID, value uint32) []byte {
	n := uintSize(value)
	dst = appendOptionHead(dst, int(number)-int(previous), n)
	for n > 0 {
		n--
		dst = append(dst, byte(value>>(8*n)))
	}
	return dst
}

func appendOptionHead(dst []byte, delta, length int) []byte {
	if delta < 0 {
		panic("coap: options out of order")
	}
	d, l := nibble(delta), nibble(length)
	dst = append(dst, byte(d<<4|l))
	dst = appendExtended(dst, d, delta)
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

// optionSize returns how many bytes an option takes whose number is delta above that of the one before it.
func optionSize(delta, length int) int {
	n := 1 + length
	for _, v := range [2]int{delta, length} {
		switch nibble(v) {
		case 13:
			n++
		case 14:
			n += 2
		}
	}
	return n
}

// uintSize returns how many bytes the shortest form of a number takes.
func uintSize(n uint32) int {
	switch {
	case n == 0:
		return 0
	case n < 1<<8:
		return 1
	case n < 1<<16:
		return 2
	case n < 1<<24:
		return 3
	}
	return 4
}
