// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"context"
	"errors"
	"fmt"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/turns"
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// Put implements [fetch.Store]: it returns nil once the server has answered that it has the block.
// The reference is not sent, servers compute it; it is for messages. If the connection fails, the
// block is put once more on a new one, and again as long as the server was there half a minute ago;
// if the server is busy, when it has its turn.
func (s *Store) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	var err error
	switch {
	case !eris.BlockSize(len(block)).Valid():
		err = eris.ErrBlockSize
	case !s.url.Put:
		err = fetch.ErrReadOnly
	default:
		err = s.turns.Retry(ctx, func() error {
			err := s.put(ctx, block)
			if busy, ok := errors.AsType[*fetch.BusyError](err); ok && busy.After > 0 {
				s.turns.Fail(busy, busy.After)
			}
			return err
		})
	}
	if cause := context.Cause(ctx); err == nil || cause != nil && errors.Is(err, cause) {
		return err
	}
	return &blockError{s, fmt.Errorf("block %v: %w", ref, err)}
}

// again reports whether a request that has failed should be made once more on a new connection: not
// if none can be made, and not if the peer has never answered; by UDP only where a socket takes no
// more.
func (s *Store) again(c connection, err error) bool {
	answered, _ := c.State()
	if s.url.Scheme == "coap" {
		return errors.Is(err, wire.ErrReleased)
	}
	return !errors.As(err, new(*dialError)) && !errors.Is(err, context.Canceled) && (answered || !errors.Is(err, wire.ErrSilent))
}

// lost is the error of a request whose connection has failed.
func (s *Store) lost(c connection, err error) error {
	return &turns.LostError{Err: err, Again: s.again(c, err)}
}

// put puts a block in one message, or in parts if the peer cannot take it otherwise.
func (s *Store) put(ctx context.Context, block []byte) error {
	if s.url.Scheme == "coap" && len(block) > blockUnit {
		return s.putParts(ctx, block, nil)
	}
	c, err := s.main.get()
	if err != nil {
		return &turns.LostError{Err: err}
	}
	var peer wire.Capabilities
	size := len(block) + s.blocks.Overhead()
	if conn, ok := c.(*wire.Conn); ok {
		if size > wire.BaseMessageSize {
			peer, err = conn.AwaitPeer(ctx)
		} else {
			conn.Lock()
			peer = conn.Peer()
			conn.Unlock()
		}
		if err != nil {
			return s.lost(c, err)
		}
		silent := !peer.Stated && !peer.BlockWise // some servers say nothing, and take whole blocks
		switch {
		case size <= peer.MessageSize, silent:
		case peer.BlockWise:
			return s.putParts(ctx, block, &peer)
		default:
			return fmt.Errorf("peer takes messages of %d bytes only", peer.MessageSize)
		}
	}
	x := &wire.Exchange{Store: s.blocks, Payload: block}
	if err := s.do(ctx, c, x); err != nil {
		return err
	}
	if x.Code != codes.RequestEntityTooLarge || len(block) <= blockUnit || !peer.BlockWise {
		return putError(x)
	}
	return s.putParts(ctx, block, &peer)
}

// do makes an exchange and waits for it.
func (s *Store) do(ctx context.Context, c connection, x *wire.Exchange) error {
	done := make(chan struct{})
	x.Done = func(*wire.Exchange) { close(done) }
	if !c.Start(x) {
		_, err := c.State()
		return s.lost(c, err)
	}
	select {
	case <-done:
	case <-ctx.Done():
		c.Cancel(x)
		<-done
	}
	return s.failure(ctx, c, x.Err)
}

// failure returns what the error of an exchange means.
func (s *Store) failure(ctx context.Context, c connection, err error) error {
	switch {
	case errors.Is(err, context.Canceled):
		return context.Cause(ctx)
	case err != nil:
		return s.lost(c, err)
	}
	return nil
}

// putError returns what the last answer to a PUT means.
func putError(x *wire.Exchange) error {
	switch x.Code {
	case codes.Created, codes.Changed:
		return nil
	case codes.MethodNotAllowed, codes.NotFound, codes.Forbidden, codes.Unauthorized:
		return fmt.Errorf("%w: %w", fetch.ErrReadOnly, responseError(x))
	}
	return refusal(x)
}
