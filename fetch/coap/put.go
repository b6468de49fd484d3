// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

const (
	// blockUnit is the size in bytes of the largest unit of block-wise transfer.
	blockUnit = 1024
	// maxRestarts is how often the transfer of a block begins again because the server asks for
	// that.
	maxRestarts = 3
	// baseMessageSize is the size in bytes of a message that every peer takes.
	baseMessageSize = 1152
)

// Put implements [fetch.Store]: it returns nil once the server has answered that it has the block.
// The reference is not sent, servers compute it; it is for messages. If the connection fails, the
// block is put once more on a new one.
func (s *Store) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	if !eris.BlockSize(len(block)).Valid() {
		return &blockError{s, ref, errSize}
	}
	if !s.url.Put {
		return &blockError{s, ref, fetch.ErrReadOnly}
	}
	err := s.put(ctx, block)
	if s.again(err) {
		err = s.put(ctx, block)
	}
	if cause := context.Cause(ctx); err == nil || cause != nil && errors.Is(err, cause) {
		return err
	}
	return &blockError{s, ref, err}
}

// connectionError is a failure of the connection, not of the request.
type connectionError struct {
	err      error
	answered bool // the peer has, before
}

func (e *connectionError) Error() string { return e.err.Error() }
func (e *connectionError) Unwrap() error { return e.err }

// again reports whether a call that has failed should be tried once more, as [request.lost] does.
func (s *Store) again(err error) bool {
	var failure *connectionError
	return errors.As(err, &failure) && s.url.Scheme != "coap" && (failure.answered || !errors.Is(err, wire.ErrSilent))
}

// put puts a block in one message, or in parts if the peer cannot take it otherwise.
func (s *Store) put(ctx context.Context, block []byte) error {
	if s.url.Scheme == "coap" && len(block) > blockUnit {
		return s.putParts(ctx, block, nil)
	}
	c, err := s.main.await(ctx)
	if err != nil {
		return err
	}
	peer := wire.Capabilities{MessageSize: baseMessageSize}
	size := len(block) + s.blocks.Overhead()
	if conn, ok := c.carrier.(*wire.Conn); ok && size > baseMessageSize {
		if peer, err = s.peer(ctx, conn); err != nil {
			return err
		}
		silent := !peer.Stated && !peer.BlockWise
		switch {
		case size <= int(peer.MessageSize), silent && !s.options.StrictMessageSize:
		case peer.BlockWise:
			return s.putParts(ctx, block, &peer)
		default:
			return fmt.Errorf("peer takes messages of %d bytes only", peer.MessageSize)
		}
	}
	x := &wire.Exchange{Store: s.blocks, Payload: block}
	if err := do(ctx, c, x); err != nil {
		return err
	}
	if x.Code != codes.RequestEntityTooLarge || len(block) <= blockUnit || !peer.BlockWise {
		return putError(x)
	}
	return s.putParts(ctx, block, &peer)
}

// peer returns what the peer can receive. It waits for a while until the peer has said so.
func (s *Store) peer(ctx context.Context, conn *wire.Conn) (wire.Capabilities, error) {
	read := func() (wire.Capabilities, <-chan struct{}) {
		conn.Queue.Mu.Lock()
		defer conn.Queue.Mu.Unlock()
		return conn.Peer()
	}
	_, introduced := read()
	timer := time.NewTimer(s.options.CapabilityTimeout)
	defer timer.Stop()
	select {
	case <-introduced:
	case <-timer.C:
	case <-ctx.Done():
		return wire.Capabilities{}, context.Cause(ctx)
	}
	peer, _ := read()
	return peer, nil
}

// do makes an exchange and waits for it.
func do(ctx context.Context, c *connection, x *wire.Exchange) error {
	done := make(chan struct{})
	x.Done = func(*wire.Exchange) { close(done) }
	if !c.Start(x) {
		answered, err := c.State()
		return &connectionError{err, answered}
	}
	select {
	case <-done:
	case <-ctx.Done():
		c.Cancel(x)
		<-done
	}
	switch {
	case errors.Is(x.Err, context.Canceled):
		return context.Cause(ctx)
	case x.Err != nil:
		answered, _ := c.State()
		return &connectionError{x.Err, answered}
	}
	return nil
}

// putParts puts a block part by part, after those that others put so on the same link: a server may
// tell transfers apart by the endpoint alone, and would make one block of the parts of two, which
// nobody would notice. Peer is nil by UDP.
func (s *Store) putParts(ctx context.Context, block []byte, peer *wire.Capabilities) error {
	var l *link
	select {
	case l = <-s.parts:
		defer func() { s.parts <- l }()
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-s.ctx.Done():
		return fetch.ErrClosed
	}
	ctx, cancel := context.WithTimeoutCause(ctx, slowParts*s.options.RequestTimeout, errSlow)
	defer cancel()
	c, err := l.await(ctx)
	if err != nil {
		return err
	}
	t := transfer{x: wire.Exchange{Store: s.blocks}, block: block, exponent: wire.MaxExponent, most: blockUnit}
	if peer != nil && peer.BERT() {
		if units := (int(min(peer.MessageSize, wire.MessageSize)) - s.blocks.Overhead()) / blockUnit; units > 1 {
			t.exponent, t.most = wire.BERT, units*blockUnit
		}
	}
	// The token is kept between parts.
	defer func() { c.Cancel(&t.x) }()
	return t.run(ctx, c)
}

// transfer is a block that is put in parts, in units of the given exponent and in messages with at
// most the given number of bytes of it (RFC 7959, section 2.5; RFC 8323, section 6). All have one
// token.
type transfer struct {
	x        wire.Exchange
	block    []byte
	exponent uint8
	most     int
}

func (t *transfer) run(ctx context.Context, c *connection) error {
	for sent, restarts := 0, 0; ; {
		x := &t.x
		part := wire.Block{Exponent: t.exponent, Present: true}
		part.Number = uint32(sent / part.Unit())
		length := min(t.most, len(t.block)-sent)
		part.More = sent+length < len(t.block)
		x.Block, x.Total, x.Payload, x.Keep = part, 0, t.block[sent:sent+length], part.More
		if sent == 0 {
			x.Total = len(t.block)
		}
		if err := do(ctx, c, x); err != nil {
			return err
		}
		answer := x.Response.Block1
		switch {
		case x.Code == codes.RequestEntityTooLarge && sent == 0 && answer.Present && answer.Exponent < t.exponent:
			// The server wants smaller parts from the first on.
			t.exponent, t.most = answer.Exponent, answer.Unit()
			continue
		case x.Code == codes.RequestEntityIncomplete && sent > 0 && restarts < maxRestarts:
			// The server has dropped what came before, or a copy of an old message made it start
			// afresh.
			sent = 0
			restarts++
			continue
		case !part.More || x.Code != codes.Continue:
			return putError(x)
		case !answer.Present || x.Response.Unusable || answer.Number != part.Number:
			return errBlockwise
		}
		sent += length
		if answer.Exponent < t.exponent {
			t.exponent, t.most = answer.Exponent, min(t.most, answer.Unit())
		}
	}
}

// putError returns what the last answer to a PUT means.
func putError(x *wire.Exchange) error {
	switch x.Code {
	case codes.Created, codes.Changed:
		return nil
	case codes.MethodNotAllowed, codes.NotFound, codes.Forbidden, codes.Unauthorized:
		return fmt.Errorf("%w: %w", fetch.ErrReadOnly, &ResponseError{x.Code, x.Text()})
	}
	return &ResponseError{x.Code, x.Text()}
}
