// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

const (
	// maxParsed is how many requests are collected before they are handed over.
	maxParsed = 256
	// maxWaitingGets is how many requests may wait to be served, on one connection.
	maxWaitingGets = 4096
	// copyUpTo is up to what size a payload is copied behind its head, rather than sent from where
	// it is.
	copyUpTo = 4096
	// unit is the greatest size in bytes of a part, but for several of them by BERT.
	unit = 1024
)

// maxAge is the value of the option Max-Age of blocks, in seconds: a year. Blocks never change.
const maxAge = 365 * 24 * 60 * 60

var maxAgeOption = coap.AppendUintOption(nil, 0, message.MaxAge, maxAge)

// check returns the code that a request is refused with, or codes.Empty.
func (s *Server) check(r *coap.Request, access Access) codes.Code {
	get := r.Code == codes.GET
	switch {
	case r.Refuse != codes.Empty:
		return r.Refuse
	case r.Resource < 0, r.Resource == documentResource && !(get && access.Document):
		return codes.NotFound
	case r.Resource != blocksResource:
		return codes.Empty
	case get && access.Get && s.config.Source != nil:
		if !r.HasReference || r.Size != 0 && !r.Size.Valid() {
			return codes.BadRequest
		}
		return codes.Empty
	case (r.Code == codes.PUT || r.Code == codes.POST) && access.Put && s.config.Sink != nil:
		return codes.Empty
	}
	return codes.MethodNotAllowed
}

// have answers a request that asks which blocks there are. That takes little time whatever the
// client asks, so that whoever reads does it, and further requests wait.
func (s *Server) have(r *coap.Request, access Access) (codes.Code, []byte, []byte) {
	store, ok := s.config.Source.(fetch.Haver)
	switch {
	case !ok:
		return codes.NotFound, nil, nil
	case r.Code != codes.POST || !access.Get:
		return codes.MethodNotAllowed, nil, nil
	case r.Block1.Present:
		return codes.BadOption, nil, nil
	}
	answer, ok := fetch.AnswerHave(store, r.Payload)
	if !ok {
		return codes.BadRequest, nil, nil
	}
	return codes.Changed, nil, answer
}

// getRequest is a GET that has been understood.
type getRequest struct {
	ref    eris.Reference
	size   eris.BlockSize // 0: not said
	token  coap.Token
	block2 coap.Block
	last   bool         // nobody else may be asked, although clients may have others asked
	source fetch.Source // where the block comes from; nil if it is the document
	client string       // for the log of requests
}

// newGetRequest returns what a client at an address, as in [admission.Host], wants to get.
func (s *Server) newGetRequest(r *coap.Request, access *Access, client string) getRequest {
	g := getRequest{ref: r.Reference, size: r.Size, token: r.Token, block2: r.Block2, client: client}
	switch {
	case r.Resource == documentResource:
	case access.Relay != nil:
		g.last, g.source = r.HopLimit == 1, access.Relay(client, int(r.HopLimit))
	default:
		g.source = s.config.Source
	}
	return g
}

// handOver hands what has been requested to those who do it. The lock must be held.
func (c *conn) handOver() {
	if len(c.parsed) > 0 {
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
	if c.calling || c.firstGet == len(c.gets) || c.getters >= c.maxGets {
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
	lookups := &c.server.lookups
	l := lookups.Get().(*lookup)
	defer func() { lookups.Put(l) }()
	c.peer.Lock()
	defer c.peer.Unlock()
	defer func() {
		c.getters--
		c.tellIdle()
	}()
	c.calling = false
	for {
		for c.isFull() {
			if c.getters > 1 {
				return // one is enough to wait for room: each has memory for a block
			}
			c.room.Wait()
		}
		if c.firstGet == len(c.gets) || c.peer.Broken() || c.ctx.Err() != nil {
			return
		}
		r := c.gets[c.firstGet]
		c.firstGet++
		if len(c.gets)-c.firstGet == maxWaitingGets {
			c.room.Broadcast()
		}
		c.looking++
		c.count()
		c.callGetter()
		form := c.form()
		c.peer.Unlock()
		code, options, payload := c.server.get(c.ctx, l, r, form)
		c.peer.Lock()
		c.looking--
		switch {
		case len(payload) <= copyUpTo || len(l.Block) == 0 || &payload[0] != &l.Block[0]:
			c.peer.Respond(r.token, code, options, payload)
		case &payload[0] == &l.memory[0]:
			sent := l
			c.peer.RespondWith(r.token, code, options, payload, func() { lookups.Put(sent) })
			l = lookups.Get().(*lookup)
		default:
			c.peer.RespondWith(r.token, code, options, payload, nil) // nobody changes it
		}
		c.count()
	}
}

// partOverhead bounds what stands before the payload of a response.
const partOverhead = 48

// form says how blocks go to a client.
type form struct {
	whole    int   // greatest size in bytes of those that may go in one message
	exponent uint8 // of parts of larger ones; noParts if the client takes none
	bert     int   // most bytes of a part by BERT; 0 if there is none
}

const noParts = 0xff

// form returns how blocks go to the client. The lock must be held.
func (c *conn) form() form {
	peer := c.peer.Peer()
	most := peer.MessageSize - partOverhead
	f := form{whole: most, exponent: noParts, bert: max(1, most/unit) * unit}
	switch {
	case peer.BERT():
		f.exponent = coap.BERT
	case peer.BlockWise:
		f.exponent = coap.Fit(most)
	case !peer.Stated: // some clients say nothing, and take whole blocks
		f.whole = coap.MessageSize
	}
	return f
}

// cut returns the answer with a block, or with the part of it that was requested or that fits. Last
// is the number of the last of the options.
func (f form) cut(options []byte, last message.OptionID, block []byte, part coap.Block) (codes.Code, []byte, []byte) {
	if !part.Present {
		switch {
		case len(block) <= f.whole:
			return codes.Content, options, block
		case f.exponent == noParts:
			return codes.InternalServerError, nil, []byte("block does not fit into your Max-Message-Size")
		}
		part = coap.Block{Exponent: f.exponent, Present: true}
	}
	offset, most := part.Offset(), part.Unit()
	if part.Exponent == coap.BERT {
		most = f.bert
	}
	if offset >= len(block) || most == 0 {
		return codes.BadRequest, nil, nil
	}
	payload := block[offset:min(len(block), offset+most)]
	part.More = offset+len(payload) < len(block)
	options = part.AppendOption(options, last, message.Block2)
	options = coap.AppendUintOption(options, message.Block2, message.Size2, uint32(len(block)))
	return codes.Content, options, payload
}

// get returns the answer to a GET. The payload is valid until the next use of the lookup.
func (s *Server) get(ctx context.Context, l *lookup, r getRequest, f form) (code codes.Code, options, payload []byte) {
	if r.source == nil {
		document := &s.config.Document
		options = coap.AppendUintOption(nil, 0, message.ContentFormat, uint32(document.Format))
		return f.cut(options, message.ContentFormat, document.Text(), r.block2)
	}
	block, code := s.find(ctx, l, r)
	s.requested(r.client, "GET", r.ref, code)
	if code != codes.Content {
		return code, nil, nil
	}
	return f.cut(slices.Clip(maxAgeOption), message.MaxAge, block, r.block2)
}

func (s *Server) requested(client, method string, ref eris.Reference, code codes.Code) {
	if s.config.Requested != nil {
		s.config.Requested(client, method, ref, code.String())
	}
}

// find looks a block up in the store.
func (s *Server) find(ctx context.Context, l *lookup, r getRequest) ([]byte, codes.Code) {
	first, last := r.size, r.size
	if r.size == 0 {
		first, last = eris.BlockSize32KiB, eris.BlockSize1KiB // the client does not say which it wants
	}
	block, err := l.get(ctx, r.source, r.ref, first)
	if block == nil && first != last && !errors.Is(err, fetch.ErrUnanswered) {
		block, err = l.get(ctx, r.source, r.ref, last)
	}
	if block == nil {
		return nil, s.getCode(err, r.last)
	}
	return block, codes.Content
}

// lookup is a request to a source, and what it needs: for one goroutine, again and again.
type lookup struct {
	fetch.Request
	done   chan struct{}
	memory [eris.BlockSize32KiB]byte
}

func newLookup() any {
	l := &lookup{done: make(chan struct{}, 1)}
	l.Done = func(*fetch.Request) { l.done <- struct{}{} }
	return l
}

// get is [fetch.Get], but for the verification, which is for clients to do. The block is nil if
// there is none of that size.
func (l *lookup) get(ctx context.Context, source fetch.Source, ref eris.Reference, size eris.BlockSize) ([]byte, error) {
	l.Pair, l.Size, l.Dst = eris.Pair{Reference: ref}, size, l.memory[:0]
	source.Start(&l.Request)
	select {
	case <-l.done: // at once, which costs less without the other case
	default:
		select {
		case <-l.done:
		case <-ctx.Done():
			source.Cancel(&l.Request)
			<-l.done
		}
	}
	if l.Err != nil || len(l.Block) != int(size) {
		return nil, l.Err
	}
	return l.Block, nil
}

// getCode returns the code for what a store returned instead of a block. Last is as in getRequest.
func (s *Server) getCode(err error, last bool) codes.Code {
	switch {
	case last && errors.Is(err, eris.ErrNotFound):
		return coap.HopLimitReached
	case err == nil, fetch.Lacks(err):
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
