// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// table gives tokens to calls. A token is a place in the table and a count of how often the place has been used, so that a
// second answer to one request is not taken for the answer to another. A place whose call was given up stays taken until the
// answer comes, or the connection ends.
type table struct {
	places []place
	free   []uint16 // places, the last freed last
	taken  int
}

type place struct {
	call  *call // nil if the place is free, or the call was given up
	round uint8
	taken bool
	since uint32 // tick of the session
}

// maxPlaces is how many requests can be without an answer at a time, on one connection.
const maxPlaces = 1 << 16

// add takes a place. There must be one: fewer than maxPlaces are taken.
func (t *table) add(c *call, tick uint32) wire.Token {
	var at int
	if n := len(t.free); n > 0 {
		at = int(t.free[n-1])
		t.free = t.free[:n-1]
	} else {
		at = len(t.places)
		t.places = append(t.places, place{})
	}
	p := &t.places[at]
	p.call, p.taken, p.since = c, true, tick
	p.round++
	c.place = at
	t.taken++
	return wire.MakeToken(uint32(p.round)<<16 | uint32(at))
}

// remove frees the place of a token. It returns false if the token is not one that is waited for; and a nil call if that
// was given up.
func (t *table) remove(token wire.Token) (*call, bool) {
	at := int(token.Value & (maxPlaces - 1))
	if at >= len(t.places) {
		return nil, false
	}
	p := &t.places[at]
	if !p.taken || token != wire.MakeToken(uint32(p.round)<<16|uint32(at)) {
		return nil, false
	}
	c := p.call
	p.call, p.taken = nil, false
	t.taken--
	t.free = append(t.free, uint16(at))
	return c, true
}

// giveUp leaves the place taken, but forgets the call.
func (t *table) giveUp(c *call) {
	t.places[c.place].call = nil
}

// age returns for how many ticks the oldest request has been without an answer.
func (t *table) age(now uint32) uint32 {
	age := uint32(0)
	for i := range t.places {
		if p := &t.places[i]; p.taken {
			age = max(age, now-p.since)
		}
	}
	return age
}

// clear frees all places and returns their calls.
func (t *table) clear() []*call {
	var calls []*call
	for i := range t.places {
		if c := t.places[i].call; c != nil {
			calls = append(calls, c)
		}
	}
	*t = table{}
	return calls
}
