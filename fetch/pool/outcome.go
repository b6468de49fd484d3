// SPDX-License-Identifier: GPL-3.0-or-later

package pool

import (
	"errors"
	"fmt"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// settle takes note of how a request has ended.
func (p *Pool) settle(r *request, err error) {
	now, f, m := p.now(), r.flight, r.member
	p.end(r, now)
	switch {
	case err == nil:
		m.delivers(r, now)
		if f.over || f.won != nil {
			m.duplicates++
		}
	case r.cut != nil:
		// Not the source's doing, unless it was silent or has lied, which has been noted then.
		if r.cut != errGivenUp {
			f.fail(m, r.cut)
		} else {
			m.late(r, now)
		}
	case r.ctx.Err() != nil:
	case p.judge(r, err, now) == miss:
		f.missed |= m.bit
		m.remembersMissing(f.key)
	default:
		f.progress = f.progress || m.delivered > r.delivered
		f.fail(m, err)
	}
	p.pump(now)
}

// fail notes that a source could not deliver the block. That it gave wrong bytes is worth more to know than other failures.
func (f *flight) fail(m *member, err error) {
	f.failed |= m.bit
	var wrong *eris.BlockError
	if f.err == nil || !errors.As(f.err, &wrong) {
		f.err = fmt.Errorf("%s: %w", m.name, err)
	}
}

// verdictKind is what an error says.
type verdictKind int

const (
	miss    verdictKind = iota // the source does not have the block
	lie                        // it gave something else
	failure                    // it could not say
)

// judge takes note of an error of a source, and returns what it says.
func (p *Pool) judge(r *request, err error, now time.Duration) verdictKind {
	m := r.member
	var wrong *eris.BlockError
	switch {
	case errors.Is(err, eris.ErrNotFound), errors.As(err, &wrong) && wrong.IsOtherSize(eris.BlockSize(r.size)):
		m.misses++
		m.answers(r, now)
		m.hits -= m.hits * hitWeight
		return miss
	case wrong != nil:
		m.faults++
		p.ban(m, err)
		return lie
	}
	m.fails(r, err, now)
	return failure
}

// ban excludes a source for good.
func (p *Pool) ban(m *member, err error) {
	if m.banned {
		return
	}
	m.banned, m.lastError = true, err
	p.options.State.Fault(m.name)
	p.setSingle()
	m.cut(errBanned)
	p.sweep()
	if p.closed {
		return
	}
	p.watch()
	// The callback and the file system are not to be waited for under the lock.
	p.group.Go(func() {
		if p.options.OnFault != nil {
			p.options.OnFault(m.name, err)
		}
		p.options.State.Save() // once more at the end, which reports errors
	})
}

// setSingle finds out whether there is only one source.
func (p *Pool) setSingle() {
	p.single = nil
	n := 0
	for _, m := range p.members {
		if !m.banned {
			p.single = m
			n++
		}
	}
	if n != 1 {
		p.single = nil
	}
}

// lieAbout returns the error of a source that was banned because of this very block, perhaps in answer to another request: that
// is worth more to know than that others fail.
func (p *Pool) lieAbout(ref eris.Reference) error {
	for _, m := range p.members {
		if wrong := (*eris.BlockError)(nil); m.banned && errors.As(m.lastError, &wrong) && wrong.Reference == ref {
			return fmt.Errorf("%s: %w", m.name, m.lastError)
		}
	}
	return nil
}

// verdict returns why a block cannot be had. Sources that were never reached, and those that lie, have no say in whether the
// block exists.
func (p *Pool) verdict(f *flight, now time.Duration) error {
	unsaid := errNone
	if lie := p.lieAbout(f.key.ref); lie != nil {
		f.err = lie
	}
	for _, m := range p.members {
		if m.lastError != nil && (m.banned || m.restUntil > now || m.failures > 0) {
			unsaid = fmt.Errorf("%s is not asked: %w", m.name, m.lastError)
		}
		if f.failed&m.bit != 0 && m.proven && !m.banned {
			return f.err
		}
	}
	switch {
	case f.missed == 0 && f.err != nil:
		return f.err
	case f.missed == 0:
		return unsaid
	case unsaid != errNone:
		return fmt.Errorf("block %v: %w (%v)", f.key.ref, eris.ErrNotFound, unsaid)
	}
	return fmt.Errorf("block %v: %w", f.key.ref, eris.ErrNotFound)
}
