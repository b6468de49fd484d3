// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

const (
	// putSockets is how many blocks of 32 KiB are put at a time. Each such transfer has a socket, hence an address, of its
	// own, because a server tells transfers apart by where they come from.
	putSockets = 4
	// partsPerBlock is how many parts of one block are asked for at a time.
	partsPerBlock = 8
)

// datagrams carries requests by UDP. All but blocks that are put in parts goes through one socket.
type datagrams struct {
	store  *Store
	ctx    context.Context // ends with close
	cancel context.CancelFunc
	group  sync.WaitGroup
	puts   chan *endpoint // idle sockets for parts; nil ones are yet to be opened

	mu      sync.Mutex
	closed  bool
	present *endpoint
	open    map[*endpoint]struct{}
	opening chan struct{} // closed when the attempt to open a socket has ended
	backoff backoff
}

func newDatagrams(store *Store) *datagrams {
	d := &datagrams{store: store, puts: make(chan *endpoint, putSockets), open: make(map[*endpoint]struct{}), backoff: backoff{first: store.options.firstBackoff}}
	for range putSockets {
		d.puts <- nil
	}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	return d
}

func (d *datagrams) close() error {
	d.mu.Lock()
	d.closed = true
	for e := range d.open {
		e.fail(errClosed)
	}
	d.mu.Unlock()
	d.cancel()
	d.group.Wait()
	return nil
}

// endpoint returns the socket for everything but parts that are put.
func (d *datagrams) endpoint(ctx context.Context) (*endpoint, error) {
	for {
		d.mu.Lock()
		if d.present != nil && d.present.usable() {
			defer d.mu.Unlock()
			return d.present, nil
		}
		opening := d.opening
		if opening == nil {
			opening = make(chan struct{})
			d.opening = opening
			d.mu.Unlock()
			e, err := d.dial(ctx)
			d.mu.Lock()
			if err == nil {
				d.present = e
			}
			d.opening = nil
			close(opening)
			d.mu.Unlock()
			return e, err
		}
		d.mu.Unlock()
		select {
		case <-opening:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// dial opens a socket. This makes no connection, but may have to look a name up.
func (d *datagrams) dial(ctx context.Context) (*endpoint, error) {
	d.mu.Lock()
	wait, err := d.backoff.wait()
	d.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if wait > 0 {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-d.ctx.Done():
			return nil, errClosed
		}
	}
	limited, cancel := context.WithTimeout(ctx, d.store.options.DialTimeout)
	defer cancel()
	var dialer net.Dialer
	network, address := d.store.url.Address()
	conn, err := dialer.DialContext(limited, network, address)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err == nil && d.closed {
		conn.Close()
		err = errClosed
	}
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		err = fmt.Errorf("connecting: %w", err)
		d.backoff.failed(err)
		return nil, err
	}
	d.backoff.worked()
	e := newEndpoint(conn, d.store.requests, &d.store.options)
	d.open[e] = struct{}{}
	d.group.Go(func() {
		e.read()
		d.mu.Lock()
		delete(d.open, e)
		d.mu.Unlock()
	})
	return e, nil
}

func (d *datagrams) get(ctx context.Context, c *call) (int, error) {
	e, err := d.endpoint(ctx)
	if err != nil {
		return 0, err
	}
	dst := c.dst
	if err := e.do(ctx, c); err != nil {
		return 0, err
	}
	if err := getError(c); err != nil {
		return 0, err
	}
	if !c.response.Block2.Present {
		return c.length, nil
	}
	if c.response.Block2.Exponent > wire.MaxExponent {
		return 0, errBlockwise // reserved but for streams (RFC 7959, section 2.2)
	}
	length, more, err := firstPart(c)
	if err != nil || !more {
		return length, err
	}
	first := c.response.Block2
	length, err = d.getRest(ctx, inTime(e, partsPerBlock), c, dst, length, first.Exponent)
	if errors.Is(err, errBlockwise) {
		// Perhaps the server does not like to be asked for parts out of order.
		c.response.Block2, c.length = first, first.Unit()
		return getParts(ctx, inTime(e, 1), c, dst)
	}
	return length, err
}

// timed bounds the time for all parts of a block, each of which may be in time by itself. What they wait for their turn, behind
// other blocks, does not count.
type timed struct {
	endpoint *endpoint
	left     atomic.Int64 // nanoseconds of all exchanges together
}

// inTime gives a block so much time as a whole one gets on a stream, for each of the exchanges that there are at a time.
func inTime(e *endpoint, atATime int) *timed {
	t := &timed{endpoint: e}
	t.left.Store(int64(maxAge*e.options.RequestTimeout) * int64(atATime))
	return t
}

func (t *timed) do(ctx context.Context, c *call) error {
	if t.left.Load() <= 0 {
		return errSlow
	}
	err := t.endpoint.do(ctx, c)
	t.left.Add(-int64(c.took))
	return err
}

// getRest gets all parts of a block but the first, several at a time.
func (d *datagrams) getRest(ctx context.Context, e exchanger, c *call, dst []byte, first int, exponent uint8) (int, error) {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(partsPerBlock)
	unit := wire.Block{Exponent: exponent}.Unit()
	for offset := first; offset < len(dst); offset += unit {
		last := offset+unit >= len(dst)
		group.Go(func() error {
			part := d.store.calls.Get().(*call)
			defer d.store.recycle(part)
			part.ref, part.size = c.ref, c.size
			length, more, err := nextPart(ctx, e, part, dst, offset, exponent)
			var response *ResponseError
			switch {
			case err == nil && (more == last || length != min(unit, len(dst)-offset)), errors.As(err, &response):
				return errBlockwise
			}
			return err
		})
	}
	return len(dst), group.Wait()
}

func (d *datagrams) put(ctx context.Context, c *call) error {
	block := c.payload
	if len(block) <= blockUnit {
		e, err := d.endpoint(ctx)
		if err != nil {
			return err
		}
		if err := e.do(ctx, c); err != nil {
			return err
		}
		return putError(c)
	}
	var e *endpoint
	select {
	case e = <-d.puts:
		defer func() { d.puts <- e }()
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-d.ctx.Done():
		return errClosed
	}
	if e == nil || !e.usable() {
		var err error
		if e, err = d.dial(ctx); err != nil {
			return err
		}
	}
	return putParts(ctx, inTime(e, 1), c, block, wire.MaxExponent, blockUnit)
}
