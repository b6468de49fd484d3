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

	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

const (
	// ticksPerTimeout is how often a session looks at the clock in one RequestTimeout.
	ticksPerTimeout = 8
	// maxAge is after how many RequestTimeouts without an answer a request condemns its connection, even if others are
	// answered.
	maxAge = 10
	// progressBytes is how many bytes, sent or received within large answers, count as progress like an answer.
	progressBytes = 4 << 10
	// maxQueued is how many bytes of requests wait to be sent at most, but for what is reserved by one more.
	maxQueued = 4 << 20
	// linger is how long the last words of a connection may take.
	linger = 500 * time.Millisecond

	// A peer may send so many messages at once that are of no use to us, and so many more per tick and per answer. Requests
	// are counted apart, and more generously: peers may ask, but we have no blocks.
	idleMessages, idlePerTick, idlePerAnswer = 1024, 64, 4
	peerRequests, peerRequestsPerTick        = 1 << 16, 1 << 13

	// deliveryBatch is how many answers are matched to their calls in one hold of the lock.
	deliveryBatch = 64
)

var (
	errSilent   = errors.New("no answer in time")
	errIdle     = errors.New("connection was idle")
	errReleased = errors.New("peer closes the connection")
	errFlood    = errors.New("peer sends too much that was not asked for")
	errNoCSM    = errors.New("peer did not begin with its capabilities")
	errSignal   = errors.New("unknown signalling message")
	errClass    = errors.New("message of unknown class")
	errClosed   = errors.New("store is closed")
	errUnusable = errors.New("response has an option that is not understood")
)

// session is one connection: one goroutine that reads, one that writes, one that looks at the clock. It does not know how
// the stream was made.
type session struct {
	conn     net.Conn
	options  *Options
	requests *wire.Requests
	reader   *wire.Reader
	queue    *wire.Queue // its mutex guards what follows
	done     chan struct{}

	table     table
	waiting   callList
	err       error // why the session is at its end
	draining  bool  // the peer has announced the end: no further requests
	direct    *call // whose payload is being read straight to its dst
	abandoned bool  // the caller of direct wants its memory back
	receiving bool  // a large answer is being read, for direct or for nobody

	tick      uint32
	progress  uint32 // tick of the last progress
	moved     int64  // bytes of payloads at that time
	answers   int64
	idle      int // messages of no use that the peer may yet send
	asked     int // requests that the peer may yet send
	lastInUse uint32

	capabilities wire.Capabilities
	introduced   chan struct{} // closed when the capabilities are known, or the session is at its end

	inParts chan struct{} // holds a token unless a PUT in parts is under way: a server can tell only one apart
}

func newSession(conn net.Conn, requests *wire.Requests, pool *sync.Pool, options *Options) *session {
	s := &session{
		conn:         conn,
		options:      options,
		requests:     requests,
		reader:       wire.NewReader(conn, wire.MessageSize, nil),
		done:         make(chan struct{}),
		idle:         idleMessages,
		asked:        peerRequests,
		capabilities: wire.BaseCapabilities(),
		introduced:   make(chan struct{}),
		inParts:      make(chan struct{}, 1),
	}
	s.inParts <- struct{}{}
	s.queue = wire.NewQueue(conn, pool, options.RequestTimeout, s.startWaiting)
	s.queue.Mu.Lock()
	s.send(wire.AppendCapabilities(nil, wire.MessageSize))
	s.queue.Mu.Unlock()
	return s
}

// run serves the connection until it ends, and closes it.
func (s *session) run() {
	var group sync.WaitGroup
	group.Go(func() {
		if err := s.queue.Run(); err != nil {
			s.fail(err)
		}
		s.conn.Close()
	})
	group.Go(s.watch)
	err := s.read()
	var protocol *protocolError
	if errors.As(err, &protocol) {
		s.abort(protocol)
	} else {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
			if s.isDraining() {
				err = errReleased
			}
		}
		s.fail(err)
	}
	close(s.done)
	group.Wait()
}

// protocolError is a fault of the peer, to be answered with Abort.
type protocolError struct {
	err error
	bad message.OptionID
}

func (e *protocolError) Error() string { return e.err.Error() }
func (e *protocolError) Unwrap() error { return e.err }

// send puts a small message in the queue. The lock must be held.
func (s *session) send(b []byte) {
	space := s.queue.Reserve(len(b))
	s.queue.Publish(space, copy(space.Bytes, b))
}

// fail ends the session at once. All calls fail with the error.
func (s *session) fail(err error) {
	s.queue.Mu.Lock()
	s.end(err)
	s.queue.Fail(err)
	s.queue.Mu.Unlock()
	s.conn.Close()
}

// abort tells the peer what is wrong and ends the session.
func (s *session) abort(cause *protocolError) {
	s.sayGoodbye(wire.AppendAbort(nil, cause.bad, cause.Error()), cause.err)
}

// release ends the session in an orderly way.
func (s *session) release(cause error) {
	s.sayGoodbye(wire.AppendMessage(nil, codes.Release, wire.Token{}, nil, ""), cause)
}

func (s *session) sayGoodbye(last []byte, cause error) {
	s.queue.Mu.Lock()
	defer s.queue.Mu.Unlock()
	if s.err != nil {
		return
	}
	s.send(last)
	s.queue.Close()
	s.end(cause)
	// The writer closes the connection once it has written everything; or it never gets that far.
	time.AfterFunc(linger, func() { s.conn.Close() })
}

// end makes all calls fail. The lock must be held.
func (s *session) end(err error) {
	if s.err != nil {
		return
	}
	s.err = err
	for _, c := range s.table.clear() {
		c.state = callTaken
		c.finish(err)
	}
	s.dismiss(err)
	s.introduce()
}

// dismiss makes the calls fail that were not sent yet. The lock must be held.
func (s *session) dismiss(err error) {
	for c := s.waiting.first; c != nil; c = s.waiting.first {
		s.waiting.remove(c)
		c.state = callTaken
		c.finish(err)
	}
}

func (s *session) introduce() {
	select {
	case <-s.introduced:
	default:
		close(s.introduced)
	}
}

func (s *session) isDraining() bool {
	s.queue.Mu.Lock()
	defer s.queue.Mu.Unlock()
	return s.draining
}

// usable reports whether the session takes further requests, and whether any was answered so far.
func (s *session) usable() (usable, proven bool) {
	s.queue.Mu.Lock()
	defer s.queue.Mu.Unlock()
	return s.err == nil && !s.draining, s.answers > 0
}

// do makes one exchange. The call must be filled in; when do returns nil, so is its response. Errors are the cause of the
// context and those of the connection, the latter as *sessionError.
func (s *session) do(ctx context.Context, c *call) error {
	if !s.begin(c) {
		return &sessionError{s.cause()}
	}
	select {
	case <-c.wake:
	case <-ctx.Done():
		if !s.cancel(c) {
			return context.Cause(ctx)
		}
	}
	if c.err != nil {
		if c.err == errAbandoned {
			return context.Cause(ctx)
		}
		return &sessionError{c.err}
	}
	return nil
}

// errAbandoned is the error of a call that was given up while its payload was being read.
var errAbandoned = errors.New("given up")

// sessionError is a failure of the connection, not of the request.
type sessionError struct{ err error }

func (e *sessionError) Error() string { return e.err.Error() }
func (e *sessionError) Unwrap() error { return e.err }

// cancel gives a call up. It reports whether the call is done all the same.
func (s *session) cancel(c *call) (done bool) {
	s.queue.Mu.Lock()
	if s.forget(c) {
		c.state = callIdle
		s.queue.Mu.Unlock()
		return false
	}
	s.queue.Mu.Unlock()
	<-c.wake
	return true
}

// forget forgets a call, unless somebody has taken it, who then will soon be done. The lock must be held.
func (s *session) forget(c *call) bool {
	switch c.state {
	case callWaiting:
		s.waiting.remove(c)
		return true
	case callSent:
		s.table.giveUp(c)
		return true
	}
	if s.direct == c {
		// The peer may take its time with the rest of the payload.
		s.abandoned = true
		s.conn.SetReadDeadline(time.Unix(1, 0))
	}
	return false
}

// hasRoom reports whether one more request may be sent. The lock must be held.
func (s *session) hasRoom() bool {
	return s.table.taken < s.options.Window && s.queue.Bytes() < maxQueued
}

// startWaiting sends requests that waited, as far as there is room. The lock must be held.
func (s *session) startWaiting() {
	for c := s.waiting.first; c != nil && s.err == nil && s.hasRoom(); c = s.waiting.first {
		s.waiting.remove(c)
		s.start(c)
	}
}

// start sends a request. The lock must be held.
func (s *session) start(c *call) {
	if s.table.taken == 0 {
		s.progress = s.tick
	}
	s.lastInUse = s.tick
	token := s.table.add(c, s.tick)
	c.state = callSent
	if c.payload == nil {
		length := s.requests.GetSize(c.size, c.block)
		space := s.queue.Reserve(wire.HeadSize(token, length) + length)
		b := wire.AppendHead(space.Bytes[:0], codes.GET, token, length)
		b = s.requests.AppendGet(b, &c.ref, c.size, c.block)
		s.queue.Publish(space, len(b))
		return
	}
	length := s.requests.PutSize(c.block, c.total, len(c.payload))
	space := s.queue.Reserve(wire.HeadSize(token, length) + length)
	b := wire.AppendHead(space.Bytes[:0], codes.PUT, token, length)
	b = s.requests.AppendPut(b, c.block, c.total, c.payload)
	s.queue.Publish(space, len(b))
}

// watch ends the session when requests stay without an answer, and when it has not been used for a while.
func (s *session) watch() {
	ticker := time.NewTicker(max(s.options.RequestTimeout/ticksPerTimeout, time.Millisecond))
	defer ticker.Stop()
	for {
		select {
		case <-s.done:
			return
		case <-ticker.C:
		}
		s.queue.Mu.Lock()
		s.tick++
		s.idle = min(s.idle+idlePerTick, idleMessages)
		s.asked = min(s.asked+peerRequestsPerTick, peerRequests)
		if moved := s.queue.Moved() + s.reader.Moved(); moved-s.moved >= progressBytes {
			// A large answer is on its way, or large requests are.
			s.progress, s.moved = s.tick, moved
		}
		outstanding := s.table.taken > 0 || s.receiving
		silent := outstanding && s.tick-s.progress > ticksPerTimeout
		if s.tick%ticksPerTimeout == 0 && s.table.age(s.tick) > maxAge*ticksPerTimeout {
			silent = true
		}
		unused := !outstanding && s.waiting.first == nil && time.Duration(s.tick-s.lastInUse)*s.options.RequestTimeout/ticksPerTimeout > s.options.IdleTimeout
		s.queue.Mu.Unlock()
		switch {
		case silent:
			s.fail(fmt.Errorf("%w (%v)", errSilent, s.options.RequestTimeout))
		case unused:
			s.release(errIdle)
		}
	}
}

// delivery is a response that is in the buffer of the reader.
type delivery struct {
	token    wire.Token
	code     codes.Code
	response wire.Response
	payload  []byte
	call     *call
}

// read takes messages until the connection fails or the peer breaks the protocol.
func (s *session) read() error {
	var batch [deliveryBatch]delivery
	first := true
	for {
		n := 0
		for n < len(batch) {
			head, body, ok, err := s.reader.Buffered()
			if err != nil {
				s.deliver(batch[:n])
				return &protocolError{err: err}
			}
			if !ok {
				break
			}
			if first {
				if head.Code != codes.CSM {
					return &protocolError{err: errNoCSM}
				}
				first = false
			}
			if wire.IsResponse(head.Code) {
				d := &batch[n]
				options := wire.ParseOptions(body)
				if err := wire.ParseResponse(&options, &d.response); err != nil {
					s.deliver(batch[:n])
					return &protocolError{err: err}
				}
				d.token, d.code, d.payload = head.Token, head.Code, options.Payload()
				n++
				continue
			}
			if err := s.control(head, body); err != nil {
				s.deliver(batch[:n])
				return err
			}
		}
		if n > 0 {
			if err := s.deliver(batch[:n]); err != nil {
				return err
			}
			continue
		}
		head, whole, err := s.reader.Wait()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && s.interrupted():
		case errors.Is(err, wire.ErrMessageSize), err == wire.ErrTokenSize:
			return &protocolError{err: err}
		case err != nil:
			return err
		case whole:
		case first:
			return &protocolError{err: errNoCSM}
		case wire.IsResponse(head.Code):
			if err := s.deliverLarge(head); err != nil {
				return err
			}
		default:
			// A large request, or a signalling message beyond all measure. Whatever it is, it is only looked at, not kept.
			body, err := s.reader.Peek(0)
			if err != nil {
				return err
			}
			if !wire.IsRequest(head.Code) {
				return &protocolError{err: errSignal}
			}
			if err := s.control(head, body); err != nil {
				return err
			}
		}
	}
}

// deliver hands responses to their callers.
func (s *session) deliver(batch []delivery) error {
	known := 0
	s.queue.Mu.Lock()
	for i := range batch {
		d := &batch[i]
		call, ok := s.table.remove(d.token)
		if ok {
			known++
		}
		if call != nil {
			call.state = callTaken
		}
		d.call = call
	}
	err := s.count(known, len(batch)-known)
	if err == nil {
		err = s.released()
	}
	s.startWaiting()
	s.queue.Mu.Unlock()
	for i := range batch {
		d := &batch[i]
		if c := d.call; c != nil {
			c.take(d.code, &d.response, len(d.payload))
			copy(c.destination(d.code, len(d.payload)), d.payload)
			c.finish(nil)
		}
		d.call, d.payload = nil, nil
	}
	return err
}

// count takes note of answers, and of messages of no use. The lock must be held.
func (s *session) count(answers, idle int) error {
	if answers > 0 {
		s.answers += int64(answers)
		s.progress, s.lastInUse = s.tick, s.tick
		s.idle = min(s.idle+idlePerAnswer*answers, idleMessages)
	}
	s.idle -= idle
	if s.idle < 0 {
		return &protocolError{err: errFlood}
	}
	return nil
}

// deliverLarge hands a response to its caller whose payload is not all in the buffer yet.
func (s *session) deliverLarge(head wire.Head) error {
	s.queue.Mu.Lock()
	c, ok := s.table.remove(head.Token)
	if c != nil {
		c.state = callTaken
		s.direct = c
	}
	var err error
	if !ok {
		err = s.count(0, 1)
	}
	s.receiving = true
	s.queue.Mu.Unlock()
	if err == nil {
		err = s.readLarge(head)
	}

	s.queue.Mu.Lock()
	s.receiving = false
	c, s.direct = s.direct, nil
	if s.abandoned {
		s.abandoned = false
		s.conn.SetReadDeadline(time.Time{})
	}
	if err == nil && ok {
		err = s.count(1, 0)
	}
	over := s.released()
	s.startWaiting()
	s.queue.Mu.Unlock()
	if c != nil {
		c.finish(err)
	}
	if err == nil {
		err = over
	}
	return err
}

// released returns errReleased if the peer wants the connection to end, and all that was asked is answered. The lock must be
// held.
func (s *session) released() error {
	if s.draining && s.table.taken == 0 {
		return errReleased
	}
	return nil
}

// readLarge reads the options of a response, and the payload if a caller waits for it. It gives memory back to the caller as
// soon as that is wanted; the rest of the response is then passed over.
func (s *session) readLarge(head wire.Head) error {
	var response wire.Response
	for {
		err := s.reader.Response(&response)
		if err == nil {
			break
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return asProtocolError(err)
		}
		if !s.interrupted() {
			return err
		}
	}
	c := s.direct
	if c == nil {
		return nil
	}
	length := s.reader.Rest()
	c.take(head.Code, &response, length)
	dst := c.destination(head.Code, length)
	for len(dst) > 0 {
		n, err := s.reader.ReadFull(dst)
		dst = dst[n:]
		if err == nil {
			break
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || !s.interrupted() {
			return err
		}
		if s.direct == nil {
			return nil
		}
	}
	return nil
}

// interrupted is called when the deadline ended a read: it gives the caller of the present call its memory back if that is
// wanted. It reports whether the session goes on.
func (s *session) interrupted() bool {
	s.queue.Mu.Lock()
	defer s.queue.Mu.Unlock()
	s.conn.SetReadDeadline(time.Time{})
	if s.abandoned && s.direct != nil {
		s.direct.finish(errAbandoned)
		s.direct = nil
	}
	s.abandoned = false
	return s.err == nil
}

// asProtocolError tells malformed options from a failure of the connection.
func asProtocolError(err error) error {
	var network net.Error
	if errors.As(err, &network) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) {
		return err
	}
	return &protocolError{err: err}
}

// control takes every message that is not a response.
func (s *session) control(head wire.Head, body []byte) error {
	s.queue.Mu.Lock()
	defer s.queue.Mu.Unlock()
	if wire.IsRequest(head.Code) {
		s.asked--
		if s.asked < 0 || s.queue.Bytes() > 2*maxQueued {
			return &protocolError{err: errFlood}
		}
		code := codes.NotImplemented
		if head.Code == codes.GET {
			code = codes.NotFound
		}
		s.send(wire.AppendHead(nil, code, head.Token, 0))
		return nil
	}
	if err := s.count(0, 1); err != nil {
		return err
	}
	switch head.Code {
	case codes.Ping, codes.Pong, codes.Release:
		if err := wire.CheckSignal(body); err != nil {
			return &protocolError{err: err}
		}
	}
	switch head.Code {
	case codes.Empty, codes.Pong:
	case codes.CSM:
		if bad, err := s.capabilities.Update(body); err != nil {
			return &protocolError{err, bad}
		}
		s.introduce()
	case codes.Ping:
		s.send(wire.AppendHead(nil, codes.Pong, head.Token, 0))
	case codes.Release:
		s.draining = true
		s.dismiss(errReleased)
		return s.released()
	case codes.Abort:
		options := wire.ParseOptions(body)
		for {
			if _, ok := options.Next(); !ok {
				break
			}
		}
		text := options.Payload()
		return fmt.Errorf("peer aborts the connection: %q", text[:min(len(text), 64)])
	default:
		if wire.IsSignal(head.Code) {
			return &protocolError{err: errSignal}
		}
		return &protocolError{err: errClass}
	}
	return nil
}
