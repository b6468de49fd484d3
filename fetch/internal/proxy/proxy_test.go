// SPDX-License-Identifier: GPL-3.0-or-later

package proxy_test

import (
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/proxy"
)

func TestFor(t *testing.T) {
	for _, test := range []struct{ scheme, host, port, value, exempt, want string }{
		{"http", "example.org", "80", "http://proxy:3128", "", "http://proxy:3128"},
		{"http", "example.org", "80", "proxy:3128", "", "http://proxy:3128"},
		{"http", "example.org", "80", "http://alice:s3cret@proxy", "", "http://alice:s3cret@proxy"},
		{"https", "example.org", "443", "", "", ""},
		{"https", "example.org", "443", "https://alice@proxy:3128/", "", "http://alice@proxy:3128/"},
		{"http", "example.org", "80", " https://proxy\n", "", "http://proxy:443"},
		{"http", "example.org", "80", "proxy", "*", ""},
		{"http", "Example.org", "80", "proxy", "EXAMPLE.org", ""},
		{"http", "a.example.org", "80", "proxy", "x, example.org", ""},
		{"http", "a.example.org", "80", "proxy", ".example.org,", ""},
		{"http", "example.org.", "80", "proxy", ",.,x", "http://proxy"},
		{"http", "notexample.org", "80", "proxy", "example.org", "http://proxy"},
		{"http", "example.org", "80", "proxy", "example.org:80", ""},
		{"http", "example.org", "8080", "proxy", "example.org:80", "http://proxy"},
		{"http", "192.0.2.1", "80", "proxy", "192.0.2.0/24", ""},
		{"http", "192.0.3.1", "80", "proxy", "192.0.2.0/24,nonsense/99", "http://proxy"},
		{"http", "2001:db8::1", "80", "proxy", "[2001:DB8:0::1]", ""},
		{"http", "2001:db8::1", "80", "proxy", "[2001:db8::1]:80", ""},
		{"http", "2001:db8::1", "81", "proxy", "[2001:db8::1]:80", "http://proxy"},
		{"http", "fe80::1%lo", "80", "proxy", "fe80::/10", ""},
	} {
		environment := map[string]string{test.scheme + "_proxy": test.value, "no_proxy": test.exempt}
		got, err := proxy.For(test.scheme, test.host, test.port, func(name string) string { return environment[name] })
		if err != nil || (got == nil) != (test.want == "") || got != nil && got.String() != test.want {
			t.Errorf("%+v: %q, error %v", test, got, err)
		}
	}
	for _, value := range []string{"socks5://proxy", "https://", "https://:443", "http://", "http://s3cret:x@ho st", "http://:80"} {
		got, err := proxy.For("http", "example.org", "80", func(name string) string {
			if name == "http_proxy" {
				return value
			}
			return ""
		})
		if err == nil || !strings.Contains(err.Error(), "http_proxy") || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q: %q, error %v", value, got, err)
		}
	}
}
