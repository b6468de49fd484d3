// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import "context"

// line is a queue of blocks that wait for a source, in the order in which they came. They may be taken from anywhere in it.
type line struct {
	flights []*flight // nil where one was taken
	first   uint64    // place of flights[0]
	live    int
	bytes   int64
}

func (l *line) push(f *flight) {
	f.line, f.place = l, l.first+uint64(len(l.flights))
	l.flights = append(l.flights, f)
	l.live++
	l.bytes += int64(f.key.size)
}

func (l *line) remove(f *flight) {
	l.flights[f.place-l.first] = nil
	f.line = nil
	l.live--
	l.bytes -= int64(f.key.size)
	n := 0
	for n < len(l.flights) && l.flights[n] == nil {
		n++
	}
	l.flights = l.flights[n:]
	l.first += uint64(n)
}

// scope is the context of callers. They mostly have one and the same, so it is watched once for all, not once for each.
type scope struct {
	done <-chan struct{}
	stop func() bool
	uses int
}

// scope returns the scope of a context.
func (p *Pool) scope(ctx context.Context) *scope {
	done := ctx.Done()
	if done == nil {
		return nil
	}
	s := p.latest
	if s == nil || s.done != done {
		if s = p.scopes[done]; s == nil {
			s = &scope{done: done}
			s.stop = context.AfterFunc(ctx, func() { p.ended(s) })
			p.scopes[done] = s
		}
		if p.latest != nil && p.latest.uses == 0 {
			p.latest.drop()
			delete(p.scopes, p.latest.done)
		}
		p.latest = s
	}
	s.uses++
	return s
}

func (s *scope) left(p *Pool) {
	if s == nil {
		return
	}
	s.uses--
	if s.uses == 0 && (s != p.latest || p.closed) {
		s.drop()
		delete(p.scopes, s.done)
	}
}

// drop ends the watch over the context.
func (s *scope) drop() {
	if s != nil {
		s.stop()
	}
}

// ended cuts the requests of a context that has ended. Called without the lock.
func (p *Pool) ended(s *scope) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range p.members {
		for r := m.first; r != nil; r = r.next {
			if r.ctx.scope == s {
				r.ctx.end()
			}
		}
	}
}
