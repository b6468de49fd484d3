// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver

import (
	"context"
	"errors"
	"fmt"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/queue"
)

const (
	// maxParsed is how many requests are collected before they are handed over.
	maxParsed = 256
	// maxWaitingGets is how many requests may wait to be served, on one connection.
	maxWaitingGets = 4096
	// copyUpTo is up to what size a block is copied behind its head, rather than sent from where it
	// is.
	copyUpTo = 4096
)

// maxAge is the value of the option Max-Age of blocks, in seconds: a year. Blocks never change.
const maxAge = 365 * 24 * 60 * 60

var maxAgeOption = coap.AppendUintOption(nil, 0, message.MaxAge, maxAge)

// getRequest is a GET that has been understood.
type getRequest struct {
	ref      eris.Reference
	size     eris.BlockSize // 0: not said
	token    coap.Token
	block2   coap.Block
	resource uint8
}

func newGetRequest(r *coap.Request) getRequest {
	return getRequest{r.Reference, r.Size, r.Token, r.Block2, uint8(r.Resource)}
}

// get takes a GET.
func (c *conn) get(r *coap.Request) {
	resource := c.resource(r)
	switch {
	case r.Resource >= len(c.server.resources) && c.access.Documents:
		c.getDocument(r)
	case resource == nil:
		c.answer(r.Token, codes.NotFound)
	case !c.access.Get || resource.Source == nil:
		c.answer(r.Token, codes.MethodNotAllowed)
	case !r.HasReference || r.BadSize:
		c.answer(r.Token, codes.BadRequest)
	default:
		c.parsed = append(c.parsed, newGetRequest(r))
		if len(c.parsed) >= maxParsed {
			c.dispatch()
		}
	}
}

// handOver hands what has been requested to those who do it. The lock must be held.
func (c *conn) handOver() {
	if len(c.parsed) > 0 {
		c.markBusy()
		if c.firstGet == len(c.gets) {
			c.gets, c.firstGet = c.gets[:0], 0
		} else if c.firstGet > maxWaitingGets {
			c.gets, c.firstGet = c.gets[:copy(c.gets, c.gets[c.firstGet:])], 0
		}
		c.gets = append(c.gets, c.parsed...)
		c.parsed = c.parsed[:0]
		c.callGetter()
	}
	c.handOverBatch()
}

// callGetter starts a goroutine that gets, if there is work that nobody is about to take. The lock
// must be held.
func (c *conn) callGetter() {
	if c.calling || c.firstGet == len(c.gets) || c.getters >= c.server.config.MaxGets {
		return
	}
	c.calling = true
	c.getters++
	c.group.Go(c.getLoop)
}

// getLoop serves requests until there are none. Each time it takes one, it makes sure that somebody
// else can take the next: thus a store that waits is called as often at a time as is allowed, and
// one that does not keeps few busy.
func (c *conn) getLoop() {
	c.queue.Mu.Lock()
	defer c.queue.Mu.Unlock()
	defer func() {
		c.getters--
		c.markIdle()
	}()
	c.calling = false
	for {
		for c.isFull() {
			c.room.Wait()
		}
		if c.firstGet == len(c.gets) || c.queue.Err() != nil || c.ctx.Err() != nil {
			return
		}
		r := &c.gets[c.firstGet]
		c.firstGet++
		if len(c.gets)-c.firstGet == maxWaitingGets {
			c.room.Broadcast()
		}
		c.callGetter()
		c.serveGet(*r)
	}
}

// getCall is a GET whose block a source has been requested, and where the block goes.
type getCall struct {
	fetch.Request
	get   getRequest
	space queue.Space
	head  int  // bytes before the block
	index int  // in started
	round int  // how often it has been used
	live  bool // Start has returned, so that it may be cancelled
}

// serveGet answers one GET. It is called and returns with the lock held, but gives it up meanwhile.
func (c *conn) serveGet(r getRequest) {
	if r.size == 0 || r.block2.Present || !c.fits(r.size) {
		c.servePart(r)
		return
	}
	call := c.newCall(r)
	round := call.round
	c.queue.Mu.Unlock()
	source := c.server.resources[r.resource].Source
	source.Start(&call.Request)
	c.queue.Mu.Lock()
	if call.round != round {
		return
	}
	call.live = true
	if c.ctx.Err() != nil {
		// The others have been cancelled already.
		c.queue.Mu.Unlock()
		source.Cancel(&call.Request)
		c.queue.Mu.Lock()
	}
}

// newCall returns a call with memory for its answer. The lock must be held.
func (c *conn) newCall(r getRequest) *getCall {
	var call *getCall
	if n := len(c.idle); n > 0 {
		call = c.idle[n-1]
		c.idle = c.idle[:n-1]
	} else {
		call = new(getCall)
		call.Done = func(*fetch.Request) { c.got(call) }
	}
	call.get = r
	call.space, call.head = c.peer.Prepare(r.token, maxAgeOption, int(r.size))
	call.Pair, call.Size = eris.Pair{Reference: r.ref}, r.size
	call.Dst = call.space.Bytes[call.head:call.head]
	call.index = len(c.started)
	c.started = append(c.started, call)
	return call
}

// got sends the answer when a source is done.
func (c *conn) got(call *getCall) {
	code, block := codes.Content, call.Block
	size := int(call.Size)
	if call.Err != nil || len(block) != size {
		code = c.server.getCode(call.Err)
	}
	dst := call.Dst[:size]
	own := code == codes.Content && &block[0] == &dst[0]
	if code == codes.Content && !own && size <= copyUpTo {
		copy(dst, block)
		own = true
	}

	c.queue.Mu.Lock()
	defer c.queue.Mu.Unlock()
	switch {
	case code != codes.Content:
		c.queue.Publish(call.space, 0)
		c.peer.Respond(call.get.token, code, nil, nil)
	case own:
		c.queue.Publish(call.space, call.head+size)
	default:
		c.queue.PublishWith(call.space, call.head, block)
	}
	last := len(c.started) - 1
	c.started[call.index] = c.started[last]
	c.started[call.index].index = call.index
	c.started = c.started[:last]
	call.Block, call.Dst, call.space = nil, nil, queue.Space{}
	call.live = false
	call.round++
	c.idle = append(c.idle, call)
	if last == 0 {
		c.room.Broadcast()
	}
}

// cancelGets is called when the connection is over: nobody waits for blocks any more, and no
// further call is made.
func (c *conn) cancelGets() {
	var live []*getCall
	c.queue.Mu.Lock()
	for _, call := range c.started {
		if call.live {
			live = append(live, call)
		}
	}
	c.queue.Mu.Unlock()
	for _, call := range live {
		c.server.resources[call.get.resource].Source.Cancel(&call.Request)
	}
}

// fits reports whether a block goes into one message to the client. The lock must be held.
func (c *conn) fits(size eris.BlockSize) bool {
	peer, _ := c.peer.Peer()
	if int(size)+partOverhead <= int(peer.MessageSize) {
		return true
	}
	return !peer.Stated && !peer.BlockWise && !c.server.config.StrictMessageSize
}

// partOverhead bounds what stands before the payload of a response.
const partOverhead = 48

// servePart answers a GET for a part of a block, and for blocks that have to be sent in parts or
// whose size is not known. It is called and returns with the lock held, but gives it up meanwhile.
func (c *conn) servePart(r getRequest) {
	c.queue.Mu.Unlock()
	memory := c.server.parts.Get().(*[eris.BlockSize32KiB]byte)
	defer c.server.parts.Put(memory)
	block, code := c.server.get(c.ctx, r, memory[:0])
	c.queue.Mu.Lock()
	var options, payload []byte
	if code == codes.Content {
		options, payload, code = c.partOf(r.block2, block)
	}
	c.peer.Respond(r.token, code, options, payload)
}

// partOf returns the answer with the part of a block that was requested, or that fits. The lock
// must be held.
func (c *conn) partOf(part coap.Block, block []byte) (options, payload []byte, code codes.Code) {
	peer, _ := c.peer.Peer()
	if !part.Present {
		if c.fits(eris.BlockSize(len(block))) {
			return cutBlock(block, part, len(block))
		}
		if !peer.BlockWise {
			return nil, []byte("block does not fit into your Max-Message-Size"), codes.InternalServerError
		}
		part = coap.Block{Exponent: coap.MaxExponent, Present: true}
		if peer.BERT() {
			part.Exponent = coap.BERT
		}
	}
	most := part.Unit()
	if part.Exponent == coap.BERT {
		most = max(1, (int(peer.MessageSize)-partOverhead)/most) * most
	}
	return cutBlock(block, part, most)
}

// getDocument answers a GET for a document. Like answer, it waits if the client does not take its
// answers.
func (c *conn) getDocument(r *coap.Request) {
	document := c.server.config.Documents[r.Resource-len(c.server.resources)]
	text := document.Text()
	c.queue.Mu.Lock()
	defer c.queue.Mu.Unlock()
	for c.isFull() {
		c.room.Wait()
	}
	c.markBusy()
	options := coap.AppendUintOption(nil, 0, message.ContentFormat, uint32(document.Format))
	part, most := r.Block2, len(text)
	peer, _ := c.peer.Peer()
	switch {
	case part.Present && part.Exponent == coap.BERT:
		c.peer.Respond(r.Token, codes.BadRequest, nil, nil)
		return
	case !part.Present && partOverhead+len(text) > int(peer.MessageSize):
		part = coap.Block{Exponent: coap.MaxExponent, Present: true}
	}
	if part.Present {
		most = part.Unit()
	}
	options, payload, code := cut(options, message.ContentFormat, text, part, most)
	c.peer.Respond(r.Token, code, options, payload)
}

// cutBlock returns the options and the payload of the response that carries a part of a block, of
// at most the given number of bytes; the whole block if the option is not present. The code is 4.00
// if there is no such part.
func cutBlock(block []byte, part coap.Block, most int) (options, payload []byte, code codes.Code) {
	return cut(maxAgeOption[:len(maxAgeOption):len(maxAgeOption)], message.MaxAge, block, part, most)
}

// cut is cutBlock, with other options before those that tell the part. Last is the number of the
// last of them.
func cut(options []byte, last message.OptionID, block []byte, part coap.Block, most int) ([]byte, []byte, codes.Code) {
	if !part.Present {
		return options, block, codes.Content
	}
	offset := part.Offset()
	if offset >= len(block) {
		return nil, nil, codes.BadRequest
	}
	payload := block[offset:min(len(block), offset+most)]
	part.More = offset+len(payload) < len(block)
	options = part.AppendOption(options, last, message.Block2)
	options = coap.AppendUintOption(options, message.Block2, message.Size2, uint32(len(block)))
	return options, payload, codes.Content
}

// get returns a block whose size may not be known, and of which further parts may be requested. The
// memory must have room for either size.
func (s *Server) get(ctx context.Context, r getRequest, memory []byte) ([]byte, codes.Code) {
	if r.block2.Number != 0 {
		if block, ok := s.recent.get(r.resource, r.ref, memory); ok {
			return block, codes.Content
		}
	}
	block, code := s.find(ctx, r, memory)
	if r.block2.Present && len(block) > r.block2.Unit() {
		s.recent.add(r.resource, r.ref, block)
	}
	return block, code
}

// find looks a block up in the store.
func (s *Server) find(ctx context.Context, r getRequest, memory []byte) ([]byte, codes.Code) {
	var err error
	sizes := []eris.BlockSize{r.size}
	if r.size == 0 {
		sizes = []eris.BlockSize{eris.BlockSize32KiB, eris.BlockSize1KiB} // the client does not say which it wants
	}
	for _, size := range sizes {
		var block []byte
		block, err = wait(ctx, s.resources[r.resource].Source, r.ref, size, memory)
		if err == nil && eris.BlockSize(len(block)).Valid() && (len(block) == int(size) || r.size == 0) {
			return block, codes.Content
		}
	}
	return nil, s.getCode(err)
}

// wait is [fetch.Get], but for the verification, which is for clients to do.
func wait(ctx context.Context, source fetch.Source, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	done := make(chan struct{})
	r := &fetch.Request{Pair: eris.Pair{Reference: ref}, Size: size, Dst: dst, Done: func(*fetch.Request) { close(done) }}
	source.Start(r)
	select {
	case <-done:
	case <-ctx.Done():
		source.Cancel(r)
		<-done
	}
	return r.Block, r.Err
}

// getCode returns the code for what a store returned instead of a block.
func (s *Server) getCode(err error) codes.Code {
	var wrong *eris.BlockError
	switch {
	case err == nil, errors.Is(err, eris.ErrNotFound), errors.As(err, &wrong):
		return codes.NotFound
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return codes.ServiceUnavailable
	}
	s.log(fmt.Errorf("getting a block: %w", err))
	return codes.InternalServerError
}

// putCode returns the code for what a store said to a block.
func (s *Server) putCode(err error) codes.Code {
	switch {
	case err == nil:
		return codes.Created
	case errors.Is(err, fetch.ErrReadOnly):
		return codes.MethodNotAllowed
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return codes.ServiceUnavailable
	}
	s.log(fmt.Errorf("storing blocks: %w", err))
	return codes.InternalServerError
}
