// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver

import (
	"slices"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// transferKey tells transfers apart. RFC 7959, section 2.5, knows the endpoint, the resource and
// the Request-Tag only; but there are clients that send several blocks at a time without a tag, and
// with a token for each.
type transferKey struct {
	peer  string // "" on a stream
	tag   string
	token coap.Token
}

// transfer is a block that is being received part by part (RFC 7959, section 2.5).
type transfer struct {
	key    transferKey
	host   string
	last   time.Time
	memory []byte // what has come so far

	complete bool // there is no memory any more
	length   int  // of the whole
	code     codes.Code
}

// part takes a part. The code is 2.31 if more parts are due, 2.01 for the last one, and otherwise
// that of the answer: 4.08 if a part is missing before it, 4.13 if the whole is longer than any
// block, 4.00 if the payload does not have the length that the option says.
func (t *transfer) part(r *coap.Request) codes.Code {
	block := r.Block1
	if !block.FitPart(len(r.Payload)) {
		return codes.BadRequest
	}
	if block.Number == 0 {
		// The first part starts afresh, whatever came before (RFC 7959, section 2.5).
		t.memory = t.memory[:0]
	}
	offset := block.Offset()
	end := offset + len(r.Payload)
	switch {
	case r.Size > eris.BlockSize32KiB, end > int(eris.BlockSize32KiB):
		return codes.RequestEntityTooLarge
	case offset > len(t.memory):
		return codes.RequestEntityIncomplete
	}
	// A part that came already is taken once more: its answer was lost.
	if grow := end - len(t.memory); grow > 0 {
		t.memory = slices.Grow(t.memory, grow)[:end]
	}
	copy(t.memory[offset:], r.Payload)
	if block.More {
		return codes.Continue
	}
	t.memory = t.memory[:end]
	return codes.Created
}

// finish takes the block of a transfer whose last part was taken. What is left of it knows the
// answer, which may have to be given again.
func (t *transfer) finish() []byte {
	whole := t.memory
	t.memory, t.complete, t.length, t.code = nil, true, len(whole), codes.ServiceUnavailable
	return whole
}

// transfers are those of one stream, or of one UDP socket.
type transfers struct {
	most, mostPerHost int
	timeout           time.Duration // for which the next part may take; 0: for ever

	all map[transferKey]*transfer
}

func newTransfers(most, mostPerHost int, timeout time.Duration) *transfers {
	return &transfers{most: most, mostPerHost: mostPerHost, timeout: timeout, all: make(map[transferKey]*transfer)}
}

// part finds or begins the transfer that a request belongs to, and does what transfer.part does. Of
// a transfer that is complete it returns the code of its answer if the last part comes again.
func (s *transfers) part(peer, host string, r *coap.Request) (*transfer, codes.Code) {
	now := time.Now()
	key := transferKey{peer, r.Tag, r.Token}
	t := s.find(key, r)
	switch {
	case t == nil && r.Block1.Number != 0:
		return nil, codes.RequestEntityIncomplete
	case t == nil:
		t = s.add(key, host, now)
	case t.complete && r.Block1.Number != 0:
		if !r.Block1.More && r.Block1.Offset()+len(r.Payload) == t.length {
			return nil, t.code
		}
		return nil, codes.RequestEntityIncomplete
	}
	t.last, t.complete = now, false
	return t, t.part(r)
}

// find returns the transfer with the given key. A client that has another token for each part has
// the one that waits for exactly this part. If several do, nobody knows which is meant: they are
// dropped, so that the client begins again.
func (s *transfers) find(key transferKey, r *coap.Request) *transfer {
	if t := s.all[key]; t != nil || r.Block1.Number == 0 {
		return t
	}
	var found []*transfer
	for _, t := range s.all {
		if t.key.peer == key.peer && t.key.tag == key.tag && !t.complete && len(t.memory) == r.Block1.Offset() {
			found = append(found, t)
		}
	}
	for _, t := range found {
		delete(s.all, t.key)
	}
	if len(found) != 1 {
		return nil
	}
	t := found[0]
	t.key = key
	s.all[key] = t
	return t
}

// add adds a transfer, and drops those that do not go on. If there are too many, the one goes that
// has waited longest, of the same host if that has too many.
func (s *transfers) add(key transferKey, host string, now time.Time) *transfer {
	var oldest, oldestHere *transfer
	here := 0
	for _, t := range s.all {
		if s.timeout > 0 && now.Sub(t.last) > s.timeout {
			delete(s.all, t.key)
			continue
		}
		if oldest == nil || t.last.Before(oldest.last) {
			oldest = t
		}
		if t.host != host {
			continue
		}
		here++
		if oldestHere == nil || t.last.Before(oldestHere.last) {
			oldestHere = t
		}
	}
	if here >= s.mostPerHost {
		delete(s.all, oldestHere.key)
	} else if len(s.all) >= s.most {
		delete(s.all, oldest.key)
	}
	t := &transfer{key: key, host: host}
	s.all[key] = t
	return t
}
