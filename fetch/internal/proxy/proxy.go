// SPDX-License-Identifier: GPL-3.0-or-later

// Package proxy knows which HTTP proxy a request goes through. See [For].
package proxy

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strings"
)

// For returns the URL of the proxy for requests to a host by a scheme, http or https, or nil if
// there is none. The host is a name or an address, without brackets; without a port it is the usual
// one of the scheme. getenv has the variables that Guix obeys (guix/build/download.scm:
// open-connection-for-uri), http_proxy and https_proxy, and no_proxy: a comma-separated list of
// host names that also stand for their subdomains, addresses, networks in CIDR notation, or "*",
// each with or without a port.
//
// A proxy that is named by https:// is spoken to without TLS, as Guix does: such a name mostly
// stands in https_proxy for a proxy of plain HTTP. For returns an error, which does not show the
// value, if the proxy is none of HTTP.
func For(scheme, host, port string, getenv func(string) string) (*url.URL, error) {
	name := scheme + "_proxy"
	value := strings.TrimSpace(getenv(name))
	port = cmp.Or(port, map[string]string{"http": "80", "https": "443"}[scheme])
	if value == "" || exempt(strings.ToLower(host), port, getenv("no_proxy")) {
		return nil, nil
	}
	if !strings.Contains(value, "://") {
		value = "http://" + value
	}
	u, err := url.Parse(value)
	if err == nil && u.Scheme == "https" {
		u.Scheme, u.Host = "http", net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "443"))
	}
	if err != nil || u.Scheme != "http" || u.Hostname() == "" {
		return nil, fmt.Errorf("%s: only http:// proxies are supported", name)
	}
	return u, nil
}

func exempt(host, port, list string) bool {
	address, _ := netip.ParseAddr(host)
	for entry := range strings.SplitSeq(list, ",") {
		entry = strings.ToLower(strings.TrimSpace(entry))
		if h, p, err := net.SplitHostPort(entry); err == nil {
			if p != port {
				continue
			}
			entry = h
		}
		entry = strings.TrimPrefix(strings.Trim(entry, "[]"), ".")
		a, notAddress := netip.ParseAddr(entry)
		network, _ := netip.ParsePrefix(entry)
		if entry == "*" || entry == host || entry != "" && strings.HasSuffix(host, "."+entry) ||
			notAddress == nil && a == address || network.Contains(address.WithZone("")) {
			return true
		}
	}
	return false
}
