// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import (
	"context"
	"errors"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// Starts implements [eris.Starter]: it is possible if one of the sources is a Starter.
func (p *Pool) Starts() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.starts()
}

func (p *Pool) starts() bool {
	for _, m := range p.members {
		if !m.banned && m.starts() {
			return true
		}
	}
	return false
}

func (m *member) starts() bool { return m.starter != nil && m.starter.Starts() }

// Start implements [eris.Starter]. It returns nil for a block that somebody else is getting. With several sources, the request
// takes its place in the queue, like a call of Get; it goes to one source only, and to a second one if it is late, so that a call
// of Get has to find out whether others have what the first one does not.
func (p *Pool) Start(ref eris.Reference, size eris.BlockSize, dst []byte, answered func()) eris.Request {
	p.mu.Lock()
	key, now, m := flightKey{ref, size}, p.now(), p.single
	if p.closed || p.flights[key] != nil || m != nil && (!m.starts() || m.restUntil > now) {
		p.mu.Unlock()
		return nil
	}
	f := p.newFlight(key)
	if m == nil {
		defer p.mu.Unlock()
		if p.shun(f); p.candidates(f, now) == 0 {
			p.finish(f, nil, errAgain)
			return nil
		}
	}
	s := started.Get().(*startedRequest)
	s.pool, s.flight, s.dst, s.answered = p, f, dst, answered
	if m == nil {
		f.started, s.queued = s, true
		p.queue(f, now)
		return s
	}
	s.request = request{flight: f, member: m, size: int64(size)}
	m.sent(&s.request, now)
	s.direct = true
	p.mu.Unlock()
	// Nobody else knows of the request.
	if s.of = m.starter.Start(ref, size, dst, answered); s.of == nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		s.endDirect(errNotStarted)
		return nil
	}
	return s
}

var (
	errNotStarted = errors.New("not started")
	// errAgain tells others who want the same block to try for themselves.
	errAgain = errors.New("try again")
	// errElsewhere is what has become of a block that others may have.
	errElsewhere = errors.New("not to be had from this source")
)

// startedRequest is a request whose caller does not wait. All of it but what the source gives is guarded by the lock of the pool.
type startedRequest struct {
	pool     *Pool
	flight   *flight
	dst      []byte
	answered func()
	request  request // its member is nil until there is one
	direct   bool    // to the only source, without the queue
	queued   bool    // it waits for a source

	of        eris.Request // of the source if that is a Starter
	finishing bool         // from now on of must not be cancelled
	block     []byte
	err       error
}

var started = sync.Pool{New: func() any { return new(startedRequest) }}

// awaken is called when the request need not wait for a source any more: one has been found, or there is none.
func (s *startedRequest) awaken() {
	if !s.queued {
		return
	}
	s.queued = false
	p, f := s.pool, s.flight
	p.leave(f)
	if f.granted == nil {
		s.answered()
		return
	}
	f.granted, f.current = nil, f.granted
	m := s.request.member
	if m.starts() {
		if s.of = m.starter.Start(f.key.ref, f.key.size, s.dst, s.answered); s.of != nil {
			return
		}
	}
	if p.closed {
		s.err = errClosed
		s.answered()
		return
	}
	s.request.begin(p.scope(p.ctx), p.ctx)
	p.group.Go(func() {
		s.block, s.err = m.source.Get(&s.request.ctx, f.key.ref, f.key.size, s.dst)
		s.answered()
	})
}

// cutOff makes the answer come soon, if it has not come.
func (s *startedRequest) cutOff() {
	if s.of != nil && !s.finishing {
		s.of.Cancel()
	}
}

// Cancel implements [eris.Request].
func (s *startedRequest) Cancel() {
	s.pool.mu.Lock()
	defer s.pool.mu.Unlock()
	if s.queued {
		s.err = context.Canceled
		s.awaken()
		return
	}
	s.request.cutOff(context.Canceled)
}

// Finish implements [eris.Request].
func (s *startedRequest) Finish() ([]byte, error) {
	p := s.pool
	if !s.direct {
		p.mu.Lock()
		s.finishing = true
		p.mu.Unlock()
	}
	if s.of != nil {
		s.block, s.err = s.of.Finish()
	}
	if s.direct || s.err == nil && s.block != nil {
		return s.block, s.err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.flight.won != nil {
		return s.flight.won, nil
	}
	if s.err == nil {
		s.err = errElsewhere
	}
	return nil, s.err
}

// Verified implements [eris.Request].
func (s *startedRequest) Verified(err error) error {
	won := err == nil && s.err != nil // the block is that of another source
	if s.err != nil {
		err = s.err
	}
	if s.of != nil {
		err = s.of.Verified(err)
	}
	s.pool.mu.Lock()
	defer s.pool.mu.Unlock()
	if s.direct {
		return s.endDirect(err)
	}
	return s.end(err, won)
}

// endDirect books what has come of a request to the only source.
func (s *startedRequest) endDirect(err error) error {
	p, r, now := s.pool, &s.request, s.pool.now()
	r.member.received(r, now)
	result := err
	switch {
	case err == nil:
		r.member.delivers(r, now)
	case p.closed, errors.Is(err, errNotStarted), errors.Is(err, context.Canceled):
		result = errAgain
	case p.judge(r, err, now) == failure:
		result = errAgain
	}
	p.finish(s.flight, s.block, result)
	s.recycle()
	return err
}

// end books what has come of the request, and returns what is to be said about the block.
func (s *startedRequest) end(err error, won bool) error {
	p, f, r := s.pool, s.flight, &s.request
	f.current = nil
	if r.member != nil {
		p.settle(r, err)
	}
	block, result := s.block, errAgain
	switch now := p.now(); {
	case won:
		block, err, result = f.won, nil, nil
	case err == nil:
		result = nil
	case p.closed, errors.Is(err, context.Canceled):
	case p.candidates(f, now) != 0 || f.others > 0:
		err = errElsewhere
	default:
		err = p.verdict(f, now)
		result = err
	}
	p.abandon(f)
	f.started = nil
	p.finish(f, block, result)
	if r.ctx.done == nil { // else a source may keep it
		s.recycle()
	}
	return err
}

func (s *startedRequest) recycle() {
	*s = startedRequest{}
	started.Put(s)
}

// shun notes which sources have said lately that they do not have the block.
func (p *Pool) shun(f *flight) {
	for _, m := range p.members {
		if m.lacks(f.key) {
			f.missed |= m.bit
		}
	}
}

// queue has a flight wait for a source, and be given one if one has room.
func (p *Pool) queue(f *flight, now time.Duration) {
	if f.spent() != 0 {
		p.retries.push(f)
	} else {
		p.fresh.push(f)
	}
	p.pump(now)
	p.watch()
}
