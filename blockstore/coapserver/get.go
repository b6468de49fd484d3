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
)

const (
	// maxAsked is how many requests are collected before they are handed over.
	maxAsked = 256
	// maxWaitingGets is how many requests may wait to be served, on one connection.
	maxWaitingGets = 4096
	// copyUpTo is up to what size a block is copied behind its head, rather than sent from where it is.
	copyUpTo = 4096
)

// getRequest is a GET that has been understood.
type getRequest struct {
	ref      eris.Reference
	size     eris.BlockSize // 0: not said
	token    coap.Token
	block2   coap.Block
	resource uint8
}

// handOver hands what was asked to those who do it. The lock must be held.
func (c *conn) handOver() {
	if len(c.asked) > 0 {
		if c.firstGet == len(c.gets) {
			c.gets, c.firstGet = c.gets[:0], 0
		} else if c.firstGet > maxWaitingGets {
			c.gets, c.firstGet = c.gets[:copy(c.gets, c.gets[c.firstGet:])], 0
		}
		c.gets = append(c.gets, c.asked...)
		c.asked = c.asked[:0]
		c.callGetter()
	}
	c.handOverBatch()
}

// callGetter starts a goroutine that gets, if there is work that nobody is about to take. The lock must be held.
func (c *conn) callGetter() {
	if c.calling || c.firstGet == len(c.gets) || c.getters >= c.server.config.MaxGets {
		return
	}
	c.calling = true
	c.getters++
	c.group.Go(c.getLoop)
}

// getLoop serves requests until there are none. Each time it takes one, it makes sure that somebody else can take the next:
// thus a store that waits is called as often at a time as is allowed, and one that does not keeps few busy.
func (c *conn) getLoop() {
	c.queue.Mu.Lock()
	defer c.queue.Mu.Unlock()
	defer func() { c.getters-- }()
	c.calling = false
	for {
		for c.isFull() {
			c.room.Wait()
		}
		if c.firstGet == len(c.gets) || c.queue.Err() != nil {
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

// serveGet answers one GET. It is called and returns with the lock held, but gives it up meanwhile.
func (c *conn) serveGet(r getRequest) {
	if r.size == 0 || r.block2.Present || !c.server.fits(r.size, c.capabilities) {
		c.servePart(r)
		return
	}
	length := len(maxAgeOption) + 1 + int(r.size)
	head := coap.HeadSize(r.token, length) + len(maxAgeOption) + 1
	space := c.queue.Reserve(head + int(r.size))
	c.queue.Mu.Unlock()

	b := coap.AppendHead(space.Bytes[:0], codes.Content, r.token, length)
	b = append(append(b, maxAgeOption...), 0xff)
	dst := space.Bytes[head:head:cap(space.Bytes)]
	block, err := c.server.resources[r.resource].Blocks.Get(c.ctx, r.ref, r.size, dst)
	code := codes.Content
	if err != nil || len(block) != int(r.size) {
		code = c.server.getCode(err)
		b = coap.AppendHead(space.Bytes[:0], code, r.token, 0)
	}
	own := code == codes.Content && &block[0] == &dst[:1][0]
	if code == codes.Content && !own && len(block) <= copyUpTo {
		copy(dst[:len(block)], block)
		own = true
	}

	c.queue.Mu.Lock()
	switch {
	case code != codes.Content:
		c.queue.Publish(space, len(b))
	case own:
		c.queue.Publish(space, len(space.Bytes))
	default:
		c.queue.PublishWith(space, head, block)
	}
}

// fits reports whether a block goes into one message to the client with the given capabilities.
func (s *Server) fits(size eris.BlockSize, capabilities coap.Capabilities) bool {
	if int(size)+partOverhead <= int(capabilities.MessageSize) {
		return true
	}
	return !capabilities.Stated && !capabilities.BlockWise && !s.config.StrictMessageSize
}

// partOverhead bounds what stands before the payload of a response.
const partOverhead = coap.MaxHeadSize + 32

// servePart answers a GET for a part of a block, and for blocks that have to be sent in parts or whose size is not known. It
// is called and returns with the lock held, but gives it up meanwhile.
func (c *conn) servePart(r getRequest) {
	capabilities := c.capabilities
	c.queue.Mu.Unlock()
	memory := c.server.parts.Get().(*[eris.BlockSize32KiB]byte)
	defer c.server.parts.Put(memory)
	block, code := c.server.get(c.ctx, r, memory[:0])
	var options, payload []byte
	if code == codes.Content {
		asked := r.block2
		if !asked.Present && !c.server.fits(eris.BlockSize(len(block)), capabilities) {
			asked = coap.Block{Exponent: coap.MaxExponent, Present: true}
			if capabilities.BERT() {
				asked.Exponent = coap.BERT
			}
		}
		most := asked.Unit()
		switch {
		case !asked.Present:
			most = len(block)
		case r.block2.Present:
		case !capabilities.BlockWise:
			code = codes.InternalServerError
			payload = []byte("block does not fit into your Max-Message-Size")
		}
		if asked.Present && asked.Exponent == coap.BERT {
			most = max(1, (int(capabilities.MessageSize)-partOverhead)/most) * most
		}
		if code == codes.Content {
			options, payload, code = part(block, asked, most)
		}
	}
	c.queue.Mu.Lock()
	c.sendPart(r.token, code, options, payload)
}

// getDocument answers a GET for a document. Like answer, it waits if the client does not take its answers.
func (c *conn) getDocument(token coap.Token, r *coap.Request) {
	document := c.server.config.Documents[r.Resource-len(c.server.resources)]
	text := document.Text()
	c.queue.Mu.Lock()
	defer c.queue.Mu.Unlock()
	for c.isFull() {
		c.room.Wait()
	}
	options := coap.AppendUintOption(nil, 0, message.ContentFormat, uint32(document.Format))
	asked, most := r.Block2, len(text)
	switch {
	case asked.Present && asked.Exponent == coap.BERT:
		c.reply(token, codes.BadRequest)
		return
	case !asked.Present && partOverhead+len(text) > int(c.capabilities.MessageSize):
		asked = coap.Block{Exponent: coap.MaxExponent, Present: true}
	}
	if asked.Present {
		most = asked.Unit()
	}
	options, payload, code := cut(options, message.ContentFormat, text, asked, most)
	c.sendPart(token, code, options, payload)
}

// sendPart sends a response with a payload. The lock must be held.
func (c *conn) sendPart(token coap.Token, code codes.Code, options, payload []byte) {
	length := len(options)
	if len(payload) > 0 {
		length += 1 + len(payload)
	}
	space := c.queue.Reserve(coap.HeadSize(token, length) + length)
	b := coap.AppendMessage(space.Bytes[:0], code, token, options, payload)
	c.queue.Publish(space, len(b))
}

// part returns the options and the payload of the response that carries a part of a block, of at most the given number of
// bytes; the whole block if the option is not present. The code is 4.00 if there is no such part.
func part(block []byte, asked coap.Block, most int) (options, payload []byte, code codes.Code) {
	return cut(maxAgeOption[:len(maxAgeOption):len(maxAgeOption)], message.MaxAge, block, asked, most)
}

// cut is part, with other options before those that tell the part. Last is the number of the last of them.
func cut(options []byte, last message.OptionID, block []byte, asked coap.Block, most int) ([]byte, []byte, codes.Code) {
	if !asked.Present {
		return options, block, codes.Content
	}
	offset := asked.Offset()
	if offset >= len(block) {
		return nil, nil, codes.BadRequest
	}
	payload := block[offset:min(len(block), offset+most)]
	asked.More = offset+len(payload) < len(block)
	options = coap.AppendUintOption(options, last, message.Block2, asked.Uint())
	options = coap.AppendUintOption(options, message.Block2, message.Size2, uint32(len(block)))
	return options, payload, codes.Content
}

// get returns a block whose size may not be known, and of which further parts may be asked for. The memory must have room
// for either size.
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
	for _, size := range sizes(r.size) {
		var block []byte
		block, err = s.resources[r.resource].Blocks.Get(ctx, r.ref, size, memory)
		if err == nil && (len(block) == int(size) || r.size == 0 && eris.BlockSize(len(block)).Valid()) {
			return block, codes.Content
		}
	}
	return nil, s.getCode(err)
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
