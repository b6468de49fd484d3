// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/ahead"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/cache"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/bytesize"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/guixdb"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/seed"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// A Session is a substituter with what it works with.
type Session struct {
	*substitute.Substituter
	blocks *blocks  // nil if there is no store
	found  []string // URLs of those of the local network
	saved  time.Time
	closed func() // what else is to be closed at the end

	noted   *ahead.Session // of the daemon, when it asks what is available; nil is none
	staging *ahead.Ahead   // when it substitutes
}

// Stores returns the block stores, if there are any, and what is known of each.
func (s *Session) Stores() ([]pool.Member, []pool.SourceStats) {
	if s.blocks == nil {
		return nil, nil
	}
	return s.blocks.members, s.blocks.Stats()
}

// Found reports whether a store was found on the local network.
func (s *Session) Found(url string) bool { return slices.Contains(s.found, url) }

const saveEvery = 5 * time.Second

// after does what is to be done after a substitution. The daemon kills its helpers as soon as it
// does not need them any more.
func (s *Session) after() {
	if s.blocks != nil && s.Verbose {
		s.blocks.show(s.Log)
	}
	if s.Verbose && s.staging != nil && s.staging.Err() != nil {
		s.Log.WarnOnce("staging", "items are not substituted ahead of the daemon any more: %v", s.staging.Err())
	}
	if time.Since(s.saved) < saveEvery {
		return
	}
	if err := s.State.Save(); err != nil {
		s.Log.WarnOnce("sources", "what is known of sources cannot be kept for later: %v", err)
	}
	s.saved = time.Now()
}

// note notes what the daemon has asked about on its own, and can have.
func (s *Session) note(items []string, records []protocol.Info) {
	if s.noted == nil || len(items) != 1 || len(records) != 1 {
		return
	}
	if err := s.noted.Note(records[0].Path); err != nil {
		s.Log.WarnOnce("session", "items are not substituted ahead of the daemon: %v", err)
	}
}

// Close writes down what is known of sources, and ends all.
func (s *Session) Close() {
	if s.staging != nil {
		s.staging.Close()
	}
	s.Substituter.Close()
	if s.blocks != nil {
		s.blocks.Close()
	}
	s.State.Save()
	s.closed()
	s.Mirrors.Close()
	if s.Cache != nil {
		s.Cache.Close()
	}
}

// Session returns the substituter that the settings describe. It must be closed. For queries it has
// no stores.
func (s *Settings) Session(query bool) *Session { return s.session(query, s.log) }

// session is Session with another log for what goes on in it.
func (s *Settings) session(query bool, log *protocol.Log) *Session {
	path := s.inCache("sources")
	if query {
		path = "" // which learns nothing about them
	}
	result := &Session{closed: func() {}}
	limiter := ratelimit.New(s.limitRate, 0)
	narConnections := s.narConnections()
	if query {
		narConnections = 0 // half of all
	}
	result.Substituter = substitute.New(substitute.Config{
		Policy:               s.Policy,
		Limiter:              limiter,
		State:                sourcestate.Open(path),
		Verbose:              s.verbose || s.file.Verbose,
		UnsignedCapabilities: s.file.UnsignedCapabilities,
		StoreDir:             s.Store,
		URLs:                 s.ServerURLs(),
		Strangers:            s.publicFiles() != nil,
		AllowUnauthenticated: s.Unauthorised,
		Deduplicate:          s.options.Deduplicate(),
		KeysFile:             s.KeysFile(),
		Debug:                os.Getenv("GUIX_SUBSTITUTE_DEBUG") != "",
		Mirrors: mirror.NewClient(mirror.Options{
			MaxConnections: s.file.NarinfoConnections,
			NarConnections: narConnections,
			PublicFiles:    s.publicFiles(),
			Getenv:         os.Getenv,
			Note:           s.log.Notef,
		}),
		Cache: s.cache(),
		Log:   log,
	})
	if query {
		return result
	}
	result.MakeRoom = func(destination string) bool {
		staged := result.staging != nil && result.staging.MakeRoom()
		b := result.blocks
		return b != nil && b.cache != nil && b.cache.MakeRoom(filepath.Dir(destination)) || staged
	}
	result.Reuse, result.closed = s.finder()
	result.Seeds = s.seeding
	urls := s.StoreURLs()
	if s.near != nil {
		result.found = s.near.urls()
		urls = append(slices.Clip(urls), result.found...)
		result.Failed = func(format string, a ...any) { s.failed = fmt.Sprintf(format, a...) }
	}
	if s.Policy != substitute.HTTPOnly && len(urls) > 0 {
		b, err := s.openBlocks(urls, result.State, limiter, log)
		if err != nil {
			s.log.Warnf("%v", err)
		}
		if b != nil {
			result.blocks = b
			result.Blocks, result.Window, result.StoreSpeed = b, b.Window, b.speed
			result.Probe, result.Nearby = b.Probe, b.nearby
		}
	}
	return result
}

// SilentSession returns a session that shows nothing by itself but the warnings of its beginning.
func (s *Settings) SilentSession(query bool) *Session {
	sub := s.session(query, silent())
	sub.SetKeys(s.Keys())
	return sub
}

// blocks is where a session gets blocks from: a pool, in which a store on a Unix socket is near,
// and is given what had to be fetched. Where there is none, a directory is.
type blocks struct {
	*pool.Pool
	members []pool.Member
	nearby  *image.Nearby // nil if no blocks are at hand
	cache   *cache.Cache  // nil is none
}

// openBlocks opens the stores and the cache. What it returns must be closed, and is nil if there is
// no store; the error tells what cannot be used.
func (s *Settings) openBlocks(urls []string, state *sourcestate.State, limiter *ratelimit.Limiter, log *protocol.Log) (*blocks, error) {
	members, failed := settings.OpenStores(urls, 0)
	if len(members) == 0 {
		return nil, failed
	}
	b, local := &blocks{}, true // all stores are on this machine
	for i := range members {
		m := &members[i]
		if len(members) > 1 && b.nearby == nil && settings.IsSocket(m.Source.String()) {
			m.Near = true
			b.nearby = &image.Nearby{Source: m.Source, Has: b.nearHas, Stride: 64}
		} else {
			local = local && m.Local
		}
	}
	size, _ := bytesize.Parse(s.file.CacheSize) // which settings.Read has looked at
	if directory := s.inCache("blocks"); b.nearby == nil && directory != "" && size > 0 && !local {
		c := cache.Open(directory, size, func(err error) {
			log.WarnOnce("block cache", "blocks cannot be kept for later: %v", err)
		})
		b.nearby, b.cache = &image.Nearby{Source: c, Has: c.Has, Stride: 1}, c
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

// nearHas reports whether the store on this machine whose blocks are at hand has one.
func (b *blocks) nearHas(ctx context.Context, ref eris.Reference, size eris.BlockSize) bool {
	rests := func(s pool.SourceStats) bool { return s.Near && (s.Resting || s.Banned) }
	if slices.ContainsFunc(b.Stats(), rests) {
		return false
	}
	_, err := fetch.Get(ctx, b.nearby, ref, size, nil)
	return err == nil
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

const (
	// leastAheadWorkers is how many large items are restored at the same time at least: while one
	// waits for the line, another one can be decompressed.
	leastAheadWorkers = 2
	// mostAheadWorkers bounds the memory that they take.
	mostAheadWorkers = 4
	// narinfoShare is the part of the connections to a server that is for narinfos when items are
	// substituted: most narinfos have been fetched before.
	narinfoShare = 8
	// atOnceOfClosing is how many items are substituted ahead at the same time from a server that
	// closes each connection.
	atOnceOfClosing = 4
)

func (s *Settings) aheadItems() int {
	if s.narConnections() < 2 {
		return 0 // the connection is for what the daemon waits for
	}
	return s.file.AheadItems
}

// daemonSession returns what is noted about the daemon process that has started this one, or nil.
func (s *Settings) daemonSession() *ahead.Session {
	directory := s.inCache("sessions")
	if directory == "" || s.aheadItems() <= 0 {
		return nil
	}
	if s.parent == nil {
		var err error
		if s.parent, err = ahead.SessionOf(directory, os.Getppid()); err != nil {
			return nil // without /proc
		}
	}
	return s.parent.Anew()
}

// ahead returns what substitutes ahead of the daemon. It must be closed.
func (s *Settings) ahead(sub *Session) *ahead.Ahead {
	bytes, _ := bytesize.Parse(s.file.AheadBytes) // which settings.Read has looked at
	return ahead.New(sub.Substituter, ahead.Options{
		Session: s.daemonSession(),
		Items:   s.aheadItems(),
		Bytes:   bytes,
		AtOnce: func() int {
			if sub.Mirrors.Closing() {
				return atOnceOfClosing
			}
			return s.narConnections() - 1 // one is left for what the daemon waits for
		},
		Workers: min(max(leastAheadWorkers, runtime.NumCPU()), mostAheadWorkers),
	})
}

func (s *Settings) narConnections() int {
	connections := s.file.NarinfoConnections
	if connections <= 0 {
		connections = mirror.DefaultConnections
	}
	return max(1, connections-max(1, connections/narinfoShare))
}

const (
	// databaseTimeout is for how long an item waits while the database is locked, which may be
	// fetched instead, and databaseRest is for how long nobody waits again then.
	databaseTimeout = 500 * time.Millisecond
	databaseRest    = 20 * databaseTimeout
)

// finder returns what finds older items of the store to make new ones of, or nil. The daemon's
// database is opened when there is an item of which it is to be asked.
func (s *Settings) finder() (finder *reuse.Finder, closeDatabase func()) {
	if !s.file.Reuse {
		return nil, func() {}
	}
	var database *guixdb.Database
	open := sync.OnceValue(func() (err error) {
		database, err = guixdb.Open(settings.DatabaseFile(), s.Store, databaseTimeout)
		return err
	})
	made := time.Now()
	var locked atomic.Int64 // how long after that it is taken to be, by a clock that nobody sets
	find := func(ctx context.Context, hashPart string) (*narinfo.Narinfo, error) {
		if err := open(); err != nil {
			return nil, fmt.Errorf("%w: %w", reuse.ErrNoDatabase, err)
		}
		begin := time.Since(made)
		if begin < time.Duration(locked.Load()) {
			return nil, errors.New("the database of guix-daemon is locked")
		}
		info, err := database.Item(ctx, hashPart)
		if end := time.Since(made); err != nil && end-begin >= databaseTimeout {
			locked.Store(int64(end + databaseRest))
		}
		return info, err
	}
	return reuse.New(reuse.Config{StoreDir: s.Store, Database: find, MissesFile: s.inCache("reuse")}), func() {
		if database != nil {
			database.Close()
		}
	}
}
