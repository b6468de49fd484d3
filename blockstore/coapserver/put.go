// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// batchSize is the size in bytes of the memory of a batch.
const batchSize = guaranteed

// putsPerBatch is how many goroutines store the blocks of one batch if the store takes only one at
// a time.
const putsPerBatch = 32

// batch is blocks that are stored together. As long as all goroutines that may put are busy, blocks
// are added to it.
type batch struct {
	memory   [batchSize]byte
	used     int
	resource int
	blocks   [][]byte
	answers  []putAnswer // fewer than blocks while one is being received
	refs     []eris.Reference
	booked   bool // on the account of the server
}

// putAnswer is what to answer to once a block is stored.
type putAnswer struct {
	token  coap.Token
	block1 coap.Block
}

func (b *batch) reset() {
	b.used = 0
	b.answers = b.answers[:0]
	b.refs = b.refs[:0]
	clear(b.blocks)
	b.blocks = b.blocks[:0]
}

// put makes room for the payload of a PUT and returns it, or the code of the answer if there shall
// be none; payload is how many bytes it has. It waits as long as too much is being stored.
func (c *conn) put(r *coap.Request, payload int) ([]byte, codes.Code) {
	resource := c.resource(r)
	switch {
	case resource == nil:
		return nil, codes.NotFound
	case r.Code != codes.PUT && r.Code != codes.POST, !c.access.Put, resource.Sink == nil:
		return nil, codes.MethodNotAllowed
	case r.Block1.Present:
		var dst []byte
		var code codes.Code
		c.transfer, dst, code = c.transfers.part("", "", r, payload)
		return dst, code
	case !eris.BlockSize(payload).Valid():
		return nil, codes.BadRequest
	}
	return c.add(r.Resource, eris.BlockSize(payload)), codes.Empty
}

// finishPut goes on when the payload is where put wanted it.
func (c *conn) finishPut(r *coap.Request) {
	token := r.Token
	switch c.code {
	case codes.Empty:
	case codes.Continue:
		c.answer(token, codes.Continue, r.Block1.AppendOption(nil, 0, message.Block1)...)
		return
	case codes.Created:
		// The last part of a block: code is what the answer will be if it can be stored.
		whole := c.transfer.finish()
		c.transfers.remove(c.transfer)
		if !eris.BlockSize(len(whole)).Valid() {
			c.answer(token, codes.BadRequest)
			return
		}
		copy(c.add(r.Resource, eris.BlockSize(len(whole))), whole)
	default:
		c.answer(token, c.code)
		return
	}
	c.queue.Mu.Lock()
	b := c.open
	b.answers = append(b.answers, putAnswer{token, r.Block1})
	full := len(b.memory)-b.used < int(eris.BlockSize1KiB)
	c.queue.Mu.Unlock()
	if full {
		c.dispatch()
	}
}

// add returns memory for a block in the open batch. Until its answer is added, the batch stays
// open.
func (c *conn) add(resource int, size eris.BlockSize) []byte {
	c.queue.Mu.Lock()
	defer c.queue.Mu.Unlock()
	for c.isFull() {
		c.room.Wait()
	}
	c.markBusy()
	if b := c.open; b != nil && (b.resource != resource || len(b.memory)-b.used < int(size)) {
		for c.open != nil && c.queue.Err() == nil {
			if c.handOverBatch(); c.open != nil {
				c.room.Wait()
			}
		}
		if c.queue.Err() != nil {
			c.open = nil
		}
	}
	if c.open == nil {
		b := c.server.batches.Get().(*batch)
		b.reset()
		b.resource = resource
		c.open = b
	}
	b := c.open
	block := b.memory[b.used : b.used+int(size)]
	b.used += int(size)
	b.blocks = append(b.blocks, block)
	return block
}

// handOverBatch starts a goroutine that puts the open batch, if there may be one more. The lock
// must be held.
func (c *conn) handOverBatch() {
	b := c.open
	if b == nil || len(b.answers) != len(b.blocks) {
		return
	}
	if c.putting > 0 {
		s := c.server
		if int64(c.putting+1)*batchSize > s.config.MaxPutBytes {
			return
		}
		if s.putBytes.Add(batchSize) > s.config.MaxTotalPutBytes {
			s.putBytes.Add(-batchSize)
			return
		}
		b.booked = true
	}
	c.putting++
	c.open = nil
	c.group.Go(func() { c.putBatches(b) })
}

// putBatches stores a batch and answers, and goes on with the batch that is open by then.
func (c *conn) putBatches(b *batch) {
	for b != nil {
		code := c.server.store(c.ctx, b)
		c.queue.Mu.Lock()
		for _, answer := range b.answers {
			if answer.block1.Present {
				c.peer.Respond(answer.token, code, answer.block1.AppendOption(nil, 0, message.Block1), nil)
			} else {
				c.peer.Respond(answer.token, code, nil, nil)
			}
		}
		booked := b.booked
		b.booked = false
		c.server.batches.Put(b)
		b = nil
		if next := c.open; next != nil && len(next.answers) == len(next.blocks) {
			b, c.open = next, nil
			b.booked = booked
		} else {
			c.putting--
			if booked {
				c.server.putBytes.Add(-batchSize)
			}
		}
		c.room.Broadcast()
		c.queue.Mu.Unlock()
	}
}

// store stores a batch.
func (s *Server) store(ctx context.Context, b *batch) codes.Code {
	b.refs = slices.Grow(b.refs, len(b.blocks))[:len(b.blocks)]
	eris.SumAll(b.refs, b.blocks)
	sink := s.resources[b.resource].Sink
	if batchSink, ok := sink.(BatchSink); ok {
		return s.putCode(batchSink.PutBatch(ctx, b.refs, b.blocks))
	}
	var (
		group sync.WaitGroup
		next  atomic.Int64
		fault atomic.Pointer[error]
	)
	work := func() {
		for {
			i := int(next.Add(1)) - 1
			if i >= len(b.blocks) || fault.Load() != nil {
				return
			}
			if err := sink.Put(ctx, b.refs[i], b.blocks[i]); err != nil {
				fault.Store(&err)
				return
			}
		}
	}
	for range min(putsPerBatch, len(b.blocks)) - 1 {
		group.Go(work)
	}
	work()
	group.Wait()
	if err := fault.Load(); err != nil {
		return s.putCode(*err)
	}
	return codes.Created
}
