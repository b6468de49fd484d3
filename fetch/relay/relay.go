// SPDX-License-Identifier: GPL-3.0-or-later

// Package relay gets for the clients of a server what its own store does not have from other
// stores, its upstreams, and keeps it. Start with [New].
//
// A block that the store has comes from there at once. Any other is asked for of a pool of the
// upstreams (package fetch/pool), which verifies it, has it put into the store, asks for equal
// blocks once, and leaves alone who is silent or lies. If nobody has it, or nobody says so in time,
// it counts as not found ([fetch.ErrUnanswered]): then a client goes elsewhere, and can still get
// what the store has.
//
// # Loops
//
// Two servers may name each other as upstreams. So requests say how many servers they may go
// through ([Options.Open]): those that are made for a client that said nothing may go through two,
// those that are made for another server through one, which has to answer from its own store. Those
// two kinds have a pool each. Therefore a request never waits for one that waits for it, and
// nothing goes round. Where all upstreams have to answer from their own stores ([Options.Levels]),
// one pool does.
//
// # Bounds
//
// A client has a bounded number of requests of upstreams under way; further ones wait for these. A
// client on the network may look in vain for so many blocks per second only; what goes beyond it is
// looked for in the store alone. Thus who asks for what nobody has cannot have upstreams flooded.
package relay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
)

// MaxUpstreams is how many upstreams are used at most.
const MaxUpstreams = pool.MaxSources - 1

const (
	// levels is how many servers a request may go through that a client makes who says nothing, if
	// the options say nothing else.
	levels = 2
	// silence is after what time a request is given up if no block has come from upstreams
	// meanwhile, firstSilence if none has for recentTime, so that nothing speaks for them; longest
	// is after what time in any case. What comes later is kept for the next time. The first two are
	// a little less than after what time a pool takes a source for silent: clients with a pool must
	// not think that of the server because of its upstreams, for it has blocks itself.
	silence, firstSilence, longest = 1800 * time.Millisecond, 1200 * time.Millisecond, 30 * time.Second
	recentTime                     = time.Minute
	// localRequests and networkRequests are the most requests of upstreams under way for one
	// client: for all on Unix sockets together, and for a host. The pool knows best how many are of
	// use, hence the first is more than enough.
	localRequests, networkRequests = 16384, 128
	// missRate is how many blocks per second a host may look for in vain in the long run, and
	// missBurst how many at first.
	missRate, missBurst = 64, 1024
	// maxClients is from how many hosts on those are forgotten for which nothing is under way.
	maxClients = 1024
)

// Store is what a relay needs of the store of its server.
type Store interface {
	// Source answers soon, without asking others: clients wait. What it returns is not verified.
	fetch.Source
	// PutBatch stores blocks, as [pool.Keeper] has it.
	PutBatch(ctx context.Context, refs []eris.Reference, blocks [][]byte) error
}

// Options says how a [Relay] behaves.
type Options struct {
	// Open opens the upstreams, whose requests are to say that they may go through so many servers.
	// It is called by New, for each number up to Levels. The relay closes them.
	Open func(hops int) ([]pool.Member, error)
	// Levels is how many servers requests may go through, after this one: 1, or 2, the default.
	Levels int
	// Pool is for the pools, see there.
	Pool pool.Options
}

// Relay is safe for concurrent use.
type Relay struct {
	store  Store
	pools  []*pool.Pool   // by how many servers requests may go through, the most first
	starts sync.WaitGroup // requests that have waited, and are being started

	mu       sync.Mutex
	clients  map[string]*client
	received time.Time // when the last block has come
	stats    Stats
}

// Stats is what a [Relay] has done.
type Stats struct {
	Found   int64 // blocks that came from upstreams
	Absent  int64 // requests for what nobody has, or could say to have
	Late    int64 // those among them that nobody answered in time
	Refused int64 // those among them that were not made, because the client had looked for too much in vain
	// Upstreams is what the upstreams have done, in the order in which they were given.
	Upstreams []pool.SourceStats
}

// client is on whose behalf upstreams are asked. It is guarded by the lock of the relay.
type client struct {
	most     int
	underWay int
	waiting  []*ticket
	misses   *ratelimit.Limiter // nil: no limit
}

// New returns a relay in front of a store, which must outlive it. Errors are those of Open.
func New(store Store, options Options) (*Relay, error) {
	r := &Relay{store: store, clients: map[string]*client{}}
	for hops := cmp.Or(options.Levels, levels); hops > 0; hops-- {
		members, err := options.Open(hops)
		if err != nil {
			for _, m := range members {
				m.Source.Close()
			}
			r.Close()
			return nil, err
		}
		members = members[:min(len(members), MaxUpstreams)]
		r.pools = append(r.pools, pool.New(append(members, pool.Member{Source: keeper{store}, Near: true}), options.Pool))
	}
	return r, nil
}

// Close cancels all requests, keeps what has come if that does not take long, and closes the
// upstreams. The store remains open.
func (r *Relay) Close() error {
	var errs []error
	for _, p := range r.pools {
		errs = append(errs, p.Close())
	}
	r.starts.Wait() // what has waited fails at once
	return errors.Join(errs...)
}

// For returns where blocks come from for a client: its host, or "" for this machine's own, and
// through how many servers its requests may go, this one among them; 0 if they do not say. It never
// waits. The source need not be closed, and must not be used after the relay is. Where upstreams
// could not say whether they have a block, its errors wrap [fetch.ErrUnanswered].
func (r *Relay) For(client string, hops int) fetch.Source {
	return &view{relay: r, client: client, hops: hops}
}

// Stats returns the statistics.
func (r *Relay) Stats() Stats {
	r.mu.Lock()
	stats := r.stats
	r.mu.Unlock()
	for i, p := range r.pools {
		of := p.Stats()
		of = of[:len(of)-1] // without the keeper
		if i == 0 {
			stats.Upstreams = of
			continue
		}
		for j, s := range of {
			u := &stats.Upstreams[j]
			u.Requests += s.Requests
			u.Bytes += s.Bytes
			u.Misses += s.Misses
			u.Faults += s.Faults
			u.Failures += s.Failures
			u.Banned = u.Banned || s.Banned
			u.Resting = u.Resting || s.Resting
			if u.Err == nil {
				u.Err = s.Err
			}
		}
	}
	return stats
}

// clientOf returns what is known of a client. The lock must be held.
func (r *Relay) clientOf(name string) *client {
	c := r.clients[name]
	if c != nil {
		return c
	}
	if len(r.clients) >= maxClients {
		for name, c := range r.clients {
			if c.underWay == 0 {
				delete(r.clients, name)
			}
		}
	}
	c = &client{most: localRequests}
	if name != "" {
		c.most, c.misses = networkRequests, ratelimit.New(missRate, missBurst)
	}
	r.clients[name] = c
	return c
}

// find looks a block up in the store. It reports whether upstreams may be asked.
func (r *Relay) find(q *fetch.Request) (goOn bool) {
	look := fetch.Request{Pair: q.Pair, Size: q.Size, Dst: q.Dst}
	fetch.Await(context.Background(), r.store, &look)
	q.Block, q.Err = look.Block, look.Err
	goOn = errors.Is(q.Err, eris.ErrNotFound)
	if goOn && q.Size == eris.BlockSize32KiB {
		// A client that does not know the size tries this one first. A block has one size only.
		look.Size = eris.BlockSize1KiB
		fetch.Await(context.Background(), r.store, &look)
		goOn = look.Err != nil
	}
	return goOn
}

// keeper is the store of the server in a pool, in which blocks have been looked up already.
type keeper struct{ Store }

// Start implements [fetch.Source].
func (k keeper) Start(r *fetch.Request) {
	r.Fail(eris.ErrNotFound)
}

// Close implements [fetch.Source]. The store is not the pool's.
func (k keeper) Close() error { return nil }

// Keep implements [pool.Keeper].
func (k keeper) Keep(ctx context.Context, refs []eris.Reference, blocks [][]byte) error {
	return k.PutBatch(ctx, refs, blocks)
}

var (
	errLate    = fmt.Errorf("%w in time", fetch.ErrUnanswered)
	errRefused = fmt.Errorf("%w: too much was looked for in vain", fetch.ErrUnanswered)
)
