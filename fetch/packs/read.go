// SPDX-License-Identifier: GPL-3.0-or-later

package packs

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

const (
	// headLength is how much of a pack is read before its table is known, and tailLength how much
	// of its end: enough for 16 383 blocks.
	headLength, tailLength = 8 << 20, 256 << 10
	// leastRun and greatestRun are the bytes in one range, each four times the one before;
	// leastAhead and greatestAhead are how far ahead of the last request is read: what comes in a
	// second.
	leastRun, greatestRun     = 512 << 10, 16 << 20
	leastAhead, greatestAhead = 1 << 20, 24 << 20
	// maxMemory is how many bytes of blocks wait in memory for requests, unless more is wanted now.
	maxMemory = 20 << 20
	// denseHits is from how many requests for blocks of one run on the next run is read.
	denseHits = 8
	growth    = 4
	// lately is in the last so many requests.
	lately = 1000
)

// pack is a pack that is being read.
type pack struct {
	s    *Store
	name string
	ctx  context.Context
	end  func()

	opened chan struct{} // closed when the next two are known
	err    error
	table  *table

	// By the lock of the store.
	users int
	used  int64 // when it was used last
}

// run is neighbouring blocks that are got, or have been got, by one range. It is guarded by the
// lock of the store.
type run struct {
	pack       *pack
	first, end int // entries of the table
	from       int64
	length     int64
	have       int            // entries from the first on that have come
	blocks     map[int][]byte // those of them that nobody has asked for yet
	hits       int
	latest     int   // the greatest entry that there was a request for
	used       int64 // how many requests there had been when one was for it
	err        error // why there will be no more
	ended      bool
	waiters    []waiter
}

type waiter struct {
	entry int
	ready chan struct{}
}

func (p *pack) open() {
	defer close(p.opened)
	p.s.mu.Lock()
	head := p.begin(&run{length: headLength})
	p.s.mu.Unlock()
	var tail *run
	if p.table, tail, p.err = p.readTable(); p.err != nil {
		p.end()
		return
	}
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	tail.used = p.s.gets
	p.s.runs = append(p.s.runs, tail)
	for _, block := range tail.blocks {
		p.s.held += len(block)
	}
	for head.end < len(p.table.entries) && p.table.entries[head.end].End() <= headLength {
		head.end++
	}
}

// readTable reads the table: mostly by one range. The blocks that come with it are a run: one that
// is wanted soon, because the length of a content is known by its last block.
func (p *pack) readTable() (*table, *run, error) {
	length := tailLength
	for {
		var tail []byte
		var total int64
		err := p.s.read(p.ctx, p.name, -int64(length), int64(length), func(body io.Reader, from, size int64) (err error) {
			total = size
			tail = make([]byte, min(int64(length), size-from))
			_, err = io.ReadFull(body, tail)
			return err
		})
		if err != nil {
			return nil, nil, err
		}
		need, err := tableLength(tail, total)
		if err != nil {
			return nil, nil, err
		}
		if need <= len(tail) {
			t, err := parseTable(tail[len(tail)-need:], total)
			if err != nil {
				return nil, nil, err
			}
			return t, p.tailOf(t, tail, total-int64(len(tail))), nil
		}
		if length != tailLength {
			return nil, nil, errTable
		}
		length = need
	}
}

// tailOf returns a run of the blocks that are in the last bytes of a pack.
func (p *pack) tailOf(t *table, tail []byte, from int64) *run {
	n := len(t.entries)
	r := &run{pack: p, first: n, end: n, length: int64(len(tail)), blocks: map[int][]byte{}, ended: true}
	for r.first > 0 && t.entries[r.first-1].Offset() >= from {
		r.first--
		e := t.entries[r.first]
		r.blocks[r.first] = bytes.Clone(tail[e.Offset()-from : e.End()-from])
	}
	r.have = n - r.first
	return r
}

func (p *pack) get(ctx context.Context, ref eris.Reference, size eris.BlockSize) ([]byte, error) {
	i, ok := p.table.find(ref)
	if !ok {
		return nil, eris.ErrNotFound
	}
	e := p.table.entries[i]
	if e.Size() != int(size) {
		return nil, &eris.BlockError{Reference: ref, Length: e.Size(), Want: size}
	}
	s := p.s
	s.mu.Lock()
	s.gets++
	r := p.runWith(i)
	if r == nil {
		r = p.startRun(i)
	}
	r.hits++
	p.readAhead(r, i)
	w := waiter{i, make(chan struct{})}
	r.waiters = append(r.waiters, w)
	r.wake()
	s.room.Broadcast()
	s.mu.Unlock()
	var err error
	select {
	case <-w.ready:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r.waiters = slices.DeleteFunc(r.waiters, func(o waiter) bool { return o == w })
	if err != nil {
		return nil, err
	}
	block, ok := r.blocks[i]
	if !ok && i-r.first < r.have {
		return nil, errTaken
	} else if !ok {
		return nil, r.err
	}
	delete(r.blocks, i)
	s.held -= len(block)
	s.room.Broadcast()
	return block, nil
}

// runWith returns the run that has a block, or will have it, or nil. The lock of the store must be
// held here and below, unless said otherwise.
func (p *pack) runWith(i int) *run {
	at := slices.IndexFunc(p.s.runs, func(r *run) bool {
		return r.pack == p && r.first <= i && i < r.end && (r.blocks[i] != nil || i-r.first >= r.have)
	})
	if at < 0 {
		return nil
	}
	r := p.s.runs[at]
	p.s.runs = append(slices.Delete(p.s.runs, at, at+1), r)
	r.used = p.s.gets
	return r
}

// readAhead has what is behind a run be read if most of its blocks were wanted up to one. Each run
// begins when the one before it has begun to come: runs that share the line all come late.
func (p *pack) readAhead(r *run, i int) {
	if i < r.latest {
		return
	}
	r.latest = i
	if r.hits < min(denseHits, r.end-r.first) || r.hits*2 < i-r.first {
		return
	}
	ahead := int64(greatestAhead)
	if took := time.Since(p.s.began); p.s.received > 0 && took > 0 {
		ahead = int64(float64(p.s.received) / took.Seconds())
	}
	active := int64(1)
	for _, o := range p.s.packs {
		if o != p && o.users > 0 {
			active++
		}
	}
	ahead = max(leastAhead, min(ahead, greatestAhead/active))
	until := p.table.entries[i].Offset() + ahead
	for r.have > 0 && r.end < len(p.table.entries) && p.table.entries[r.end].Offset() < until {
		next := p.following(r)
		if next == nil {
			next = p.startRun(r.end)
		}
		r = next
	}
}

func (p *pack) following(r *run) *run {
	for _, o := range p.s.runs {
		if o.pack == p && o.first == r.end && o.end > o.first {
			return o
		}
	}
	return nil
}

// makeRoom drops runs that have come and have not been used lately: those of which all has been
// used, and if too many blocks wait in memory, others, too.
func (s *Store) makeRoom() {
	s.runs = slices.DeleteFunc(s.runs, func(r *run) bool {
		drop := r.ended && len(r.waiters) == 0 && s.gets-r.used > lately && (len(r.blocks) == 0 || s.held > maxMemory)
		if drop {
			s.forget(r)
		}
		return drop
	})
}

func (s *Store) forget(r *run) {
	for _, block := range r.blocks {
		s.held -= len(block)
	}
	r.blocks = nil
}

// startRun starts to read blocks from one on: four times as much as what was read before it.
func (p *pack) startRun(first int) *run {
	entries := p.table.entries
	length := int64(leastRun)
	for _, o := range p.s.runs {
		if o.pack == p && o.end == first {
			length = min(growth*o.length, greatestRun)
		}
	}
	r := &run{first: first, end: first + 1, from: entries[first].Offset()}
	isFirst := func(i int) bool {
		return slices.ContainsFunc(p.s.runs, func(o *run) bool { return o.pack == p && o.first == i })
	}
	for r.end < len(entries) && entries[r.end].End() <= r.from+length && !isFirst(r.end) {
		r.end++
	}
	r.length = entries[r.end-1].End() - r.from
	p.s.makeRoom()
	return p.begin(r)
}

func (p *pack) begin(r *run) *run {
	s := p.s
	if !slices.ContainsFunc(s.runs, func(o *run) bool { return !o.ended }) {
		s.received, s.began = 0, time.Time{}
	}
	r.pack, r.used, r.blocks = p, s.gets, map[int][]byte{}
	s.runs = append(s.runs, r)
	s.group.Go(func() {
		err := s.read(p.ctx, p.name, r.from, r.length, r.read)
		s.mu.Lock()
		defer s.mu.Unlock()
		r.finish(err)
	})
	return r
}

// read takes the blocks of a run, as far as they fit into memory. Called without the lock.
func (r *run) read(body io.Reader, _, _ int64) error {
	p, s := r.pack, r.pack.s
	select {
	case <-p.opened:
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
	if p.table == nil {
		return p.err
	}
	s.mu.Lock()
	if s.began.IsZero() {
		s.began = time.Now()
	}
	first, end := r.first, r.end
	s.mu.Unlock()
	in := bufio.NewReaderSize(body, 64<<10)
	at := r.from
	for i := first; i < end; i++ {
		e := p.table.entries[i]
		if _, err := io.CopyN(io.Discard, in, e.Offset()-at); err != nil {
			return err
		}
		block := make([]byte, e.Size())
		if _, err := io.ReadFull(in, block); err != nil {
			return err
		}
		at = e.End()
		s.mu.Lock()
		for s.held > maxMemory && len(r.waiters) == 0 && p.ctx.Err() == nil {
			s.room.Wait()
		}
		if r.blocks == nil { // the pack has been dropped
			s.mu.Unlock()
			return context.Canceled
		}
		r.blocks[i] = block
		r.have++
		s.held += len(block)
		s.received += int64(e.Size())
		r.wake()
		s.mu.Unlock()
	}
	return nil
}

func (r *run) finish(err error) {
	s := r.pack.s
	r.ended = true
	if err == nil || errors.Is(err, eris.ErrNotFound) {
		r.err = errCut
	} else {
		r.err = err
	}
	if err != nil {
		s.runs = slices.DeleteFunc(s.runs, func(o *run) bool { return o == r })
	}
	if !slices.Contains(s.runs, r) && len(r.waiters) == 0 {
		s.forget(r)
	}
	r.wake()
}

// wake wakes those whose blocks are there, or will not come.
func (r *run) wake() {
	r.waiters = slices.DeleteFunc(r.waiters, func(w waiter) bool {
		ready := r.ended || r.blocks[w.entry] != nil
		if ready {
			close(w.ready)
		}
		return ready
	})
}
