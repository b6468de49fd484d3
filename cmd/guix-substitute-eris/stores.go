// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"fmt"
	neturl "net/url"
	"os"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dir"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dump"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/ipfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/web"
)

// storeVariable has store URLs, separated by spaces; other programs for ERIS read
// it too.
const storeVariable = "ERIS_STORE_URL"

// A storeKind opens the stores whose URLs have one of its schemes. docs/sources.md
// describes them in the same order.
type storeKind struct {
	schemes []string
	open    func(url string) (fetch.Store, error)
}

// storeKinds are the kinds of stores.
var storeKinds = []storeKind{
	{[]string{"coap+unix", "coap+tcp", "coaps+tcp", "coap", "coap+ws", "coaps+ws"}, func(url string) (fetch.Store, error) {
		return coap.Open(url, coap.Options{})
	}},
	{[]string{"http", "https"}, func(url string) (fetch.Store, error) {
		return web.Open(url, web.Options{})
	}},
	{[]string{"file"}, func(url string) (fetch.Store, error) {
		return dir.Open(url, dir.Options{})
	}},
	{[]string{"dump"}, func(url string) (fetch.Store, error) {
		return dump.Open(url)
	}},
	{[]string{"ipfs+http", "ipfs+https"}, func(url string) (fetch.Store, error) {
		return ipfs.Open(url, ipfs.Options{})
	}},
}

// storeAliases are schemes that eris-go has for what we have too.
var storeAliases = map[string]string{"dir+fs": "file", "cbor+file": "dump"}

// dumpSuffix is how the names of files end that are dumps, not directories.
const dumpSuffix = ".cbor"

// storeURLs returns the store URLs that were given by a flag, else by the
// environment, else by the configuration file.
func storeURLs(flag string, file configuration) []string {
	if flag == "none" {
		return nil
	}
	if flag != "" {
		return strings.Fields(flag)
	}
	if urls := strings.Fields(os.Getenv(storeVariable)); len(urls) > 0 {
		return urls
	}
	return file.Stores
}

// openStore opens the store at a URL. What is behind the scheme may be a secret,
// hence errors do not show it.
func openStore(url string) (fetch.Store, error) {
	scheme, rest, ok := strings.Cut(url, ":")
	if !ok && strings.HasSuffix(url, dumpSuffix) {
		scheme, rest, ok = "dump", (&neturl.URL{Path: url}).EscapedPath(), true
	}
	if !ok {
		return nil, fmt.Errorf("this is not a store URL; one begins with a scheme: %s", storeSchemes())
	}
	scheme = strings.ToLower(scheme)
	if other, ok := storeAliases[scheme]; ok {
		scheme = other
	}
	if path, _, _ := strings.Cut(rest, "?"); scheme == "file" && strings.HasSuffix(path, dumpSuffix) {
		scheme = "dump"
	}
	for _, kind := range storeKinds {
		for _, s := range kind.schemes {
			if s != scheme {
				continue
			}
			store, err := kind.open(scheme + ":" + rest)
			if err != nil {
				return nil, err // not a nil pointer in an interface
			}
			return store, nil
		}
	}
	return nil, fmt.Errorf("store URL with scheme %.40q is not understood; those that are: %s", scheme, storeSchemes())
}

// storeSchemes lists the schemes that are understood.
func storeSchemes() string {
	var all []string
	for _, kind := range storeKinds {
		all = append(all, kind.schemes...)
	}
	return strings.Join(all, ", ")
}

// addCapability tells a store of a read capability, if it is one that keeps them and its URL asks for that.
func addCapability(ctx context.Context, store fetch.Store, urn string) error {
	d, ok := store.(*dump.Store)
	if !ok || !d.KeepsCapabilities() {
		return nil
	}
	c, err := eris.ParseURN(urn)
	if err != nil {
		return err
	}
	return d.AddCapability(ctx, c)
}

// openStores opens all stores that can be opened. Errors name those that cannot.
func openStores(urls []string) ([]fetch.Source, error) {
	var stores []fetch.Source
	var failed []error
	for _, url := range urls {
		s, err := openStore(url)
		if err != nil {
			failed = append(failed, err)
			continue
		}
		stores = append(stores, s)
	}
	return stores, errors.Join(failed...)
}

func closeStores(stores []fetch.Source) {
	for _, s := range stores {
		s.Close()
	}
}
