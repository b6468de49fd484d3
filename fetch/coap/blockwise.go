// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"cmp"
	"context"
	"errors"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/turns"
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

const (
	// blockUnit is the size in bytes of the largest unit of block-wise transfer.
	blockUnit = 1024
	// partsAtATime is how many parts of one block are requested at a time by UDP: all, so that on a
	// slow line blocks come one after the other, and not many of them late.
	partsAtATime = 32
	// slowParts is how many RequestTimeouts all parts of a block may take together.
	slowParts = 10
	// maxRestarts is how often the transfer of a block begins again because the server asks for
	// that.
	maxRestarts = 3
)

// getParts gets the parts of a block that follow the first, which has come, and is in memory of the
// size of the block. It returns the length of the whole, or any that is greater than the block if
// that is too long.
func (s *Store) getParts(ctx context.Context, c connection, first *wire.Exchange, dst []byte) (int, error) {
	part, udp := first.Response.Block2, s.url.Scheme == "coap"
	if udp {
		s.received.Add(int64(first.Length))
	}
	switch {
	case part.Number != 0 || !part.FitPart(first.Length) || udp && part.Exponent > wire.MaxExponent:
		return 0, errBlockwise
	case !part.More:
		return first.Length, nil
	case first.Length >= len(dst):
		return first.Length + 1, nil
	case udp:
		err := s.getPartsAtOnce(ctx, c, first, dst)
		if err == nil || errors.As(err, new(*turns.LostError)) || ctx.Err() != nil {
			return len(dst), err
		}
		// Perhaps the server does not like to be requested parts out of order.
	}
	x := &wire.Exchange{Store: first.Store, Reference: first.Reference, Size: first.Size}
	length := first.Length
	for part.More && length < len(dst) {
		aim(x, length, part.Exponent, dst)
		err := s.do(ctx, c, x)
		if err == nil {
			err = s.partError(x)
		}
		if err != nil {
			return 0, err
		}
		part = x.Response.Block2
		length += x.Length
	}
	if part.More {
		length++
	}
	return length, nil
}

// getPartsAtOnce gets all parts that follow the first, several at a time. On a stream few servers
// answer so.
func (s *Store) getPartsAtOnce(ctx context.Context, c connection, first *wire.Exchange, dst []byte) (err error) {
	unit, exponent := first.Length, first.Response.Block2.Exponent
	exchanges := make([]wire.Exchange, min(partsAtATime, (len(dst)-1)/unit))
	done := make(chan *wire.Exchange, len(exchanges))
	next, underWay := unit, 0
	start := func(x *wire.Exchange) {
		aim(x, next, exponent, dst)
		next += unit
		underWay++
		if !c.Start(x) {
			_, x.Err = c.State()
			done <- x
		} else if ctx.Err() != nil {
			c.Cancel(x) // the others have been cancelled already
		}
	}
	for i := range exchanges {
		x := &exchanges[i]
		*x = wire.Exchange{Store: first.Store, Reference: first.Reference, Size: first.Size, Done: func(x *wire.Exchange) { done <- x }}
		start(x)
	}
	stop := context.AfterFunc(ctx, func() { cancelAll(c, exchanges) })
	defer stop()
	for ; underWay > 0; underWay-- {
		x := <-done
		switch {
		case err != nil:
			continue
		case x.Err != nil:
			err = s.failure(ctx, c, x.Err)
		case ctx.Err() != nil:
			err = context.Cause(ctx)
		default:
			err = s.partError(x)
			part, end := x.Response.Block2, min(x.Block.Offset()+unit, len(dst))
			if err == nil && (part.More != (end < len(dst)) || part.Exponent != exponent || x.Block.Offset()+x.Length != end) {
				err = errBlockwise
			}
		}
		if err != nil {
			cancelAll(c, exchanges)
		} else if next < len(dst) {
			start(x)
		}
	}
	return err
}

func cancelAll(c connection, exchanges []wire.Exchange) {
	for i := range exchanges {
		c.Cancel(&exchanges[i])
	}
}

// aim makes an exchange one for the part of a block at an offset. What is left of a block must be
// requested in the unit of the answers, which may be smaller than that of the first request (RFC
// 7959, section 2.4; RFC 8323, section 6).
func aim(x *wire.Exchange, offset int, exponent uint8, dst []byte) {
	x.Block = wire.Block{Exponent: exponent, Present: true}
	x.Block.Number = uint32(offset / x.Block.Unit())
	x.Dst = dst[offset:]
}

// partError returns what is wrong with the answer to a request for a part, or nil.
func (s *Store) partError(x *wire.Exchange) error {
	part := x.Response.Block2
	if err := getError(x); err != nil {
		return err
	}
	if !part.Present || part.Offset() != x.Block.Offset() || !part.FitPart(x.Length) {
		return errBlockwise
	}
	if s.url.Scheme == "coap" {
		s.received.Add(int64(x.Length))
	}
	return nil
}

// putParts puts a block part by part, after those that others put so on the same link: a server may
// tell transfers apart by the endpoint alone, and would make one block of the parts of two, which
// nobody would notice. Peer is nil by UDP. It begins again, after others, if the server has dropped
// what came before: a copy of an old message made it start afresh, or it has no room for so many.
func (s *Store) putParts(ctx context.Context, block []byte, peer *wire.Capabilities) error {
	for restarts := 0; ; restarts++ {
		var l *link
		select {
		case l = <-s.parts:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.ctx.Done():
			return fetch.ErrClosed
		}
		x := &wire.Exchange{Store: s.blocks}
		err := s.putPartsOn(ctx, l, x, block, peer)
		dropped := x.Code == codes.RequestEntityIncomplete && x.Block.Number > 0
		s.release(l, x.Again, dropped, err)
		if !dropped || restarts == maxRestarts {
			return err
		}
	}
}

// release gives back a link on which a block was put in parts, of which so many were sent again. By
// UDP, one block more is put at a time after one of which at most one part was, until the server
// drops one; and one less after that, or where an eighth of the parts were sent again.
func (s *Store) release(l *link, again int, dropped bool, err error) {
	if dropped {
		s.crowded.Store(true)
	}
	if dropped || again > int(eris.BlockSize32KiB)/blockUnit/8 {
		select {
		case s.spare <- l:
			return
		default: // no more are in use than at first
		}
	}
	s.parts <- l
	if err == nil && again <= 1 && !s.crowded.Load() {
		select {
		case more := <-s.spare:
			s.parts <- more
		default:
		}
	}
}

// putPartsOn puts a block part by part on a link, by an exchange of which the store is set.
func (s *Store) putPartsOn(ctx context.Context, l *link, x *wire.Exchange, block []byte, peer *wire.Capabilities) error {
	ctx, cancel := context.WithTimeoutCause(ctx, slowParts*s.options.RequestTimeout, errSlow)
	defer cancel()
	c, err := l.get()
	if err != nil {
		return &turns.LostError{Err: err}
	}
	room := blockUnit
	if peer != nil {
		room = peer.MessageSize - s.blocks.Overhead()
	}
	if units := room / blockUnit; units > 1 && peer.BERT() {
		return s.transfer(ctx, c, x, block, wire.BERT, units*blockUnit)
	}
	exponent := wire.Fit(room)
	return s.transfer(ctx, c, x, block, exponent, wire.Block{Exponent: exponent}.Unit())
}

// transfer puts a block in parts, in units of the given exponent and in messages with at most the
// given number of bytes of it (RFC 7959, section 2.5; RFC 8323, section 6).
func (s *Store) transfer(ctx context.Context, c connection, x *wire.Exchange, block []byte, exponent uint8, most int) error {
	for sent := 0; ; {
		part := wire.Block{Exponent: exponent, Present: true}
		part.Number = uint32(sent / part.Unit())
		length := min(most, len(block)-sent)
		part.More = sent+length < len(block)
		x.Block, x.Total, x.Payload = part, 0, block[sent:sent+length]
		if sent == 0 {
			x.Total = len(block)
		}
		if err := s.do(ctx, c, x); err != nil {
			return err
		}
		answer := x.Response.Block1
		switch {
		case x.Code == codes.RequestEntityTooLarge && sent == 0 && answer.Present && answer.Exponent < exponent:
			// The server wants smaller parts from the first on.
			exponent, most = answer.Exponent, answer.Unit()
			continue
		case !part.More:
			return putError(x)
		case x.Code != codes.Continue: // a server that takes this for all of it keeps parts as blocks
			return cmp.Or(putError(x), errBlockwise)
		case !answer.Present || x.Response.Unusable || answer.Number != part.Number:
			return errBlockwise
		}
		sent += length
		if answer.Exponent < exponent {
			exponent, most = answer.Exponent, min(most, answer.Unit())
		}
	}
}
