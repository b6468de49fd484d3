// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"reflect"
	"slices"
	"strings"
	"testing"
)

func TestParseURL(t *testing.T) {
	wellKnown := wellKnownPath[:]
	for _, v := range []struct {
		text    string
		want    StoreURL
		network string
		address string
		show    string
	}{
		{"coap://example.net", StoreURL{"coap", "example.net", 5683, wellKnown, true, true}, "udp", "example.net:5683", "coap://example.net"},
		{"coaps://example.net/", StoreURL{"coaps", "example.net", 5684, wellKnown, true, true}, "udp", "example.net:5684", "coaps://example.net"},
		{"coap+tcp://[::1]:5683", StoreURL{"coap+tcp", "::1", 5683, wellKnown, true, true}, "tcp", "[::1]:5683", "coap+tcp://[::1]"},
		{"coap+tcp://[::1]:5699?get&put", StoreURL{"coap+tcp", "::1", 5699, wellKnown, true, true}, "tcp", "[::1]:5699", "coap+tcp://[::1]:5699"},
		{"coap+tcp://192.0.2.1?put", StoreURL{"coap+tcp", "192.0.2.1", 5683, wellKnown, false, true}, "tcp", "192.0.2.1:5683", "coap+tcp://192.0.2.1"},
		{"COAP+TCP://Example.NET/.well-known/eris/?get", StoreURL{"coap+tcp", "Example.NET", 5683, wellKnown, true, false}, "tcp", "Example.NET:5683", "coap+tcp://Example.NET"},
		{"coaps+tcp://a.example:443/pinned/x%2Fy/", StoreURL{"coaps+tcp", "a.example", 443, []string{"pinned", "x/y"}, true, true}, "tcp", "a.example:443", "coaps+tcp://a.example:443"},
		{"coap+ws://a.example/s", StoreURL{"coap+ws", "a.example", 80, []string{"s"}, true, true}, "tcp", "a.example:80", "coap+ws://a.example"},
		{"coaps+ws://a.example", StoreURL{"coaps+ws", "a.example", 443, wellKnown, true, true}, "tcp", "a.example:443", "coaps+ws://a.example"},
		{"coap+tcp://[fe80::1%25eth0]", StoreURL{"coap+tcp", "fe80::1%eth0", 5683, wellKnown, true, true}, "tcp", "[fe80::1%eth0]:5683", "coap+tcp://[fe80::1%25eth0]"},
		{"coap+unix:///run/user/1000/eris.sock", StoreURL{"coap+unix", "/run/user/1000/eris.sock", 0, wellKnown, true, true}, "unix", "/run/user/1000/eris.sock", "coap+unix:///run/user/1000/eris.sock"},
		{"coap+unix:///run/a%20b?get", StoreURL{"coap+unix", "/run/a b", 0, wellKnown, true, false}, "unix", "/run/a b", "coap+unix:///run/a%20b"},
		{"coap+unix://%2Frun%2Feris.sock", StoreURL{"coap+unix", "/run/eris.sock", 0, wellKnown, true, true}, "unix", "/run/eris.sock", "coap+unix:///run/eris.sock"},
		{"coap+unix://%2Frun%2Feris.sock/store/path", StoreURL{"coap+unix", "/run/eris.sock", 0, []string{"store", "path"}, true, true}, "unix", "/run/eris.sock", "coap+unix:///run/eris.sock"},
	} {
		got, err := ParseURL(v.text)
		if err != nil || !reflect.DeepEqual(got, v.want) {
			t.Errorf("%s: %+v, %v", v.text, got, err)
			continue
		}
		if network, address := got.Address(); network != v.network || address != v.address {
			t.Errorf("%s: address %s %s", v.text, network, address)
		}
		if got.String() != v.show {
			t.Errorf("%s: shown as %s, want %s", v.text, got, v.show)
		}
		if again, err := ParseURL(got.String()); err != nil || again.Host != got.Host || again.Port != got.Port || again.Scheme != got.Scheme {
			t.Errorf("%s: what is shown is read as %+v, %v", v.text, again, err)
		}
	}
	for _, text := range []string{
		"", "coap", "coap:", "coap:example.net", "coap:/example.net", "//example.net", "http://example.net", "coap+udp://example.net",
		"coap://", "coap:///path", "coap://:5683", "coap://user@example.net", "coap://example.net#x", "coap://example.net:0",
		"coap://example.net:65536", "coap://example.net:+1", "coap://example.net:1:2", "coap://::1", "coap://[::1", "coap://[::1]x",
		"coap://[192.0.2.1]", "coap://[::1%25eth/0]", "coap://exa mple.net", "coap://example.net/a b", "coap://example.net/\x00", "coap://example.net/é",
		"coap://example.net/..", "coap://example.net/a/%2e%2e/b", "coap://example.net/./b", "coap://example.net/%", "coap://example.net/%4",
		"coap://example.net/%zz", "coap://example.net?delete", "coap://example.net?get=1", "coap://example.net?get&&put", "coap://exam%2Fple.net",
		"coap+unix://", "coap+unix:///", "coap+unix://run/eris.sock", "coap+unix://eris.sock", "coap+unix:///a%00b",
		"coap+unix:///" + strings.Repeat("a", 107), "coap://example.net/" + strings.Repeat("a", 256), "coap://example.net/" + strings.Repeat("a/", 33),
		"coap://example.net/" + strings.Repeat("a", 4096), "coap://" + strings.Repeat("a", 254),
	} {
		u, err := ParseURL(text)
		if err == nil {
			t.Errorf("%q is taken: %+v", text, u)
		} else if len(text) > 30 && strings.Contains(err.Error(), "aaaa") {
			t.Errorf("the error for %.40q shows the path: %v", text, err)
		}
	}
	if u, err := ParseURL("coap+unix:///" + strings.Repeat("a", 106)); err != nil || len(u.Host) != 107 {
		t.Errorf("the longest path of a socket is not taken: %v", err)
	}
}

func TestParsePath(t *testing.T) {
	for text, want := range map[string][]string{
		"": wellKnownPath[:], "/": wellKnownPath[:], "pinned": {"pinned"}, "/a/b/": {"a", "b"}, "a//b": {"a", "", "b"}, "%2F": {"/"},
	} {
		if got, err := ParsePath(text); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
	if _, err := ParsePath("a/../b"); err == nil {
		t.Error("a path with .. is taken")
	}
}
