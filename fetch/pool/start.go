// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import (
	"context"
	"errors"
	"sync"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// Starts implements [eris.Starter]: it is possible with a single source that is a Starter.
func (p *Pool) Starts() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.starter() != nil
}

// starter returns the only source if it is a Starter.
func (p *Pool) starter() eris.Starter {
	if p.single == nil || p.single.starter == nil || !p.single.starter.Starts() {
		return nil
	}
	return p.single.starter
}

// Start implements [eris.Starter]. It returns nil for a block that somebody else is getting.
func (p *Pool) Start(ref eris.Reference, size eris.BlockSize, dst []byte, answered func()) eris.Request {
	p.mu.Lock()
	source, now := p.starter(), p.now()
	if source == nil || p.closed || p.flights[flightKey{ref, size}] != nil || p.single.restUntil > now {
		p.mu.Unlock()
		return nil
	}
	s := started.Get().(*startedRequest)
	s.pool, s.flight = p, p.newFlight(flightKey{ref, size})
	s.request = request{member: p.single, size: int64(size)}
	s.request.member.sent(&s.request, now)
	p.mu.Unlock()
	s.of = source.Start(ref, size, dst, answered)
	if s.of == nil {
		s.end(errNotStarted)
		return nil
	}
	return s
}

var (
	errNotStarted = errors.New("not started")
	// errAgain tells others who want the same block to try for themselves.
	errAgain = errors.New("try again")
)

// startedRequest is a request whose caller does not wait.
type startedRequest struct {
	pool    *Pool
	flight  *flight
	request request
	of      eris.Request
	block   []byte
}

var started = sync.Pool{New: func() any { return new(startedRequest) }}

// Cancel implements [eris.Request].
func (s *startedRequest) Cancel() { s.of.Cancel() }

// Finish implements [eris.Request].
func (s *startedRequest) Finish() ([]byte, error) {
	var err error
	s.block, err = s.of.Finish()
	return s.block, err
}

// Verified implements [eris.Request].
func (s *startedRequest) Verified(err error) error {
	err = s.of.Verified(err)
	s.end(err)
	return err
}

// end books what has come of the request.
func (s *startedRequest) end(err error) {
	p, f, r := s.pool, s.flight, &s.request
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	r.member.received(r, now)
	switch {
	case err == nil:
		r.member.delivers(r, now)
	case p.closed, errors.Is(err, errNotStarted), errors.Is(err, context.Canceled):
		err = errAgain
	case p.judge(r, err, now) == failure:
		err = errAgain
	}
	p.finish(f, s.block, err)
	*s = startedRequest{}
	started.Put(s)
}
