// SPDX-License-Identifier: GPL-3.0-or-later

// Package settings reads the configuration file, finds the directories of Guix and of this program,
// and opens block stores by their URLs.
package settings

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/BurntSushi/toml"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dir"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dump"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/ipfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/packs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/web"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/bytesize"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
)

// File is the configuration file. [Defaults] says what the settings mean.
type File struct {
	Guix                 string   `toml:"guix"`
	NarinfoConnections   int      `toml:"narinfo-connections"`
	Stores               []string `toml:"eris-stores"`
	SubstituteURLs       []string `toml:"substitute-urls"`
	Policy               string   `toml:"policy"`
	CacheSize            string   `toml:"cache-size"`
	CacheDirectory       string   `toml:"cache-directory"`
	LimitRate            string   `toml:"limit-rate"`
	Verbose              bool     `toml:"verbose"`
	UnsignedCapabilities bool     `toml:"unsigned-capabilities"`
	Reuse                bool     `toml:"reuse"`
	SeedNars             bool     `toml:"seed-nars"`
	AheadItems           int      `toml:"ahead-items"`
	AheadBytes           string   `toml:"ahead-bytes"`
	DiscoverStores       *bool    `toml:"discover-stores"` // nil is as the daemon has it
	Confine              bool     `toml:"confine"`
}

// Defaults is a configuration file with all settings as they are by default, each with a comment
// that says what it means. The manual is made of it.
//
//go:embed substitute-eris.toml
var Defaults string

// Default returns what [Defaults] says, which to read takes a helper longer than all else at its
// start.
func Default() File {
	return File{
		Policy: "fastest", UnsignedCapabilities: true, CacheSize: "1GiB", Reuse: true, AheadItems: 32, AheadBytes: "512MiB",
		NarinfoConnections: 32, Confine: true,
	}
}

// maxConfiguration bounds the length of the configuration file in bytes.
const maxConfiguration = 1 << 20

// FileName is the name of the configuration file.
func FileName() string {
	return filepath.Join(Directory(), "substitute-eris.toml")
}

// Read reads the configuration file; there need not be one. With an error, what is wrong is as if
// it were not there, or, where that cannot be told, all of it.
func Read() (File, error) {
	usual, name := Default(), FileName()
	c := usual
	text, err := files.ReadRegular(name, maxConfiguration)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	} else if err != nil {
		return c, fmt.Errorf("configuration ignored: %s", message.Plain(err))
	}
	meta, err := toml.Decode(string(text), &c)
	if err != nil {
		return usual, fmt.Errorf("configuration ignored: %s: %s", name, message.Plain(err))
	}
	wrong := c.correct(usual, string(text))
	for _, unknown := range meta.Undecoded() {
		wrong = append(wrong, lineOf(string(text), unknown[len(unknown)-1])+message.Unknown("setting", unknown.String(), settingNames()))
	}
	if len(wrong) > 0 {
		return c, fmt.Errorf("%s: %s", name, strings.Join(wrong, "; "))
	}
	return c, nil
}

// lineOf says in which line of a file a setting stands; nothing if that cannot be told.
func lineOf(text, name string) string {
	at := regexp.MustCompile(`(?m)^([^#=\n]*[\["'. \t])?` + regexp.QuoteMeta(name) + `["'\]. \t=]`).FindStringIndex(text)
	if at == nil {
		return ""
	}
	return fmt.Sprintf("line %d: ", 1+strings.Count(text[:at[1]-1], "\n"))
}

// correct has what makes no sense be as it is by default, and says it.
func (c *File) correct(usual File, file string) (wrong []string) {
	refuse := func(name, format string, a ...any) {
		wrong = append(wrong, lineOf(file, name)+name+": "+fmt.Sprintf(format, a...))
	}
	look := func(name string, text *string, usual string, parse func(text string) (int64, error)) {
		if *text == usual {
			return
		}
		if _, err := parse(*text); err != nil {
			refuse(name, "%v", err)
			*text = usual
		}
	}
	look("cache-size", &c.CacheSize, usual.CacheSize, bytesize.Parse)
	look("ahead-bytes", &c.AheadBytes, usual.AheadBytes, bytesize.Parse)
	look("limit-rate", &c.LimitRate, usual.LimitRate, bytesize.ParseRate)
	atLeast := func(least int, name string, n *int, usual int) {
		if *n < least {
			refuse(name, "%d is less than %d", *n, least)
			*n = usual
		}
	}
	atLeast(0, "ahead-items", &c.AheadItems, usual.AheadItems)
	atLeast(1, "narinfo-connections", &c.NarinfoConnections, usual.NarinfoConnections)
	if c.CacheDirectory != "" && !filepath.IsAbs(c.CacheDirectory) {
		refuse("cache-directory", "%q does not begin with /", c.CacheDirectory)
		c.CacheDirectory = ""
	}
	return wrong
}

// StoreDirectory is the store, as Guix finds it (Guix, guix/config.scm).
func StoreDirectory() string { return directoryFrom("NIX_STORE_DIR", "/gnu/store") }

// StateDirectory has the state of Guix, found in the same way.
func StateDirectory() string { return directoryFrom("GUIX_STATE_DIRECTORY", "/var/guix") }

// Directory has the configuration of Guix, found in the same way.
func Directory() string {
	return directoryFrom("GUIX_CONFIGURATION_DIRECTORY", "/etc/guix")
}

// CacheDirectory returns the directory of what servers keep, for the system or for a user.
func CacheDirectory(name string) (string, error) {
	base := filepath.Join("/", SystemRoot(), "var/cache")
	if os.Geteuid() != 0 {
		var err error
		if base, err = os.UserCacheDir(); err != nil {
			return "", err
		}
	}
	return filepath.Join(base, "guix-substitute-eris", name), nil
}

// DatabaseFile is the daemon's database.
func DatabaseFile() string {
	return filepath.Join(directoryFrom("GUIX_DATABASE_DIRECTORY", filepath.Join(StateDirectory(), "db")), "db.sqlite")
}

func directoryFrom(variable, fallback string) string {
	return filepath.Clean(cmp.Or(os.Getenv(variable), fallback))
}

func settingNames() (names []string) {
	for _, f := range reflect.VisibleFields(reflect.TypeFor[File]()) {
		names = append(names, f.Tag.Get("toml"))
	}
	return names
}

// StoreVariable has store URLs, separated by spaces; other programs for ERIS read it too.
const StoreVariable = "ERIS_STORE_URL"

// StoreURLs returns the store URLs that were given by a flag, else by the environment, else by the
// configuration file, and else that of the block store of this machine, if one runs. "none" is
// none.
func StoreURLs(flag string, file File) []string {
	urls := NamedStores(flag, file)
	switch {
	case NoStores(flag, file):
		return nil
	case len(urls) > 0:
		return urls
	}
	return runningStore()
}

// NoStores reports whether what names stores says that there is to be none.
func NoStores(flag string, file File) bool {
	return slices.Equal(NamedStores(flag, file), []string{"none"})
}

// NamedStores returns the store URLs that were given.
func NamedStores(flag string, file File) []string {
	if urls := strings.Fields(cmp.Or(flag, os.Getenv(StoreVariable))); len(urls) > 0 {
		return urls
	}
	return file.Stores
}

// runningStore returns the URL of the block store that runs for this user, or for the system, if we
// may use it.
func runningStore() []string {
	own, _ := DefaultSocket(os.Geteuid(), os.Getenv("XDG_RUNTIME_DIR"))
	system, _ := DefaultSocket(0, "")
	for _, path := range slices.Compact([]string{own, system}) {
		// A socket may be left from a store that was killed.
		if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
			conn.Close()
			return []string{"coap+unix://" + (&url.URL{Path: path}).EscapedPath()}
		}
	}
	return nil
}

// DefaultSocket returns the path of the socket where the store of the system, or of a user, is
// looked for.
func DefaultSocket(user int, runtimeDirectory string) (string, error) {
	switch {
	case user == 0:
		return filepath.Join("/", SystemRoot(), "run/guix-substitute-eris/eris.sock"), nil
	case filepath.IsAbs(runtimeDirectory):
		return filepath.Join(runtimeDirectory, "eris.sock"), nil
	}
	return "", errors.New("XDG_RUNTIME_DIR is not set; name a socket by --socket")
}

// SystemRoot is the directory that stands for / where processes and services of the system, the
// socket of its block store, and what its servers keep, are looked for: another one in tests.
func SystemRoot() string { return os.Getenv("GUIX_SUBSTITUTE_ERIS_SYSTEM_ROOT") }

// OpenStore opens the store at a URL. docs/sources.md describes the kinds of stores. Errors do not
// show what may be a secret.
func OpenStore(text string) (fetch.Store, error) { return openStoreFor(text, 0) }

// openStoreFor is openStore for a server that forwards requests, which are to say through how many
// servers they may go.
func openStoreFor(text string, hops int) (fetch.Store, error) {
	u, err := storeurl.Parse(text)
	if err != nil {
		return nil, err
	}
	var store fetch.Store
	switch {
	case u.Scheme == "s3" || u.Has("packed"):
		store, err = packs.Open(text, web.Options{})
	case u.Scheme == "http" || u.Scheme == "https":
		store, err = web.Open(text, web.Options{HopLimit: hops})
	case u.Scheme == "file":
		store, err = dir.Open(text)
	case u.Scheme == "dump" && u.Path == "-":
		store = &dump.Stream{W: os.Stdout, KeepCapabilities: u.Has("capability")}
	case u.Scheme == "dump":
		store, err = dump.Open(text)
	case u.Scheme == "ipfs+http" || u.Scheme == "ipfs+https":
		store, err = ipfs.Open(text, ipfs.Options{})
	default:
		store, err = coap.Open(text, coap.Options{HopLimit: uint8(hops)})
	}
	if err != nil {
		return nil, err // and no nil pointer in an interface
	}
	return store, nil
}

// OpenToPut opens the store where blocks are to go: that of a flag or of the environment, else the
// one that runs on this machine, for those of others seldom take blocks, and else the first of
// [StoreURLs]. It is nil if there is none.
func OpenToPut(flag string) (fetch.Store, error) {
	if len(strings.Fields(flag)) > 1 {
		return nil, message.Usage("--store=%q: blocks are put into one store; the spaces in its URL are written %%20", flag)
	}
	file, err := Read()
	urls := StoreURLs(flag, file)
	if err != nil || len(urls) == 0 {
		return nil, err
	}
	if flag == "" && os.Getenv(StoreVariable) == "" {
		urls = append(runningStore(), urls...)
	}
	return OpenStore(urls[0])
}

// FinishPut is called when everything has been put into a store. It tells the store of read
// capabilities, if it is one that makes packs of what they denote, or that keeps them and its URL
// asks for that.
func FinishPut(ctx context.Context, store fetch.Store, capabilities []eris.ReadCapability) error {
	if s, ok := store.(interface {
		Finish(ctx context.Context, capabilities []eris.ReadCapability) error
	}); ok {
		return s.Finish(ctx, capabilities)
	}
	return nil
}

// OpenStores opens all stores that can be opened, as members of a pool, each once. Errors name
// those that cannot. Hops is as in openStoreFor.
func OpenStores(urls []string, hops int) ([]pool.Member, error) {
	var stores []pool.Member
	var failed []error
	var known []storeurl.URL
	for _, text := range urls {
		u, err := storeurl.Parse(text)
		if err == nil && slices.ContainsFunc(known, func(k storeurl.URL) bool { return reflect.DeepEqual(k, u) }) {
			continue // named a second time, perhaps with the port that it has anyway
		}
		known = append(known, u)
		s, err := openStoreFor(text, hops)
		if err != nil {
			failed = append(failed, err)
			continue
		}
		url := s.String()
		local := IsSocket(url) || strings.HasPrefix(url, "file:") || strings.HasPrefix(url, "dump:")
		stores = append(stores, pool.Member{Source: s, Local: local})
	}
	return stores, errors.Join(failed...)
}

// IsSocket reports whether a store is a daemon on this machine, by its URL.
func IsSocket(url string) bool { return strings.HasPrefix(url, "coap+unix:") }
