// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/queue"
)

const (
	// releaseGrace is how long clients get to close a connection after they were told that it ends.
	releaseGrace = 2 * time.Second
	// unixWriteBuffer is the size in bytes of the buffer that the kernel keeps for answers on a
	// Unix socket.
	unixWriteBuffer = 512 << 10
	// guaranteed is how many bytes of answers, and of blocks to be stored, each connection may have
	// in memory whatever others have.
	guaranteed = 256 << 10
	// maxStreamTransfers is how many blocks may be in the course of being received part by part, on
	// one connection.
	maxStreamTransfers = 32
)

// conn serves the requests of one connection: as long as there is something to do, some goroutines
// get and some put. It is the [coap.Handler] of the connection, whose lock guards all but what
// belongs to the goroutine that reads.
type conn struct {
	server *Server
	access Access
	peer   *coap.Conn
	queue  *queue.Queue
	ctx    context.Context // ends with the connection
	cancel context.CancelFunc
	group  sync.WaitGroup

	// Of the goroutine that reads.
	parsed    []getRequest // not handed over yet
	transfers *transfers
	transfer  *transfer  // of the request that is being received
	code      codes.Code // what put said to it
	putter    bool       // it is a PUT that is not answered yet

	room    sync.Cond // there is room for more again
	counted int64     // of queue.Bytes, in answerBytes of the server

	gets     []getRequest // waiting, from firstGet on
	firstGet int
	getters  int
	calling  bool       // a getter has been started that has taken nothing yet
	started  []*getCall // requests of sources without an answer
	idle     []*getCall // to be used again

	open    *batch // offered to the next goroutine that puts, and to the reader to put more in
	putting int    // batches that are being put

	busy    bool            // something is under way, as the gate knows
	setIdle func(idle bool) // tells the gate
}

// newConn returns a connection. SetIdle is told whether nothing is under way, as at first.
func newConn(s *Server, netConn net.Conn, access Access, setIdle func(idle bool)) *conn {
	setIdle(true)
	c := &conn{server: s, access: access, transfers: newTransfers(maxStreamTransfers, maxStreamTransfers, 0), setIdle: setIdle}
	if unix, ok := netConn.(*net.UnixConn); ok {
		// The default holds six blocks of 32 KiB, which makes both sides wait for each other all
		// the time.
		_ = unix.SetWriteBuffer(unixWriteBuffer)
	}
	c.ctx, c.cancel = context.WithCancel(s.ctx)
	c.peer = coap.NewConn(netConn, coap.Config{
		Timeout: s.config.MessageTimeout, IdleTimeout: s.config.IdleTimeout, Pool: s.pool, Paths: s.paths, Handler: c,
	})
	c.queue = c.peer.Queue
	c.room.L = &c.queue.Mu
	return c
}

// serve serves the connection until it ends.
func (c *conn) serve() {
	defer c.cancel()
	stop := context.AfterFunc(c.ctx, c.cancelGets)
	defer stop()
	_ = c.peer.Run()
	c.queue.Mu.Lock()
	c.server.answerBytes.Add(-c.counted)
	c.counted = 0
	c.queue.Mu.Unlock()
}

// Request implements [coap.Handler].
func (c *conn) Request(r *coap.Request, length int) (dst []byte) {
	c.putter = false
	switch {
	case r.Refuse != codes.Empty:
		c.answer(r.Token, r.Refuse)
	case r.Code == codes.GET:
		c.get(r)
	default:
		c.putter = true
		dst, c.code = c.put(r, length)
	}
	return dst
}

// Received implements [coap.Handler].
func (c *conn) Received(r *coap.Request) {
	if c.putter {
		c.finishPut(r)
	}
}

// Dry implements [coap.Handler]: now is the time to do what was part.
func (c *conn) Dry() {
	c.queue.Mu.Lock()
	c.handOver()
	c.queue.Mu.Unlock()
}

// Written implements [coap.Handler].
func (c *conn) Written() {
	bytes := max(0, int64(c.queue.Bytes())-guaranteed)
	c.server.answerBytes.Add(bytes - c.counted)
	c.counted = bytes
	if c.queue.Err() != nil {
		c.cancel()
	}
	c.room.Broadcast()
	c.markIdle()
}

// markBusy notes that something is under way. The lock must be held.
func (c *conn) markBusy() {
	if !c.busy {
		c.busy = true
		c.setIdle(false)
	}
}

// markIdle notes when nothing is under way any more: the connection may make room for others then.
// The lock must be held.
func (c *conn) markIdle() {
	gets := len(c.gets) - c.firstGet + len(c.started) + c.getters
	if c.busy && gets == 0 && c.putting == 0 && c.open == nil && c.queue.Bytes() == 0 {
		c.busy = false
		c.setIdle(true)
	}
}

// Finish implements [coap.Handler].
func (c *conn) Finish(failed bool) {
	if failed {
		c.cancel()
	}
	c.dispatch()
	c.group.Wait()
	c.queue.Mu.Lock()
	defer c.queue.Mu.Unlock()
	for len(c.started) > 0 {
		c.room.Wait()
	}
}

// answer sends a response without a payload. Only the goroutine that reads calls it: if the client
// does not take its answers, it waits, so that no further requests are read.
func (c *conn) answer(token coap.Token, code codes.Code, options ...byte) {
	c.queue.Mu.Lock()
	defer c.queue.Mu.Unlock()
	for c.isFull() {
		c.room.Wait()
	}
	c.markBusy()
	c.peer.Respond(token, code, options, nil)
}

// isFull reports whether there are so many answers that have not been taken that no more may be
// made. The lock must be held.
func (c *conn) isFull() bool {
	bytes := int64(c.queue.Bytes())
	if bytes <= guaranteed || c.queue.Err() != nil {
		return false
	}
	return bytes >= c.server.config.MaxAnswerBytes || c.server.answerBytes.Load() > c.server.config.MaxTotalAnswerBytes
}

// dispatch does what was part, and waits if too much is being part.
func (c *conn) dispatch() {
	c.queue.Mu.Lock()
	c.handOver()
	for len(c.gets)-c.firstGet > maxWaitingGets && c.queue.Err() == nil {
		c.room.Wait()
	}
	c.queue.Mu.Unlock()
}

// resource returns the resource of a request, if it is a store.
func (c *conn) resource(r *coap.Request) *Resource {
	if r.Resource < 0 || r.Resource >= len(c.server.resources) {
		return nil
	}
	return &c.server.resources[r.Resource]
}
