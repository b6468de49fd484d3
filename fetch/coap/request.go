// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/turns"
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
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
	over       bool // there is a result; Done is called when nothing of send is under way
	cancelled  bool
	sending    int // calls of send
	connection connection
	exchange   *wire.Exchange
	started    bool // the exchange is with the connection
	length     int  // the result
	err        error
	again      bool               // on a new connection
	stop       context.CancelFunc // of a block that comes in parts
}

func newRequest(s *Store) *request {
	q := &request{store: s, over: true}
	q.first.Done = q.answered
	return q
}

// start begins a request anew.
func (q *request) start(r *fetch.Request) {
	q.mu.Lock()
	q.r, q.over, q.cancelled, q.again = r, false, false, false
	q.connection, q.exchange, q.started = nil, &q.first, false
	q.stop = nil
	q.mu.Unlock()
	x := &q.first
	q.dst = r.Dst[:cap(r.Dst)]
	x.Store, x.Block, x.Payload = q.store.have, wire.Block{}, nil
	if r.Have == nil {
		switch {
		case !r.Size.Valid() || cap(r.Dst) < int(r.Size):
			q.end(0, eris.ErrBlockSize)
			return
		case !q.store.url.Get:
			q.end(0, eris.ErrNotFound)
			return
		}
		q.dst = r.Dst[:r.Size]
		x.Store, x.Reference, x.Size = q.store.blocks, r.Pair.Reference, r.Size
	}
	x.Dst = q.dst
	q.connect()
}

// connect begins the first exchange, or the first on a new connection.
func (q *request) connect() {
	for {
		c, err := q.store.main.get()
		if err != nil {
			q.end(0, err)
			return
		}
		if q.send(c, q.exchange) {
			return
		}
	}
}

// send makes an exchange. It reports whether the connection takes it. Until it returns Done is not
// called, so that the exchange is not used again.
func (q *request) send(c connection, x *wire.Exchange) bool {
	q.mu.Lock()
	q.connection = c
	q.sending++
	q.mu.Unlock()
	if q.r.Have != nil {
		x.Payload = q.store.fit(c, q.r.Have)
	}
	taken := c.Start(x)
	q.mu.Lock()
	if taken && q.exchange == x {
		q.started = true
	}
	cancelled := taken && q.cancelled
	q.mu.Unlock()
	if cancelled {
		c.Cancel(x)
	}
	q.mu.Lock()
	q.sending--
	finished := q.over && q.sending == 0
	q.mu.Unlock()
	if finished {
		q.finish()
	}
	return taken
}

// fit returns what of a question fits into a message.
func (s *Store) fit(c connection, question []byte) []byte {
	room := blockUnit
	if conn, ok := c.(*wire.Conn); ok {
		conn.Lock()
		room = conn.Peer().MessageSize - s.have.Overhead()
		conn.Unlock()
	}
	return question[:max(fetch.HavePrefix, min(len(question), room&^(fetch.HavePrefix-1)))]
}

// cancel implements [Store.Cancel].
func (q *request) cancel() {
	q.mu.Lock()
	q.cancelled = true
	started, c, x, stop := q.started && !q.over, q.connection, q.exchange, q.stop
	q.mu.Unlock()
	if started { // or else it is over, or send will see that it is cancelled
		c.Cancel(x)
	}
	if stop != nil {
		stop()
	}
}

// end notes the result, a block of the given length or an error, and calls Done if nothing of send
// is under way.
func (q *request) end(length int, err error) {
	q.mu.Lock()
	q.over, q.length, q.err = true, length, err
	finished := q.sending == 0
	q.mu.Unlock()
	if finished {
		q.finish()
	}
}

// finish calls Done.
func (q *request) finish() {
	r, length, err := q.r, q.length, q.err
	r.Block, r.Err = nil, nil
	switch {
	case errors.Is(err, context.Canceled):
		r.Err = err
	case err != nil:
		r.Err = &blockError{q.store, err} // whoever gets it names the block
	case r.Have != nil:
		r.Block = q.dst[:length]
	case length != int(r.Size):
		r.Err = &eris.BlockError{Reference: r.Pair.Reference, Length: length, Want: r.Size}
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
	case q.r.Have != nil && (x.Code != codes.Changed || x.Length > len(x.Dst)):
		q.end(0, fmt.Errorf("%w: %w", fetch.ErrCannotSay, responseError(x)))
	case q.r.Have != nil:
		q.end(x.Length, nil)
	case getError(x) != nil:
		q.end(0, getError(x))
	case !x.Response.Block2.Present:
		q.end(x.Length, nil)
	default:
		q.store.main.group.Go(func() { q.inParts(x) }) // its owner reads the connection and is in it as well
	}
}

// lost is called when an exchange has failed. It makes another on a new connection if it was the
// connection that failed: it may have died unnoticed while nobody used it.
func (q *request) lost(err error) {
	q.mu.Lock()
	again := !q.again && !q.cancelled && q.store.again(q.connection, err)
	if again {
		q.again, q.connection, q.started = true, nil, false
		old := q.exchange
		q.exchange = &wire.Exchange{Store: old.Store, Reference: old.Reference, Size: old.Size, Dst: q.dst, Done: q.answered}
		q.stop = nil
	}
	q.mu.Unlock()
	if !again {
		q.end(0, err)
		return
	}
	q.connect()
}

// inParts gets the parts that follow the first, which has come.
func (q *request) inParts(first *wire.Exchange) {
	ctx, cancel := context.WithTimeoutCause(q.store.ctx, slowParts*q.store.options.RequestTimeout, errSlow)
	defer cancel()
	q.mu.Lock()
	q.stop = cancel
	c := q.connection
	if q.cancelled {
		cancel()
	}
	q.mu.Unlock()
	length, err := q.store.getParts(ctx, c, first, q.dst)
	if errors.As(err, new(*turns.LostError)) {
		q.lost(err)
		return
	}
	q.end(length, err)
}

// getError returns what the answer to a GET means, nil if it has a payload to look at.
func getError(x *wire.Exchange) error {
	switch {
	case x.Response.Unusable:
		return errUnusable
	case x.Code == codes.Content:
		return nil
	case x.Code == codes.NotFound, x.Code == wire.HopLimitReached:
		return eris.ErrNotFound
	}
	return refusal(x)
}

// refusal returns what the code of an error response means that says nothing about the block. A
// busy peer may say for how long (RFC 7252, section 5.9.3.4; RFC 8516, section 2).
func refusal(x *wire.Exchange) error {
	err := responseError(x)
	if x.Code == codes.ServiceUnavailable || x.Code == codes.TooManyRequests {
		return &fetch.BusyError{After: min(time.Duration(x.Response.MaxAge)*time.Second, turns.LongestRest), Err: err}
	}
	return err
}
