// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver

import (
	"slices"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// batchSize is the size in bytes of the memory of a batch.
const batchSize = guaranteed

// batch is blocks that are stored together. As long as all goroutines that may put are busy, blocks
// are added to it.
type batch struct {
	memory  [batchSize]byte
	used    int
	blocks  [][]byte
	answers []putAnswer
	refs    []eris.Reference
	booked  bool // on the account of the server
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

// put takes a PUT. It waits as long as too much is being stored.
func (c *conn) put(r *coap.Request) {
	block := r.Payload
	if r.Block1.Present {
		t, code := c.transfers.part("", "", r)
		if code != codes.Created {
			c.answer(r.Token, code, block1Option(r.Block1, code), nil)
			return
		}
		block = t.finish()
		delete(c.transfers.all, t.key)
	}
	if !eris.BlockSize(len(block)).Valid() {
		c.answer(r.Token, codes.BadRequest, nil, nil)
		return
	}
	c.peer.Lock()
	defer c.peer.Unlock()
	c.add(block, putAnswer{r.Token, r.Block1})
}

// block1Option returns the option of the answer to a part of a block.
func block1Option(part coap.Block, code codes.Code) []byte {
	if !part.Present {
		return nil
	}
	if code == codes.RequestEntityTooLarge {
		part.More = false
	}
	return part.AppendOption(nil, 0, message.Block1)
}

// add adds a block to the open batch, and hands that over if it is full. The lock must be held.
func (c *conn) add(block []byte, answer putAnswer) {
	for c.isFull() {
		c.room.Wait()
	}
	for c.open != nil && len(c.open.memory)-c.open.used < len(block) && !c.peer.Broken() {
		if c.handOverBatch(); c.open != nil {
			c.room.Wait()
		}
	}
	if c.peer.Broken() {
		return // nobody waits for the answer
	}
	if c.open == nil {
		c.open = c.server.batches.Get().(*batch)
		c.open.reset()
	}
	b := c.open
	memory := b.memory[b.used : b.used+copy(b.memory[b.used:], block)]
	b.used += len(memory)
	b.blocks = append(b.blocks, memory)
	b.answers = append(b.answers, answer)
	if len(b.memory)-b.used < int(eris.BlockSize1KiB) {
		c.handOver()
	}
}

// handOverBatch starts a goroutine that puts the open batch, if there may be one more. The lock
// must be held.
func (c *conn) handOverBatch() {
	b := c.open
	if b == nil {
		return
	}
	if c.putting > 0 {
		s := c.server
		if int64(c.putting+1)*batchSize > s.config.MaxBytes {
			return
		}
		if s.putBytes.Add(batchSize) > s.config.MaxTotalBytes {
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
		b.refs = slices.Grow(b.refs, len(b.blocks))[:len(b.blocks)]
		eris.SumAll(b.refs, b.blocks)
		code := c.server.putCode(c.server.config.Sink.PutBatch(c.ctx, b.refs, b.blocks))
		for _, ref := range b.refs {
			c.server.requested(c.client, "PUT", ref, code)
		}
		var text []byte
		if code == codes.InternalServerError {
			text = []byte("blocks cannot be stored; the log of the server says why")
		}
		c.peer.Lock()
		for _, answer := range b.answers {
			c.peer.Respond(answer.token, code, block1Option(answer.block1, code), text)
		}
		booked := b.booked
		b.booked = false
		c.server.batches.Put(b)
		b = nil
		if c.open != nil {
			b, c.open = c.open, nil
			b.booked = booked
		} else {
			c.putting--
			if booked {
				c.server.putBytes.Add(-batchSize)
			}
		}
		c.tellIdle()
		c.room.Broadcast()
		c.peer.Unlock()
	}
}
