// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

const (
	// A client may send so many messages at once that ask for nothing, and so many more per second and per request.
	idleMessages, idlePerSecond, idlePerRequest = 1024, 16, 4
	// releaseGrace is how long clients get to close a connection after they were told that it ends.
	releaseGrace = 2 * time.Second
	// unixWriteBuffer is the size in bytes of the buffer that the kernel keeps for answers on a Unix socket.
	unixWriteBuffer = 512 << 10
	// linger is how long the last words of a connection may take.
	linger = 500 * time.Millisecond
)

var (
	errFlood      = errors.New("peer sends too many messages that ask for nothing")
	errNoCSM      = errors.New("peer did not begin with its capabilities")
	errSignal     = errors.New("unknown signalling message")
	errClass      = errors.New("message of unknown class")
	errPeerAborts = errors.New("peer aborts the connection")
)

// conn is one connection: a goroutine that reads and understands requests, one that writes answers, and, as long as there is
// something to do, some that get and some that put.
type conn struct {
	server *Server
	access Access
	conn   net.Conn
	reader *coap.Reader
	queue  *coap.Queue // its mutex guards all but what belongs to the reader
	ctx    context.Context
	cancel context.CancelFunc
	group  sync.WaitGroup

	// Of the goroutine that reads.
	asked       []getRequest // not handed over yet
	messages    int64
	transfers   transfers
	within      bool  // the deadline is for a message
	deadlineFor int64 // the number of messages when the deadline was set
	deadlineSet time.Time
	idle        int       // messages that ask for nothing that the client may yet send
	idleSince   time.Time // when idle was last raised

	room         sync.Cond // there is room for more again
	capabilities coap.Capabilities
	released     bool
	counted      int64 // of queue.Bytes, in answerBytes of the server

	gets     []getRequest // waiting, from firstGet on
	firstGet int
	getters  int
	calling  bool // a getter has been started that has taken nothing yet

	open    *batch // offered to the next goroutine that puts, and to the reader to put more in
	putting int    // batches that are being put
}

func newConn(s *Server, netConn net.Conn, access Access) *conn {
	c := &conn{
		server:       s,
		access:       access,
		conn:         netConn,
		capabilities: coap.BaseCapabilities(),
		idle:         idleMessages,
		idleSince:    time.Now(),
	}
	if unix, ok := netConn.(*net.UnixConn); ok {
		// The default holds six blocks of 32 KiB, which makes both sides wait for each other all the time.
		_ = unix.SetWriteBuffer(unixWriteBuffer)
	}
	c.reader = coap.NewReader(netConn, coap.MessageSize, c.dry)
	c.queue = coap.NewQueue(netConn, s.pool, s.config.MessageTimeout, c.hasRoom)
	c.room.L = &c.queue.Mu
	c.ctx, c.cancel = context.WithCancel(s.ctx)
	return c
}

// serve serves the connection until it ends.
func (c *conn) serve() {
	defer c.cancel()
	var writer sync.WaitGroup
	writer.Go(func() {
		if err := c.queue.Run(); err != nil {
			c.fail(err)
		}
		c.conn.Close()
	})
	c.queue.Mu.Lock()
	c.send(coap.AppendCapabilities(nil, coap.MessageSize))
	c.queue.Mu.Unlock()

	err := c.read()
	c.dispatch()
	var fault *protocolError
	switch {
	case errors.As(err, &fault):
		c.queue.Mu.Lock()
		c.send(coap.AppendAbort(nil, fault.bad, fault.Error()))
		c.queue.Close()
		c.queue.Mu.Unlock()
		c.cancel()
		time.AfterFunc(linger, func() { c.conn.Close() })
		c.group.Wait()
	case err == io.EOF || err == errPeerReleases || c.isReleased() && errors.Is(err, os.ErrDeadlineExceeded):
		// The client may well wait for answers to what it has sent.
		c.group.Wait()
		c.queue.Mu.Lock()
		c.queue.Close()
		c.queue.Mu.Unlock()
	default:
		c.fail(err)
		c.group.Wait()
	}
	writer.Wait()
	c.queue.Mu.Lock()
	c.server.answerBytes.Add(-c.counted)
	c.counted = 0
	c.queue.Mu.Unlock()
}

// protocolError is a fault of the peer, to be answered with Abort.
type protocolError struct {
	err error
	bad message.OptionID
}

func (e *protocolError) Error() string { return e.err.Error() }
func (e *protocolError) Unwrap() error { return e.err }

// errPeerReleases ends reading when the peer wants the connection to end in an orderly way.
var errPeerReleases = errors.New("peer closes the connection")

// fail ends the connection at once.
func (c *conn) fail(err error) {
	c.queue.Mu.Lock()
	c.queue.Fail(err)
	c.queue.Mu.Unlock()
	c.cancel()
	c.conn.Close()
}

// release tells the client that the connection is to end, and sees to it that it does.
func (c *conn) release() {
	c.queue.Mu.Lock()
	defer c.queue.Mu.Unlock()
	if c.released {
		return
	}
	c.released = true
	if c.queue.Err() == nil {
		c.send(coap.AppendMessage(nil, codes.Release, coap.Token{}, nil, ""))
	}
	c.conn.SetReadDeadline(time.Now().Add(releaseGrace))
}

func (c *conn) isReleased() bool {
	c.queue.Mu.Lock()
	defer c.queue.Mu.Unlock()
	return c.released
}

// send puts a small message in the queue. The lock must be held.
func (c *conn) send(b []byte) {
	space := c.queue.Reserve(len(b))
	c.queue.Publish(space, copy(space.Bytes, b))
}

// answer sends a response without a payload. Only the goroutine that reads calls it: if the client does not take its answers,
// it waits, so that no further requests are read.
func (c *conn) answer(token coap.Token, code codes.Code, options ...byte) {
	c.queue.Mu.Lock()
	defer c.queue.Mu.Unlock()
	for c.isFull() {
		c.room.Wait()
	}
	c.reply(token, code, options...)
}

// reply sends a response without a payload. The lock must be held.
func (c *conn) reply(token coap.Token, code codes.Code, options ...byte) {
	space := c.queue.Reserve(coap.HeadSize(token, len(options)) + len(options))
	b := coap.AppendHead(space.Bytes[:0], code, token, len(options))
	c.queue.Publish(space, len(append(b, options...)))
}

// guaranteed is how many bytes of answers, and of blocks to be stored, each connection may have in memory whatever others
// have.
const guaranteed = 256 << 10

// isFull reports whether there are so many answers that have not been taken that no more may be made. The lock must be held.
func (c *conn) isFull() bool {
	bytes := int64(c.queue.Bytes())
	if bytes <= guaranteed || c.queue.Err() != nil {
		return false
	}
	return bytes >= c.server.config.MaxAnswerBytes || c.server.answerBytes.Load() > c.server.config.MaxTotalAnswerBytes
}

// account tells the server how much memory is in use for answers. The lock must be held.
func (c *conn) account() {
	bytes := max(0, int64(c.queue.Bytes())-guaranteed)
	c.server.answerBytes.Add(bytes - c.counted)
	c.counted = bytes
}

// hasRoom is called when answers have been sent, with the lock held.
func (c *conn) hasRoom() {
	c.account()
	c.room.Broadcast()
}

// dry is called when there is nothing to read: now is the time to do what was asked. It does not wait.
func (c *conn) dry() {
	c.queue.Mu.Lock()
	c.handOver()
	c.setDeadline()
	c.queue.Mu.Unlock()
}

// dispatch does what was asked, and waits if too much is being asked.
func (c *conn) dispatch() {
	c.queue.Mu.Lock()
	c.handOver()
	for len(c.gets)-c.firstGet > maxWaitingGets && c.queue.Err() == nil {
		c.room.Wait()
	}
	c.queue.Mu.Unlock()
}

// setDeadline bounds how long the next message may take to begin, or the present one to be complete. The lock must be held.
func (c *conn) setDeadline() {
	if c.released {
		return
	}
	timeout, within := c.server.config.IdleTimeout, c.reader.Within()
	if within {
		timeout = c.server.config.MessageTimeout
	}
	if within == c.within && c.messages == c.deadlineFor && !c.deadlineSet.IsZero() {
		return
	}
	now := time.Now()
	if within == c.within && now.Sub(c.deadlineSet) < timeout/8 {
		return
	}
	c.within, c.deadlineFor, c.deadlineSet = within, c.messages, now
	c.conn.SetReadDeadline(now.Add(timeout))
}

// read takes messages until the connection fails or the peer breaks the protocol.
func (c *conn) read() error {
	first := true
	for {
		for {
			head, body, ok, err := c.reader.Buffered()
			if err != nil {
				return &protocolError{err: err}
			}
			if !ok {
				break
			}
			c.messages++
			if first != (head.Code == codes.CSM && first) {
				return &protocolError{err: errNoCSM}
			}
			first = false
			if coap.IsRequest(head.Code) {
				err = c.request(head, body)
			} else {
				err = c.control(head, body)
			}
			if err != nil {
				return err
			}
		}
		head, whole, err := c.reader.Wait()
		switch {
		case errors.Is(err, coap.ErrMessageSize), err == coap.ErrTokenSize:
			return &protocolError{err: err}
		case err != nil:
			return err
		case whole:
		case first:
			return &protocolError{err: errNoCSM}
		case coap.IsRequest(head.Code):
			c.messages++
			if err := c.largeRequest(head); err != nil {
				return err
			}
		default:
			return &protocolError{err: errClass}
		}
	}
}

// request takes a request that is in the buffer.
func (c *conn) request(head coap.Head, body []byte) error {
	var r coap.Request
	c.idle = min(c.idle+idlePerRequest, idleMessages)
	if code := c.server.paths.ParseRequest(body, &r); code != codes.Empty {
		c.answer(head.Token, code)
		return nil
	}
	if head.Code == codes.GET {
		c.get(head.Token, &r)
		return nil
	}
	block, code := c.put(head, &r, len(r.Payload))
	copy(block, r.Payload)
	c.finishPut(head.Token, &r, code)
	return nil
}

// largeRequest takes a request whose payload is still to come, straight to where it will be stored.
func (c *conn) largeRequest(head coap.Head) error {
	var r coap.Request
	c.idle = min(c.idle+idlePerRequest, idleMessages)
	code, err := c.reader.Request(c.server.paths, &r)
	if err != nil {
		return err
	}
	if code != codes.Empty {
		c.answer(head.Token, code)
		return nil
	}
	if head.Code == codes.GET {
		c.get(head.Token, &r)
		return nil
	}
	block, code := c.put(head, &r, c.reader.Rest())
	if _, err := c.reader.ReadFull(block); err != nil {
		return err
	}
	c.finishPut(head.Token, &r, code)
	return nil
}

// resource returns the resource of a request, if it is a store.
func (c *conn) resource(r *coap.Request) *Resource {
	if r.Resource < 0 || r.Resource >= len(c.server.resources) {
		return nil
	}
	return &c.server.resources[r.Resource]
}

// get takes a GET.
func (c *conn) get(token coap.Token, r *coap.Request) {
	resource := c.resource(r)
	switch {
	case r.Resource >= len(c.server.resources) && c.access.Documents:
		c.getDocument(token, r)
	case resource == nil:
		c.answer(token, codes.NotFound)
	case !c.access.Get || resource.Blocks == nil:
		c.answer(token, codes.MethodNotAllowed)
	case !r.HasReference || r.BadSize:
		c.answer(token, codes.BadRequest)
	default:
		c.asked = append(c.asked, getRequest{r.Reference, r.Size, token, r.Block2, uint8(r.Resource)})
		if len(c.asked) >= maxAsked {
			c.dispatch()
		}
	}
}

// control takes every message that is not a request.
func (c *conn) control(head coap.Head, body []byte) error {
	c.idle--
	if c.idle < 0 {
		now := time.Now()
		c.idle = min(int(now.Sub(c.idleSince).Seconds()*idlePerSecond), idleMessages) - 1
		c.idleSince = now
		if c.idle < 0 {
			return &protocolError{err: errFlood}
		}
	}
	switch head.Code {
	case codes.Ping, codes.Pong, codes.Release:
		if err := coap.CheckSignal(body); err != nil {
			return &protocolError{err: err}
		}
	}
	switch head.Code {
	case codes.Empty, codes.Pong:
	case codes.CSM:
		c.queue.Mu.Lock()
		bad, err := c.capabilities.Update(body)
		c.queue.Mu.Unlock()
		if err != nil {
			return &protocolError{err, bad}
		}
	case codes.Ping:
		c.answer(head.Token, codes.Pong)
	case codes.Release:
		return errPeerReleases
	case codes.Abort:
		return errPeerAborts
	default:
		if coap.IsSignal(head.Code) {
			return &protocolError{err: errSignal}
		}
		if !coap.IsResponse(head.Code) {
			return &protocolError{err: errClass}
		}
		// We have asked for nothing.
	}
	return nil
}

// maxAge is the value of the option Max-Age of blocks, in seconds: a year. Blocks never change.
const maxAge = 365 * 24 * 60 * 60

var maxAgeOption = coap.AppendUintOption(nil, 0, message.MaxAge, maxAge)

// sizes are the block sizes to be tried for a client that does not say which one it wants.
func sizes(size eris.BlockSize) []eris.BlockSize {
	if size != 0 {
		return []eris.BlockSize{size}
	}
	return []eris.BlockSize{eris.BlockSize32KiB, eris.BlockSize1KiB}
}
