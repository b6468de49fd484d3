// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// call is one request and what became of it. Its state, place and links are guarded by the mutex of the session; the response
// belongs to whoever has taken the call, and to the caller once that is awake.
type call struct {
	state callState

	// The request: a GET if payload is nil, else a PUT.
	ref     eris.Reference
	size    eris.BlockSize
	block   wire.Block // Block1 or Block2, if present
	total   int        // of a PUT in parts: the size of the whole
	payload []byte

	place          int   // in the table of tokens
	next, previous *call // in the line of those who wait for a place

	// The response.
	dst        []byte // where a payload goes that fits
	code       codes.Code
	response   wire.Response
	length     int // of the payload
	diagnostic [64]byte
	err        error
	took       time.Duration // of an exchange by UDP, from when it was its turn

	wake chan struct{} // receives once when the call is done

	// Of a call that nobody waits for: see Store.Start.
	store    *Store
	session  *session
	answered func() // called in place of waking somebody
}

type callState uint8

const (
	callIdle    callState = iota
	callWaiting           // for a place
	callSent              // its token is in use
	callTaken             // whoever took it wakes the caller, soon
)

// callList is a list of calls in the order in which they came.
type callList struct {
	first, last *call
}

func (l *callList) push(c *call) {
	c.previous, c.next = l.last, nil
	if l.last == nil {
		l.first = c
	} else {
		l.last.next = c
	}
	l.last = c
}

func (l *callList) remove(c *call) {
	if c.previous == nil {
		l.first = c.next
	} else {
		c.previous.next = c.next
	}
	if c.next == nil {
		l.last = c.previous
	} else {
		c.next.previous = c.previous
	}
	c.next, c.previous = nil, nil
}

// finish wakes the caller. The call must have been taken.
func (c *call) finish(err error) {
	c.err = err
	if c.answered != nil {
		c.answered()
		return
	}
	c.wake <- struct{}{}
}

// take notes a response, all but its payload.
func (c *call) take(code codes.Code, response *wire.Response, length int) {
	c.code, c.response, c.length = code, *response, length
}

// destination returns where a payload of the given length goes: nil if it is not wanted, or longer than what is. Of
// anything but a block, the beginning is kept for messages.
func (c *call) destination(code codes.Code, length int) []byte {
	if code != codes.Content {
		return c.diagnostic[:min(length, len(c.diagnostic))]
	}
	if length > len(c.dst) {
		return nil
	}
	return c.dst[:length]
}

// text returns the diagnostic payload of an error response, for people.
func (c *call) text() string {
	return string(c.diagnostic[:min(c.length, len(c.diagnostic))])
}
