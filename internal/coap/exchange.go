// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"errors"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// Exchange is a request that we make to the peer, and its response. Whoever makes it owns it but
// from Start of a [Conn] or an [Endpoint] until Done is called; then it may be used again.
type Exchange struct {
	// The request: a PUT if there is a payload, else a GET.
	Store     *Requests
	Reference eris.Reference
	Size      eris.BlockSize
	Block     Block // Block1 or Block2, if present
	Total     int   // of a PUT in parts: the size of the whole, or 0 to say nothing
	Payload   []byte

	// Keep says that further parts of the same transfer follow, which have the same token: some
	// servers know a transfer by it. After Done, either Start or Cancel must be called.
	Keep bool
	// Dst is where the payload of a response with content goes, if it is no longer than this.
	Dst []byte
	// Done is called once for each Start that took the exchange, without any lock held. It must not
	// wait.
	Done func(x *Exchange)

	// The response, unless Err says that there is none.
	Code     codes.Code
	Response Response
	Length   int // of the payload
	Err      error

	diagnostic [64]byte
	state      exchangeState
	kept       any // where the token is still ours: nil or a *pending or *Endpoint
	token      Token
	sent       *confirmable // on an Endpoint
	next       *Exchange
	previous   *Exchange
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
func (x *Exchange) Text() string {
	return string(x.diagnostic[:min(x.Length, len(x.diagnostic))])
}

// take notes a response, all but its payload.
func (x *Exchange) take(code codes.Code, response *Response, length int) {
	x.Code, x.Response, x.Length = code, *response, length
}

// destination returns where a payload of the given length goes: nil if it is longer than what is
// wanted. Of anything but content, the beginning is kept for messages.
func (x *Exchange) destination(code codes.Code, length int) []byte {
	if code != codes.Content {
		return x.diagnostic[:min(length, len(x.diagnostic))]
	}
	if length > len(x.Dst) {
		return nil
	}
	return x.Dst[:length]
}

// finish calls Done. The exchange must have been taken, and no lock be held.
func (x *Exchange) finish(err error) {
	x.Err = err
	x.Done(x)
}

// exchanges is a list of those that wait, in the order in which they are to be sent.
type exchanges struct {
	first, last *Exchange
}

func (l *exchanges) push(x *Exchange) {
	x.previous, x.next = l.last, nil
	if l.last == nil {
		l.first = x
	} else {
		l.last.next = x
	}
	l.last = x
}

func (l *exchanges) pushFirst(x *Exchange) {
	x.previous, x.next = nil, l.first
	if l.first == nil {
		l.last = x
	} else {
		l.first.previous = x
	}
	l.first = x
}

func (l *exchanges) remove(x *Exchange) {
	if x.previous == nil {
		l.first = x.next
	} else {
		x.previous.next = x.next
	}
	if x.next == nil {
		l.last = x.previous
	} else {
		x.next.previous = x.previous
	}
	x.next, x.previous = nil, nil
}

// pending is the requests without an answer on a stream, by token. Tokens are numbers that are not
// used again, so that a second answer to one request is not taken for the answer to another. A
// request that was cancelled stays until its answer comes, or the connection ends.
type pending struct {
	requests map[uint32]pendingRequest
	last     uint32 // token
}

type pendingRequest struct {
	exchange *Exchange // nil if it was cancelled
	since    uint32    // tick of the connection
}

// add gives an exchange a token, unless it has kept one.
func (p *pending) add(x *Exchange, tick uint32) {
	if x.kept != p {
		p.last++
		x.token = makeToken(p.last)
	}
	p.requests[uint32(x.token.Value)] = pendingRequest{x, tick}
}

// remove returns the exchange that an answer is for; nil if that was cancelled, and false if no
// answer to the token is due.
func (p *pending) remove(token Token) (*Exchange, bool) {
	n := uint32(token.Value)
	r, ok := p.requests[n]
	if !ok || token != makeToken(n) {
		return nil, false
	}
	delete(p.requests, n)
	if x := r.exchange; x != nil {
		x.kept = nil
		if x.Keep {
			x.kept = p
		}
	}
	return r.exchange, true
}

// age returns for how many ticks the oldest request has been without an answer.
func (p *pending) age(now uint32) uint32 {
	age := uint32(0)
	for _, r := range p.requests {
		age = max(age, now-r.since)
	}
	return age
}

// Errors of exchanges, and of connections.
var (
	// ErrSilent is wrapped by the error of a request that the peer did not answer in time.
	ErrSilent   = errors.New("no answer in time")
	errClosed   = errors.New("connection is closed")
	errIdle     = errors.New("connection was idle")
	errReleased = errors.New("peer closes the connection")
	errFlood    = errors.New("peer sends too much that was not requested")
	errNoCSM    = errors.New("peer did not begin with its capabilities")
	errSignal   = errors.New("unknown signalling message")
	errClass    = errors.New("message of unknown class")
	errReset    = errors.New("peer rejects the request")
)
