// SPDX-License-Identifier: GPL-3.0-or-later

// Package session has what helpers of the daemon and commands about store items have in common: the
// settings of substitution, and the session that they describe.
package session

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	"golang.org/x/term"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/ahead"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/bytesize"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/narinfocache"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/seed"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// DefaultURLs are asked when neither the daemon nor the user names servers.
var DefaultURLs = []string{"https://bordeaux.guix.gnu.org", "https://ci.guix.gnu.org"}

// Settings are what the flags, the environment and the configuration file say about substitution,
// in this order of precedence.
type Settings struct {
	URLs           string // of servers, separated by spaces
	acl            string
	Store          string // its directory
	cacheDirectory string
	Unauthorised   bool  // signatures do not count
	Wrong          error // what is wrong with the configuration file; it counts as if it were not there
	stores         string
	Policy         substitute.Policy // empty is Fastest
	limitRate      int64             // bytes per second; 0 is no limit
	verbose        bool

	daemon  bool // the daemon has started this process
	byHand  bool // a person has, and nothing of theirs is replaced
	options protocol.Options
	file    settings.File
	log     *protocol.Log
	kept    string // the directory of what is kept for other processes; empty if nothing is
	near    *neighbours
	failed  string      // why the last item could not be restored
	seeding *seed.Seeds // of all sessions, for it may take long to close; nil is none

	keys     *acl.ACL // when they were read last
	keysFile files.Identity
	parent   *ahead.Session // of the daemon; nil if it has not been looked for
}

// Flags defines the options.
func (s *Settings) Flags(f *pflag.FlagSet) {
	f.StringVar(&s.URLs, "substitute-urls", "", "ask the servers with these `URLS`, separated by spaces, in this order (default: those of the daemon, or \""+strings.Join(DefaultURLs, " ")+"\")")
	f.StringVar(&s.acl, "acl", "", "take the list of authorised keys from `FILE` (default: acl in the configuration directory of Guix)")
	f.StringVar(&s.Store, "store-dir", "", "the store is in `DIRECTORY` (default: $NIX_STORE_DIR, or /gnu/store)")
	f.StringVar(&s.cacheDirectory, "cache-dir", "", "keep narinfos, blocks and what is known of stores in `DIRECTORY`; \"none\" keeps nothing (default: see the setting cache-directory)")
	f.StringVar(&s.stores, "eris-store-url", "", "fetch blocks from the stores with these `URLS`, separated by spaces; \"none\" is none (default: $ERIS_STORE_URL, or the setting eris-stores)")
	f.Func("policy", "what is tried in which `ORDER`: fastest, eris-first, http-first, eris-only or http-only (default: the setting policy)", func(text string) (err error) {
		s.Policy, err = policyOf(text)
		return err
	})
	f.Func("limit-rate", "fetch at most `RATE` bytes per second, like 500K or 2MiB, over the network (default: the setting limit-rate)", bytesize.Set(&s.limitRate, bytesize.ParseRate))
	f.BoolVar(&s.verbose, "verbose", false, "show what is expected of blocks and nars, what is chosen, and what the stores have done")
	f.BoolVar(&s.Unauthorised, "allow-unauthenticated", false, "accept narinfos without an authorised signature (dangerous)")
}

// Load reads the environment and the configuration file, and warns of what is wrong with them. The
// error is that of [Settings.CheckURLs].
func (s *Settings) Load() error {
	s.begin()
	s.read()
	return s.CheckURLs()
}

// begin finds out who has started this process and what they see of it.
func (s *Settings) begin() {
	packed, daemon := os.LookupEnv("_NIX_OPTIONS")
	s.daemon = daemon
	s.options = protocol.ParseOptions(packed)
	s.log = newLog(daemon, s.options)
}

func (s *Settings) read() {
	s.file, s.Wrong = settings.Read()
	if s.Store == "" {
		s.Store = settings.StoreDirectory()
	}
	s.Store = filepath.Clean(s.Store)
	if strings.EqualFold(os.Getenv("GUIX_ALLOW_UNAUTHENTICATED_SUBSTITUTES"), "yes") {
		s.Unauthorised = true
	}
	if s.Policy == "" {
		var err error
		if s.Policy, err = policyOf(s.file.Policy); err != nil {
			s.Wrong = errors.Join(s.Wrong, fmt.Errorf("%s: %w", settings.FileName(), err))
		}
	}
	if s.limitRate == 0 {
		s.limitRate, _ = bytesize.ParseRate(s.file.LimitRate) // nothing is no limit
	}
	if s.Wrong != nil {
		s.log.Warnf("%v", s.Wrong)
	}
	if s.kept = s.KeepDirectory(); s.kept != "" {
		if err := files.MakeDirectory(s.kept); err != nil {
			s.log.Warnf("nothing is kept for later: %s", message.Plain(err))
			s.kept = ""
		}
	}
	if s.Unauthorised {
		s.log.Warnf("authentication and authorization of substitutes disabled!")
	}
}

// Log returns what the person who runs a command sees.
func (s *Settings) Log() *protocol.Log { return s.log }

// NewLog returns what the person who runs a command sees that has no Settings.
func NewLog() *protocol.Log { return newLog(false, nil) }

func newLog(daemon bool, options protocol.Options) *protocol.Log {
	terminal := term.IsTerminal(2) && os.Getenv("TERM") != "dumb"
	columns := options.Columns()
	if !daemon && terminal {
		if width, _, err := term.GetSize(2); err == nil && width > 0 {
			columns = max(20, width-1)
		}
	}
	program := "guix-substitute-eris"
	if daemon {
		program = "guix substitute"
	}
	return protocol.NewLog(protocol.NewDescriptorWriter(2), protocol.LogStyle{
		Program: program,
		Traces:  options.Traces(),
		Columns: columns,
		Unicode: page.Unicode(),
		Dynamic: daemon || terminal,
	})
}

// LoadQuietly is Load for whoever looks at the settings of the daemon's helpers, or of a person if
// daemon is false: warnings are not shown, and nothing is kept. A directory that root made would be
// closed to a daemon that is not root.
func (s *Settings) LoadQuietly(daemon bool) {
	s.begin()
	s.log = silent()
	s.read()
	s.kept, s.daemon = "", daemon
}

// Adopt has the options count that a daemon gives to its helpers, if there are any.
func (s *Settings) Adopt(options protocol.Options) {
	if len(options) > 0 {
		s.options = options
	}
}

func silent() *protocol.Log { return protocol.NewLog(io.Discard, protocol.LogStyle{}) }

// Policies returns the names of policies, in the order of the alphabet.
func Policies() []string {
	return []string{"eris-first", "eris-only", "fastest", "http-first", "http-only"}
}

// policyOf returns the policy of a name, of which none is none.
func policyOf(name string) (substitute.Policy, error) {
	if name != "" && !slices.Contains(Policies(), name) {
		return "", errors.New(message.Unknown("policy", name, Policies()))
	}
	return substitute.Policy(name), nil
}

// CheckURLs returns an error if the options for servers and stores have something that is no URL.
func (s *Settings) CheckURLs() error {
	for _, server := range strings.Fields(s.URLs) {
		if err := mirror.CheckURL(server); err != nil {
			return message.Usage("--substitute-urls: %w; spaces separate URLs, and one in a URL is written %%20", err)
		}
	}
	for url := range strings.FieldsSeq(s.stores) {
		if _, err := storeurl.Parse(url); err != nil && url != "none" {
			return fmt.Errorf("--eris-store-url: %w", err)
		}
	}
	return nil
}

// StoreURLs returns the URLs of the stores that blocks come from: those of [settings.StoreURLs],
// and what lies beside the narinfos in blocks in the directories that "export" has made and that
// are substitute servers. Those of the latter that somebody names who is not trusted are not used:
// what is there may be hidden from everybody else.
func (s *Settings) StoreURLs() []string {
	urls := settings.StoreURLs(s.stores, s.file)
	if settings.NoStores(s.stores, s.file) || s.publicFiles() != nil {
		return urls
	}
	for _, server := range s.ServerURLs() {
		for _, directory := range mirror.LocalDirectories(server) {
			stick := url.URL{Scheme: "file", Path: filepath.Join(directory, "blocks")}
			if info, err := os.Stat(stick.Path); err == nil && info.IsDir() { // perhaps once more, which counts once
				urls = append(slices.Clip(urls), stick.String())
			}
		}
	}
	return urls
}

// publicFiles returns the URLs of servers if they come from somebody who may not read all that we
// can.
func (s *Settings) publicFiles() []string {
	if s.URLs == "" && s.options.UntrustedURLs() {
		return append([]string{}, s.ServerURLs()...) // not nil
	}
	return nil
}

// ServerURLs returns the substitute URLs in order, each once.
func (s *Settings) ServerURLs() []string {
	urls := DefaultURLs
	if fromDaemon, ok := s.options.SubstituteURLs(); ok {
		urls = fromDaemon
	}
	if s.URLs != "" {
		urls = strings.Fields(s.URLs)
	} else if more := s.file.SubstituteURLs; len(more) > 0 {
		urls = slices.Concat(more, urls)
	}
	if s.options.Discover() {
		urls = slices.Concat(s.discovered(), urls)
	}
	seen := map[string]bool{}
	return slices.DeleteFunc(slices.Clone(urls), func(url string) bool {
		url = strings.TrimRight(url, "/") // which says the same
		defer func() { seen[url] = true }()
		return seen[url]
	})
}

// maxDiscovered is how many servers of the local network are asked (Guix,
// guix/scripts/substitute.scm: %max-substitute-urls).
const maxDiscovered = 50

func (s *Settings) discovered() []string {
	text, _ := files.ReadRegular(filepath.Join(settings.StateDirectory(), "discover", "publish"), 1<<20)
	var urls []string
	for url := range strings.FieldsSeq(string(text)) {
		if mirror.CheckURL(url) == nil && !mirror.IsLocal(url) {
			urls = append(urls, url)
		}
	}
	if len(urls) > maxDiscovered {
		rand.Shuffle(len(urls), func(i, j int) { urls[i], urls[j] = urls[j], urls[i] })
		urls = urls[:maxDiscovered]
	}
	return slices.Clip(urls)
}

// KeepDirectory is where things are kept for other processes, or empty.
func (s *Settings) KeepDirectory() string {
	if s.cacheDirectory == "none" {
		return ""
	}
	if named := cmp.Or(s.cacheDirectory, s.file.CacheDirectory); named != "" {
		return named
	}
	// Where AppArmor lets the daemon's helpers write, and where Guix has its own
	// (guix/substitutes.scm: %narinfo-cache-directory), beside that.
	if s.daemon && os.Getenv("XDG_CACHE_HOME") == "" {
		return filepath.Join(settings.StateDirectory(), "substitute", "eris")
	}
	base, err := os.UserCacheDir()
	if err != nil {
		return ""
	}
	return filepath.Join(base, "guix", "substitute-eris")
}

func (s *Settings) cache() *narinfocache.Cache {
	directory := s.inCache("narinfos")
	if directory == "" {
		return nil
	}
	c, err := narinfocache.Open(directory)
	if err != nil {
		s.log.Warnf("narinfos cannot be kept for later: %v", err)
		return nil
	}
	return c
}

// Keys reads the list of authorised keys. Without one the machine's own key is authorised, as Guix,
// guix/pki.scm: current-acl, has it. When the list cannot be understood, no key is. As long as the
// file is the same, so is the list.
func (s *Settings) Keys() *acl.ACL {
	name := s.KeysFile()
	identity := files.Identify(name)
	if identity != (files.Identity{}) && identity == s.keysFile {
		return s.keys
	}
	keys, err := acl.ReadACL(func() ([]byte, error) { return files.ReadRegular(name, acl.MaxSexpSize) }, ownKey)
	if err != nil {
		s.log.WarnOnce("acl", "no substitute is authorised: %s", message.Text(fmt.Sprintf("%s: %v", name, err)))
		return nil
	}
	if _, err := os.Stat(name); s.acl != "" && errors.Is(err, fs.ErrNotExist) {
		s.log.WarnOnce("acl", "there is no %s, which is to say who is authorised", name)
	} else if !s.Unauthorised && !s.HasForeignKeys(keys) {
		s.log.WarnOnce("acl", "access control list %s authorises no other machine; substitutes may be unavailable", name)
	}
	s.keys, s.keysFile = keys, identity
	return keys
}

func ownKey() ([]byte, error) {
	return files.ReadRegular(filepath.Join(settings.Directory(), "signing-key.pub"), acl.MaxSexpSize)
}

// KeysFile is the name of the list of authorised keys.
func (s *Settings) KeysFile() string {
	return cmp.Or(s.acl, filepath.Join(settings.Directory(), "acl"))
}

// HasForeignKeys reports whether a list has another key than the machine's own.
func (s *Settings) HasForeignKeys(keys *acl.ACL) bool {
	listed := keys.Keys()
	if len(listed) != 1 {
		return len(listed) > 0
	}
	text, err := ownKey()
	if err != nil {
		return true
	}
	own, err := acl.ParsePublicKey(text)
	return err != nil || !own.Equal(listed[0])
}

// inCache returns a file name in the directory for what is kept for other processes; empty if
// nothing is.
func (s *Settings) inCache(name string) string {
	if s.kept == "" {
		return ""
	}
	return filepath.Join(s.kept, name)
}
