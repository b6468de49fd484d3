// SPDX-License-Identifier: GPL-3.0-or-later

package storeurl

import (
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

func TestParse(t *testing.T) {
	coap := func(scheme, host string, port uint16, segments ...string) URL {
		if segments == nil {
			segments = wellKnown()
		}
		return URL{Scheme: scheme, Host: host, Port: port, Segments: segments, Get: true, Put: true}
	}
	file := func(scheme, path string, settings ...string) URL {
		return URL{Scheme: scheme, Path: path, Get: true, Put: true, settings: settings}
	}
	web := func(scheme, host string, port uint16, path string, user *url.Userinfo, settings ...string) URL {
		return URL{Scheme: scheme, Host: host, Port: port, Path: path, User: user, Get: true, Put: true, settings: settings}
	}
	only := func(u URL, get bool) URL {
		u.Get, u.Put = get, !get
		return u
	}
	long := strings.Repeat("\xff", maxFilePath)
	for _, v := range []struct {
		text             string
		want             URL
		network, address string
		show             string
	}{
		{"coap://example.net", coap("coap", "example.net", 5683), "udp", "example.net:5683", "coap://example.net"},
		{"coap+tcp://[::1]:5683", coap("coap+tcp", "::1", 5683), "tcp", "[::1]:5683", "coap+tcp://[::1]"},
		{"coap+tcp://[::1]:5699?get&put", coap("coap+tcp", "::1", 5699), "tcp", "[::1]:5699", "coap+tcp://[::1]:5699"},
		{"coap+tcp://192.0.2.1?put", only(coap("coap+tcp", "192.0.2.1", 5683), false), "tcp", "192.0.2.1:5683", "coap+tcp://192.0.2.1"},
		{"COAP+TCP://Example.NET/.well-known/eris/?get", only(coap("coap+tcp", "example.net", 5683), true), "tcp", "example.net:5683", "coap+tcp://example.net"},
		{"coaps+tcp://a.example:443/pinned/x%2Fy/", coap("coaps+tcp", "a.example", 443, "pinned", "x/y"), "tcp", "a.example:443", "coaps+tcp://a.example:443"},
		{"coap+ws://a.example/s", coap("coap+ws", "a.example", 80, "s"), "tcp", "a.example:80", "coap+ws://a.example"},
		{"coaps+ws://a.example", coap("coaps+ws", "a.example", 443), "tcp", "a.example:443", "coaps+ws://a.example"},
		{"coap+tcp://[fe80::1%25eth0]", coap("coap+tcp", "fe80::1%eth0", 5683), "tcp", "[fe80::1%eth0]:5683", "coap+tcp://[fe80::1%25eth0]"},
		{"coap+tcp://[FE80::0:1%25enP4p65s0]:7", coap("coap+tcp", "fe80::1%enP4p65s0", 7), "tcp", "[fe80::1%enP4p65s0]:7", "coap+tcp://[fe80::1%25enP4p65s0]:7"},
		{"http://[fe80::1%eth0]", web("http", "fe80::1%eth0", 80, "", nil), "tcp", "[fe80::1%eth0]:80", "http://[fe80::1%25eth0]"},
		{"coap+unix:///run/a%20b?get", only(coap("coap+unix", "/run/a b", 0), true), "unix", "/run/a b", "coap+unix:///run/a%20b"},
		{"coap+unix://%2Frun%2Feris.sock/store/path", coap("coap+unix", "/run/eris.sock", 0, "store", "path"), "unix", "/run/eris.sock", "coap+unix:///run/eris.sock"},
		{"coap+unix:///" + strings.Repeat("a", 106), coap("coap+unix", "/"+strings.Repeat("a", 106), 0), "unix", "/" + strings.Repeat("a", 106), "coap+unix:///" + strings.Repeat("a", 106)},

		{"file:///media/usb", file("file", "/media/usb"), "", "", "file:///media/usb"},
		{"FILE:/media/usb", file("file", "/media/usb"), "", "", "file:///media/usb"},
		{"file://localhost/a%20b", file("file", "/a b"), "", "", "file:///a%20b"},
		{"file:blocks", file("file", "blocks"), "", "", "file:blocks"},
		{"file:./~/a b", file("file", "./~/a b"), "", "", "file:./~/a%20b"},
		{"file:../a/b?get", only(file("file", "../a/b"), true), "", "", "file:../a/b"},
		{"file:///a?put&layout=flat", only(file("file", "/a", "layout=flat"), false), "", "", "file:///a"},
		{"file:///100%25%3F%23%FFü", file("file", "/100%?#\xffü"), "", "", "file:///100%25%3F%23%FF%C3%BC"},
		{"dump:a.cbor?capability", file("dump", "a.cbor", "capability"), "", "", "dump:a.cbor"},
		{"dir+fs:///srv/blocks", file("file", "/srv/blocks"), "", "", "file:///srv/blocks"},
		{"cbor+file:x", file("dump", "x"), "", "", "dump:x"},
		{"file:out.cbor", file("dump", "out.cbor"), "", "", "dump:out.cbor"},
		{"file:out%2Ecbor", file("dump", "out.cbor"), "", "", "dump:out.cbor"},
		{"file:" + long, file("file", long), "", "", "file:" + strings.Repeat("%FF", len(long))},
		{"my out.cbor", file("dump", "my out.cbor"), "", "", "dump:my%20out.cbor"},

		{"http://Example.org", web("http", "example.org", 80, "", nil), "tcp", "example.org:80", "http://example.org"},
		{"https://user:p%40ss@example.org:8443/a%2Fb/?verify&static", web("https", "example.org", 8443, "/a%2Fb", url.UserPassword("user", "p@ss"), "verify", "static"),
			"tcp", "example.org:8443", "https://example.org:8443"},
		{"http://[::1]:80/a?static&get", only(web("http", "::1", 80, "/a", nil, "static"), true), "tcp", "[::1]:80", "http://[::1]"},
		{"ipfs+http://me@127.0.0.1:5001/?rpc", web("ipfs+http", "127.0.0.1", 5001, "", url.User("me"), "rpc"), "tcp", "127.0.0.1:5001", "ipfs+http://127.0.0.1:5001"},
	} {
		got, err := Parse(v.text)
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
		again, err := Parse(got.String())
		if err != nil || again.Host != got.Host || again.Port != got.Port || again.Scheme != got.Scheme || got.isLocal() && again.Path != got.Path {
			t.Errorf("%s: what is shown is read as %+v, %v", v.text, again, err)
		}
	}
}

func TestParseWrong(t *testing.T) {
	long := strings.Repeat("secret", 3000)
	for _, text := range []string{
		"coap:", "coap:example.net", "coap:/example.net", "//example.net", "coap+udp://example.net", "coap://", "coap:///secret", "coap://:5683",
		"coap://secret@example.net", "coap://example.net#secret", "coap://example.net:0", "coap://example.net:65536", "coap://example.net:+1",
		"coap://example.net:1:2", "coap://::1", "coap://[::1", "coap://[::1]x", "coap://[192.0.2.1]", "coap://[::1%25eth/0]", "coap://exa mple.net",
		"coap://example.net/secret b", "coap://example.net/secret\x00", "coap://example.net/é", "coap://example.net/..", "coap://example.net/secret/%2e%2e/b",
		"coap://example.net/./b", "coap://example.net/secret%", "coap://example.net/%4", "coap://example.net?delete", "coap://example.net?get=secret",
		"coap://exam%2Fple.net", "coap+unix://", "coap+unix:///", "coap+unix://run/secret", "coap+unix://eris.sock/secret", "coap+unix:///a%00b",
		"coap+unix:///" + strings.Repeat("a", 107), "coap://example.net/" + strings.Repeat("secrets", 40), "coap://example.net/" + strings.Repeat("a/", 33),
		"coap://example.net/" + long, "coap://" + strings.Repeat("a", 254),

		"file", "file:", "file://", "file://localhost", "file://media", "files:a", "file:a#b", "file:%", "file:%zz", "file:a%00", "file:a\n",
		"file:" + strings.Repeat("a", maxFilePath+1), "file:///x?layout=round", "file:///x?x", "dump:", "dump:x?layout=flat",

		"http:", "http://", "http:///secret", "http:secret", "ftp://example.org/secret", "https://example.org/secret#x", "http://example.org/?key=secret",
		"http://example.org/sec ret", "http://example.org/%zzsecret", "http://example.org/?static&layout=secret", "https://example.org/?h2c",
		"http://example.org/?verify", "http://example.org:secret/", "http://me:secret@example.org:x/", "http://me:secret%@example.org/",
		"http://example.org/" + long, "ipfs+http://h:", "ipfs://host/secret", "ipfs+http://h/" + long,
	} {
		u, err := Parse(text)
		if err == nil {
			t.Errorf("%.60q is taken: %+v", text, u)
			continue
		}
		if message := err.Error(); strings.Contains(message, "secret") || strings.ContainsAny(message, "\n\x00") || len(message) > 500 {
			t.Errorf("%.60q: the error is not fit to be shown: %.600q", text, message)
		}
	}
}

// TestMessages has the commonest mistakes: what was given, what is wrong, and what to write
// instead.
func TestMessages(t *testing.T) {
	const schemes = "schemes are coap+unix, coap+tcp, coaps+tcp, coap, coap+ws, coaps+ws, http, https, file, dump, s3, ipfs+http, ipfs+https"
	for text, want := range map[string]string{
		"":                         `"": it begins with no scheme; ` + schemes,
		"blocks":                   `"blocks": it begins with no scheme; for a directory with blocks write file:blocks; other ` + schemes,
		"./my blocks":              `"./my blocks": it begins with no scheme; for a directory with blocks write file:./my%20blocks; other ` + schemes,
		"/run/eris.sock":           `"/run/eris.sock": it begins with no scheme; write coap+unix:///run/eris.sock with the whole path of the socket`,
		"127.0.0.1:8181":           `"127.0.0.1:…": it begins with no scheme; write coap+tcp://127.0.0.1:8181 or http://127.0.0.1:8181`,
		"ftp://example.org/x":      `"ftp://example.org": the scheme is not understood; ` + schemes,
		"coap+unix:nonexist.sock":  `"coap+unix:nonexist.sock": write coap+unix:///nonexist.sock with the whole path of the socket`,
		"file:~/blocks":            `"file:~/blocks": the shell does not replace ~ in it; write file:$HOME/blocks`,
		"file://media/usb":         `"file://media/usb": it names the host "media"; a path has three slashes before it, or none: file:///media/usb or file:media/usb`,
		"file:":                    `"file:": it has no path; write file:PATH`,
		"http:blocks.example":      `"http:…": it is not of the form http://host:port/path`,
		"http://h:80a/":            `"http:…": the port is not a number from 1 to 65535`,
		"s3://KEY:secret@bucket/":  `"s3://bucket": user names are not used`,
		"s3://b/?endpoint=%zz":     `"s3://b": wrong percent-encoding; a percent sign is written %25`,
		"http://h/?endpoint=https": `"http://h": "endpoint" in the query is not understood; there may be get, put, static, layout=flat, layout=sharded, h2c, packed`,
		"https://h/?layout=round":  `"https://h": "layout" in the query is not understood; there may be get, put, static, layout=flat, layout=sharded, verify, packed`,
		"coap+tcp://me@h":          `"coap+tcp://h": user names are not used`,
		"http://h/é":               `"http://h": a space or a character that is not ASCII has to be percent-encoded`,
	} {
		if _, err := Parse(text); err == nil || err.Error() != "store URL "+want {
			t.Errorf("%s:\n got %v\nwant store URL %s", text, err, want)
		}
	}
}

func TestParseListen(t *testing.T) {
	for text, want := range map[string]string{
		"coap+tcp://:0":                          "tcp :0 get",
		"coap+tcp://[::1]?get&put":               "tcp [::1]:5683 get put",
		"coap+tcp://127.0.0.1/.well-known/eris/": "tcp 127.0.0.1:5683 get",
		"coap://127.0.0.1:5683?put":              "udp 127.0.0.1:5683 put",
		"coap+ws://:8081":                        "tcp :8081 get",
		"http://localhost:8080/":                 "tcp localhost:8080 get",
		"http://:8080?relay":                     "tcp :8080 get relay",
		"coap+tcp://:0?put&relay":                "tcp :0 put",
		"coap+unix:///run/x.sock":                "unix /run/x.sock get put relay",
		"coap+unix:///run/x.sock?get":            "unix /run/x.sock get relay",
		"coap+unix:///run/x.sock?put":            "unix /run/x.sock put",
	} {
		u, err := ParseListen(text)
		if err != nil {
			t.Error(err)
			continue
		}
		network, address := u.Address()
		got := network + " " + address
		if u.Get {
			got += " get"
		}
		if u.Put {
			got += " put"
		}
		if u.Relay() {
			got += " relay"
		}
		if got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
	for text, want := range map[string]string{
		"127.0.0.1:8181":          `endpoint "127.0.0.1:…": it begins with no scheme; write coap+tcp://127.0.0.1:8181 or http://127.0.0.1:8181`,
		":8080":                   `endpoint ":…": it begins with no scheme; write coap+tcp://:8080 or http://:8080`,
		"blocks":                  `endpoint "blocks": it begins with no scheme; schemes are coap+unix, coap+tcp, coaps+tcp, coap, coap+ws, http`,
		"https://127.0.0.1":       `endpoint "https://127.0.0.1": the scheme is not understood; schemes are coap+unix, coap+tcp, coaps+tcp, coap, coap+ws, http`,
		"http://127.0.0.1/base":   `endpoint "http://127.0.0.1": blocks are always served at the same path; leave it out`,
		"coap+tcp://:5683/store":  `endpoint "coap+tcp://:5683": blocks are always served at the same path; leave it out`,
		"http://127.0.0.1?static": `endpoint "http://127.0.0.1": "static" in the query is not understood; there may be get, put, relay`,
		"http://me@127.0.0.1":     `endpoint "http://127.0.0.1": user names are not used`,
		"http://127.0.0.1:70000":  `endpoint "http:…": the port is not a number from 1 to 65535`,
	} {
		if u, err := ParseListen(text); err == nil || err.Error() != want {
			t.Errorf("%s: %+v\n got %v\nwant %s", text, u, err, want)
		}
	}
}

func TestParsePath(t *testing.T) {
	for text, want := range map[string][]string{
		"": wellKnown(), "/": wellKnown(), "pinned": {"pinned"}, "/a/b/": {"a", "b"}, "a//b": {"a", "", "b"}, "%2F": {"/"},
	} {
		if got, err := ParsePath(text); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
	if _, err := ParsePath("a/../b"); err == nil {
		t.Error("a path with .. is taken")
	}
}

func TestHTTP(t *testing.T) {
	for text, want := range map[string]string{
		"http://example.org:80":                 "http://example.org/more",
		"https://me:pw@example.org/a%2Fb%20c/":  "https://example.org/a%2Fb%20c/more",
		"ipfs+http://[fe80::1%25eth0]:8080?rpc": "http://[fe80::1%25eth0]:8080/more",
	} {
		u, err := Parse(text)
		testhelp.Must(t, err)
		if got := u.HTTP("/more").String(); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, text := range []string{"coap+tcp://[::1]:5?get", "file:a%20b?layout=flat", "http://u:p@h/p?static", "coap+unix://%2Fa/b", "x.cbor"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		u, err := Parse(text)
		if err != nil {
			return
		}
		again, err := Parse(u.String())
		if err != nil || again.Scheme != u.Scheme || again.Host != u.Host || again.Port != u.Port {
			t.Errorf("%q is shown as %q, which is read as %+v, %v", text, u, again, err)
		}
	})
}
