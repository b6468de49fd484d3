// SPDX-License-Identifier: GPL-3.0-or-later

// Package substitute is the policy of a substituter, and the only package that sees the whole of
// it: it looks narinfos up, decides which of them are authorised, lists the ways to an item,
// restores it by the first that works, and checks the result. Start with [New].
//
// The rule behind it: trust comes only from the NarHash of an authorised narinfo. Everything else,
// narinfos of mirrors and nars alike, may come from anybody, since what is restored is hashed and
// must have that NarHash.
//
// It follows Guix, guix/scripts/substitute.scm and guix/substitutes.scm, in what the daemon can see
// of it; but it never gives up as a whole: whatever goes wrong with an item, its answer is that the
// item cannot be had.
package substitute

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/backoff"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/memory"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/narinfocache"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/precedence"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/seed"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
)

// Config is what a [Substituter] works with.
type Config struct {
	// StoreDir is the store directory, an absolute file name without a slash at its end.
	StoreDir string
	// URLs are the substitute URLs in the order in which they are asked, each once. Those that make
	// no sense are passed over, with a warning.
	URLs []string
	// Keys are the keys whose signatures count, and KeysFile the file that lists them, for
	// messages.
	Keys     *acl.ACL
	KeysFile string
	// Strangers tells that whoever has named the URLs need not have the right to read what this
	// process can: nothing of what is found there is shown.
	Strangers bool
	// AllowUnauthenticated makes every narinfo count as authorised.
	AllowUnauthenticated bool
	// Deduplicate makes equal files of the store share their contents.
	Deduplicate bool
	// Mirrors fetches from substitute servers.
	Mirrors *mirror.Client
	// Cache keeps narinfos for other processes; nil is none.
	Cache *narinfocache.Cache
	// Blocks is where blocks are fetched from; nil is nowhere.
	Blocks fetch.Source
	// Reuse finds older items of the store to make new ones of; nil is none. It is tried before
	// everything else, whatever the policy.
	Reuse *reuse.Finder
	// Seeds takes compressed nars that were fetched, for others; nil takes none.
	Seeds *seed.Seeds
	// Window bounds the blocks in flight; nil is a default.
	Window func() fetch.Window
	// Limiter bounds the bytes of nars; nil is no limit.
	Limiter *ratelimit.Limiter
	// Policy tells what is tried first; empty is Fastest.
	Policy Policy
	// UnsignedCapabilities allows the use of read capabilities that no signature covers. What they
	// denote is checked all the same; they decide what is fetched, but not what is restored.
	UnsignedCapabilities bool
	// Log is where messages and progress go; but that an item cannot be restored, and why, Failed
	// is told, unless it is nil.
	Log    *protocol.Log
	Failed func(format string, a ...any)
	// MakeRoom is called, once for an item, where there is no room at its destination and it is
	// waited for. It reports whether there may be more now. Nil is nobody can.
	MakeRoom func(destination string) bool
	// StoreSpeed tells how fast the stores of Blocks are; nil is nobody knows.
	StoreSpeed func() Speed
	// Probe tries stores that are out of reach by a block that nobody waits for, so that it is
	// noticed when they can be used again; nil is nothing.
	Probe func(pair eris.Pair, size eris.BlockSize)
	// State remembers how fast substitute servers are, and which rest; nil is for this process.
	State *sourcestate.State
	// Nearby has the blocks that need not be fetched; nil is none.
	Nearby *image.Nearby
	// Verbose shows the ways to each item, what is expected of them, and why blocks are not used.
	Verbose bool
	// LookAhead is how many narinfos are fetched in all before anybody asks for them: those of the
	// references of what Info was asked about, and of theirs. None if it is 0. Close must be called
	// then.
	LookAhead int
	// Debug shows each narinfo that a server does not have.
	Debug bool
	// Now is the clock; nil is the system's.
	Now func() time.Time
}

// A Policy is the order in which the ways to get an item are tried, by its name in settings.
type Policy string

// The policies.
const (
	// Fastest compares what is known of the stores and the servers, and of the blocks that are
	// there already, and tries first what should take less time.
	Fastest Policy = "fastest"
	// ERISFirst tries blocks before nars.
	ERISFirst Policy = "eris-first"
	// HTTPFirst tries nars before blocks.
	HTTPFirst Policy = "http-first"
	// ERISOnly uses blocks alone.
	ERISOnly Policy = "eris-only"
	// HTTPOnly uses nars alone.
	HTTPOnly Policy = "http-only"
)

// A Substituter answers the daemon's questions. Its methods are not safe for concurrent use: there
// is one request at a time.
type Substituter struct {
	Config
	servers []*server
	memory  memory.Memory[memoryKey, *record]
	ahead   *lookAhead
	order   precedence.Order
	came    atomic.Int64 // bytes, over the network, for all items
}

// New returns a substituter.
func New(c Config) *Substituter {
	if c.Now == nil {
		c.Now = time.Now
	}
	c.Policy = cmp.Or(c.Policy, Fastest)
	if c.State == nil {
		c.State = sourcestate.Open("")
	}
	s := &Substituter{Config: c, ahead: newLookAhead()}
	s.sayIgnored()
	for _, url := range c.URLs {
		if mirror.CheckURL(url) == nil {
			server := &server{
				vain: backoff.Backoff{Min: 10 * time.Second, Max: 5 * time.Minute},
				slow: backoff.Backoff{Min: 10 * time.Second, Max: time.Minute},
				url:  url, name: mirror.WithoutUser(url), index: len(s.servers), state: c.State,
			}
			known := c.State.Get(narsOf(url))
			server.vain.Resume(known.Rest, known.Rests)
			s.servers = append(s.servers, server)
		}
	}
	return s
}

// sayIgnored says which URLs make no sense.
func (s *Substituter) sayIgnored() {
	for _, url := range s.URLs {
		err := mirror.CheckURL(url)
		if err != nil && !strings.Contains(url, ":") {
			err = fmt.Errorf("%w; a space in a URL is written %%20", err)
		}
		if err != nil {
			s.Log.WarnOnce("url "+url, "substitute server ignored: %v", err)
		}
	}
}

// SetKeys changes the keys whose signatures count.
func (s *Substituter) SetKeys(keys *acl.ACL) {
	s.ahead.stop()
	s.ahead = newLookAhead()
	s.Keys = keys
	s.memory.Clear()
}

// A server is a substitute server.
type server struct {
	url   string
	name  string // the URL without what may be a password
	index int    // in the order of preference
	state *sourcestate.State

	answered atomic.Bool // at least once

	mu   sync.Mutex
	vain backoff.Backoff // its nars have failed or come too slowly
	slow backoff.Backoff // lookups have ended without all of its answers
}

// isHere notes that the server has answered.
func (s *server) isHere() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answered.Store(true)
	s.slow.Succeed()
}

// late notes that a lookup has ended without all of the server's answers.
func (s *server) late() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slow.Fail(time.Now(), 0)
}

// ended notes whether a nar of the server was of use, also for the next process: there may be one
// for each item.
func (s *server) ended(ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.vain.Failures()
	now := time.Now()
	if ok {
		s.vain.Succeed()
	} else {
		s.vain.Fail(now, 0)
	}
	if failures := s.vain.Failures(); failures != before {
		s.state.Rests(narsOf(s.url), now.Add(s.vain.Rest(now)), failures)
	}
}

// narsOf is what is remembered to rest when nars of a server do: blocks may come from the same URL.
func narsOf(url string) string { return "nars of " + url }

// rests reports whether one of the server's two things has been in vain just now: with slow, it is
// not waited for; with vain, its nars are the last to be tried. So not each item loses the seconds
// until it is given up.
func (s *server) rests(b *backoff.Backoff) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return b.Rest(time.Now()) > 0
}

// Close stops looking ahead. It returns when nothing of that goes on any more.
func (s *Substituter) Close() { s.ahead.stop() }

// Have returns those of the given store items that are available, in the order given. Anything that
// is not the file name of a store item is not.
func (s *Substituter) Have(ctx context.Context, items []string) (available []string) {
	for _, f := range s.lookup(ctx, items).all() {
		available = append(available, f.path())
	}
	return available
}

// Info returns what the daemon wants to know about those of the given store items that are
// available, in the order given. After a question about few items, it goes on in the background
// with what they refer to, as [Config] allows, for that is what the daemon asks about next.
func (s *Substituter) Info(ctx context.Context, items []string) []protocol.Info {
	var records []protocol.Info
	found := s.lookup(ctx, items).all()
	defer s.lookAhead(items, found)
	for _, f := range found {
		if err := s.usable(f); err != nil {
			server := f.authorised.server
			s.Log.WarnOnce("unusable "+server.url, "narinfo of %s from %s is of no use: %v", f.path(), server.name, err)
			continue
		}
		n := f.all[0].narinfo
		r := protocol.Info{Path: f.path(), References: s.references(n), NarSize: n.NarSize, DownloadSize: n.PreferredURLs()[0].FileSize}
		if n.Deriver != "" {
			r.Deriver = s.StoreDir + "/" + n.Deriver
		}
		records = append(records, r)
	}
	return records
}

// references returns the file names of what an item refers to.
func (s *Substituter) references(n *narinfo.Narinfo) (paths []string) {
	for _, name := range n.References {
		paths = append(paths, s.StoreDir+"/"+name)
	}
	return paths
}
