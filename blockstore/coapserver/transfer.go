// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver

import (
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// transfer is a block that is being received part by part (RFC 7959, section 2.5).
type transfer struct {
	memory [eris.BlockSize32KiB]byte
	have   int
}

// part returns where the payload of a part goes. The code is 2.31 if more parts are due, 2.01 for the last one, and otherwise
// that of the answer: 4.08 if a part is missing before it, 4.13 if the whole is longer than any block, 4.00 if the payload
// does not have the length that the option says.
func (t *transfer) part(r *coap.Request, payload int) ([]byte, codes.Code) {
	block := r.Block1
	if !block.FitPart(payload) {
		return nil, codes.BadRequest
	}
	if block.Number == 0 {
		// The first part starts afresh, whatever came before (RFC 7959, section 2.5).
		t.have = 0
	}
	offset := block.Offset()
	switch {
	case r.Size > eris.BlockSize32KiB, offset+payload > len(t.memory):
		return nil, codes.RequestEntityTooLarge
	case offset > t.have:
		return nil, codes.RequestEntityIncomplete
	}
	// A part that came already is taken once more: its answer was lost.
	end := offset + payload
	t.have = max(t.have, end)
	if block.More {
		return t.memory[offset:end], codes.Continue
	}
	t.have = end
	return t.memory[offset:end], codes.Created
}

// transferKey tells the transfers of one peer apart.
type transferKey struct {
	resource int
	tag      uint64
}

// maxStreamTransfers is how many blocks may be in the course of being received part by part, on one connection.
const maxStreamTransfers = 8

// transfers are those of one connection, the one used last at the end.
type transfers struct {
	list []streamTransfer
}

type streamTransfer struct {
	key transferKey
	*transfer
}

// part is transfer.part for the transfer that the request belongs to.
func (t *transfers) part(r *coap.Request, payload int) ([]byte, codes.Code) {
	key := transferKey{r.Resource, r.Tag}
	for i, candidate := range t.list {
		if candidate.key == key {
			t.list = append(append(t.list[:i], t.list[i+1:]...), candidate)
			return candidate.part(r, payload)
		}
	}
	if r.Block1.Number != 0 {
		return nil, codes.RequestEntityIncomplete
	}
	if len(t.list) == maxStreamTransfers {
		t.list = append(t.list[:0], t.list[1:]...)
	}
	next := streamTransfer{key, new(transfer)}
	t.list = append(t.list, next)
	return next.part(r, payload)
}

// take returns the block of the transfer whose last part was taken, and forgets the transfer. It is valid until the next
// call.
func (t *transfers) take() []byte {
	last := t.list[len(t.list)-1]
	t.list = t.list[:len(t.list)-1]
	return last.memory[:last.have]
}
