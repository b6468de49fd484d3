// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/cache"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/bytesize"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/seed"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// blocks is where a session gets blocks from: a pool, in which a store on a Unix socket is near,
// and is given what had to be fetched. Where there is none, a directory is.
type blocks struct {
	*pool.Pool
	members []pool.Member
	nearby  image.Nearby // nil if no blocks are at hand
	stride  int          // see [substitute.Config]
	local   bool         // all stores are on this machine
}

// openBlocks opens the stores and the cache. What it returns must be closed, and is nil if there is
// no store; the error tells what cannot be used.
func (s *Settings) openBlocks(urls []string, state *sourcestate.State, limiter *ratelimit.Limiter, log *protocol.Log) (*blocks, error) {
	members, failed := settings.OpenStores(urls, 0)
	if len(members) == 0 {
		return nil, failed
	}
	b := &blocks{local: true}
	for i := range members {
		m := &members[i]
		if len(members) > 1 && b.nearby == nil && settings.IsSocket(m.Source.String()) {
			m.Near = true
			b.nearby, b.stride = &nearStore{Source: m.Source, resting: b.nearRests}, 64
		} else {
			b.local = b.local && m.Local
		}
	}
	size, _ := bytesize.Parse(s.file.CacheSize) // which settings.Read has looked at
	if directory := s.inCache("blocks"); b.nearby == nil && directory != "" && size > 0 && !b.local {
		c := cache.Open(directory, size, func(err error) {
			log.WarnOnce("block cache", "blocks cannot be kept for later: %v", err)
		})
		b.nearby, b.stride = c, 1
		members = append(members, pool.Member{Source: c, Near: true})
	}
	b.members = members
	b.Pool = pool.New(members, pool.Options{
		State: state, Limiter: limiter,
		OnFault: func(source string, err error) {
			log.Warnf("store %s gave wrong bytes and is not asked again: %s", source, message.OfStore(source, err))
		},
		OnRest: func(source string, err error) {
			log.Warnf("store %s is left alone for a while: %s", source, message.OfStore(source, err))
		},
	})
	return b, failed
}

// localWindow is enough for stores of this machine: what is more only takes memory, the use of
// which costs more than the block.
var localWindow = fetch.Window{Requests: 512, Bytes: 8 << 20}

// window is what a reader should keep in flight.
func (b *blocks) window() fetch.Window {
	if b.local {
		return localWindow
	}
	return b.Window()
}

// speed is how fast blocks should come. As long as there is a store of which nothing is known,
// nothing is known of all.
func (b *blocks) speed() substitute.Speed {
	e := b.Expect()
	if e.Sources == 0 {
		return substitute.Speed{None: true}
	}
	return substitute.Speed{Rate: e.Rate, Latency: e.RoundTrip, Known: e.Known == e.Sources && e.Rate > 0}
}

func (b *blocks) show(log *protocol.Log) {
	for _, s := range b.Stats() {
		state := ""
		switch {
		case s.Banned:
			state = ", gave wrong bytes"
		case s.Resting:
			state = ", cannot be used now"
		}
		if s.Err != nil {
			state += fmt.Sprintf(" (%s)", message.OfStore(s.URL, s.Err))
		}
		log.Notef("store %s: %d requests, %.1f MB, %d without the block; %.1f MB/s, %d ms%s", s.URL, s.Requests,
			float64(s.Bytes)/1e6, s.Misses, s.Rate/1e6, s.RoundTrip.Milliseconds(), state)
	}
}

func (b *blocks) nearRests() bool {
	return slices.ContainsFunc(b.Stats(), func(s pool.SourceStats) bool { return s.Near && (s.Resting || s.Banned) })
}

// nearStore is a store on this machine whose blocks are at hand.
type nearStore struct {
	fetch.Source
	resting func() bool
}

// Has implements [image.Nearby].
func (n *nearStore) Has(ctx context.Context, ref eris.Reference, size eris.BlockSize) bool {
	if n.resting() {
		return false
	}
	_, err := fetch.Get(ctx, n.Source, ref, size, nil)
	return err == nil
}

// serverSpeeds remembers the speeds of substitute servers among those of stores.
type serverSpeeds struct{ state *sourcestate.State }

// LeastMeasured is how many bytes tell something about a speed.
const LeastMeasured = 64 << 10

// Speed implements [substitute.Speeds].
func (s serverSpeeds) Speed(address string) substitute.Speed {
	r := s.state.Get(serverOf(address))
	return substitute.Speed{Rate: r.Rate, Latency: r.RoundTrip, Known: r.Rate > 0}
}

// Measured implements [substitute.Speeds].
func (s serverSpeeds) Measured(address string, bytes int64, waited, latency time.Duration) {
	if bytes < LeastMeasured {
		bytes, waited = 0, 0
	}
	s.state.Measured(serverOf(address), bytes, max(waited, time.Millisecond), latency)
}

func serverOf(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return address
	}
	return u.Scheme + "://" + u.Host
}

// limiter returns what bounds the bytes per second that are fetched, or nil.
func (s *Settings) limiter() *ratelimit.Limiter {
	rate := s.limitRate
	if rate == 0 {
		rate, _ = bytesize.ParseRate(s.file.LimitRate) // nothing is no limit
	}
	return ratelimit.New(rate, 0)
}

// seeds returns what puts nars that were fetched into the store of this machine, or nil.
func (s *Settings) seeds() *seed.Seeds {
	if !s.file.SeedNars {
		return nil
	}
	err := errors.New("it needs a store on a Unix socket among eris-stores, and a cache directory")
	urls := s.StoreURLs()
	if i := slices.IndexFunc(urls, settings.IsSocket); i >= 0 && s.kept != "" {
		var store fetch.Store
		if store, err = settings.OpenStore(urls[i]); err == nil {
			return seed.Open(s.inCache("seeds"), store, func(err error) { s.log.WarnOnce("seeds", "%v", err) })
		}
	}
	s.log.Warnf("seed-nars ignored: %v", err)
	return nil
}

// inCache returns a file name in the directory for what is kept for other processes; empty if
// nothing is.
func (s *Settings) inCache(name string) string {
	if s.kept == "" {
		return ""
	}
	return filepath.Join(s.kept, name)
}
