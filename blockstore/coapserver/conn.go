// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
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
	// requestWindow is how many requests a client may have without an answer that it is asked.
	requestWindow = 64
)

// conn serves the requests of one connection: as long as there is something to do, some goroutines
// get and some put. It is the [coap.Handler] of the connection, whose lock guards all but what
// belongs to the goroutine that reads.
type conn struct {
	server *Server
	access Access
	client string // as in [admission.Host]
	peer   *coap.Conn
	ctx    context.Context // ends with the connection
	cancel context.CancelFunc
	group  sync.WaitGroup

	// Of the goroutine that reads.
	parsed    []getRequest // not handed over yet
	crowded   bool         // too many that were handed over have not been served
	transfers *transfers

	room    sync.Cond // there is room for more again
	counted int64     // of what is held, in answerBytes of the server
	idle    func(bool)
	isIdle  bool // as idle was told

	gets     []getRequest // waiting, from firstGet on
	firstGet int
	getters  int
	looking  int // of the getters, those that are looking a block up
	maxGets  int
	calling  bool // a getter has been started that has taken nothing yet

	open    *batch // offered to the next goroutine that puts, and to the reader to put more in
	putting int    // batches that are being put
}

func newConn(s *Server, netConn net.Conn, access Access, idle func(bool)) *conn {
	c := &conn{server: s, access: access, idle: idle, isIdle: true, transfers: newTransfers(maxStreamTransfers, maxStreamTransfers, 0)}
	if c.maxGets = s.config.MaxGets; access.Relay != nil {
		c.maxGets *= 8
	}
	if remote := netConn.RemoteAddr(); remote != nil {
		c.client = admission.Host(remote.String())
	}
	if unix, ok := netConn.(*net.UnixConn); ok {
		// The default holds six blocks of 32 KiB, which makes both sides wait for each other all
		// the time.
		_ = unix.SetWriteBuffer(unixWriteBuffer)
	}
	c.ctx, c.cancel = context.WithCancel(s.ctx)
	c.peer = coap.NewConn(netConn, coap.Config{
		Timeout: s.config.MessageTimeout, IdleTimeout: s.config.IdleTimeout, Pool: s.pool, Paths: s.paths, Handler: c,
		KeepAlive: access.KeepAlive, Window: requestWindow,
	})
	c.room.L = c.peer
	return c
}

// serve serves the connection until it ends.
func (c *conn) serve() {
	defer c.cancel()
	if c.access.Connected != nil {
		defer c.access.Connected(c.peer, c.client)()
	}
	_ = c.peer.Run()
	c.peer.Lock()
	c.server.answerBytes.Add(-c.counted)
	c.counted = 0
	c.peer.Unlock()
}

// Request implements [coap.Handler].
func (c *conn) Request(r *coap.Request) {
	code := c.server.check(r, c.access)
	switch {
	case code != codes.Empty:
		c.answer(r.Token, code, nil, nil)
	case r.Resource == haveResource:
		code, options, payload := c.server.have(r, c.access)
		c.answer(r.Token, code, options, payload)
	case r.Code == codes.GET:
		c.parsed = append(c.parsed, c.server.newGetRequest(r, &c.access, c.client))
		if len(c.parsed) >= maxParsed || c.crowded {
			c.dispatch()
		}
	default:
		c.put(r)
	}
}

// Dry implements [coap.Handler]: now is the time to do what was requested.
func (c *conn) Dry() {
	c.peer.Lock()
	defer c.peer.Unlock()
	c.handOver()
	c.crowded = len(c.gets)-c.firstGet > maxWaitingGets
	c.tellIdle()
}

// Written implements [coap.Handler].
func (c *conn) Written() {
	c.count()
	if c.peer.Broken() {
		c.cancel()
	}
	c.tellIdle()
	c.room.Broadcast()
	if c.getters > 0 && !c.isFull() {
		c.callGetter() // those have ended for which there was no room
	}
}

// held is how many bytes are in memory for answers, those among them that are being made. The lock
// must be held.
func (c *conn) held() int64 {
	return int64(c.peer.Queued()) + int64(c.looking)*int64(eris.BlockSize32KiB)
}

// count adds what is held to that of all connections. The lock must be held.
func (c *conn) count() {
	bytes := max(0, c.held()-guaranteed)
	c.server.answerBytes.Add(bytes - c.counted)
	c.counted = bytes
}

// tellIdle calls idle if it has changed whether nothing is under way. The lock must be held.
func (c *conn) tellIdle() {
	idle := c.firstGet == len(c.gets) && c.getters == 0 && c.open == nil && c.putting == 0 && c.peer.Queued() == 0
	if idle != c.isIdle {
		c.isIdle = idle
		c.idle(idle)
	}
}

// Finish implements [coap.Handler].
func (c *conn) Finish(failed bool) {
	if failed {
		c.cancel()
	}
	c.dispatch()
	c.group.Wait()
}

// answer sends a short response. Only the goroutine that reads calls it: if the client does not
// take its answers, it waits, so that no further requests are read.
func (c *conn) answer(token coap.Token, code codes.Code, options, payload []byte) {
	c.peer.Lock()
	defer c.peer.Unlock()
	for c.isFull() {
		c.room.Wait()
	}
	c.peer.Respond(token, code, options, payload)
}

// isFull reports whether there are so many answers that have not been taken that no more may be
// made. The lock must be held.
func (c *conn) isFull() bool {
	bytes := c.held()
	if bytes <= guaranteed || c.peer.Broken() {
		return false
	}
	return bytes >= c.server.config.MaxBytes || c.server.answerBytes.Load() > c.server.config.MaxTotalBytes
}

// dispatch does what was requested, and waits if too much is.
func (c *conn) dispatch() {
	c.peer.Lock()
	c.handOver()
	for len(c.gets)-c.firstGet > maxWaitingGets && !c.peer.Broken() {
		c.room.Wait()
	}
	c.crowded = false
	c.peer.Unlock()
}
