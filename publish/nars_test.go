// SPDX-License-Identifier: GPL-3.0-or-later

package publish_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

// keptNarinfo asks for a narinfo until all of its nars are kept.
func keptNarinfo(t *testing.T, url string) *narinfo.Narinfo {
	t.Helper()
	_, header, body := complete(t, url)
	n, err := narinfo.Parse([]byte(body))
	must(t, err)
	if header.Get("Cache-Control") == "max-age=60" {
		t.Fatalf("%s: the nars are never kept", url)
	}
	return n
}

// TestNothingToKeep has a cache where only nars without compression are offered, which it does not
// keep: nothing is noted, and nobody is told that this fails.
func TestNothingToKeep(t *testing.T) {
	directory, items := aStore(t)
	nars := publish.NewNars(filepath.Join(t.TempDir(), "cache", "nars"), 1, 0, t.Errorf)
	defer nars.Close()
	url := server(t, publish.ServerOptions{Root: directory, Items: items, Compressions: []string{"none"}, Nars: nars, Log: t.Errorf}).URL
	wantStatus(t, url+"/00000000000000000000000000000002.narinfo", 200)
}

// TestKeptNars has nars made once, which then have a size, are the same bytes as without a cache,
// and can be had when the item has left the store.
func TestKeptNars(t *testing.T) {
	directory, items := aStore(t)
	cache := filepath.Join(t.TempDir(), "nars")
	nars := publish.NewNars(cache, 2, 0, logger(t))
	defer nars.Close()
	o := publish.ServerOptions{Root: directory, Items: items, Compressions: []string{"zstd", "gzip:9", "none"}, TTL: time.Hour}
	plain := server(t, o).URL
	o.Nars = nars
	url := server(t, o).URL
	const hash, name = "00000000000000000000000000000002", "00000000000000000000000000000002-tree"
	_, header, _ := request(t, "GET", url+"/"+hash+".narinfo")
	if got := header.Get("Cache-Control"); got != "max-age=60" {
		t.Errorf("the first narinfo may be kept: %q", got)
	}
	n := keptNarinfo(t, url+"/"+hash+".narinfo")
	if len(n.URLs) != 3 {
		t.Fatalf("URLs: %v", n.URLs)
	}
	bodies := map[string]string{}
	for _, u := range n.URLs {
		_, header, body := request(t, "GET", url+"/"+u.URL)
		if !u.SizeKnown || u.FileSize != uint64(len(body)) {
			t.Errorf("%s: %d bytes, and the narinfo says %d (%v)", u.URL, len(body), u.FileSize, u.SizeKnown)
		}
		if _, _, live := request(t, "GET", plain+"/"+u.URL); live != body {
			t.Errorf("%s: other bytes than without a cache", u.URL)
		}
		status, _, part := request(t, "GET", url+"/"+u.URL, "Range: bytes=10-", "If-Range: "+header.Get("Etag"))
		if status != 206 || part != body[10:] {
			t.Errorf("%s: a part: status %d, %d bytes", u.URL, status, len(part))
		}
		bodies[u.URL] = body
	}

	// What a power failure has left of a nar is not served, but made anew.
	made, err := filepath.Glob(cache + "/*-zstd-*")
	if err != nil || len(made) != 1 {
		t.Fatalf("%v, %v", made, err)
	}
	must(t, os.Truncate(made[0], 0))
	for range 2 {
		if _, body := wantStatus(t, url+"/"+n.URLs[0].URL, 200); body != bodies[n.URLs[0].URL] {
			t.Errorf("%d bytes instead of %d after a power failure", len(body), len(bodies[n.URLs[0].URL]))
		}
		if again := keptNarinfo(t, url+"/"+hash+".narinfo"); again.URLs[0].FileSize != n.URLs[0].FileSize {
			t.Errorf("%d bytes after a power failure", again.URLs[0].FileSize)
		}
	}

	must(t, os.RemoveAll(directory+"/"+name))
	_, _, body := request(t, "GET", url+"/"+hash+".narinfo")
	if gone, err := narinfo.Parse([]byte(body)); err != nil || gone.StorePath != "/gnu/store/"+name || len(gone.References) != 2 {
		t.Errorf("the narinfo of what has gone: %v\n%s", err, body)
	}
	for _, u := range n.URLs[:2] {
		if _, body := wantStatus(t, url+"/"+u.URL, 200); body != bodies[u.URL] {
			t.Errorf("%s is another nar when the item has gone", u.URL)
		}
	}
	wantStatus(t, url+"/nar/zstd/"+hash+"-other", 404)

	// What nobody asks for any more goes, and so does what a killed process has left.
	old := time.Now().Add(-40 * 24 * time.Hour)
	must(t, os.WriteFile(filepath.Join(cache, files.TemporaryPrefix+strings.Repeat("A", 26)), nil, 0o600))
	entries, err := os.ReadDir(cache)
	if err != nil || len(entries) != 4 {
		t.Fatalf("%v, %v", entries, err)
	}
	for _, e := range entries {
		must(t, os.Chtimes(filepath.Join(cache, e.Name()), old, old))
	}
	request(t, "GET", url+"/"+n.URLs[0].URL) // somebody does: for the nar, and what is known of it
	publish.NewNars(cache, 1, time.Hour, logger(t)).Close()
	left, err := filepath.Glob(cache + "/*")
	if err != nil || len(left) != 2 || !strings.HasSuffix(left[0], hash+".narinfo") || !strings.Contains(left[1], "-zstd-") {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestUnkeptNars has nars that cannot be kept: they are served all the same.
func TestUnkeptNars(t *testing.T) {
	directory, items := aStore(t)
	const hash, name = "00000000000000000000000000000005", "00000000000000000000000000000005-large"
	t.Run("other contents", func(t *testing.T) {
		n := *items[hash]
		n.NarDigest, n.NarSize, n.NarSizeKnown = [32]byte{1}, 1, true
		cache := t.TempDir()
		logged := make(chan struct{})
		nars := publish.NewNars(cache, 1, 0, func(string, ...any) { close(logged) })
		url := server(t, publish.ServerOptions{Root: directory, Items: publish.Manifest{hash: &n}, Nars: nars, Compressions: []string{"gzip"}}).URL
		request(t, "GET", url+"/"+hash+".narinfo")
		<-logged
		nars.Close()
		if entries, err := os.ReadDir(cache); err != nil || len(entries) != 0 {
			t.Errorf("kept: %v, %v", entries, err)
		}
	})
	t.Run("no place", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		must(t, os.WriteFile(file, nil, 0o600))
		nars := publish.NewNars(filepath.Join(file, "nars"), 1, 0, logger(t))
		defer nars.Close()
		url := server(t, publish.ServerOptions{Root: directory, Items: items, Nars: nars, Compressions: []string{"gzip"}}).URL
		for i := range 2 {
			wantStatus(t, url+"/"+hash+".narinfo", 200)
			if header, body := wantStatus(t, url+"/nar/gzip/"+name, 200); body == "" {
				t.Errorf("nar %d: %v", i, header)
			}
		}
	})
}
