// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"container/list"
	"context"
	"errors"
	"sync"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

const (
	// partsAtATime is how many parts of one block are requested at a time by UDP.
	partsAtATime = 8
	// slowParts is how many RequestTimeouts all parts of a block may take together.
	slowParts = 10
)

// request is a [fetch.Request] between Start and Done. It is made of one exchange; of one more on
// another connection, if the first fails; and of several, if the peer answers in parts. It remains
// with the fetch.Request, to be used again.
type request struct {
	store *Store
	r     *fetch.Request
	dst   []byte
	first wire.Exchange

	mu         sync.Mutex
	round      uint64 // how often it has been started
	over       bool   // Done has been or is being called
	cancelled  bool
	waiting    *list.Element
	connection *connection
	exchange   *wire.Exchange
	again      bool // on a new connection

	// Of a block that comes in parts.
	parts    []*wire.Exchange // that are requested at a time
	began    time.Time
	next     int   // offset of the next part that nobody has requested
	exponent uint8 // of the unit
	out      int   // parts that are requested
	err      error // why the block will not be complete
}

func newRequest(s *Store) *request {
	q := &request{store: s, over: true}
	q.first.Done, q.first.Store = q.answered, s.blocks
	return q
}

// start begins a request anew.
func (q *request) start(r *fetch.Request) {
	q.mu.Lock()
	q.round++
	q.r, q.over, q.cancelled, q.again = r, false, false, false
	q.waiting, q.connection, q.exchange = nil, nil, &q.first
	q.parts, q.err = nil, nil
	q.mu.Unlock()
	switch {
	case !r.Size.Valid() || cap(r.Dst) < int(r.Size):
		q.end(0, errSize)
		return
	case !q.store.url.Get:
		q.end(0, eris.ErrNotFound)
		return
	}
	q.dst = r.Dst[:r.Size]
	x := q.exchange
	x.Reference, x.Size, x.Dst, x.Block = r.Pair.Reference, r.Size, q.dst, wire.Block{}
	q.connect()
}

// connect begins the first exchange, or the first on a new connection.
func (q *request) connect() {
	q.mu.Lock()
	round := q.round
	q.mu.Unlock()
	e := q.store.main.use(q)
	if e == nil {
		return
	}
	q.mu.Lock()
	if q.round != round {
		q.mu.Unlock()
		return
	}
	q.waiting = e
	cancelled := q.cancelled
	q.mu.Unlock()
	if cancelled && q.store.main.remove(e, q) {
		q.end(0, context.Canceled)
	}
}

// begin implements waiter.
func (q *request) begin(c *connection) bool {
	q.mu.Lock()
	q.connection = c
	x := q.exchange
	q.mu.Unlock()
	return q.send(c, x)
}

// failed implements waiter.
func (q *request) failed(err error) { q.end(0, err) }

// send makes an exchange. It reports whether the connection takes it.
func (q *request) send(c *connection, x *wire.Exchange) bool {
	q.mu.Lock()
	round := q.round
	q.mu.Unlock()
	if !c.Start(x) {
		return false
	}
	q.mu.Lock()
	cancelled := q.cancelled && q.round == round
	q.mu.Unlock()
	if cancelled {
		c.Cancel(x)
	}
	return true
}

// cancel implements [Store.Cancel].
func (q *request) cancel() {
	q.mu.Lock()
	if q.over {
		q.mu.Unlock()
		return
	}
	q.cancelled = true
	waiting, c, x, parts := q.waiting, q.connection, q.exchange, q.parts
	q.mu.Unlock()
	if q.store.main.remove(waiting, q) {
		q.end(0, context.Canceled)
		return
	}
	if c == nil {
		return
	}
	c.Cancel(x)
	for _, x := range parts {
		c.Cancel(x)
	}
}

// end calls Done, with a block of the given length or an error.
func (q *request) end(length int, err error) {
	q.mu.Lock()
	q.over = true
	r := q.r
	q.mu.Unlock()
	r.Block, r.Err = nil, nil
	switch {
	case errors.Is(err, context.Canceled):
		r.Err = err
	case err != nil:
		r.Err = &blockError{q.store, r.Pair.Reference, err}
	case length != int(r.Size):
		r.Err = &blockError{q.store, r.Pair.Reference, &eris.BlockError{Reference: r.Pair.Reference, Length: length, Want: r.Size}}
	default:
		r.Block = q.dst
	}
	r.Done(r)
}

// answered is called when the first exchange is done.
func (q *request) answered(x *wire.Exchange) {
	switch {
	case x.Err != nil:
		q.lost(x.Err)
	case getError(x) != nil:
		q.end(0, getError(x))
	case !x.Response.Block2.Present:
		q.end(x.Length, nil)
	default:
		q.began = time.Now()
		q.inParts(x, q.partsAtATime())
	}
}

// lost is called when an exchange has failed. It makes another on a new connection if it was the
// connection that failed: it may have died unnoticed while nobody used it. But a peer that has
// never answered gets no second request.
func (q *request) lost(err error) {
	q.mu.Lock()
	answered, _ := q.connection.State()
	again := !q.again && !q.cancelled && !errors.Is(err, context.Canceled) && q.store.url.Scheme != "coap" &&
		(answered || !errors.Is(err, wire.ErrSilent))
	if again {
		q.again, q.waiting, q.connection = true, nil, nil
		old := q.exchange
		q.exchange = &wire.Exchange{Store: old.Store, Reference: old.Reference, Size: old.Size, Dst: q.dst, Done: q.answered}
		q.parts = nil
	}
	q.mu.Unlock()
	if !again {
		q.end(0, err)
		return
	}
	q.connect()
}

// partsAtATime returns how many parts are requested at a time: on a stream one after the other,
// because few servers answer so there.
func (q *request) partsAtATime() int {
	if q.store.url.Scheme == "coap" {
		return partsAtATime
	}
	return 1
}

// inParts asks for the parts that follow the first, which has come.
func (q *request) inParts(first *wire.Exchange, n int) {
	part := first.Response.Block2
	if part.Number != 0 || !part.FitPart(first.Length) || n > 1 && part.Exponent > wire.MaxExponent {
		q.end(0, errBlockwise)
		return
	}
	if !part.More || first.Length > len(q.dst) {
		q.end(first.Length, nil)
		return
	}
	unit := first.Length
	parts := make([]*wire.Exchange, min(n, (len(q.dst)-1)/unit))
	if len(parts) == 0 {
		q.end(first.Length+1, nil) // more than the block can have
		return
	}
	q.mu.Lock()
	for i := range parts {
		parts[i] = &wire.Exchange{Store: first.Store, Reference: first.Reference, Size: first.Size, Done: q.part}
	}
	q.parts, q.next, q.exponent, q.out, q.err = parts, first.Length, part.Exponent, len(parts), nil
	for _, x := range parts {
		q.aim(x)
	}
	q.mu.Unlock()
	for _, x := range parts {
		q.sendPart(x)
	}
}

// aim makes an exchange one for the next part. What is left of a block must be requested in the
// unit of the answers, which may be smaller than that of the first request (RFC 7959, section 2.4;
// RFC 8323, section 6). The lock must be held.
func (q *request) aim(x *wire.Exchange) {
	x.Block = wire.Block{Exponent: q.exponent, Present: true}
	x.Block.Number = uint32(q.next / x.Block.Unit())
	x.Dst = q.dst[min(q.next, len(q.dst)):]
	if len(q.parts) > 1 {
		q.next += x.Block.Unit()
	}
}

func (q *request) sendPart(x *wire.Exchange) {
	q.mu.Lock()
	c := q.connection
	q.mu.Unlock()
	if !q.send(c, x) {
		x.Err = c.err()
		q.part(x)
	}
}

// part is called when the exchange for a part is done.
func (q *request) part(x *wire.Exchange) {
	q.mu.Lock()
	offset := x.Block.Offset()
	p := x.Response.Block2
	atATime := len(q.parts)
	err := x.Err
	if err == nil {
		err = getError(x)
	}
	last := atATime > 1 && offset+x.Block.Unit() >= len(q.dst)
	switch {
	case err != nil:
	case !p.Present || p.Offset() != offset || !p.FitPart(x.Length),
		atATime > 1 && (p.More == last || p.Exponent != x.Block.Exponent || !last && x.Length != p.Unit()):
		err = errBlockwise
	case time.Since(q.began) > slowParts*q.store.options.RequestTimeout:
		err = errSlow
	case atATime == 1:
		q.next, q.exponent = offset+x.Length, p.Exponent
		last = !p.More || q.next > len(q.dst)
	default:
		last = q.next >= len(q.dst)
	}
	failed := err != nil && q.err == nil
	if failed {
		q.err = err
	}
	if q.err == nil && !last {
		q.aim(x)
		q.mu.Unlock()
		q.sendPart(x)
		return
	}
	q.out--
	out, err, length, parts, c := q.out, q.err, q.next, q.parts, q.connection
	q.mu.Unlock()
	if failed {
		for _, other := range parts {
			if other != x {
				c.Cancel(other)
			}
		}
	}
	if out == 0 {
		q.partsOver(min(length, len(q.dst)+1), atATime, err)
	}
}

// partsOver is called when no part is requested any more.
func (q *request) partsOver(length, atATime int, err error) {
	var response *ResponseError
	switch {
	case err == nil && atATime > 1:
		q.end(len(q.dst), nil)
	case err == nil:
		q.end(length, nil)
	case atATime > 1 && (err == errBlockwise || errors.As(err, &response) || errors.Is(err, eris.ErrNotFound)):
		// Perhaps the server does not like to be requested parts out of order.
		q.mu.Lock()
		first := q.exchange
		q.mu.Unlock()
		q.inParts(first, 1)
	case errors.Is(err, context.Canceled), getFinal(err):
		q.end(0, err)
	default:
		q.lost(err)
	}
}

// getFinal reports whether an error is one of the answer, not of the connection.
func getFinal(err error) bool {
	var response *ResponseError
	return err == errBlockwise || err == errSlow || err == errUnusable || errors.As(err, &response) || errors.Is(err, eris.ErrNotFound)
}

// getError returns what the answer to a GET means, nil if it has a payload to look at.
func getError(x *wire.Exchange) error {
	switch {
	case x.Response.Unusable:
		return errUnusable
	case x.Code == codes.Content:
		return nil
	case x.Code == codes.NotFound:
		return eris.ErrNotFound
	}
	return &ResponseError{x.Code, x.Text()}
}
