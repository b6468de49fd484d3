// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"context"
	"errors"
	"fmt"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// errInParts is the failure of a request whose answer is the first of several.
var errInParts = errors.New("peer answers in parts")

// Starts implements [eris.Starter]: it is possible on streams, as long as the peer answers each request by one message.
func (s *Store) Starts() bool {
	stream, ok := s.carrier.(*stream)
	return ok && s.url.Get && !stream.inParts.Load()
}

// Start implements [eris.Starter]. It returns nil while there is no connection. What Finish returns is what Get does for one
// request.
func (s *Store) Start(ref eris.Reference, size eris.BlockSize, dst []byte, answered func()) eris.Request {
	if !s.Starts() || !size.Valid() || cap(dst) < int(size) {
		return nil
	}
	session := s.carrier.(*stream).present.Load()
	if session == nil {
		return nil
	}
	c := s.calls.Get().(*call)
	c.ref, c.size, c.dst = ref, size, dst[:size]
	c.store, c.session, c.answered = s, session, answered
	if !session.begin(c) {
		s.recycle(c)
		return nil
	}
	return c
}

// begin sends a request or puts it in the line of those who wait. It reports whether the session takes any.
func (s *session) begin(c *call) bool {
	s.queue.Mu.Lock()
	defer s.queue.Mu.Unlock()
	if s.err != nil || s.draining {
		return false
	}
	if s.waiting.first == nil && s.hasRoom() {
		s.start(c)
	} else {
		c.state = callWaiting
		s.waiting.push(c)
	}
	return true
}

// Cancel implements [eris.Request].
func (c *call) Cancel() {
	s := c.session
	s.queue.Mu.Lock()
	defer s.queue.Mu.Unlock()
	if s.forget(c) {
		c.state = callTaken
		c.finish(context.Canceled)
	}
}

// Finish implements [eris.Request].
func (c *call) Finish() ([]byte, error) {
	block, err := c.dst, c.err
	if err == nil {
		err = getError(c)
	}
	if err == nil && c.response.Block2.Present {
		// From now on each block has a goroutine, to ask for the further parts.
		c.store.carrier.(*stream).inParts.Store(true)
		err = errInParts
	}
	switch {
	case err != nil:
		return nil, &blockError{c.store, c.ref, err}
	case c.length != len(block):
		return nil, &eris.BlockError{Reference: c.ref, Length: c.length, Want: eris.BlockSize(len(block))}
	}
	return block, nil
}

// Verified implements [eris.Request].
func (c *call) Verified(err error) error {
	store := c.store
	store.recycle(c)
	var wrong *eris.BlockError
	if errors.As(err, &wrong) {
		return fmt.Errorf("%s: %w", store.name, err)
	}
	return err
}

var _ eris.Starter = (*Store)(nil)
