// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
)

// storeVariable has store URLs, separated by spaces; other programs for ERIS read
// it too.
const storeVariable = "ERIS_STORE_URL"

// storeURLs returns the store URLs that were given by a flag, else by the
// environment, else by the configuration file.
func storeURLs(flag string, file configuration) []string {
	if flag != "" {
		return strings.Fields(flag)
	}
	if urls := strings.Fields(os.Getenv(storeVariable)); len(urls) > 0 {
		return urls
	}
	return file.Stores
}

// openStore opens the store at a URL.
func openStore(url string) (fetch.Store, error) {
	scheme, _, _ := strings.Cut(url, ":")
	switch scheme {
	case "coap", "coap+tcp", "coaps+tcp", "coap+unix":
		s, err := coap.Open(url, coap.Options{})
		if err != nil {
			return nil, err
		}
		return s, nil
	}
	return nil, fmt.Errorf("store URL with scheme %.40q is not understood", scheme)
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
