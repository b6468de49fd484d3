// SPDX-License-Identifier: GPL-3.0-or-later

// Package peers asks those who have connected to a server for blocks, over their connections:
// machines that nobody can connect to, for example. Start with [New].
//
// # Who is asked
//
// Of a client nobody knows whether it has blocks until it has given one. For each block at most
// [MaxAsked] are asked, one after the other: first who has given blocks before, and of these and of
// the others who has been asked in vain the least. A client that itself makes requests of the
// server, as consumers do and peers of "serve --peer" do not, comes last, is one of the three at
// most, and is not asked any more when it never had what it was asked for. Of those of one host
// that have given nothing yet, one is asked for a block.
//
// # Who is not
//
// A peer that is silent is left alone for a while, which grows. Blocks are verified here, so that
// it is known who lies: the connection is closed, and nobody from that host is asked for ten
// minutes. Who sends what was not asked for is dropped by the connection (package internal/coap).
//
// Peers are told not to ask others (Hop-Limit 1, RFC 8768), so that nothing goes round. That nobody
// has a block is remembered by the pool that the group is a member of.
package peers

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/backoff"
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// MaxAsked is how many peers are asked for a block at most.
const MaxAsked = 3

const (
	// blockTime is how long all of them may take together, and silence for how long one may answer
	// nothing at all. Three silent ones take less time than a pool gives to a source that has never
	// answered.
	blockTime, silence = 2 * time.Second, 450 * time.Millisecond
	// leastSilence is after what time a peer counts as silent when its request was given up.
	leastSilence = 200 * time.Millisecond
	// workers is how many blocks are looked for at a time. The pool bounds them further.
	workers = 128
	// mostVain bounds how often in a row a peer is remembered to have been asked in vain; proven is
	// how much of that is forgiven who has given blocks before.
	mostVain, proven = 64, 8
	// lieTime is for how long a host is not asked that has given wrong bytes, and mostLiars how
	// many of these are known.
	lieTime, mostLiars = 10 * time.Minute, 1024
	// Rests of silent peers.
	firstRest, longestRest = time.Second, time.Minute
)

// Group is the peers that are connected. It is safe for concurrent use.
type Group struct {
	onLie func(host string, err error)

	mu       sync.Mutex
	peers    []*peer
	liars    map[string]time.Time // hosts, and since when they are
	question *question            // that more blocks can be added to; nil if there is none
}

// peer is a connection. Store, conn and host never change; the lock of the group guards the rest.
type peer struct {
	store *coap.Store
	conn  *wire.Conn
	host  string

	proven   bool // it has given a block
	vain     int  // how often in a row it did not have what it was asked for
	asked    time.Time
	answered time.Time // zero before it has
	doubts   int       // answers to questions that were wrong, or did not come; see mostDoubts
	backoff  backoff.Backoff
}

// New returns a group that nobody belongs to. OnLie is told of hosts that give wrong bytes, of one
// at a time; it must not wait, nor call the group.
func New(onLie func(host string, err error)) *Group {
	return &Group{onLie: onLie, liars: map[string]time.Time{}}
}

// Join adds the peer of a connection, which somebody else runs, at a host. Ended is to be called
// when the connection has ended.
func (g *Group) Join(conn *wire.Conn, host string) (ended func()) {
	p := &peer{
		store: coap.OfConnection(conn, "peer "+host), conn: conn, host: host,
		backoff: backoff.Backoff{Min: firstRest, Max: longestRest},
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.peers = append(g.peers, p)
	return func() {
		g.mu.Lock()
		g.peers = slices.DeleteFunc(g.peers, func(other *peer) bool { return other == p })
		g.mu.Unlock()
		p.store.Close()
	}
}

// Source returns a source of what the peers have, which must be closed. What a request finds with
// nobody who was asked counts as not found, even if one of them said nothing.
func (g *Group) Source() fetch.Source { return fetch.NewWorkers("peers:", workers, g.get) }

// get asks for a block.
func (g *Group) get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, blockTime)
	defer cancel()
	var tried []*peer
	var said map[*peer]bool
	for len(tried) < MaxAsked && ctx.Err() == nil {
		if len(tried) == 1 { // who has all, or most, is asked nothing
			said = g.inquire(ctx, ref)
		}
		p := g.next(tried, said)
		if p == nil {
			break
		}
		tried = append(tried, p)
		block, err := g.ask(ctx, p, ref, size, dst)
		if said[p] && ctx.Err() == nil {
			g.claims(p, err == nil)
		}
		if err == nil {
			return block, nil
		}
	}
	return nil, eris.ErrNotFound
}

// next returns the peer to ask after those that have been asked, given what peers say to have, or
// nil if there is none.
func (g *Group) next(tried []*peer, said map[*peer]bool) *peer {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	var best *peer
	bestRank := 0
	for _, p := range g.peers {
		has, known := said[p]
		if slices.Contains(tried, p) || known && !has || p.backoff.Rest(now) > 0 || now.Sub(g.liars[p.host]) < lieTime {
			continue
		}
		rank := p.vain - proven
		if !p.proven {
			rank = p.vain
			asks := p.conn.Asks()
			if asks {
				rank += mostVain
			}
			// Who has given nothing yet has one chance for each host, and consumers have one in
			// all.
			had := func(t *peer) bool { return !t.proven && (t.host == p.host || asks && t.conn.Asks()) }
			if asks && p.vain == mostVain || slices.ContainsFunc(tried, had) {
				continue
			}
		}
		if has {
			rank -= 2 * mostVain
		}
		if best == nil || rank < bestRank || rank == bestRank && p.asked.Before(best.asked) {
			best, bestRank = p, rank
		}
	}
	if best != nil {
		best.asked = now
	}
	return best
}

// ask asks one peer, which may take as long as it answers something.
func (g *Group) ask(ctx context.Context, p *peer, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	began := time.Now()
	var timer *time.Timer
	timer = time.AfterFunc(time.Hour, func() {
		g.mu.Lock()
		rest := silence - min(time.Since(began), time.Since(p.answered))
		g.mu.Unlock()
		if rest > 0 {
			timer.Reset(rest)
		} else {
			cancel()
		}
	})
	timer.Reset(silence) // it is known by now
	defer timer.Stop()
	block, err := fetch.Get(ctx, p.store, ref, size, dst)
	g.note(p, began, size, err)
	return block, err
}

// note takes note of what became of a request. A peer that has given wrong bytes is dropped.
func (g *Group) note(p *peer, began time.Time, size eris.BlockSize, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	var wrong *eris.BlockError
	switch {
	case err == nil:
		p.proven, p.vain = true, 0
		p.answered = now
		p.backoff.Succeed()
	case errors.As(err, &wrong) && !wrong.IsOtherSize(size):
		if len(g.liars) >= mostLiars {
			clear(g.liars)
		}
		g.liars[p.host] = now
		p.conn.Release(0, err) // which does not wait
		g.onLie(p.host, err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		if p.answered.Before(began) && now.Sub(began) > leastSilence {
			p.backoff.Fail(now, 0)
			p.doubts++
		}
	default: // the peer does not have it, or will not say
		p.vain = min(p.vain+1, mostVain)
		p.answered = now
		p.backoff.Succeed()
	}
}
