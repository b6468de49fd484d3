// SPDX-License-Identifier: GPL-3.0-or-later

package narinfo_test

import (
	"slices"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

func TestResolveURL(t *testing.T) {
	for _, tt := range []struct {
		name, base, value, want string
	}{
		{"relative", "http://h", "nar/gzip/x", "http://h/nar/gzip/x"},
		{"base with a slash", "http://h/", "nar/x", "http://h/nar/x"},
		{"base with a path", "http://h/sub", "nar/x", "http://h/sub/nar/x"},
		{"absolute path", "http://h", "/nar/x", "http://h//nar/x"},
		{"absolute path after a slash", "http://h/", "/nar/x", "http://h//nar/x"},
		{"dot segments", "http://h/a/b", "../x/./y", "http://h/a/b/../x/./y"},
		{"percent signs", "http://h", "nar/a%2Bb%zz?c=+d", "http://h/nar/a%2Bb%zz?c=+d"},
		{"absolute", "http://h", "https://g/x", "https://g/x"},
		{"absolute in upper case", "http://h", "HTTP://g", "HTTP://g"},
		{"another scheme", "http://h", "file:///etc/passwd", "file:///etc/passwd"},
		{"scheme of all characters", "http://h", "a1+-.:x", "a1+-.:x"},
		{"no scheme: digit first", "http://h", "1a:x", "http://h/1a:x"},
		{"no scheme: slash before the colon", "http://h", "nar/a:x", "http://h/nar/a:x"},
		{"no scheme: colon first", "http://h", ":x", "http://h/:x"},
		{"no scheme: no colon", "http://h", "x", "http://h/x"},
		{"network path", "http://h", "//g/x", "http://h///g/x"},
		{"file base", "file:///srv", "nar/x", "file:///srv/nar/x"},
		{"base that is not ASCII", "http://me:secret@h/é", "nar/x", "http://me:secret@h/é/nar/x"},
	} {
		if got, err := narinfo.ResolveURL(tt.base, tt.value); err != nil || got != tt.want {
			t.Errorf("%s: ResolveURL = %q, %v, want %q", tt.name, got, err, tt.want)
		}
	}
	for _, value := range []string{"", "a b", "a\n", "a\r", "\x00", "\x7f", "é", "http://g/ x", "a\x1b[2J"} {
		got, err := narinfo.ResolveURL("http://me:secret@h", value)
		if err == nil || strings.ContainsAny(err.Error(), "\x00\x1b\r\n") || strings.Contains(err.Error(), "secret") {
			t.Errorf("ResolveURL(%q) = %q, %v, want an error without control characters and passwords", value, got, err)
		}
	}
}

func TestPreferredURLs(t *testing.T) {
	// A URL is written METHOD or METHOD=SIZE.
	for _, tt := range []struct{ name, in, want string }{
		{"as guix publish writes them", "gzip lzip zstd none=9", "zstd none=9 gzip lzip"},
		{"sizes do not count", "gzip=3 lzip=1 zstd=2 none=9", "zstd=2 none=9 gzip=3 lzip=1"},
		{"all methods", "none gzip bzip2 xz zstd lzip", "none zstd gzip lzip bzip2 xz"},
		{"alike", "xz bzip2 xz bzip2", "xz bzip2 xz bzip2"},
		{"unsupported", "br=1 gzip=2 GZIP=1 zstd-1=1", "gzip=2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var b strings.Builder
			b.WriteString(helloSigned)
			for _, w := range strings.Fields(tt.in) {
				method, size, known := strings.Cut(w, "=")
				b.WriteString("URL: " + w + "\nCompression: " + method + "\n")
				if known {
					b.WriteString("FileSize: " + size + "\n")
				}
			}
			n := parse(t, b.String())
			var got []string
			for _, u := range n.PreferredURLs() {
				got = append(got, u.URL)
			}
			if !slices.Equal(got, strings.Fields(tt.want)) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if n.URLs[0].URL != strings.Fields(tt.in)[0] {
				t.Error("URLs was changed")
			}
		})
	}
}

func TestLongURL(t *testing.T) {
	for length, want := range map[int]int{4096: 3, 4097: 2} { // beside the two of hello
		n, err := narinfo.Parse([]byte(hello + "URL: " + strings.Repeat("x", length) + "\nCompression: none\n"))
		must(t, err)
		if got := len(n.PreferredURLs()); got != want {
			t.Errorf("with a URL of %d bytes: %d that can be used, want %d", length, got, want)
		}
	}
}

func TestCheckStoreName(t *testing.T) {
	hash := "0123456789abcdfghijklmnpqrsvwxyz"
	for _, tt := range []struct {
		name, in, want string // want is what the error says, empty if there is none
	}{
		{"plain", hash + "-hello-2.12", ""},
		{"every kind of character", hash + "-aZ09+-._?=", ""},
		{"shortest", hash + "-x", ""},
		{"longest", hash + "-" + strings.Repeat("x", 222), ""},
		{"too long", hash + "-" + strings.Repeat("x", 223), "longer than 255"},
		{"empty", "", "too short"},
		{"no name", hash + "-", "too short"},
		{"only a hash", hash, "too short"},
		{"no hyphen", hash + "_x", "no hyphen"},
		{"leading period", hash + "-.x", "period"},
		{"letter that is no digit", "e" + hash[1:] + "-x", "'e' at offset 0"},
		{"upper-case hash", strings.ToUpper(hash) + "-x", "'A'"},
		{"slash", hash + "-x/y", "0x2f"},
		{"blank", hash + "-x y", "0x20"},
		{"NUL", hash + "-x\x00", "0x00"},
		{"not ASCII", hash + "-é", "0xc3"},
		{"tilde", hash + "-x~", "0x7e"},
	} {
		wantError(t, tt.name, narinfo.CheckStoreName(tt.in), tt.want)
	}
}

func TestCheckStorePath(t *testing.T) {
	base := strings.Repeat("a", 32) + "-x"
	for _, tt := range []struct {
		name, store, path string
		ok                bool
	}{
		{"plain", "/gnu/store", "/gnu/store/" + base, true},
		{"another store", "/tmp/a b", "/tmp/a b/" + base, true},
		{"in the wrong store", "/gnu/store", "/nix/store/" + base, false},
		{"below an item", "/gnu/store", "/gnu/store/" + base + "/" + base, false},
		{"two slashes", "/gnu/store", "/gnu/store//" + base, false},
		{"through a parent", "/gnu/store", "/gnu/store/../store/" + base, false},
		{"no directory", "/gnu/store", base, false},
		{"only the store", "/gnu/store", "/gnu/store", false},
		{"slash at the end", "/gnu/store", "/gnu/store/" + base + "/", false},
		{"empty", "/gnu/store", "", false},
		{"prefix of the store", "/gnu/store", "/gnu/store" + base, false},
	} {
		hash, err := narinfo.HashPart(tt.store, tt.path)
		if (err == nil) != tt.ok || tt.ok && hash != strings.Repeat("a", 32) {
			t.Errorf("%s: HashPart = %q, %v", tt.name, hash, err)
		}
	}
}

func TestCheckItem(t *testing.T) {
	n := parse(t, hello)
	must(t, n.CheckItem("/gnu/store", helloPath))
	wantError(t, "another item", n.CheckItem("/gnu/store", helloPath+"2"), "instead of")
	wantError(t, "another item", n.CheckItem("/nix/store", helloPath), "not in the store directory")
	other := parse(t, edit(t, hello, "/gnu/store/", "/gnu/store/x/"))
	wantError(t, "another item", other.CheckItem("/gnu/store", helloPath), "instead of")
	wantError(t, "another item", other.CheckItem("/gnu/store", other.StorePath), "not in the store directory")
}
