// SPDX-License-Identifier: GPL-3.0-or-later

package settings

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

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
)

// StoreVariable has store URLs, separated by spaces; other programs for ERIS read it too.
const StoreVariable = "ERIS_STORE_URL"

// StoreURLs returns the store URLs that were given by a flag, else by the environment, else by the
// configuration file, and else that of the block store of this machine, if one runs. "none" is
// none.
func StoreURLs(flag string, file File) []string {
	urls := namedStores(flag, file)
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
	return slices.Equal(namedStores(flag, file), []string{"none"})
}

func namedStores(flag string, file File) []string {
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
	for _, path := range []string{own, system} {
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

// SystemRoot is the directory that stands for / where processes and services of the system, and the
// socket of its block store, are looked for: another one in tests.
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
	switch d := store.(type) {
	case *dump.Stream:
		return d.End(capabilities...)
	case *packs.Store:
		return d.Finish(ctx, capabilities)
	case *dump.Store:
		for _, c := range capabilities {
			if err := d.AddCapability(ctx, c); err != nil {
				return err
			}
		}
	}
	return nil
}

// OpenStores opens all stores that can be opened, as members of a pool. Errors name those that
// cannot. Hops is as in openStoreFor.
func OpenStores(urls []string, hops int) ([]pool.Member, error) {
	var stores []pool.Member
	var failed []error
	for _, text := range urls {
		s, err := openStoreFor(text, hops)
		if err != nil {
			failed = append(failed, err)
			continue
		}
		stores = append(stores, pool.Member{Source: s, Local: isLocal(s.String())})
	}
	return stores, errors.Join(failed...)
}

// IsSocket reports whether a store is a daemon on this machine, by its URL.
func IsSocket(url string) bool { return strings.HasPrefix(url, "coap+unix:") }

func isLocal(url string) bool {
	return IsSocket(url) || strings.HasPrefix(url, "file:") || strings.HasPrefix(url, "dump:")
}
