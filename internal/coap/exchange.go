// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/list"
)

// Exchange is a request that we make to the peer, and its response. Whoever makes it owns it but
// from Start of a [Conn] or an [Endpoint] until Done is called; then it may be used again.
type Exchange struct {
	// The request: a PUT if there is a payload (a POST to what is no store), else a GET. A block
	// that is put in parts has one exchange for all of them: parts after the first have the token
	// of the first, because some servers know a transfer by it.
	Store     *Requests
	Reference eris.Reference
	Size      eris.BlockSize
	Block     Block // Block1 or Block2, if present
	Total     int   // of a PUT in parts: the size of the whole, or 0 to say nothing
	Payload   []byte

	// Dst is where the payload of a response of success goes, if it is no longer than this.
	Dst []byte
	// Done is called once for each Start that took the exchange, without any lock held. It must not
	// wait.
	Done func(x *Exchange)

	// The response, unless Err says that there is none.
	Code     codes.Code
	Response Response
	Length   int // of the payload
	Again    int // how often a request was sent again, by UDP; of all parts of a PUT
	Err      error

	diagnostic [64]byte
	text       int // of it, in bytes
	state      exchangeState
	token      Token
	owner      *requester   // that gave the token
	sent       *confirmable // on an Endpoint
	list.Links[Exchange]
}

type exchangeState uint8

const (
	exchangeIdle    exchangeState = iota
	exchangeWaiting               // to be sent
	exchangeSent                  // its token is in use
	exchangeTaken                 // whoever took it calls Done, soon
)

// Text returns the beginning of the diagnostic payload of an error response: for people, not to be
// trusted.
func (x *Exchange) Text() string { return string(x.diagnostic[:x.text]) }

// answer notes a response. Of anything but success, the beginning of the payload is kept for
// messages.
func (x *Exchange) answer(code codes.Code, response *Response, payload []byte) {
	x.Code, x.Response, x.Length, x.text = code, *response, len(payload), 0
	switch {
	case code != codes.Content && code != codes.Changed:
		x.text = copy(x.diagnostic[:], payload)
	case len(payload) <= len(x.Dst):
		copy(x.Dst, payload)
	}
}

// exchanges are in the order in which they are to be dealt with.
type exchanges = list.List[Exchange, *Exchange]

// transport is what is different between a [Conn] and an [Endpoint] for requests of ours. The lock
// is held in all calls.
type transport interface {
	// hasRoom reports whether one more request may be sent.
	hasRoom() bool
	// transmit sends a request, which has its token.
	transmit(x *Exchange)
	// forget is told that nobody waits any more for the response to a request that was sent.
	forget(x *Exchange)
	// open begins to use what was dialled, and end is told that the connection is at its end.
	open(conn net.Conn)
	end(err error)
}

// requester is the requests of ours on a [Conn] or an [Endpoint], and the lock of that: those that
// wait for their turn, or for a connection to be made; those without an answer; and those whose
// Done is to be called once the lock is given up.
type requester struct {
	mu        sync.Mutex
	transport transport

	waiting   exchanges
	begun     exchanges              // parts of what has begun, which come before what has not
	sent      map[uint32]sentRequest // by token
	ended     exchanges
	outbox    []*confirmable // to be written once the lock is given up
	err       error          // why the connection is at its end
	draining  bool           // the peer has announced the end: no further requests of ours
	full      bool           // no more than further parts of what has begun
	answered  bool           // the peer has ever answered
	lastToken uint32
	tokenSize uint8 // 0 for the shortest
}

type sentRequest struct {
	exchange *Exchange // nil if nobody waits for the answer any more
	since    uint32    // tick of the connection
}

// Lock takes the lock of the connection, which may guard what belongs to its owner as well, so that
// one hold of it does for both.
func (r *requester) Lock() { r.mu.Lock() }

// Unlock gives up the lock, sends what may be sent, and calls Done of what has ended meanwhile.
func (r *requester) Unlock() {
	r.flush()
	ended, outbox := r.ended, r.outbox
	r.ended, r.outbox = exchanges{}, nil
	r.mu.Unlock()
	for _, m := range outbox {
		m.endpoint.write(m)
	}
	for x := ended.First(); x != nil; x = ended.First() {
		ended.Remove(x)
		x.Done(x)
	}
}

// connect dials. It reports whether that worked, and the connection was not closed meanwhile.
func (r *requester) connect(dial func() (net.Conn, error)) bool {
	conn, err := dial()
	r.Lock()
	defer r.Unlock()
	switch {
	case err != nil:
		r.transport.end(err)
		return false
	case r.err != nil:
		conn.Close()
		return false
	}
	r.transport.open(conn)
	return true
}

// State returns why the connection is at its end, or nil if it is not and takes further requests;
// and reports whether the peer has ever answered.
func (r *requester) State() (answered bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil && (r.draining || r.full) {
		return r.answered, ErrReleased
	}
	return r.answered, r.err
}

// Start sends a request, or lets it wait for its turn, or for the connection to be made; it never
// waits itself. It reports whether the connection takes the request. If not, because the connection
// is at its end, Done is not called.
func (r *requester) Start(x *Exchange) bool {
	r.Lock()
	defer r.Unlock()
	if r.err != nil || r.draining || r.full && x.Block.Number == 0 {
		return false
	}
	x.state = exchangeWaiting
	r.queue(x).Push(x)
	return true
}

// queue returns where an exchange waits to be sent.
func (r *requester) queue(x *Exchange) *exchanges {
	if x.Block.Number > 0 {
		return &r.begun
	}
	return &r.waiting
}

// Cancel makes Done of an exchange be called soon, if that has not been done, with
// [context.Canceled]. It never waits. The memory at Dst is not used any more once Done is called.
func (r *requester) Cancel(x *Exchange) {
	r.Lock()
	defer r.Unlock()
	r.take(x, context.Canceled)
}

// flush sends what waits and may be sent. Tokens are numbers that are not used again, so that a
// second answer to one request is not taken for the answer to another. The lock must be held.
func (r *requester) flush() {
	for x := r.first(); x != nil && r.err == nil && r.transport.hasRoom(); x = r.first() {
		r.queue(x).Remove(x)
		if later := x.Payload != nil && x.Block.Number > 0; !later || x.owner != r {
			r.lastToken++
			x.owner, x.token = r, r.token(r.lastToken)
		}
		x.state = exchangeSent
		r.sent[uint32(x.token.Value)] = sentRequest{exchange: x}
		r.transport.transmit(x)
	}
}

// first returns the exchange that is to be sent next, or nil. The lock must be held.
func (r *requester) first() *Exchange { return cmp.Or(r.begun.First(), r.waiting.First()) }

func (r *requester) token(n uint32) Token {
	if r.tokenSize > 0 {
		return Token{uint64(n), r.tokenSize}
	}
	return makeToken(n)
}

// find returns the request that has a token, and reports whether there is one. The lock must be
// held.
func (r *requester) find(token Token) (sentRequest, bool) {
	n := uint32(token.Value)
	s, ok := r.sent[n]
	return s, ok && token == r.token(n)
}

// take ends an exchange. The lock must be held.
func (r *requester) take(x *Exchange, err error) {
	switch x.state {
	case exchangeWaiting:
		r.queue(x).Remove(x)
	case exchangeSent:
		r.transport.forget(x)
	default:
		return
	}
	x.state, x.Err = exchangeTaken, err
	r.ended.Push(x)
}

// failWaiting ends all exchanges that were not sent yet. The lock must be held.
func (r *requester) failWaiting(err error) {
	for x := r.first(); x != nil; x = r.first() {
		r.take(x, err)
	}
}

// failSent ends all exchanges without an answer. The lock must be held.
func (r *requester) failSent(err error) {
	for _, s := range r.sent {
		if s.exchange != nil {
			r.take(s.exchange, err)
		}
	}
}

// failAll ends all exchanges, and forgets what the peer owes. The lock must be held.
func (r *requester) failAll(err error) {
	r.failSent(err)
	r.failWaiting(err)
	clear(r.sent)
}

// refusal is the answer to a request of the peer if we serve nothing.
func refusal(method codes.Code) codes.Code {
	if method == codes.GET {
		return codes.NotFound
	}
	return codes.NotImplemented
}

// Errors of exchanges, and of connections.
var (
	// ErrSilent is wrapped by the error of a request that the peer did not answer in time.
	ErrSilent = errors.New("no answer in time")
	// ErrReleased says that the connection comes to its end as it should, and another one is to be
	// made.
	ErrReleased = errors.New("peer closes the connection")
	errMute     = fmt.Errorf("%w: it accepts connections, and says nothing; is \"serve\" running well, or does it hang: %w", ErrSilent, os.ErrDeadlineExceeded)
	errClosed   = errors.New("connection is closed")
	errIdle     = errors.New("connection was idle")
	errFlood    = errors.New("peer sends too much that was not requested")
	errNoCSM    = errors.New("peer did not begin with its capabilities")
	errSignal   = errors.New("unknown signalling message")
	errClass    = errors.New("message of unknown class")
	errReset    = errors.New("peer rejects the request")
)
