// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"context"
	"errors"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// exchanger makes one exchange of a request and a response. The call must be filled in; when do returns nil, so is its
// response.
type exchanger interface {
	do(ctx context.Context, c *call) error
}

var errBlockwise = errors.New("block-wise transfer went wrong")

// blockUnit is the size in bytes of the largest unit of block-wise transfer.
const blockUnit = 1024

// maxRestarts is how often the transfer of a block begins again at the server's wish.
const maxRestarts = 3

// firstPart returns the length of the part that the call has received, if it is the first, and whether parts follow.
func firstPart(c *call) (length int, more bool, err error) {
	part := c.response.Block2
	if part.Number != 0 || !part.FitPart(c.length) {
		return 0, false, errBlockwise
	}
	return c.length, part.More, nil
}

// nextPart asks for the part that starts at the given offset, and returns its length and whether parts follow. What is left
// of a block must be asked for in the unit of the answers, which may be smaller than that of the first question (RFC 7959,
// section 2.4; RFC 8323, section 6).
func nextPart(ctx context.Context, e exchanger, c *call, dst []byte, offset int, exponent uint8) (length int, more bool, err error) {
	c.block = wire.Block{Exponent: exponent, Present: true}
	c.block.Number = uint32(offset / c.block.Unit())
	c.dst = dst[min(offset, len(dst)):]
	if err := e.do(ctx, c); err != nil {
		return 0, false, err
	}
	if err := getError(c); err != nil {
		return 0, false, err
	}
	part := c.response.Block2
	if !part.Present || part.Offset() != offset || !part.FitPart(c.length) {
		return 0, false, errBlockwise
	}
	return c.length, part.More, nil
}

// getParts goes on with a block of which the first part has come, one part after the other. It returns the length of the
// whole, or what it is at least if that is more than dst holds.
func getParts(ctx context.Context, e exchanger, c *call, dst []byte) (int, error) {
	have, more, err := firstPart(c)
	for err == nil && more && have <= len(dst) {
		var length int
		length, more, err = nextPart(ctx, e, c, dst, have, c.response.Block2.Exponent)
		have += length
	}
	return have, err
}

// putParts puts a block part by part, in units of the given exponent and in messages with at most the given number of bytes
// of it (RFC 7959, section 2.5; RFC 8323, section 6). There must be one such transfer at a time: a server tells them apart by
// their resource alone, and would make one block of the parts of two, which nobody would notice.
func putParts(ctx context.Context, e exchanger, c *call, block []byte, exponent uint8, most int) error {
	for sent, again := 0, 0; ; {
		part := wire.Block{Exponent: exponent, Present: true}
		part.Number = uint32(sent / part.Unit())
		length := min(most, len(block)-sent)
		part.More = sent+length < len(block)
		c.block, c.total, c.payload = part, 0, block[sent:sent+length]
		if sent == 0 {
			c.total = len(block)
		}
		if err := e.do(ctx, c); err != nil {
			return err
		}
		answer := c.response.Block1
		if c.code == codes.RequestEntityTooLarge && sent == 0 && answer.Present && answer.Exponent < exponent {
			// The server wants smaller parts from the first on.
			exponent = answer.Exponent
			most = answer.Unit()
			continue
		}
		if c.code == codes.RequestEntityIncomplete && sent > 0 && again < maxRestarts {
			// The server has dropped what came before, or a copy of an old message made it start afresh.
			sent = 0
			again++
			continue
		}
		if !part.More || c.code != codes.Continue {
			return putError(c)
		}
		if !answer.Present || c.response.Unusable || answer.Number != part.Number {
			return errBlockwise
		}
		sent += length
		if answer.Exponent < exponent {
			exponent = answer.Exponent
			most = min(most, answer.Unit())
		}
	}
}
