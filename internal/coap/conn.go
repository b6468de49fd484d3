// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

const (
	// ticksPerTimeout is how often a connection looks at the clock in one Timeout.
	ticksPerTimeout = 8
	// maxAge is after how many Timeouts without an answer a request condemns its connection, even
	// if others are answered.
	maxAge = 10
	// progressBytes is how many bytes, sent or received of what is awaited, count as progress like
	// a whole message.
	progressBytes = 4 << 10
	// maxQueued is how many bytes of requests wait to be sent at most, but for those of one more.
	maxQueued = 4 << 20
	// linger is how long the last words of a connection may take.
	linger = 250 * time.Millisecond

	// A peer may send so many messages at once that are of no use to us, and so many more per tick
	// and per message that is.
	uselessMessages, uselessPerTick, uselessPerUseful = 1024, 64, 4
)

// Config says how a [Conn] behaves.
type Config struct {
	// Timeout is for how long the peer may make no progress with what it owes: no answer to what
	// was requested, no end of a message that has begun, and no 4 KiB of what is asked or answered
	// in either direction. It must be positive.
	Timeout time.Duration
	// IdleTimeout is for how long the connection is kept while neither side sends requests, but for
	// those of the peer if there are no Paths. It must be positive.
	IdleTimeout time.Duration
	// KeepAlive, if positive, is how often the peer is sent a Ping, so that the connection is kept
	// although neither side sends requests, by whatever is in between as well. It is at its end if
	// nothing comes, and less than 4 KiB goes, until the next one.
	KeepAlive time.Duration
	// Greeting, if positive, is how long the peer may take to say what it can receive, which is its
	// first message.
	Greeting time.Duration
	// Window is the most requests of ours that are without an answer at a time, at most 65536;
	// further ones wait.
	Window int
	// Pool is the memory for messages, which the connections of one owner share: see [NewPool].
	Pool *sync.Pool
	// Received, if not nil, is given how many bytes have come of responses to what was requested,
	// also of those that are not whole. What nobody has asked for does not count.
	Received *atomic.Int64
	// Dial makes the stream, unless it was given. The error is that of all requests then.
	Dial func() (net.Conn, error)
	// Paths are the resources that the peer may ask for, and Handler serves them. If they are nil
	// the peer is told that we have nothing.
	Paths   Paths
	Handler Handler
}

// Handler serves the requests of the peer on one [Conn]. All methods but Written are called by the
// goroutine that reads.
type Handler interface {
	// Request takes a request, whose payload is valid until it returns. It may wait, and the
	// connection is not read meanwhile.
	Request(r *Request)
	// Dry is called when the requests that have come have been handed over, and it may take a while
	// until others come. It must not wait.
	Dry()
	// Written is called when messages were sent or the connection has failed, with the lock held.
	// It must not wait.
	Written()
	// Finish is called when no further request comes, and returns once all are answered. If the
	// connection has failed, nobody waits for the answers any more.
	Finish(failed bool)
}

// Conn is one connection to a peer on a stream (RFC 8323), over which each side may ask the other:
// one goroutine that reads, one that writes, one that looks at the clock. It does not know how the
// stream was made. Its methods are safe for concurrent use.
type Conn struct {
	requester
	queue  queue
	conn   net.Conn // nil until it is made
	config Config
	reader *reader
	done   chan struct{}

	released  bool // we have announced the end
	receiving bool // a message has begun; the reader, who alone sets this, waits for the rest
	asks      bool // the peer has made requests
	pinged    bool // nothing has come since the last Ping

	tick       uint32
	progress   uint32 // tick of the last progress
	lastUse    uint32 // tick of the last request or answer
	received   int64  // bytes of requests that are not whole, and of responses that were awaited
	moved      int64  // bytes sent and received at the last progress
	pingMoved  int64  // bytes that had been sent at the last Ping
	useless    int    // messages of no use that the peer may yet send
	peer       Capabilities
	introduced chan struct{} // closed by introduce when peer is known, or the connection is at its end
	introduce  func()
	scratch    []byte // what stands before a payload
	options    []byte // of the request that is being sent

	// Of the goroutine that reads.
	requests int  // that have come since the lock was held last
	part     int  // bytes of the message that is not whole, if it is awaited
	slow     bool // no message has become whole by what came last
	incoming Request
	started  bool     // the first message has come
	answer   Response // that is being read
}

// NewConn makes a connection of a stream, which is the Conn's from then on. If there is none yet,
// requests wait until config.Dial has made it. [Conn.Run] must be called.
func NewConn(conn net.Conn, config Config) *Conn {
	c := &Conn{
		conn:       conn,
		config:     config,
		done:       make(chan struct{}),
		useless:    uselessMessages,
		peer:       Capabilities{MessageSize: BaseMessageSize},
		introduced: make(chan struct{}),
	}
	c.introduce = sync.OnceFunc(func() { close(c.introduced) })
	c.requester = requester{transport: c, sent: make(map[uint32]sentRequest)}
	if c.config.Handler == nil {
		c.config.Paths, c.config.Handler = nil, refuser{c}
	}
	c.queue = queue{mu: &c.mu, pool: config.Pool, timeout: config.Timeout, onRoom: c.written}
	c.queue.wake.L = &c.mu
	c.Lock()
	defer c.Unlock()
	c.Respond(Token{}, codes.CSM, ownCapabilities(), nil)
	if conn != nil {
		c.open(conn)
	}
	return c
}

// open begins to use a stream. The lock must be held.
func (c *Conn) open(conn net.Conn) {
	c.conn, c.queue.conn = conn, conn
	c.reader = newReader(conn)
	if w, ok := conn.(*webSocket); ok {
		w.part = c.begun
	}
}

// Run makes the stream if there is none, serves the connection until it ends, and closes it. It
// returns why it has ended.
func (c *Conn) Run() error {
	if c.conn != nil || c.connect(c.config.Dial) {
		c.serve()
	}
	_, err := c.State()
	return err
}

func (c *Conn) serve() {
	var group sync.WaitGroup
	group.Go(func() {
		if err := c.queue.run(); err != nil {
			c.Close(err)
		}
		c.conn.Close()
	})
	group.Go(c.watch)
	if c.config.Greeting > 0 {
		timer := time.AfterFunc(c.config.Greeting, c.awaitGreeting)
		defer timer.Stop()
	}
	err := c.read()
	protocol, broken := err.(*protocolError)
	agreed := err == ErrReleased || c.draining // which nobody else sets
	switch {
	case broken:
		c.leave(codes.Abort, protocol.option(), protocol.Error(), protocol.error)
	case err == io.EOF || err == ErrReleased:
		if err = ErrReleased; !agreed {
			err = io.ErrUnexpectedEOF
		}
		c.Lock()
		c.draining = true // no answers come any more
		c.failAll(err)
		c.Unlock()
		// But the peer may well wait for answers to what it has sent.
		c.config.Handler.Finish(false)
		c.leave(codes.Empty, nil, "", err)
	default:
		c.Close(err)
	}
	c.config.Handler.Finish(true)
	close(c.done)
	group.Wait()
	if socket, ok := c.conn.(interface{ Wait() }); ok {
		socket.Wait() // a WebSocket takes leave
	}
}

// awaitGreeting ends the connection if the peer has not said anything.
func (c *Conn) awaitGreeting() {
	select {
	case <-c.introduced:
	default:
		c.Close(errMute)
	}
}

// refuser is the handler of a peer that has nothing.
type refuser struct{ conn *Conn }

func (h refuser) Request(r *Request) {
	h.conn.Lock()
	flood := h.conn.Queued() > 2*maxQueued // it does not take the answers
	if !flood {
		h.conn.Respond(r.Token, refusal(r.Code), nil, nil)
	}
	h.conn.Unlock()
	if flood {
		h.conn.Close(errFlood)
	}
}

func (refuser) Dry()        {}
func (refuser) Written()    {}
func (refuser) Finish(bool) {}

// protocolError is a fault of the peer, to be answered with Abort (RFC 8323, section 5.6).
type protocolError struct {
	error
	bad message.OptionID // of a capability message; 0 for none
}

// option returns the option of the Abort.
func (e *protocolError) option() []byte {
	if e.bad == 0 {
		return nil
	}
	return AppendUintOption(nil, 0, message.TCPBadCSMOption, uint32(e.bad))
}

// Peer returns what the peer can receive, as far as it has said so. The lock must be held.
func (c *Conn) Peer() Capabilities { return c.peer }

// AwaitPeer returns what the peer can receive. It waits until the peer has said so, or the
// connection is at its end. The error is the cause of the context.
func (c *Conn) AwaitPeer(ctx context.Context) (Capabilities, error) {
	select {
	case <-c.introduced:
	case <-ctx.Done():
		return Capabilities{}, context.Cause(ctx)
	}
	c.Lock()
	defer c.Unlock()
	return c.peer, nil
}

// Asks reports whether the peer has made requests.
func (c *Conn) Asks() bool {
	c.Lock()
	defer c.Unlock()
	return c.asks
}

// Close ends the connection at once. All exchanges fail with the error. It does not wait.
func (c *Conn) Close(err error) {
	c.Lock()
	c.end(err)
	c.queue.fail(err)
	conn := c.conn
	c.Unlock()
	if conn != nil {
		conn.Close()
	}
}

// Release tells the peer that the connection ends, which has the given time to finish what it asks
// and to close it. If that is 0, or there is no stream yet, what is under way fails with the error,
// and the connection ends as soon as the peer could be told. It does not wait.
func (c *Conn) Release(grace time.Duration, err error) {
	c.Lock()
	conn := c.conn
	if grace > 0 && conn != nil && !c.released && c.err == nil {
		c.released = true
		c.Respond(Token{}, codes.Release, nil, nil)
		time.AfterFunc(grace, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	}
	c.Unlock()
	if grace == 0 || conn == nil {
		c.leave(codes.Release, nil, "", err)
	}
}

// leave sends the last words, if there is a code for them, after all else that was to be sent, and
// ends the connection.
func (c *Conn) leave(last codes.Code, options []byte, text string, cause error) {
	c.Lock()
	defer c.Unlock()
	if c.err != nil {
		return
	}
	if last != codes.Empty {
		c.Respond(Token{}, last, options, []byte(text))
	}
	c.queue.close()
	c.end(cause)
	if conn := c.conn; conn != nil && last != codes.Empty {
		// The writer closes the connection once it has written everything; or it never gets that
		// far.
		time.AfterFunc(linger, func() { conn.Close() })
	}
}

// end makes all exchanges fail. The lock must be held.
func (c *Conn) end(err error) {
	if c.err != nil {
		return
	}
	c.err = err
	c.failAll(err)
	c.introduce()
	c.written()
}

// Respond answers a request of the peer, or sends anything that has a token. What it is given is
// copied. The lock must be held.
func (c *Conn) Respond(token Token, code codes.Code, options, payload []byte) {
	c.appendHead(token, code, options, len(payload))
	c.queue.append(payload)
}

// RespondWith is Respond, but for the payload, which is not copied and must not change until
// release is called, which may be nil, with the lock held.
func (c *Conn) RespondWith(token Token, code codes.Code, options, payload []byte, release func()) {
	c.appendHead(token, code, options, len(payload))
	c.queue.refer(payload, release)
}

// appendHead sends what stands before a payload of the given length.
func (c *Conn) appendHead(token Token, code codes.Code, options []byte, payload int) {
	length := len(options)
	if payload > 0 {
		length += 1 + payload
	}
	c.scratch = append(AppendHead(c.scratch[:0], code, token, length), options...)
	if payload > 0 {
		c.scratch = append(c.scratch, payloadMarker)
	}
	c.queue.append(c.scratch)
}

// Queued returns how many bytes are not written yet. The lock must be held.
func (c *Conn) Queued() int { return c.queue.bytes }

// Broken reports whether nothing can be sent any more. The lock must be held.
func (c *Conn) Broken() bool { return c.queue.err != nil || c.queue.closed }

// hasRoom implements transport.
func (c *Conn) hasRoom() bool {
	return c.conn != nil && len(c.sent) < c.config.Window && c.queue.bytes < maxQueued
}

// transmit implements transport.
func (c *Conn) transmit(x *Exchange) {
	if len(c.sent) == 1 {
		c.progress = c.tick
	}
	c.lastUse = c.tick
	c.sent[uint32(x.token.Value)] = sentRequest{x, c.tick}
	c.options = x.Store.append(c.options[:0], x)
	c.Respond(x.token, x.Store.method(x), c.options, x.Payload)
}

// forget implements transport. The token stays in use until the answer comes, or the connection
// ends.
func (c *Conn) forget(x *Exchange) {
	n := uint32(x.token.Value)
	c.sent[n] = sentRequest{since: c.sent[n].since}
}

// written is called when there is room for more, with the lock held.
func (c *Conn) written() {
	c.flush()
	c.config.Handler.Written()
}

// watch ends the connection when the peer owes something for too long, and when it has not been
// used for a while.
func (c *Conn) watch() {
	period := max(c.config.Timeout/ticksPerTimeout, time.Millisecond)
	idle := uint32(min(c.config.IdleTimeout/period, 1<<31))
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	var pings <-chan time.Time
	if c.config.KeepAlive > 0 {
		ticker := time.NewTicker(c.config.KeepAlive)
		defer ticker.Stop()
		pings = ticker.C
	}
	for {
		select {
		case <-c.done:
			return
		case <-pings:
			if !c.ping() {
				c.Close(fmt.Errorf("%w (%v)", ErrSilent, c.config.KeepAlive))
			}
			continue
		case <-ticker.C:
		}
		c.Lock()
		c.tick++
		c.useless = min(c.useless+uselessPerTick, uselessMessages)
		if moved := c.queue.moved + c.received; moved-c.moved >= progressBytes {
			c.progress, c.moved = c.tick, moved
		}
		owed := len(c.sent) > 0 || c.receiving
		silent := owed && c.tick-c.progress > ticksPerTimeout
		if c.tick%ticksPerTimeout == 0 && c.age() > maxAge*ticksPerTimeout {
			silent = true
		}
		unused := !owed && c.first() == nil && c.queue.bytes == 0 && c.tick-c.lastUse > idle
		c.Unlock()
		switch {
		case silent:
			c.Close(fmt.Errorf("%w (%v)", ErrSilent, c.config.Timeout))
		case unused:
			c.Release(0, errIdle)
		}
	}
}

// ping sends a Ping. It reports whether there was a sign of life since the last one.
func (c *Conn) ping() bool {
	c.Lock()
	defer c.Unlock()
	if c.pinged && c.queue.moved-c.pingMoved < progressBytes {
		return false
	}
	c.pinged, c.pingMoved, c.lastUse = true, c.queue.moved, c.tick
	c.Respond(Token{}, codes.Ping, nil, nil)
	return true
}

// age returns for how many ticks the oldest request has been without an answer. The lock must be
// held.
func (c *Conn) age() uint32 {
	age := uint32(0)
	for _, s := range c.sent {
		age = max(age, c.tick-s.since)
	}
	return age
}

// dry is called before the reader waits.
func (c *Conn) dry() {
	within := c.reader.part() > 0
	if within != c.receiving || c.requests > 0 {
		c.setReceiving(within)
	}
	c.config.Handler.Dry()
}

// setReceiving takes note of whether the peer owes the rest of a message.
func (c *Conn) setReceiving(receiving bool) {
	c.Lock()
	defer c.Unlock()
	if receiving && !c.receiving && len(c.sent) == 0 {
		c.progress = c.tick
	}
	c.receiving = receiving
	if c.requests > 0 {
		c.asks, c.pinged = true, false
		if c.config.Paths != nil { // else they are in vain, and nothing for which to keep the connection
			c.progress, c.lastUse = c.tick, c.tick
			c.useless = min(c.useless+uselessPerUseful*c.requests, uselessMessages)
		}
		c.requests = 0
	}
}

// read takes messages until the connection fails or the peer breaks the protocol. It returns
// ErrReleased if the end was agreed.
func (c *Conn) read() error {
	for {
		if err := c.readBuffered(); err != nil {
			return err
		}
		c.dry()
		if err := c.reader.fill(); errors.Is(err, os.ErrDeadlineExceeded) {
			return ErrReleased // the peer had its time after that
		} else if err != nil {
			return err
		}
	}
}

// readBuffered takes the messages that are in the buffer.
func (c *Conn) readBuffered() error {
	for {
		head, body, ok, err := c.reader.next()
		switch {
		case err != nil:
			return &protocolError{error: err}
		case !c.started && head.Size > 0 && head.Code != codes.CSM:
			return &protocolError{error: errNoCSM}
		case !ok:
			if c.slow && head.Size > 0 {
				c.begun(head, c.reader.part())
			}
			c.slow = true
			return nil
		}
		c.started = true
		switch {
		case isResponse(head.Code):
			err = c.response(head, body)
		case isRequest(head.Code):
			c.request(head, body)
		default:
			err = c.control(head, body)
		}
		c.part, c.slow = 0, false
		if err != nil {
			return err
		}
	}
}

// begun takes note of how many bytes there are of a message that is not whole. A sign of life is
// only what was requested, or requests something. The lock must not be held.
func (c *Conn) begun(head Head, bytes int) {
	c.Lock()
	defer c.Unlock()
	if _, awaited := c.find(head.Token); bytes > c.part && (isRequest(head.Code) || isResponse(head.Code) && awaited) {
		c.receive(head.Code, bytes-c.part)
		c.part = bytes
	}
}

// receive counts bytes of a request, or of a response that was awaited. The lock must be held.
func (c *Conn) receive(code codes.Code, bytes int) {
	c.received += int64(bytes)
	if c.config.Received != nil && isResponse(code) {
		c.config.Received.Add(int64(bytes))
	}
}

// response hands a response to its exchange.
func (c *Conn) response(head Head, body []byte) error {
	response := &c.answer
	payload, err := parseResponse(body, response)
	if err != nil {
		return &protocolError{error: err}
	}
	var x *Exchange
	c.Lock()
	if s, known := c.find(head.Token); known {
		c.receive(head.Code, max(0, len(payload)-c.part))
		delete(c.sent, uint32(head.Token.Value))
		if x = s.exchange; x != nil {
			x.state = exchangeTaken
		}
		err = c.count(1, 0)
	} else {
		err = c.count(0, 1)
	}
	c.receiving = false
	if err == nil {
		err = c.over()
	}
	c.Unlock()
	if x != nil {
		x.answer(head.Code, response, payload)
		x.Err = nil
		x.Done(x)
	}
	return err
}

// count takes note of answers, and of messages of no use. The lock must be held.
func (c *Conn) count(answers, useless int) error {
	c.pinged = false
	if answers > 0 {
		c.answered = true
		c.progress, c.lastUse = c.tick, c.tick
		c.useless = min(c.useless+uselessPerUseful*answers, uselessMessages)
	}
	c.useless -= useless
	if c.useless < 0 {
		return &protocolError{error: errFlood}
	}
	return nil
}

// over returns ErrReleased if the peer wants the connection to end, and has answered all that was
// requested. The lock must be held.
func (c *Conn) over() error {
	if c.draining && len(c.sent) == 0 {
		return ErrReleased
	}
	return nil
}

// request hands a request to the handler.
func (c *Conn) request(head Head, body []byte) {
	r := &c.incoming
	*r = Request{Code: head.Code, Token: head.Token}
	c.config.Paths.parse(body, r)
	c.requests++
	if c.receiving {
		c.setReceiving(false)
	}
	c.config.Handler.Request(r)
}

// control takes every message that is neither a request nor a response.
func (c *Conn) control(head Head, body []byte) error {
	c.Lock()
	defer c.Unlock()
	if err := c.count(0, 1); err != nil {
		return err
	}
	switch {
	case head.Code == codes.Empty:
		return nil
	case head.Code>>5 != 7:
		return &protocolError{error: errClass}
	}
	text, bad, err := c.peer.parseSignal(head.Code, body)
	switch {
	case head.Code == codes.Abort:
		return fmt.Errorf("peer aborts the connection: %q", text[:min(len(text), 64)])
	case err != nil:
		return &protocolError{err, bad}
	}
	switch head.Code {
	case codes.Pong:
	case codes.CSM:
		c.introduce()
	case codes.Ping:
		c.lastUse = c.tick
		c.Respond(head.Token, codes.Pong, nil, nil)
	case codes.Release:
		c.draining = true
		c.failWaiting(ErrReleased)
		return c.over()
	default:
		return &protocolError{error: errSignal}
	}
	return nil
}
