// SPDX-License-Identifier: GPL-3.0-or-later

package web

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strings"
)

// proxyFor returns the proxy for requests to u, or nil, by the variables that package fetch/mirror obeys as well (Guix,
// guix/build/download.scm: open-connection-for-uri). no_proxy is a comma-separated list of host names that also stand for
// their subdomains, addresses, networks in CIDR notation, or "*".
func proxyFor(u *url.URL, getenv func(string) string) (*url.URL, error) {
	name := u.Scheme + "_proxy"
	value := getenv(name)
	if value == "" || exempt(u, getenv("no_proxy")) {
		return nil, nil
	}
	if !strings.Contains(value, "://") {
		value = "http://" + value
	}
	proxy, err := url.Parse(value)
	if err != nil || proxy.Scheme != "http" || proxy.Hostname() == "" {
		return nil, fmt.Errorf("%s: only http:// proxies are supported", name)
	}
	return proxy, nil
}

func exempt(u *url.URL, list string) bool {
	host := strings.ToLower(u.Hostname())
	address, err := netip.ParseAddr(host)
	isAddress := err == nil
	for entry := range strings.SplitSeq(list, ",") {
		entry = strings.ToLower(strings.TrimSpace(entry))
		if h, port, err := net.SplitHostPort(entry); err == nil {
			if port != u.Port() {
				continue
			}
			entry = h
		}
		entry = strings.TrimPrefix(entry, ".")
		switch {
		case entry == "":
			continue
		case entry == "*", entry == host, strings.HasSuffix(host, "."+entry):
			return true
		}
		if network, err := netip.ParsePrefix(entry); err == nil && isAddress && network.Contains(address) {
			return true
		}
	}
	return false
}
