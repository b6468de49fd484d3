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
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/queue"
)

const (
	// ticksPerTimeout is how often a connection looks at the clock in one Timeout.
	ticksPerTimeout = 8
	// maxAge is after how many Timeouts without an answer a request condemns its connection, even
	// if others are answered.
	maxAge = 10
	// progressBytes is how many bytes, sent or received within large messages, count as progress
	// like a whole message.
	progressBytes = 4 << 10
	// maxQueued is how many bytes of requests wait to be sent at most, but for what is reserved by
	// one more.
	maxQueued = 4 << 20
	// linger is how long the last words of a connection may take.
	linger = 250 * time.Millisecond

	// A peer may send so many messages at once that are of no use to us, and so many more per tick
	// and per message that is.
	uselessMessages, uselessPerTick, uselessPerUseful = 1024, 64, 4

	// deliveryBatch is how many answers are matched to their exchanges in one hold of the lock.
	deliveryBatch = 64
)

// Config says how a [Conn] behaves.
type Config struct {
	// Timeout is for how long the peer may make no progress with what it owes: no answer to what
	// was part, no end of a message that has begun, and no 4 KiB of anything large in either
	// direction. It must be positive.
	Timeout time.Duration
	// IdleTimeout is for how long the connection is kept while neither side sends requests. It must
	// be positive.
	IdleTimeout time.Duration
	// Window is the most requests of ours that are without an answer at a time, at most 65536;
	// further ones wait.
	Window int
	// Pool is the memory for messages, which the connections of one owner share: see
	// [queue.NewPool].
	Pool *sync.Pool
	// Paths are the resources that the peer may ask for, and Handler serves them. If they are nil
	// the peer is told that we have nothing.
	Paths   *Paths
	Handler Handler
}

// Handler serves the requests of the peer on one [Conn]. All methods but Written are called by the
// goroutine that reads.
type Handler interface {
	// Request takes a request, whose payload is of the given length and may still be to come. It
	// returns where the payload goes: nothing if it is not wanted. It may wait, and the connection
	// is not read meanwhile.
	Request(r *Request, length int) (dst []byte)
	// Received is called once the payload is there.
	Received(r *Request)
	// Dry is called when all requests that have come have been handed over. It must not wait.
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
	// Queue is what is sent. Its lock guards the state of the connection, and may guard that of the
	// Handler.
	Queue *queue.Queue

	conn   net.Conn
	config Config
	reader *reader
	done   chan struct{}

	pending   pending
	waiting   exchanges
	ended     exchanges // whose Done is to be called with err, once the lock is given up
	err       error     // why the connection is at its end
	draining  bool      // the peer has announced the end: no further requests of ours
	released  bool      // we have announced the end
	expired   bool      // the peer had its time after that
	direct    *Exchange // whose payload is being read straight to its Dst
	abandoned bool      // the owner of direct wants its memory back
	receiving bool      // a message has begun, and the reader waits for the rest

	tick       uint32
	progress   uint32 // tick of the last progress
	lastUse    uint32 // tick of the last request or answer
	moved      int64  // bytes of payloads at the last progress
	answers    int64
	useless    int // messages of no use that the peer may yet send
	peer       Capabilities
	introduced chan struct{} // closed when peer is known, or the connection is at its end
	scratch    []byte        // what stands before a payload
	options    []byte        // of the request that is being sent

	// Of the goroutine that reads.
	stalled  bool // receiving is set
	requests int  // that have come since the lock was held last
	incoming Request
}

// NewConn makes a connection of a stream, which is the Conn's from then on. [Conn.Run] must be
// called.
func NewConn(conn net.Conn, config Config) *Conn {
	c := &Conn{
		conn:       conn,
		config:     config,
		done:       make(chan struct{}),
		pending:    pending{requests: make(map[uint32]pendingRequest)},
		useless:    uselessMessages,
		peer:       Capabilities{MessageSize: baseMessageSize},
		introduced: make(chan struct{}),
	}
	if c.config.Paths == nil {
		c.config.Paths = &Paths{}
	}
	c.reader = newReader(conn, MessageSize, c.dry)
	c.Queue = queue.New(conn, config.Pool, config.Timeout, c.written)
	c.Queue.Mu.Lock()
	c.send(appendCapabilities(nil, MessageSize))
	c.Queue.Mu.Unlock()
	return c
}

// Run serves the connection until it ends, and closes it. It returns why it has ended.
func (c *Conn) Run() error {
	var group sync.WaitGroup
	group.Go(func() {
		if err := c.Queue.Run(); err != nil {
			c.Close(err)
		}
		c.conn.Close()
	})
	group.Go(c.watch)
	err := c.read()
	var protocol *protocolError
	switch {
	case errors.As(err, &protocol):
		c.leave(appendAbort(nil, protocol.bad, protocol.Error()), protocol.err)
	case err == io.EOF || err == errReleased:
		// The peer may well wait for answers to what it has sent.
		c.finish(false)
		c.leave(nil, c.endOf(err))
	default:
		c.Close(err)
	}
	c.finish(true)
	close(c.done)
	group.Wait()
	if socket, ok := c.conn.(interface{ Wait() }); ok {
		socket.Wait() // a WebSocket takes leave
	}
	_, err = c.State()
	return err
}

// endOf returns what the end of the stream means.
func (c *Conn) endOf(err error) error {
	c.Queue.Mu.Lock()
	defer c.Queue.Mu.Unlock()
	if err == io.EOF && !c.draining {
		return io.ErrUnexpectedEOF
	}
	return errReleased
}

func (c *Conn) finish(failed bool) {
	if c.config.Handler != nil {
		c.config.Handler.Finish(failed)
	}
}

// protocolError is a fault of the peer, to be answered with Abort.
type protocolError struct {
	err error
	bad message.OptionID
}

func (e *protocolError) Error() string { return e.err.Error() }
func (e *protocolError) Unwrap() error { return e.err }

// State returns why the connection is at its end, or nil if it is not and takes further requests;
// and reports whether the peer has ever answered.
func (c *Conn) State() (answered bool, err error) {
	c.Queue.Mu.Lock()
	defer c.Queue.Mu.Unlock()
	if c.err == nil && c.draining {
		return c.answers > 0, errReleased
	}
	return c.answers > 0, c.err
}

// Peer returns what the peer can receive, as far as it has said so; the channel is closed when it
// has, or the connection is at its end. The lock of the queue must be held.
func (c *Conn) Peer() (Capabilities, <-chan struct{}) {
	return c.peer, c.introduced
}

// Close ends the connection at once. All exchanges fail with the error. It does not wait.
func (c *Conn) Close(err error) {
	c.Queue.Mu.Lock()
	c.end(err)
	c.Queue.Fail(err)
	c.unlock()
	c.conn.Close()
}

// Release tells the peer that the connection ends, which has the given time to finish what it asks
// and to close it. If that is 0, what is under way fails with the error, and the connection ends as
// soon as the peer could be told. It does not wait.
func (c *Conn) Release(grace time.Duration, err error) {
	c.Queue.Mu.Lock()
	if c.released || c.err != nil {
		c.Queue.Mu.Unlock()
		return
	}
	c.released = true
	goodbye := appendMessage(nil, codes.Release, Token{}, nil, "")
	if grace == 0 {
		c.Queue.Mu.Unlock()
		c.leave(goodbye, err)
		return
	}
	c.send(goodbye)
	c.Queue.Mu.Unlock()
	time.AfterFunc(grace, func() {
		c.Queue.Mu.Lock()
		c.expired = true
		c.Queue.Mu.Unlock()
		c.conn.SetReadDeadline(time.Unix(1, 0))
	})
}

// leave sends the last words, after all else that was to be sent, and ends the connection.
func (c *Conn) leave(last []byte, cause error) {
	c.Queue.Mu.Lock()
	defer c.unlock()
	if c.err != nil {
		return
	}
	if len(last) > 0 {
		c.send(last)
	}
	c.Queue.Close()
	c.end(cause)
	if len(last) > 0 {
		// The writer closes the connection once it has written everything; or it never gets that
		// far.
		time.AfterFunc(linger, func() { c.conn.Close() })
	}
}

// end makes all exchanges fail. The lock must be held, and be given up by unlock.
func (c *Conn) end(err error) {
	if c.err != nil {
		return
	}
	c.err = err
	for _, r := range c.pending.requests {
		if x := r.exchange; x != nil {
			x.state, x.kept = exchangeTaken, nil
			c.ended.push(x)
		}
	}
	clear(c.pending.requests)
	c.dismiss()
	c.introduce()
	c.written()
}

// dismiss makes the exchanges fail that were not sent yet. The lock must be held, and be given up
// by unlock.
func (c *Conn) dismiss() {
	for x := c.waiting.first; x != nil; x = c.waiting.first {
		c.waiting.remove(x)
		x.state = exchangeTaken
		c.ended.push(x)
	}
}

// unlock gives up the lock, and calls Done of what has failed meanwhile.
func (c *Conn) unlock() {
	ended, err := c.ended, c.err
	c.ended = exchanges{}
	if err == nil {
		err = errReleased
	}
	c.Queue.Mu.Unlock()
	for x := ended.first; x != nil; x = ended.first {
		ended.remove(x)
		x.finish(err)
	}
}

func (c *Conn) introduce() {
	select {
	case <-c.introduced:
	default:
		close(c.introduced)
	}
}

// send puts a small message in the queue. The lock must be held.
func (c *Conn) send(b []byte) {
	space := c.Queue.Reserve(len(b))
	c.Queue.Publish(space, copy(space.Bytes, b))
}

// Respond answers a request of the peer, or anything that has a token. The lock of the queue must
// be held.
func (c *Conn) Respond(token Token, code codes.Code, options, payload []byte) {
	space, head := c.prepare(token, code, options, len(payload))
	c.Queue.Publish(space, head+copy(space.Bytes[head:], payload))
}

// Prepare reserves memory for a response with content of the given size, and writes what stands
// before the content. The response is sent by [queue.Queue.Publish] once the content is at
// space.Bytes[head:], or by [queue.Queue.PublishWith] and the first head bytes. The lock of the
// queue must be held.
func (c *Conn) Prepare(token Token, options []byte, size int) (space queue.Space, head int) {
	return c.prepare(token, codes.Content, options, size)
}

func (c *Conn) prepare(token Token, code codes.Code, options []byte, size int) (space queue.Space, head int) {
	length := len(options)
	if size > 0 {
		length += 1 + size
	}
	b := append(AppendHead(c.scratch[:0], code, token, length), options...)
	if size > 0 {
		b = append(b, payloadMarker)
	}
	c.scratch = b
	space = c.Queue.Reserve(len(b) + size)
	return space, copy(space.Bytes, b)
}

// Start sends a request, or lets it wait for its turn; it never waits itself. It reports whether
// the connection takes it. If not, because the connection is at its end, Done is not called.
func (c *Conn) Start(x *Exchange) bool {
	c.Queue.Mu.Lock()
	defer c.Queue.Mu.Unlock()
	if c.err != nil || c.draining {
		return false
	}
	if x.kept == &c.pending || c.waiting.first == nil && c.hasRoom() {
		c.sendRequest(x)
	} else {
		x.state = exchangeWaiting
		c.waiting.push(x)
	}
	return true
}

// Cancel makes Done of an exchange be called soon, if that has not been done, with
// [context.Canceled]; and gives back the token of one that keeps it. It never waits. The memory at
// Dst is not used any more once Done is called.
func (c *Conn) Cancel(x *Exchange) {
	c.Queue.Mu.Lock()
	cancelled := true
	switch {
	case x.state == exchangeWaiting:
		c.waiting.remove(x)
	case x.state == exchangeSent:
		r := c.pending.requests[uint32(x.token.Value)]
		r.exchange = nil
		c.pending.requests[uint32(x.token.Value)] = r
	case c.direct == x:
		// The peer may take its time with the rest of the payload.
		c.abandoned = true
		c.conn.SetReadDeadline(time.Unix(1, 0))
		fallthrough
	default:
		cancelled = false
	}
	x.kept = nil
	if cancelled {
		x.state = exchangeTaken
	}
	c.Queue.Mu.Unlock()
	if cancelled {
		x.finish(context.Canceled)
	}
}

// hasRoom reports whether one more request may be sent. The lock must be held.
func (c *Conn) hasRoom() bool {
	return len(c.pending.requests) < c.config.Window && c.Queue.Bytes() < maxQueued
}

// written is called when there is room for more, with the lock held.
func (c *Conn) written() {
	for x := c.waiting.first; x != nil && c.err == nil && c.hasRoom(); x = c.waiting.first {
		c.waiting.remove(x)
		c.sendRequest(x)
	}
	if c.config.Handler != nil {
		c.config.Handler.Written()
	}
}

// sendRequest sends a request. The lock must be held.
func (c *Conn) sendRequest(x *Exchange) {
	if len(c.pending.requests) == 0 {
		c.progress = c.tick
	}
	c.lastUse = c.tick
	c.pending.add(x, c.tick)
	x.state = exchangeSent
	c.options = x.Store.append(c.options[:0], x)
	c.Respond(x.token, x.method(), c.options, x.Payload)
}

// watch ends the connection when the peer owes something for too long, and when it has not been
// used for a while.
func (c *Conn) watch() {
	period := max(c.config.Timeout/ticksPerTimeout, time.Millisecond)
	idle := uint32(min(c.config.IdleTimeout/period, 1<<31))
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	for {
		select {
		case <-c.done:
			return
		case <-ticker.C:
		}
		c.Queue.Mu.Lock()
		c.tick++
		c.useless = min(c.useless+uselessPerTick, uselessMessages)
		if moved := c.Queue.Moved() + c.reader.moved.Load(); moved-c.moved >= progressBytes {
			c.progress, c.moved = c.tick, moved
		}
		owed := len(c.pending.requests) > 0 || c.receiving
		silent := owed && c.tick-c.progress > ticksPerTimeout
		if c.tick%ticksPerTimeout == 0 && c.pending.age(c.tick) > maxAge*ticksPerTimeout {
			silent = true
		}
		unused := !owed && c.waiting.first == nil && c.Queue.Bytes() == 0 && c.tick-c.lastUse > idle
		c.Queue.Mu.Unlock()
		switch {
		case silent:
			c.Close(fmt.Errorf("%w (%v)", ErrSilent, c.config.Timeout))
		case unused:
			c.Release(0, errIdle)
		}
	}
}

// dry is called by the reader when it is about to wait.
func (c *Conn) dry() {
	within := c.reader.within()
	if within != c.stalled || c.requests > 0 {
		c.setReceiving(within)
	}
	if c.config.Handler != nil {
		c.config.Handler.Dry()
	}
}

// setReceiving takes note of whether the peer owes the rest of a message.
func (c *Conn) setReceiving(receiving bool) {
	c.Queue.Mu.Lock()
	defer c.Queue.Mu.Unlock()
	if receiving && !c.receiving && len(c.pending.requests) == 0 {
		c.progress = c.tick
	}
	c.receiving, c.stalled = receiving, receiving
	if c.requests > 0 {
		c.progress, c.lastUse = c.tick, c.tick
		c.useless = min(c.useless+uselessPerUseful*c.requests, uselessMessages)
		c.requests = 0
	}
}

// interrupted is called when the deadline ended a read: it gives the owner of the present exchange
// its memory back if that is wanted. It reports whether the connection goes on.
func (c *Conn) interrupted() bool {
	c.Queue.Mu.Lock()
	var given *Exchange
	if c.abandoned {
		c.abandoned = false
		given, c.direct = c.direct, nil
	}
	on := c.err == nil && !c.expired
	if on {
		c.conn.SetReadDeadline(time.Time{})
	}
	c.Queue.Mu.Unlock()
	if given != nil {
		given.finish(context.Canceled)
	}
	return on
}

// delivery is a response that is in the buffer of the reader.
type delivery struct {
	token    Token
	code     codes.Code
	response Response
	payload  []byte
	exchange *Exchange
}

// read takes messages until the connection fails or the peer breaks the protocol. It returns
// errReleased if the end was agreed.
func (c *Conn) read() error {
	batch := make([]delivery, 0, deliveryBatch)
	first := true
	for {
		err := c.readBuffered(&batch, &first)
		if e := c.deliver(batch); err == nil {
			err = e
		}
		if err != nil {
			return err
		}
		if len(batch) == cap(batch) {
			batch = batch[:0]
			continue
		}
		batch = batch[:0]
		head, whole, err := c.reader.wait()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if !c.interrupted() {
				return errReleased
			}
		case errors.Is(err, ErrMessageSize), err == ErrTokenSize:
			return &protocolError{err: err}
		case err != nil:
			return err
		case whole:
		case first:
			return &protocolError{err: errNoCSM}
		default:
			if err := c.readLarge(head); err != nil {
				return err
			}
		}
	}
}

// readBuffered takes the messages that are in the buffer. Responses are collected in the batch,
// until it is full.
func (c *Conn) readBuffered(batch *[]delivery, first *bool) error {
	for len(*batch) < cap(*batch) {
		head, body, ok, err := c.reader.buffered()
		if err != nil {
			return &protocolError{err: err}
		}
		if !ok {
			return nil
		}
		if *first && head.Code != codes.CSM {
			return &protocolError{err: errNoCSM}
		}
		*first = false
		switch {
		case isResponse(head.Code):
			*batch = (*batch)[:len(*batch)+1]
			d := &(*batch)[len(*batch)-1]
			d.token, d.code = head.Token, head.Code
			options := walkOptions(body)
			if err := parseResponse(&options, &d.response); err != nil {
				*batch = (*batch)[:len(*batch)-1]
				return &protocolError{err: err}
			}
			d.payload = options.payload()
		case isRequest(head.Code):
			r := &c.incoming
			*r = Request{Code: head.Code, Token: head.Token}
			c.config.Paths.parse(body, r)
			dst, err := c.request(r, len(r.Payload))
			if err != nil {
				return err
			}
			copy(dst, r.Payload)
			c.received(r)
		default:
			if err := c.control(head, body); err != nil {
				return err
			}
		}
	}
	return nil
}

// deliver hands responses to their exchanges.
func (c *Conn) deliver(batch []delivery) error {
	if len(batch) == 0 {
		return nil
	}
	known := 0
	c.Queue.Mu.Lock()
	for i := range batch {
		d := &batch[i]
		x, ok := c.pending.remove(d.token)
		if ok {
			known++
		}
		if x != nil {
			x.state = exchangeTaken
		}
		d.exchange = x
	}
	c.receiving, c.stalled = false, false
	err := c.count(known, len(batch)-known)
	if err == nil {
		err = c.over()
	}
	c.written()
	c.Queue.Mu.Unlock()
	for i := range batch {
		d := &batch[i]
		if x := d.exchange; x != nil {
			x.take(d.code, &d.response, len(d.payload))
			copy(x.destination(d.code, len(d.payload)), d.payload)
			x.finish(nil)
		}
		d.exchange, d.payload = nil, nil
	}
	return err
}

// count takes note of answers, and of messages of no use. The lock must be held.
func (c *Conn) count(answers, useless int) error {
	if answers > 0 {
		c.answers += int64(answers)
		c.progress, c.lastUse = c.tick, c.tick
		c.useless = min(c.useless+uselessPerUseful*answers, uselessMessages)
	}
	c.useless -= useless
	if c.useless < 0 {
		return &protocolError{err: errFlood}
	}
	return nil
}

// over returns errReleased if the peer wants the connection to end, and has answered all that was
// part. The lock must be held.
func (c *Conn) over() error {
	if c.draining && len(c.pending.requests) == 0 {
		return errReleased
	}
	return nil
}

// readLarge takes a message that is not in the buffer yet.
func (c *Conn) readLarge(head Head) error {
	switch {
	case isResponse(head.Code):
		return c.deliverLarge(head)
	case !isRequest(head.Code):
		return &protocolError{err: errSignal} // a signalling message beyond all measure
	}
	r := &c.incoming
	*r = Request{Code: head.Code, Token: head.Token}
	if err := c.readOptions(func() error { return c.reader.request(c.config.Paths, r) }); err != nil {
		return err
	}
	dst, err := c.request(r, c.reader.rest)
	if err != nil {
		return err
	}
	if err := c.readPayload(dst, func() bool { return true }); err != nil {
		return err
	}
	c.received(r)
	return nil
}

// deliverLarge hands a response to its exchange whose payload is not all in the buffer yet.
func (c *Conn) deliverLarge(head Head) error {
	c.Queue.Mu.Lock()
	x, ok := c.pending.remove(head.Token)
	if x != nil {
		x.state = exchangeTaken
		c.direct = x
	}
	err := c.count(0, 0)
	if !ok {
		err = c.count(0, 1)
	}
	c.Queue.Mu.Unlock()
	if err == nil {
		err = c.readResponse(head)
	}

	c.Queue.Mu.Lock()
	x, c.direct = c.direct, nil
	if c.abandoned {
		c.abandoned = false
		if !c.expired {
			c.conn.SetReadDeadline(time.Time{})
		}
	}
	if err == nil && ok {
		err = c.count(1, 0)
	}
	end := c.over()
	c.receiving, c.stalled = false, false
	c.written()
	c.Queue.Mu.Unlock()
	if x != nil {
		x.finish(err)
	}
	if err == nil {
		err = end
	}
	return err
}

// readResponse reads the options of a response, and the payload if somebody waits for it. It gives
// memory back as soon as that is wanted; the rest of the response is then passed over.
func (c *Conn) readResponse(head Head) error {
	var response Response
	if err := c.readOptions(func() error { return c.reader.response(&response) }); err != nil {
		return err
	}
	x := c.direct
	if x == nil {
		return nil
	}
	length := c.reader.rest
	x.take(head.Code, &response, length)
	return c.readPayload(x.destination(head.Code, length), func() bool { return c.direct == x })
}

// readOptions calls a function that reads options, again if the deadline interrupts it.
func (c *Conn) readOptions(read func() error) error {
	for {
		err := read()
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return optionsError(err)
		case !c.interrupted():
			return errReleased
		}
	}
}

// optionsError tells malformed options from a failure of the connection.
func optionsError(err error) error {
	var network net.Error
	if errors.As(err, &network) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) {
		return err
	}
	return &protocolError{err: err}
}

// readPayload reads a payload, as long as it is wanted.
func (c *Conn) readPayload(dst []byte, wanted func() bool) error {
	for len(dst) > 0 {
		n, err := c.reader.readFull(dst)
		dst = dst[n:]
		switch {
		case err == nil:
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		case !c.interrupted():
			return errReleased
		case !wanted():
			return nil
		}
	}
	return nil
}

// request hands a request to the handler, and returns where its payload goes. Without a handler, it
// answers itself.
func (c *Conn) request(r *Request, length int) ([]byte, error) {
	c.requests++
	if c.stalled {
		c.setReceiving(false)
	}
	if c.config.Handler != nil {
		return c.config.Handler.Request(r, length), nil
	}
	c.Queue.Mu.Lock()
	defer c.Queue.Mu.Unlock()
	if c.Queue.Bytes() > 2*maxQueued {
		return nil, &protocolError{err: errFlood}
	}
	code := codes.NotImplemented
	if r.Code == codes.GET {
		code = codes.NotFound
	}
	c.Respond(r.Token, code, nil, nil)
	return nil, nil
}

func (c *Conn) received(r *Request) {
	if c.config.Handler != nil {
		c.config.Handler.Received(r)
	}
}

// control takes every message that is neither a request nor a response.
func (c *Conn) control(head Head, body []byte) error {
	c.Queue.Mu.Lock()
	defer c.unlock()
	if err := c.count(0, 1); err != nil {
		return err
	}
	switch head.Code {
	case codes.Ping, codes.Pong, codes.Release:
		if err := checkSignal(body); err != nil {
			return &protocolError{err: err}
		}
	}
	switch head.Code {
	case codes.Empty, codes.Pong:
	case codes.CSM:
		if bad, err := c.peer.update(body); err != nil {
			return &protocolError{err, bad}
		}
		c.introduce()
	case codes.Ping:
		c.Respond(head.Token, codes.Pong, nil, nil)
	case codes.Release:
		c.draining = true
		c.dismiss()
		return c.over()
	case codes.Abort:
		options := walkOptions(body)
		_ = options.skip()
		text := options.payload()
		return fmt.Errorf("peer aborts the connection: %q", text[:min(len(text), 64)])
	default:
		if head.Code>>5 == 7 {
			return &protocolError{err: errSignal}
		}
		return &protocolError{err: errClass}
	}
	return nil
}
