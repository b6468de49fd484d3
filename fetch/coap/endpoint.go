// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

const (
	// ackRandomFactor stretches the first wait for an answer by up to this factor, at random (RFC 7252, section 4.8).
	ackRandomFactor = 1.5
	// leastTimeout is the shortest first wait, however fast the peer has been so far.
	leastTimeout = 200 * time.Millisecond
	// tokenBits of randomness make it hard to forge answers (RFC 7252, section 5.3.1).
	datagramTokenSize = 4
	// firstWindow is how many exchanges may be in flight before anything is known about the line.
	firstWindow = 4
	// recentIDs is how many message IDs of separate answers are remembered, so that copies of them are acknowledged too.
	recentIDs = 64
)

var (
	errReset     = errors.New("peer rejects the request")
	errManyTries = errors.New("request is in use")
)

// endpoint is one UDP socket, connected to the peer: one goroutine reads, callers write. The caller of an exchange sends its
// message again until it is answered.
type endpoint struct {
	conn     net.Conn
	requests *wire.Requests
	options  *Options

	mu        sync.Mutex
	err       error
	byToken   map[wire.Token]*exchange
	byID      map[uint16]*exchange
	nextID    uint16
	nextToken uint32
	lastHeard time.Time // last answer
	recent    [recentIDs]uint16
	recents   int

	// Congestion control: how many exchanges may be in flight, as TCP has it.
	window    float64
	threshold float64
	inFlight  int
	waiting   []chan struct{}
	lastLoss  time.Time
	roundTrip time.Duration // smoothed, 0 if not known (RFC 6298)
	variation time.Duration
}

// exchange is a request in flight.
type exchange struct {
	call    *call
	id      uint16
	token   wire.Token
	acked   bool          // the answer comes apart
	done    bool          // wake has been sent for good
	changed chan struct{} // receives when acked or done was set
	err     error
}

func newEndpoint(conn net.Conn, requests *wire.Requests, options *Options) *endpoint {
	return &endpoint{
		conn:      conn,
		requests:  requests,
		options:   options,
		byToken:   make(map[wire.Token]*exchange),
		byID:      make(map[uint16]*exchange),
		nextID:    uint16(rand.Uint32()),
		nextToken: rand.Uint32(),
		window:    min(firstWindow, float64(options.Datagram.Window)),
		threshold: float64(options.Datagram.Window),
	}
}

func (e *endpoint) usable() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.err == nil
}

// fail ends all exchanges, and the endpoint.
func (e *endpoint) fail(err error) {
	e.mu.Lock()
	if e.err == nil {
		e.err = err
	}
	e.failAll(err)
	for _, c := range e.waiting {
		close(c)
	}
	e.waiting = nil
	e.mu.Unlock()
	e.conn.Close()
}

// failAll ends all exchanges. The lock must be held.
func (e *endpoint) failAll(err error) {
	for _, x := range e.byToken {
		e.finish(x, err)
	}
}

// finish ends an exchange. The lock must be held.
func (e *endpoint) finish(x *exchange, err error) {
	if x.done {
		return
	}
	x.done, x.err = true, err
	delete(e.byToken, x.token)
	delete(e.byID, x.id)
	x.change()
}

func (x *exchange) change() {
	select {
	case x.changed <- struct{}{}:
	default:
	}
}

// do implements exchanger. Its errors are the cause of the context, and failures of the exchange.
func (e *endpoint) do(ctx context.Context, c *call) error {
	if err := e.enter(ctx); err != nil {
		return err
	}
	defer e.leave()
	x := &exchange{call: c, changed: make(chan struct{}, 1)}
	b, err := e.begin(x)
	if err != nil {
		return err
	}
	defer func() {
		e.mu.Lock()
		e.finish(x, errAbandoned)
		e.mu.Unlock()
	}()

	began := time.Now()
	defer func() { c.took = time.Since(began) }()
	timeout := e.timeout()
	deadline := began.Add(e.options.RequestTimeout)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for tries := 0; ; {
		if tries == 0 {
			if _, err := e.conn.Write(b); err != nil {
				return e.lost(err)
			}
			tries++
			timer.Reset(min(timeout, time.Until(deadline)))
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-x.changed:
			e.mu.Lock()
			done, err := x.done, x.err
			if done && err == nil {
				e.answered(time.Since(began), tries > 1)
			}
			e.mu.Unlock()
			if done {
				return err
			}
			// Acknowledged: the answer will come, and must not be asked for again.
			timer.Reset(time.Until(deadline))
			tries = e.options.Datagram.MaxRetransmit + 1
		case now := <-timer.C:
			e.congested(now)
			if tries > e.options.Datagram.MaxRetransmit || !now.Before(deadline) {
				return e.lost(fmt.Errorf("%w (%v)", errSilent, now.Sub(began).Round(time.Millisecond)))
			}
			if _, err := e.conn.Write(b); err != nil {
				return e.lost(err)
			}
			tries++
			timeout *= 2
			timer.Reset(min(timeout, time.Until(deadline)))
		}
	}
}

// lost is called when an exchange has failed. If nothing at all was heard lately, the endpoint is of no more use: the peer may
// have got another address.
func (e *endpoint) lost(err error) error {
	e.mu.Lock()
	silent := time.Since(e.lastHeard) > e.options.RequestTimeout/2
	e.mu.Unlock()
	if silent {
		e.fail(err)
	}
	return err
}

// begin gives an exchange its ID and token, and returns its message.
func (e *endpoint) begin(x *exchange) ([]byte, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err != nil {
		return nil, e.err
	}
	e.nextToken++
	x.token = wire.Token{Value: uint64(e.nextToken), Size: datagramTokenSize}
	if e.byToken[x.token] != nil {
		return nil, errManyTries
	}
	for e.nextID++; e.byID[e.nextID] != nil; e.nextID++ {
	}
	x.id = e.nextID
	e.byToken[x.token], e.byID[x.id] = x, x
	c := x.call
	b := make([]byte, 0, wire.MaxDatagramSize)
	if c.payload == nil {
		b = wire.AppendDatagramHead(b, message.Confirmable, codes.GET, x.id, x.token)
		return e.requests.AppendGet(b, &c.ref, c.size, c.block), nil
	}
	b = wire.AppendDatagramHead(b, message.Confirmable, codes.PUT, x.id, x.token)
	return e.requests.AppendPut(b, c.block, c.total, c.payload), nil
}

// enter waits until one more exchange may be in flight.
func (e *endpoint) enter(ctx context.Context) error {
	e.mu.Lock()
	if e.err != nil {
		defer e.mu.Unlock()
		return e.err
	}
	if len(e.waiting) == 0 && float64(e.inFlight) < max(1, e.window) {
		e.inFlight++
		e.mu.Unlock()
		return nil
	}
	turn := make(chan struct{})
	e.waiting = append(e.waiting, turn)
	e.mu.Unlock()
	select {
	case <-turn:
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.err
	case <-ctx.Done():
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for i, other := range e.waiting {
		if other == turn {
			e.waiting = append(e.waiting[:i], e.waiting[i+1:]...)
			return context.Cause(ctx)
		}
	}
	// It has become our turn meanwhile.
	e.inFlight--
	e.admit()
	return context.Cause(ctx)
}

func (e *endpoint) leave() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.inFlight--
	e.admit()
}

// admit lets those who wait begin, as far as the window allows. The lock must be held.
func (e *endpoint) admit() {
	for len(e.waiting) > 0 && float64(e.inFlight) < max(1, e.window) {
		close(e.waiting[0])
		e.waiting = e.waiting[1:]
		e.inFlight++
	}
}

// timeout returns how long to wait for the answer to a message that was sent for the first time.
func (e *endpoint) timeout() time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	timeout := e.options.Datagram.AckTimeout
	if e.roundTrip > 0 {
		timeout = min(timeout, max(leastTimeout, e.roundTrip+4*e.variation))
	}
	return time.Duration(float64(timeout) * (1 + (ackRandomFactor-1)*rand.Float64()))
}

// answered takes note of an answer. The lock must be held.
func (e *endpoint) answered(took time.Duration, again bool) {
	if e.window < e.threshold {
		e.window++
	} else {
		e.window += 1 / e.window
	}
	e.window = min(e.window, float64(e.options.Datagram.Window))
	if again {
		return // it is not known to which copy this was the answer
	}
	if e.roundTrip == 0 {
		e.roundTrip, e.variation = took, took/2
		return
	}
	e.variation += ((e.roundTrip - took).Abs() - e.variation) / 4
	e.roundTrip += (took - e.roundTrip) / 8
}

// congested takes note of a message that was lost: once per round trip, because what is lost together counts as one.
func (e *endpoint) congested(now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if now.Sub(e.lastLoss) < max(e.roundTrip, leastTimeout) {
		return
	}
	e.lastLoss = now
	e.window = max(1, e.window/2)
	e.threshold = e.window
}

// read takes datagrams until the endpoint fails.
func (e *endpoint) read() {
	buffer := make([]byte, wire.MaxDatagramSize+1)
	for {
		n, err := e.conn.Read(buffer)
		if err != nil {
			e.mu.Lock()
			over := e.err != nil || errors.Is(err, net.ErrClosed)
			if !over {
				// Mostly "connection refused", which anybody could forge: what is in flight fails, no more.
				e.failAll(err)
			}
			e.mu.Unlock()
			if over {
				e.fail(err)
				return
			}
			time.Sleep(time.Millisecond)
			continue
		}
		if n > wire.MaxDatagramSize {
			continue
		}
		m, err := wire.ParseDatagram(buffer[:n])
		if err != nil {
			continue
		}
		if reply := e.packet(m); reply != nil {
			// If it is lost, the peer sends again.
			_, _ = e.conn.Write(reply)
		}
	}
}

// packet takes one message and returns what is to be sent in reply, if anything.
func (e *endpoint) packet(m wire.Datagram) []byte {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch m.Type {
	case message.Acknowledgement, message.Reset:
		x := e.byID[m.ID]
		switch {
		case x == nil:
		case m.Type == message.Reset:
			e.lastHeard = time.Now()
			e.finish(x, errReset)
		case m.Code == codes.Empty:
			x.acked = true
			x.change()
		case wire.IsResponse(m.Code) && m.Token == x.token:
			e.take(x, m)
		}
		return nil
	}
	confirmable := m.Type == message.Confirmable
	switch {
	case wire.IsResponse(m.Code):
		x := e.byToken[m.Token]
		known := x != nil
		if known && e.take(x, m) {
			e.recent[e.recents%recentIDs] = m.ID
			e.recents++
		}
		for i := range min(e.recents, recentIDs) {
			known = known || e.recent[i] == m.ID
		}
		switch {
		case !confirmable:
			return nil
		case known:
			return wire.AppendEmpty(nil, message.Acknowledgement, m.ID)
		}
	case wire.IsRequest(m.Code) && confirmable:
		// The peer may ask, too; we have nothing.
		code := codes.NotImplemented
		if m.Code == codes.GET {
			code = codes.NotFound
		}
		return wire.AppendDatagramHead(nil, message.Acknowledgement, code, m.ID, m.Token)
	}
	if !confirmable {
		return nil
	}
	return wire.AppendEmpty(nil, message.Reset, m.ID)
}

// take takes a response. It reports whether it could be understood; if not, it may as well not have come. The lock must be
// held.
func (e *endpoint) take(x *exchange, m wire.Datagram) bool {
	var response wire.Response
	options := wire.ParseOptions(m.Body)
	if wire.ParseResponse(&options, &response) != nil {
		return false
	}
	payload := options.Payload()
	x.call.take(m.Code, &response, len(payload))
	copy(x.call.destination(m.Code, len(payload)), payload)
	e.lastHeard = time.Now()
	e.finish(x, nil)
	return true
}
