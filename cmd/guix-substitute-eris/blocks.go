// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/cache"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/bytesize"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// defaultCacheSize is how many bytes of blocks are kept for later, if the settings
// do not say it.
const defaultCacheSize = 1 << 30

// blocks is where a session gets blocks from: what is near first, then a pool of
// all that is not. A store on a Unix socket is near, and takes what had to be
// fetched; where there is none, a directory is.
type blocks struct {
	eris.VerifiedBlocks
	pool   *pool.Pool
	nearby image.Nearby
	stride int
	stores []fetch.Source
	near   bool // all stores of the pool are
	cache  *cache.Cache
	local  *cache.StoreCache
}

// blocksOptions says how blocks are got.
type blocksOptions struct {
	urls      []string
	directory string // of the cache; empty if there is none
	cacheSize int64
	state     *sourcestate.State
	limiter   *ratelimit.Limiter
	log       *protocol.Log
}

// openBlocks opens the stores and the cache. What it returns must be closed, and is
// nil if there is no store; the error tells what cannot be used.
func openBlocks(o blocksOptions) (*blocks, error) {
	stores, failed := openStores(o.urls)
	if len(stores) == 0 {
		return nil, failed
	}
	b := &blocks{stores: stores}
	wrong := func(source string, err error) {
		o.log.Warnf("store %s gave wrong bytes and is not asked again: %v", source, err)
	}
	var far []fetch.Source
	var daemon fetch.Store
	for _, s := range stores {
		store, ok := s.(fetch.Store)
		switch {
		case ok && daemon == nil && strings.HasPrefix(s.String(), "coap+unix:"):
			daemon = store
		case isNear(s.String()):
			far = append(far, s)
		default:
			far = append(far, fetch.Limited(s, o.limiter))
		}
	}
	if daemon != nil && len(far) == 0 {
		far, daemon = []fetch.Source{daemon}, nil
	}
	b.near = allNear(far)
	b.pool = pool.New(far, pool.Options{State: o.state, OnFault: wrong})
	b.VerifiedBlocks = b.pool
	switch {
	case daemon != nil:
		b.local = cache.ThroughStore(daemon, b.pool, func(err error) { o.log.Warnf("store of this machine: %v", err) })
		b.VerifiedBlocks = b.local
		b.nearby, b.stride = nearStore{daemon}, 64
	case o.directory != "" && o.cacheSize > 0 && !b.near:
		b.cache = cache.OpenLater(o.directory, o.cacheSize, func(err error) {
			o.log.WarnOnce("block cache", "blocks cannot be kept for later: %v", err)
		})
		b.VerifiedBlocks = cache.Through(b.cache, b.pool)
		b.nearby, b.stride = b.cache, 1
	}
	return b, failed
}

// nearWindow is enough for stores of this machine: what is more only takes memory,
// the use of which costs more than the block.
var nearWindow = eris.Window{Requests: 512, Bytes: 8 << 20}

// window is what a reader should keep in flight.
func (b *blocks) window() eris.Window {
	if b.near {
		return nearWindow
	}
	return b.pool.Window()
}

// isNear tells whether a store is on this machine, by its URL.
func isNear(url string) bool {
	return strings.HasPrefix(url, "coap+unix:") || strings.HasPrefix(url, "file:") || strings.HasPrefix(url, "dump:")
}

func allNear(stores []fetch.Source) bool {
	for _, s := range stores {
		if !isNear(s.String()) {
			return false
		}
	}
	return true
}

func (b *blocks) close() {
	if b.local != nil {
		b.local.Close()
	}
	b.pool.Close()
	b.cache.Close()
	closeStores(b.stores)
}

// speed is how fast blocks should come. As long as there is a store of which
// nothing is known, nothing is known of all.
func (b *blocks) speed() substitute.Speed {
	e := b.pool.Expect()
	if e.Sources == 0 {
		return substitute.Speed{Rate: 1, Known: true} // none can be used
	}
	return substitute.Speed{Rate: e.Rate, Latency: e.RoundTrip, Known: e.Known == e.Sources && e.Rate > 0}
}

// show tells what the stores have done.
func (b *blocks) show(log *protocol.Log) {
	for _, s := range b.pool.Stats() {
		state := ""
		switch {
		case s.Banned:
			state = ", gave wrong bytes"
		case s.Resting:
			state = ", cannot be used now"
		}
		if s.Err != nil {
			state += fmt.Sprintf(" (%v)", s.Err)
		}
		log.Notef("store %s: %d requests, %.1f MB, %d without the block, %d twice; %.1f MB/s, %d ms%s", s.URL, s.Requests,
			float64(s.Bytes)/1e6, s.Misses, s.Duplicates, s.Rate/1e6, s.RoundTrip.Milliseconds(), state)
	}
}

// nearStore is a store on this machine whose blocks are at hand.
type nearStore struct{ fetch.Store }

// Has implements [image.Nearby].
func (n nearStore) Has(ctx context.Context, ref eris.Reference, size eris.BlockSize) bool {
	_, err := n.Get(ctx, ref, size, make([]byte, 0, size))
	return err == nil
}

// serverSpeeds remembers the speeds of substitute servers among those of stores.
type serverSpeeds struct{ state *sourcestate.State }

// leastMeasured is how many bytes tell something about a speed.
const leastMeasured = 64 << 10

// Speed implements [substitute.Speeds].
func (s serverSpeeds) Speed(address string) substitute.Speed {
	r := s.state.Get(serverOf(address))
	return substitute.Speed{Rate: r.Rate, Latency: r.RoundTrip, Known: r.Rate > 0}
}

// Measured implements [substitute.Speeds].
func (s serverSpeeds) Measured(address string, bytes int64, waited, latency time.Duration) {
	if bytes < leastMeasured {
		bytes, waited = 0, 0
	}
	s.state.Measured(serverOf(address), bytes, max(waited, time.Millisecond), latency)
}

// serverOf returns the part of a URL that names a server.
func serverOf(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return address
	}
	return u.Scheme + "://" + u.Host
}

// limiter returns what bounds the bytes per second that are fetched, or nil.
func (s *settings) limiter() *ratelimit.Limiter {
	text := s.limitRate
	if text == "" {
		text = s.file.LimitRate
	}
	if text == "" {
		return nil
	}
	rate, err := bytesize.ParseRate(text)
	if err != nil {
		s.notes = append(s.notes, fmt.Sprintf("limit of the rate ignored: %v", err))
		return nil
	}
	return ratelimit.New(rate, 0)
}

// cacheSize returns how many bytes of blocks are kept for later.
func (s *settings) cacheSize() int64 {
	if s.file.CacheSize == "" {
		return defaultCacheSize
	}
	size, err := bytesize.Parse(s.file.CacheSize)
	if err != nil {
		s.notes = append(s.notes, fmt.Sprintf("cache-size ignored: %v", err))
		return defaultCacheSize
	}
	return size
}

// inCache returns a file name in the directory for what is kept for other
// processes; empty if nothing is.
func (s *settings) inCache(name string) string {
	directory := s.keepDirectory()
	if directory == "" {
		return ""
	}
	return filepath.Join(directory, name)
}
