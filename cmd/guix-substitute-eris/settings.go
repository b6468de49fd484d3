// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/term"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/ahead"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/narinfocache"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// defaultURLs are asked when neither the daemon nor the user names servers.
var defaultURLs = []string{"https://bordeaux.guix.gnu.org", "https://ci.guix.gnu.org"}

// settings are what the flags, the environment and the configuration file say about substitution,
// in this order of precedence.
type settings struct {
	urls           string
	acl            string
	store          string
	cacheDirectory string
	unauthorised   bool
	stores         string
	policy         string
	limitRate      string
	verbose        bool

	daemon  bool // the daemon has started this process
	byHand  bool // a person has, and nothing of theirs is replaced
	options protocol.Options
	file    configuration
	log     *protocol.Log
	kept    string   // the directory of what is kept for other processes; empty if nothing is
	notes   []string // warnings of the start, for when somebody reads them
}

func (s *settings) flags(f *flag.FlagSet) {
	f.StringVar(&s.urls, "substitute-urls", "", "ask the servers with these `URLS`, separated by spaces, in this order")
	f.StringVar(&s.acl, "acl", "", "take the list of authorised keys from `FILE`")
	f.StringVar(&s.store, "store-dir", "", "the store is in `DIRECTORY`")
	f.StringVar(&s.cacheDirectory, "cache-dir", "", "keep narinfos, blocks and what is known of stores in `DIRECTORY`; \"none\" keeps nothing")
	f.StringVar(&s.stores, "eris-store-url", "", "fetch blocks from the stores with these `URLS`, separated by spaces; \"none\" is none")
	f.StringVar(&s.policy, "policy", "", "what is tried in which `ORDER`: fastest, eris-first, http-first, eris-only or http-only")
	f.StringVar(&s.limitRate, "limit-rate", "", "fetch at most `RATE` bytes per second, like 500K or 2MiB, over the network")
	f.BoolVar(&s.verbose, "verbose", false, "show what is expected of blocks and nars, what is chosen, and what the stores have done")
	f.BoolVar(&s.unauthorised, "allow-unauthenticated", false, "accept narinfos without an authorised signature (dangerous)")
}

// load reads the environment and the configuration file.
func (s *settings) load() {
	packed, daemon := os.LookupEnv("_NIX_OPTIONS")
	s.daemon = daemon
	s.options = protocol.ParseOptions(packed)
	terminal := term.IsTerminal(2)
	columns := s.options.Columns()
	if !daemon && terminal {
		if width, _, err := term.GetSize(2); err == nil {
			columns = max(20, width-1)
		}
	}
	program := "guix-substitute-eris"
	if daemon {
		program = "guix substitute"
	}
	s.log = protocol.NewLog(protocol.NewDescriptorWriter(2), protocol.LogStyle{
		Program: program,
		Traces:  s.options.Traces(),
		Columns: columns,
		Unicode: unicode(),
		Dynamic: daemon || terminal,
	})
	var err error
	if s.file, err = readConfiguration(); err != nil {
		s.notes = append(s.notes, err.Error())
	}
	if s.store == "" {
		s.store = storeDirectory()
	}
	s.store = filepath.Clean(s.store)
	if strings.EqualFold(os.Getenv("GUIX_ALLOW_UNAUTHENTICATED_SUBSTITUTES"), "yes") {
		s.unauthorised = true
	}
	if s.policy == "" {
		s.policy = s.file.Policy
	}
	if s.kept = s.keepDirectory(); s.kept != "" {
		if err := files.MakeDirectory(s.kept); err != nil {
			s.notes = append(s.notes, fmt.Sprintf("nothing is kept for later: %v", err))
			s.kept = ""
		}
	}
	if s.unauthorised {
		s.notes = append(s.notes, "authentication and authorization of substitutes disabled!")
	}
}

// unicode reports whether the locale has other characters than ASCII.
func unicode() bool {
	for _, variable := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if value := os.Getenv(variable); value != "" {
			value = strings.ToLower(value)
			return strings.Contains(value, "utf-8") || strings.Contains(value, "utf8")
		}
	}
	return false
}

// showNotes shows the warnings of the start. The daemon reads them only while it waits for a reply,
// so this is for after the first request.
func (s *settings) showNotes() {
	for _, note := range s.notes {
		s.log.Warnf("%s", note)
	}
	s.notes = nil
}

// policies are the words for policies.
var policies = map[string]substitute.Policy{
	"":           substitute.Fastest,
	"fastest":    substitute.Fastest,
	"eris-first": substitute.ERISFirst,
	"http-first": substitute.HTTPFirst,
	"eris-only":  substitute.ERISOnly,
	"http-only":  substitute.HTTPOnly,
}

// A session is a substituter with what it works with.
type session struct {
	*substitute.Substituter
	blocks *blocks // nil if there is no store
	state  *sourcestate.State
	saved  time.Time
	closed func() // what else is to be closed at the end

	noted   *ahead.Session // of the daemon, when it asks what is available; nil is none
	staging *ahead.Ahead   // when it substitutes
}

// saveEvery is how often what is known of servers and stores is written down.
const saveEvery = 5 * time.Second

// after does what is to be done after a substitution. The daemon kills its helpers as soon as it
// does not need them any more.
func (s *session) after() {
	if s.blocks != nil && s.Verbose {
		s.blocks.show(s.Log)
	}
	if s.Verbose && s.staging != nil {
		t := s.staging.Stats()
		s.Log.Notef("ahead of the daemon: %d items staged, %.1f MB; %d used, %.1f MB", t.Staged, float64(t.StagedBytes)/1e6,
			t.Used, float64(t.UsedBytes)/1e6)
	}
	if time.Since(s.saved) < saveEvery {
		return
	}
	if err := s.state.Save(); err != nil {
		s.Log.WarnOnce("sources", "what is known of sources cannot be kept for later: %v", err)
	}
	s.saved = time.Now()
}

// note notes what the daemon has asked about on its own, and can have.
func (s *session) note(items []string, records []protocol.Info) {
	if s.noted == nil || len(items) != 1 || len(records) != 1 {
		return
	}
	if err := s.noted.Note(records[0].Path); err != nil {
		s.Log.WarnOnce("session", "items are not substituted ahead of the daemon: %v", err)
	}
}

func (s *session) close() {
	if s.staging != nil {
		s.staging.Close()
	}
	s.Substituter.Close()
	if s.blocks != nil {
		s.blocks.Close()
	}
	s.state.Save()
	s.closed()
	s.Mirrors.Close()
	if s.Cache != nil {
		s.Cache.Close()
	}
}

// session returns the substituter that the settings describe. It must be closed. For queries it has
// no stores.
func (s *settings) session(query bool) *session {
	policy, ok := policies[s.policy]
	if !ok {
		s.notes = append(s.notes, fmt.Sprintf("policy %.40q is not understood; fastest is followed", s.policy))
	}
	path := s.inCache("sources")
	if query {
		path = "" // which learns nothing about them
	}
	result := &session{state: sourcestate.Open(path), closed: func() {}}
	limiter := s.limiter()
	unsigned := s.file.UnsignedCapabilities == nil || *s.file.UnsignedCapabilities
	result.Substituter = substitute.New(substitute.Config{
		Policy:               policy,
		Limiter:              limiter,
		Speeds:               serverSpeeds{result.state},
		Verbose:              s.verbose || s.file.Verbose,
		UnsignedCapabilities: unsigned,
		StoreDir:             s.store,
		URLs:                 s.serverURLs(),
		AllowUnauthenticated: s.unauthorised,
		Deduplicate:          s.options.Deduplicate(),
		KeysFile:             s.keysFile(),
		Debug:                os.Getenv("GUIX_SUBSTITUTE_DEBUG") != "",
		Mirrors: mirror.NewClient(mirror.Options{
			MaxConnections: s.file.NarinfoConnections,
			UserAgent:      "guix-substitute-eris",
			PublicFiles:    s.publicFiles(),
			Getenv:         os.Getenv,
			OnSlow: func(host string) {
				s.log.Warnf("%s: server is somewhat slow; try '--no-substitutes' if it does not get better", host)
			},
			OnResume: func(url string, offset int64, cut error) {
				s.log.Notef("%s: %v; going on after %d bytes", url, cut, offset)
			},
			OnRedirect: func(url string) { s.log.Notef("following redirection to '%s'...", url) },
		}),
		Cache: s.cache(),
		Log:   s.log,
	})
	if !query {
		result.Reuse, result.closed = s.finder()
	}
	if urls := storeURLs(s.stores, s.file); !query && policy != substitute.HTTPOnly && len(urls) > 0 {
		b, err := openBlocks(blocksOptions{
			urls: urls, directory: s.inCache("blocks"), cacheSize: s.cacheSize(),
			state: result.state, limiter: limiter, log: s.log,
		})
		if err != nil {
			s.notes = append(s.notes, err.Error())
		}
		if b != nil {
			result.blocks = b
			result.Blocks, result.Window, result.StoreSpeed = b, b.window, b.speed
			result.Probe = b.Probe
			result.Nearby, result.NearbyStride = b.nearby, b.stride
		}
	}
	return result
}

// publicFiles returns the URLs of servers if they come from somebody who may not read all that we
// can.
func (s *settings) publicFiles() []string {
	if s.urls == "" && s.options.UntrustedURLs() {
		return append([]string{}, s.serverURLs()...) // not nil
	}
	return nil
}

// serverURLs returns the substitute URLs in order.
func (s *settings) serverURLs() []string {
	urls := defaultURLs
	if fromDaemon, ok := s.options.SubstituteURLs(); ok {
		urls = fromDaemon
	}
	if s.urls != "" {
		urls = strings.Fields(s.urls)
	}
	if s.options.Discover() {
		urls = append(s.discovered(), urls...)
	}
	return urls
}

// maxDiscovered is how many servers of the local network are asked (Guix,
// guix/scripts/substitute.scm: %max-substitute-urls).
const maxDiscovered = 50

// discovered returns the servers that "guix discover" has found.
func (s *settings) discovered() []string {
	f, err := os.Open(filepath.Join(stateDirectory(), "discover", "publish"))
	if err != nil {
		return nil
	}
	defer f.Close()
	var urls []string
	for lines := bufio.NewScanner(f); lines.Scan() && len(urls) < 10000; {
		if url := strings.TrimSpace(lines.Text()); url != "" && mirror.CheckURL(url) == nil && !mirror.IsLocal(url) {
			urls = append(urls, url)
		}
	}
	if len(urls) > maxDiscovered {
		rand.Shuffle(len(urls), func(i, j int) { urls[i], urls[j] = urls[j], urls[i] })
		urls = urls[:maxDiscovered]
	}
	return slices.Clip(urls)
}

// keepDirectory is where things are kept for other processes, or empty.
func (s *settings) keepDirectory() string {
	switch {
	case s.cacheDirectory == "none":
		return ""
	case s.cacheDirectory != "":
		return s.cacheDirectory
	case s.file.CacheDirectory != "":
		return s.file.CacheDirectory
	}
	// Where AppArmor lets the daemon's helpers write, and where Guix has its own
	// (guix/substitutes.scm: %narinfo-cache-directory), beside that.
	base := os.Getenv("XDG_CACHE_HOME")
	if base == "" && s.daemon {
		return filepath.Join(stateDirectory(), "substitute", "eris")
	}
	if base == "" {
		var err error
		if base, err = os.UserCacheDir(); err != nil {
			return ""
		}
	}
	return filepath.Join(base, "guix", "substitute-eris")
}

// cache opens the cache of narinfos, or returns nil.
func (s *settings) cache() *narinfocache.Cache {
	directory := s.inCache("narinfos")
	if directory == "" {
		return nil
	}
	c, err := narinfocache.Open(directory)
	if err != nil {
		s.notes = append(s.notes, fmt.Sprintf("narinfos cannot be kept for later: %v", err))
		return nil
	}
	return c
}

// maxACL bounds the length of an ACL file in bytes.
const maxACL = acl.MaxSexpSize

// keys reads the list of authorised keys. Without one the machine's own key is authorised, as Guix,
// guix/pki.scm: current-acl, has it. When the list cannot be understood, no key is.
func (s *settings) keys() *acl.ACL {
	name := s.keysFile()
	text, err := readLimited(name, maxACL)
	var keys *acl.ACL
	switch {
	case err == nil:
		keys, err = acl.ParseACL(text)
	case errors.Is(err, fs.ErrNotExist):
		var public []byte
		public, err = readLimited(filepath.Join(configurationDirectory(), "signing-key.pub"), maxACL)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			keys, err = acl.DefaultACL(public)
		}
	}
	if err != nil {
		s.log.WarnOnce("acl", "no substitute is authorised: %s: %v", name, err)
		return nil
	}
	if !s.unauthorised && !s.hasForeignKeys(keys) {
		s.log.WarnOnce("acl", "access control list %s authorises no other machine; substitutes may be unavailable", name)
	}
	return keys
}

// keysFile is the name of the list of authorised keys.
func (s *settings) keysFile() string {
	if s.acl != "" {
		return s.acl
	}
	return filepath.Join(configurationDirectory(), "acl")
}

// hasForeignKeys reports whether a list has another key than the machine's own.
func (s *settings) hasForeignKeys(keys *acl.ACL) bool {
	listed := keys.Keys()
	if len(listed) != 1 {
		return len(listed) > 0
	}
	text, err := readLimited(filepath.Join(configurationDirectory(), "signing-key.pub"), maxACL)
	if err != nil {
		return true
	}
	own, err := acl.ParsePublicKey(text)
	return err != nil || !own.Equal(listed[0])
}

// readLimited reads a file of at most limit bytes.
func readLimited(name string, limit int) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err == nil && len(b) > limit {
		err = fmt.Errorf("%s is longer than %d bytes", name, limit)
	}
	return b, err
}
