// SPDX-License-Identifier: GPL-3.0-or-later

package publish_test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/content"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

var must = testhelp.Must

// memoryStore is a store in memory that may refuse blocks.
type memoryStore struct {
	*sourcetest.Store
	fail error
	puts atomic.Int64
}

func newMemoryStore() *memoryStore { return &memoryStore{Store: sourcetest.NewBackend().Open(4)} }

func (m *memoryStore) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	m.puts.Add(1)
	if m.fail != nil {
		return m.fail
	}
	return m.Store.Put(ctx, ref, block)
}

// logger shows messages in the log of a test.
func logger(t testing.TB) func(string, ...any) {
	return func(format string, a ...any) { t.Logf(format, a...) }
}

// manifest parses a manifest.
func manifest(t *testing.T, text string) publish.Manifest {
	t.Helper()
	items, err := publish.ParseManifest([]byte(text))
	must(t, err)
	return items
}

// noise is n bytes that do not compress, the same for the same seed.
func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// anItem is a store with one file.
func anItem(t *testing.T, item string, contents []byte) (directory string, items publish.Manifest) {
	t.Helper()
	directory = t.TempDir()
	must(t, os.WriteFile(directory+"/"+item, contents, 0o444))
	return directory, manifest(t, "StorePath: /gnu/store/"+item+"\nReferences: \n")
}

// aStore is a store with some items.
func aStore(t *testing.T) (directory string, items publish.Manifest) {
	directory = filepath.Join(t.TempDir(), "store")
	var text strings.Builder
	add := func(i int, name string, make func(path string) error, references ...string) {
		base := fmt.Sprintf("%032d-%s", i, name)
		must(t, make(filepath.Join(directory, base)))
		fmt.Fprintf(&text, "StorePath: /gnu/store/%s\nReferences: %s\n\n", base, strings.Join(references, " "))
	}
	must(t, os.Mkdir(directory, 0o755))
	add(1, "file+plus", func(p string) error { return os.WriteFile(p, []byte("hello\n"), 0o644) })
	add(2, "tree", func(p string) error {
		return errors.Join(os.MkdirAll(p+"/bin", 0o755), os.WriteFile(p+"/bin/x", bytes.Repeat([]byte("x"), 100000), 0o755),
			os.Symlink("x", p+"/bin/y"), os.WriteFile(p+"/empty", nil, 0o644))
	}, "00000000000000000000000000000001-file+plus", "00000000000000000000000000000002-tree")
	add(3, "link", func(p string) error { return os.Symlink("/gnu/store/x", p) })
	add(4, "empty-directory", func(p string) error { return os.MkdirAll(p+"/empty", 0o755) })
	add(5, "large", func(p string) error { return os.WriteFile(p, bytes.Repeat([]byte("0123456789"), 200000), 0o644) })
	return directory, manifest(t, text.String())
}

// complete gets a narinfo, once all is known that it will say: on a busy machine that takes longer
// than a client is kept waiting.
func complete(t *testing.T, url string) (status int, header http.Header, body string) {
	t.Helper()
	for range 6000 {
		if status, header, body = request(t, "GET", url); header.Get("Cache-Control") != "max-age=60" {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return status, header, body
}

// newServer makes a server.
func newServer(t *testing.T, o publish.ServerOptions) *publish.Server {
	t.Helper()
	o.StoreDir = "/gnu/store"
	if o.Log == nil {
		o.Log = logger(t)
	}
	s, err := publish.NewServer(o)
	must(t, err)
	return s
}

// server starts a server.
func server(t *testing.T, o publish.ServerOptions) *httptest.Server {
	t.Helper()
	h := httptest.NewServer(newServer(t, o))
	t.Cleanup(h.Close)
	return h
}

// unredirected gets what is at a URL itself, as clients do that follow no redirection.
func unredirected(t *testing.T, url string) (status int, location, body string) {
	t.Helper()
	r, err := http.NewRequest("GET", url, nil)
	must(t, err)
	response, err := http.DefaultTransport.RoundTrip(r)
	must(t, err)
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	must(t, err)
	return response.StatusCode, response.Header.Get("Location"), string(b)
}

func TestNarinfo(t *testing.T) {
	directory, items := aStore(t)
	key := acl.GenerateSigningKey()
	h := server(t, publish.ServerOptions{
		Root: directory, Items: items, Key: key, Host: "example", Capabilities: newCapabilities(t, nil), WaitFor: 1 << 20,
		Compressions: []string{"gzip", "none"}, TTL: time.Hour, NegativeTTL: 10 * time.Minute,
	})
	status, header, text := complete(t, h.URL+"/00000000000000000000000000000001.narinfo")
	if status != 200 || header.Get("Cache-Control") != "max-age=3600" || header.Get("Content-Type") != "application/x-nix-narinfo" {
		t.Errorf("status %d, header %v", status, header)
	}
	// As it is asked for below a URL that ends in a slash, by clients that follow no redirection.
	if status, _, _ := unredirected(t, h.URL+"//00000000000000000000000000000001.narinfo"); status != 200 {
		t.Errorf("below a slash: status %d", status)
	}
	above, below, _ := strings.Cut(text, "Signature: ")
	wantAbove := "StorePath: /gnu/store/00000000000000000000000000000001-file+plus\n" +
		"NarHash: sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw\nNarSize: 120\n" +
		"ERIS: urn:eris:"
	if !strings.HasPrefix(above, wantAbove) || !strings.HasSuffix(above, "\nReferences: \n") {
		t.Errorf("above the signature:\n%s", above)
	}
	_, below, _ = strings.Cut(below, "\n")
	if want := "URL: nar/gzip/00000000000000000000000000000001-file%2Bplus\nCompression: gzip\n" +
		"URL: nar/00000000000000000000000000000001-file%2Bplus\nCompression: none\nFileSize: 120\n"; below != want {
		t.Errorf("below the signature:\n%s", below)
	}
	authorised(t, key, text)

	// What takes long to encode comes later; until then the answer is temporary.
	url := h.URL + "/00000000000000000000000000000005.narinfo"
	_, header, text = request(t, "GET", url)
	if strings.Contains(text, "ERIS:") || header.Get("Cache-Control") != "max-age=60" {
		t.Errorf("header %v, narinfo:\n%s", header, text)
	}
	_, header, text = complete(t, url)
	if !strings.Contains(text, "\nERIS: urn:eris:B") || header.Get("Cache-Control") != "max-age=3600" {
		t.Errorf("header %v, narinfo:\n%s", header, text)
	}

	for path, want := range map[string]int{
		"/": 200, "/nix-cache-info": 200, "/signing-key.pub": 200,
		"/00000000000000000000000000000009.narinfo": 404,
		"/short.narinfo": 404,
		"/nar/00000000000000000000000000000009-x":              404,
		"/nar/00000000000000000000000000000001-other":          404,
		"/nar/..%2f..%2fetc%2fpasswd":                          404,
		"/nar/xz/00000000000000000000000000000001-file%2Bplus": 404,
		"/nar/00000000000000000000000000000001-file+plus":      200,
	} {
		header, _ := wantStatus(t, h.URL+path, want)
		if absent := header.Get("Cache-Control") == "max-age=600"; absent != (path == "/00000000000000000000000000000009.narinfo") {
			t.Errorf("%s: header %v", path, header)
		}
	}
	if _, _, body := request(t, "GET", h.URL+"/nix-cache-info"); body != "StoreDir: /gnu/store\nWantMassQuery: 0\nPriority: 100\n" {
		t.Errorf("nix-cache-info: %q", body)
	}
	// An item that has gone from the store is not offered any more.
	must(t, os.Remove(filepath.Join(directory, "00000000000000000000000000000001-file+plus")))
	wantStatus(t, h.URL+"/00000000000000000000000000000001.narinfo", 404)
}

// find returns a capability, however long that takes.
func find(c *publish.Capabilities, path string, narHash [32]byte) (eris.ReadCapability, error) {
	for ; ; time.Sleep(time.Millisecond) {
		if found, err := c.FindSoon(context.Background(), path, narHash); found || err != nil {
			values, ok := c.Known(path, narHash)
			if !ok {
				return eris.ReadCapability{}, err
			}
			capability, err := eris.ParseURN(values[0].URN)
			return capability, err
		}
	}
}

// aTree is an item of a store, and the hash of its archive.
func aTree(t *testing.T) (path string, narHash [32]byte) {
	t.Helper()
	directory, items := aStore(t)
	path = filepath.Join(directory, filepath.Base(items["00000000000000000000000000000002"].StorePath))
	narHash, _, err := nar.HashTree(t.Context(), path)
	must(t, err)
	return path, narHash
}

// newAnnotator makes an annotator.
func newAnnotator(t *testing.T, o publish.AnnotatorOptions) *publish.Annotator {
	t.Helper()
	o.StoreDir = "/gnu/store"
	if o.Log == nil {
		o.Log = logger(t)
	}
	a, err := publish.NewAnnotator(o)
	must(t, err)
	return a
}

// annotator starts an annotator.
func annotator(t *testing.T, o publish.AnnotatorOptions) string {
	t.Helper()
	h := httptest.NewServer(newAnnotator(t, o))
	t.Cleanup(h.Close)
	return h.URL
}

// newCapabilities are capabilities that are closed at the end of the test.
func newCapabilities(t *testing.T, store fetch.Store) *publish.Capabilities {
	c := publish.NewCapabilities(t.TempDir(), store, 2, logger(t))
	t.Cleanup(c.Close)
	return c
}

// wantStatus gets what is at a URL.
func wantStatus(t *testing.T, url string, want int) (header http.Header, body string) {
	t.Helper()
	status, header, body := request(t, "GET", url)
	if status != want {
		t.Errorf("%s: status %d instead of %d, body %.100q", url, status, want, body)
	}
	return header, body
}

// authorised parses a narinfo that the key has signed.
func authorised(t *testing.T, key *acl.SigningKey, text string) *narinfo.Narinfo {
	t.Helper()
	n, err := narinfo.Parse([]byte(text))
	must(t, err)
	must(t, n.Authorise(acl.NewACL(key.PublicKey())))
	return n
}

// TestCapabilities checks what is encoded when.
func TestCapabilities(t *testing.T) {
	path, narHash := aTree(t)
	cache := t.TempDir() + "/a/b"

	// Without a store.
	c := publish.NewCapabilities(cache, nil, 2, logger(t))
	if _, ok := c.Known(path, narHash); ok {
		t.Error("the capability is known from nowhere")
	}
	first, err := find(c, path, narHash)
	must(t, err)
	c.Close()

	// It is known as well where nothing can be written.
	c = publish.NewCapabilities("/dev/null/cache", nil, 2, logger(t))
	if got, err := find(c, path, narHash); err != nil || got != first {
		t.Errorf("%v, error %v", got, err)
	}
	c.Close()

	// Another process knows it; with a store the blocks are needed, once.
	c = publish.NewCapabilities(cache, nil, 2, logger(t))
	if got, ok := c.Known(path, narHash); !ok || got[0].URN != first.URN() {
		t.Errorf("%v, %v", got, ok)
	}
	if _, ok := c.Known(path, [32]byte{1}); ok {
		t.Error("the capability of other contents is known")
	}
	c.Close()
	store := newMemoryStore()
	store.fail = errors.New("store is full")
	c = publish.NewCapabilities(cache, store, 2, logger(t))
	if _, ok := c.Known(path, narHash); ok {
		t.Error("nobody has put the blocks into the store")
	}
	for range 2 { // the second time without trying
		_, err := find(c, path, narHash)
		testhelp.WantError(t, "a full store", err, "store is full")
	}
	c.Close()
	store.fail = nil
	c = publish.NewCapabilities(cache, store, 2, logger(t))
	var wait sync.WaitGroup
	for range 20 {
		wait.Go(func() {
			if got, err := find(c, path, narHash); err != nil || got != first {
				t.Errorf("%v, error %v", got, err)
			}
		})
	}
	wait.Wait()
	if n := len(store.All()); int(store.puts.Load()) > 2*n+1 {
		t.Errorf("%d blocks were put %d times", n, store.puts.Load())
	}
	_, err = find(c, path, [32]byte{1})
	testhelp.WantError(t, "another hash", err, "other contents")
	c.Close()
}

// TestUnusedRecords checks that what nobody has asked for in a month is removed, and nothing else.
func TestUnusedRecords(t *testing.T) {
	path, narHash := aTree(t)
	cache := t.TempDir()
	c := publish.NewCapabilities(cache, nil, 2, logger(t))
	_, err := find(c, path, narHash)
	must(t, err)
	name := func(digit string) string { return cache + "/" + strings.Repeat(digit, 32) + ".json" }
	others := []string{name("1"), name("e"), cache + "/notes.json"} // e is no digit of hashes
	for _, name := range others {
		must(t, os.WriteFile(name, nil, 0o600))
	}
	used := cache + "/00000000000000000000000000000002.json"
	left := cache + "/" + files.TemporaryPrefix + strings.Repeat("A", 26) // by a process that was killed
	must(t, os.WriteFile(left, nil, 0o600))
	month := time.Now().Add(-31 * 24 * time.Hour)
	for _, name := range append(others, used, left) {
		must(t, os.Chtimes(name, month, month))
	}
	c.Known(path, narHash)
	c.Close()
	publish.NewCapabilities(cache, nil, 2, logger(t)).Close()
	publish.NewDeltas(publish.DeltaOptions{Directory: cache, Log: logger(t)}).Close()
	for _, name := range append(others, used, left) {
		if _, err := os.Lstat(name); (err == nil) == (name == others[0] || name == left) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestClockAhead starts publishers while the clock is a month ahead, to which all that is known and
// kept seems old: it stays, for the clock will be set back.
func TestClockAhead(t *testing.T) {
	cache := t.TempDir()
	month := time.Now().Add(-31 * 24 * time.Hour)
	names := []string{cache + "/00000000000000000000000000000002.json", cache + "/00000000000000000000000000000002-zstd-x"}
	for i, name := range names {
		must(t, os.WriteFile(name, nil, 0o600))
		must(t, os.Chtimes(name, month, month.Add(time.Duration(i)*time.Hour)))
	}
	publish.NewCapabilities(cache, nil, 2, logger(t)).Close()
	publish.NewNars(cache, 1, time.Hour, logger(t)).Close()
	for _, name := range names {
		if _, err := os.Lstat(name); err != nil {
			t.Error(err)
		}
	}
}

// TestEncodeForms checks that a tree that ERIS-FS cannot express is encoded as its archive.
func TestEncodeForms(t *testing.T) {
	directory, items := aStore(t)
	for hash, want := range map[string]string{
		"00000000000000000000000000000001": "eris-fs",
		"00000000000000000000000000000003": "eris-fs",
		"00000000000000000000000000000004": "nar",
	} {
		path := filepath.Join(directory, filepath.Base(items[hash].StorePath))
		store := newMemoryStore()
		e, err := publish.Encode(context.Background(), path, store.Put, erisfs.EncodeOptions{})
		must(t, err)
		var archive bytes.Buffer
		nar.Write(&archive, nar.NewTree(path))
		if e.Form != want || e.NarHash != sha256.Sum256(archive.Bytes()) || e.NarSize != uint64(archive.Len()) {
			t.Errorf("%s: %+v", path, e)
		}
		if want == "nar" {
			r, err := content.Open(context.Background(), store, e.Capability, 1<<20, fetch.Window{})
			must(t, err)
			if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, archive.Bytes()) {
				t.Errorf("%s: %d bytes, error %v", path, len(got), err)
			}
			r.Close()
		}
	}
	if _, err := publish.Encode(context.Background(), directory+"/absent", nil, erisfs.EncodeOptions{}); err == nil {
		t.Error("nothing can be encoded")
	}
	failing := newMemoryStore()
	failing.fail = errors.New("no")
	for _, name := range []string{"00000000000000000000000000000004-empty-directory", "00000000000000000000000000000005-large"} {
		if _, err := publish.Encode(context.Background(), directory+"/"+name, failing.Put, erisfs.EncodeOptions{}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestAnnotator(t *testing.T) {
	directory, items := aStore(t)
	key := acl.GenerateSigningKey()
	upstream := server(t, publish.ServerOptions{Root: directory, Items: items, Key: key, Host: "upstream"})
	// Here the large item is another one, and one is missing.
	local, _ := aStore(t)
	must(t, os.WriteFile(local+"/00000000000000000000000000000001-file+plus", []byte("another build"), 0o644))
	must(t, os.Remove(local+"/00000000000000000000000000000003-link"))
	here := annotator(t, publish.AnnotatorOptions{
		Upstream: upstream.URL + "/", Root: local, Capabilities: newCapabilities(t, newMemoryStore()), WaitFor: 1 << 30,
	})
	for hash, want := range map[string]bool{
		"00000000000000000000000000000001": false,
		"00000000000000000000000000000002": true,
		"00000000000000000000000000000003": false,
		"00000000000000000000000000000004": true,
		"00000000000000000000000000000005": true,
	} {
		_, _, plain := request(t, "GET", upstream.URL+"/"+hash+".narinfo")
		_, _, text := complete(t, here+"/"+hash+".narinfo")
		rest, ok := strings.CutPrefix(text, plain)
		if !ok || (rest != "") != want || want && !strings.HasPrefix(rest, "ERIS: urn:eris:B") {
			t.Errorf("%s: annotated:\n%s", hash, text)
		}
		if n := authorised(t, key, text); want && n.ERIS[0].Signed {
			t.Errorf("%s: the capability counts as signed", hash)
		}
	}
	wantStatus(t, here+"/00000000000000000000000000000009.narinfo", 404)
	if _, body := wantStatus(t, here+"/nar/gzip/00000000000000000000000000000001-file%2Bplus", 200); body == "" {
		t.Error("an empty nar")
	}
	for _, bad := range []string{"", "ftp://x", "http://", "%"} {
		if _, err := publish.NewAnnotator(publish.AnnotatorOptions{Upstream: bad}); err == nil {
			t.Errorf("%q is accepted as a server", bad)
		}
	}
	upstream.Close()
	wantStatus(t, here+"/00000000000000000000000000000001.narinfo", http.StatusBadGateway)
}

// TestAnnotatorUpstream has an annotator pass on nothing that its upstream makes up to harm it, or
// to be shown what is not its own.
func TestAnnotatorUpstream(t *testing.T) {
	const path = "/0000000000000000000000000000000a.narinfo"
	good := "StorePath: /gnu/store/0000000000000000000000000000000a-x\nNarHash: sha256:" + strings.Repeat("0", 52) +
		"\nNarSize: 120\nReferences: \nURL: x\nCompression: none\n"
	found := "HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: "
	hidden := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, map[string]string{"/good": good, "/secret": "a secret"}[r.URL.Path])
	}))
	defer hidden.Close()
	for name, test := range map[string]struct {
		response string
		status   int
		body     string
	}{
		"narinfo elsewhere": {found + hidden.URL + "/good\r\n\r\n", 200, good},
		"secret elsewhere":  {found + hidden.URL + "/secret\r\n\r\n", 502, "no good answer"},
		"another protocol":  {"HTTP/1.1 101 x\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", 502, "no good answer"},
		"no status":         {"HTTP/1.1 000 \r\nContent-Length: 1\r\n\r\nx", 502, "no good answer"},
		"long header":       {"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 1<<20) + "\r\nContent-Length: 1\r\n\r\nx", 502, "no good answer"},
	} {
		upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			c, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			io.WriteString(c, test.response)
			if name == "another protocol" {
				io.Copy(io.Discard, c)
			}
		}))
		status, _, body := request(t, "GET", annotator(t, publish.AnnotatorOptions{Upstream: upstream.URL})+path)
		if status != test.status || !strings.HasPrefix(body, test.body) {
			t.Errorf("%s: status %d, %q", name, status, body)
		}
		upstream.Close()
	}
}

// TestAnnotatorRedirected has a server that wants a password redirect to itself: clients, which do
// not know it, get what is there all the same.
func TestAnnotatorRedirected(t *testing.T) {
	const name = "0000000000000000000000000000000a.narinfo"
	var location string
	guarded := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, password, _ := r.BasicAuth()
		switch {
		case password != "secret":
			w.WriteHeader(http.StatusUnauthorized)
		case strings.Contains(r.URL.Path, "/there/"):
			io.WriteString(w, r.URL.RequestURI())
		default:
			w.Header().Set("Location", location)
			w.WriteHeader(http.StatusFound)
		}
	}))
	defer guarded.Close()
	server := strings.Replace(guarded.URL, "127.0.0.1", "localhost", 1)
	here := annotator(t, publish.AnnotatorOptions{Upstream: strings.Replace(server, "localhost", "me:secret@LOCALHOST", 1) + "/a%20b/"})
	for _, path := range []string{"nar/zstd/a%2Bb", name} {
		want := "/a%20b/there/" + path + "?a=%2F"
		for _, location = range []string{server + want, want, strings.TrimPrefix(server, "http:") + want} {
			if _, body := wantStatus(t, here+"/"+path, http.StatusOK); body != want {
				t.Errorf("%s: %q", location, body)
			}
		}
	}
	location = "/elsewhere/there/x?y#z" // not below the URL
	if _, body := wantStatus(t, here+"/nar/x", http.StatusOK); body != "/elsewhere/there/x?y" {
		t.Errorf("%s: %q", location, body)
	}
	for _, location = range []string{"http://127.0.0.1:1/there/", "again"} {
		if _, to, _ := unredirected(t, here+"/nar/x"); to != location {
			t.Errorf("to %q instead of %q", to, location)
		}
	}
}

// TestAnnotatorLoop has two annotators ask each other.
func TestAnnotatorLoop(t *testing.T) {
	second := httptest.NewUnstartedServer(nil)
	defer second.Close()
	first := annotator(t, publish.AnnotatorOptions{Upstream: "http://" + second.Listener.Addr().String()})
	second.Config.Handler = newAnnotator(t, publish.AnnotatorOptions{Upstream: first})
	second.Start()
	wantStatus(t, first+"/0000000000000000000000000000000a.narinfo", http.StatusLoopDetected)
}

// TestAnnotatorNarLater has a server not give the nar the first time: it is busy, or the connection
// breaks. The second time the nar gets its capability.
func TestAnnotatorNarLater(t *testing.T) {
	path, narHash := aTree(t)
	text := "StorePath: /gnu/store/" + filepath.Base(path) + "\nNarHash: sha256:" + nixbase32.EncodeToString(narHash[:]) +
		"\nNarSize: 1000000\nReferences: \nURL: nar.gz\nCompression: gzip\n"
	var compressed bytes.Buffer
	z := gzip.NewWriter(&compressed)
	tree := nar.NewTree(path)
	defer tree.Close()
	_, err := nar.Write(z, tree)
	must(t, errors.Join(err, z.Close()))
	var busy, broken atomic.Bool
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/nar.gz" && broken.Load():
			w.Header().Set("Content-Length", strconv.Itoa(compressed.Len()))
			w.Write(compressed.Bytes()[:compressed.Len()/2])
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		case r.URL.Path == "/nar.gz":
			w.Write(compressed.Bytes())
		case busy.Load():
			w.WriteHeader(http.StatusServiceUnavailable)
		default:
			io.WriteString(w, text)
		}
	}))
	defer upstream.Close()
	for name, failing := range map[string]*atomic.Bool{"busy": &busy, "broken": &broken} {
		cache := t.TempDir()
		for _, fails := range []bool{true, false} {
			failing.Store(fails)
			c := publish.NewCapabilities(cache, nil, 1, logger(t)) // as another process, which may try again at once
			annotator(t, publish.AnnotatorOptions{Upstream: upstream.URL, Root: filepath.Dir(path), Capabilities: c, Nars: true})
			found, err := c.FindSoon(t.Context(), path, narHash)
			for !found && err == nil { // some tries take long
				found, err = c.FindSoon(t.Context(), path, narHash)
			}
			if values, _ := c.Known(path, narHash); found == fails || len(values) == 2 == fails {
				t.Errorf("%s %v: found %v, %v, error %v", name, fails, found, values, err)
			}
			c.Close()
		}
	}
}

// TestAnnotatorPassesOn checks what an annotator makes of answers that are no narinfos of items
// that it has.
func TestAnnotatorPassesOn(t *testing.T) {
	const hash = "0000000000000000000000000000000a"
	// Bytes that a parser and printer would not leave alone.
	odd := "\n# comment\nStorePath: /gnu/store/" + hash + "-x\nNarHash:sha256:" + strings.Repeat("0", 52) +
		"\nNarSize:  120\nUnknown: \t y \nReferences: \nURL: ../other/nar/x%2Bx?y=%2f\nCompression: none\n"
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.RequestURI {
		case "/mirror/" + hash + ".narinfo":
			w.Header().Set("Cache-Control", "max-age=77")
			w.Header().Set("Content-Type", "text/x-other")
			io.WriteString(w, odd)
		case "/mirror/0000000000000000000000000000000b.narinfo":
			http.Redirect(w, r, hash+".narinfo", http.StatusFound)
		case "/mirror/0000000000000000000000000000000c.narinfo":
			w.Header().Set("Cache-Control", "max-age=300")
			w.Header().Set("X-Baking", "1")
			w.WriteHeader(404)
		case "/mirror/0000000000000000000000000000000d.narinfo":
			w.WriteHeader(503)
			io.WriteString(w, "later")
		case "/mirror/0000000000000000000000000000000f.narinfo":
			w.Write(make([]byte, narinfo.MaxSize+1))
		default:
			fmt.Fprintf(w, "%s %s", r.Host, r.RequestURI)
		}
	}))
	defer upstream.Close()
	options := publish.AnnotatorOptions{Upstream: upstream.URL + "/mirror/", Root: t.TempDir(), Capabilities: newCapabilities(t, nil)}
	here := annotator(t, options)
	for path, want := range map[string]struct {
		status             int
		cacheControl, body string
	}{
		"/" + hash + ".narinfo":                            {200, "max-age=77", odd},
		"/0000000000000000000000000000000b.narinfo":        {200, "max-age=77", odd},
		"/0000000000000000000000000000000c.narinfo":        {404, "max-age=300", ""},
		"/0000000000000000000000000000000d.narinfo":        {503, "", "later"},
		"/0000000000000000000000000000000f.narinfo":        {502, "", "no good answer from " + strings.TrimPrefix(upstream.URL, "http://") + "\n"},
		"/nar/gzip/a%2Bb?x=%2f":                            {200, "", strings.TrimPrefix(upstream.URL, "http://") + " /mirror/nar/gzip/a%2Bb?x=%2f"},
		"/nix-cache-info":                                  {200, "", strings.TrimPrefix(upstream.URL, "http://") + " /mirror/nix-cache-info"},
		"/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee.narinfo?%2e%2e": {200, "", strings.TrimPrefix(upstream.URL, "http://") + " /mirror/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee.narinfo?%2e%2e"},
	} {
		status, header, body := request(t, "GET", here+path)
		if status != want.status || header.Get("Cache-Control") != want.cacheControl || body != want.body {
			t.Errorf("%s: status %d, header %v, body %.300q; want %+v", path, status, header, body, want)
		}
	}

	// Clients find the nars themselves.
	options.Upstream = "http://mirror.example/a%20b/"
	elsewhere := annotator(t, options)
	if status, to, _ := unredirected(t, elsewhere+"/nar/zstd/a%2Bb%3Fc"); status != 302 || to != "http://mirror.example/a%20b/nar/zstd/a%2Bb%3Fc" {
		t.Errorf("status %d, to %q", status, to)
	}

	// But not at another port of the host, where Guix does not look; nor here for ever.
	status, _, body := unredirected(t, here+"/nar/zstd/x")
	if want := strings.TrimPrefix(upstream.URL, "http://") + " /mirror/nar/zstd/x"; status != 200 || body != want {
		t.Errorf("status %d, %q", status, body)
	}
	itself := httptest.NewUnstartedServer(nil)
	options.Upstream = "http://" + itself.Listener.Addr().String()
	itself.Config.Handler = newAnnotator(t, options)
	itself.Start()
	defer itself.Close()
	wantStatus(t, itself.URL+"/nar/zstd/x", http.StatusLoopDetected)

	// A password is this server's: clients get the nars by way of it.
	guarded := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, password, _ := r.BasicAuth()
		fmt.Fprint(w, user, " ", password)
	}))
	defer guarded.Close()
	options.Upstream = "http://me:secret@" + strings.Replace(strings.TrimPrefix(guarded.URL, "http://"), "127.0.0.1", "localhost", 1)
	for _, path := range []string{"/nar/zstd/x", "/" + hash + ".narinfo"} {
		if status, to, body := unredirected(t, annotator(t, options)+path); status != 200 || body != "me secret" {
			t.Errorf("%s: status %d, to %q: %q", path, status, to, body)
		}
	}

	// It opens what is below the URL of that server, and nothing else there.
	for _, path := range []string{"/../private", "/nar/../../private", "/%2e%2e/private", "/nar/..%2F..%2Fprivate"} {
		wantStatus(t, annotator(t, options)+path, http.StatusNotFound)
	}

	// A user name may be a secret, too, for the log and who reads its last lines on the page.
	var log []string
	options.Log = func(format string, a ...any) { log = append(log, fmt.Sprintf(format, a...)) }
	guarded.Close()
	newAnnotator(t, options).ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/"+hash+".narinfo", nil))
	options.Upstream = "htps://me:secret@mirror.example"
	_, err := publish.NewAnnotator(options)
	log = append(log, fmt.Sprint(err))
	if text := strings.Join(log, "\n"); len(log) != 2 || strings.Contains(text, "me:") || strings.Contains(text, "secret") {
		t.Errorf("log:\n%s", text)
	}
	upstream.Close()
	wantStatus(t, here+"/nar/zstd/x", http.StatusBadGateway)
}

// TestGone deletes an item: it is offered as long as its blocks are in the store.
func TestGone(t *testing.T) {
	directory, items := aStore(t)
	key := acl.GenerateSigningKey()
	cache, store := t.TempDir(), newMemoryStore()
	start := func(store fetch.Store) string {
		c := publish.NewCapabilities(cache, store, 2, logger(t))
		t.Cleanup(c.Close)
		return server(t, publish.ServerOptions{Root: directory, Items: items, Key: key, Capabilities: c, WaitFor: 1 << 30}).URL
	}
	const name = "/00000000000000000000000000000002.narinfo"
	first := start(store)
	_, _, before := complete(t, first+name)
	if !strings.Contains(before, "ERIS: ") {
		t.Fatalf("narinfo:\n%s", before)
	}
	must(t, os.RemoveAll(directory+"/00000000000000000000000000000002-tree"))
	above, _, _ := strings.Cut(before, "Signature:")
	for what, url := range map[string]string{"the same process": first, "another one": start(store)} {
		status, _, text := request(t, "GET", url+name)
		if status != 200 || !strings.HasPrefix(text, above+"Signature:") {
			t.Fatalf("%s: status %d, narinfo:\n%s", what, status, text)
		}
		authorised(t, key, text)
		wantStatus(t, url+"/nar/zstd/00000000000000000000000000000002-tree", 404)
	}
	// Without a store there are no blocks, and blocks may go, too.
	wantStatus(t, start(nil)+name, 404)
	store.Store = newMemoryStore().Store
	wantStatus(t, first+name, 404)
}

// TestFindLater checks that an item is encoded once in the background, however often it is asked
// for, and that Close waits for it.
func TestFindLater(t *testing.T) {
	path, narHash := aTree(t)
	store := newMemoryStore()
	release := store.Hold()
	c := publish.NewCapabilities(t.TempDir(), store, 2, logger(t))
	before := runtime.NumGoroutine()
	for range 1000 {
		c.FindLater(path, narHash)
	}
	store.AwaitHeld(1)
	if n := runtime.NumGoroutine(); n > before+100 {
		t.Errorf("%d goroutines for one item", n-before)
	}
	release()
	if _, err := find(c, path, narHash); err != nil {
		t.Error(err)
	}
	if _, ok := c.Known(path, narHash); !ok {
		t.Error("the capability is not known")
	}
	c.Close()
	if _, err := find(c, path, [32]byte{}); !errors.Is(err, context.Canceled) {
		t.Errorf("after Close: error %v", err)
	}

	// Whoever asked is gone, and the store hangs: Close ends it.
	store = newMemoryStore()
	store.Hold()
	c = publish.NewCapabilities(t.TempDir(), store, 2, logger(t))
	ctx, cancel := context.WithCancel(context.Background())
	go func() { store.AwaitHeld(1); cancel() }()
	if _, err := c.FindSoon(ctx, path, narHash); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	c.Close()
	if n := store.Held(); n != 0 {
		t.Errorf("%d calls of the store go on after Close", n)
	}
}

// TestHangingStore has a store that hangs: many requests must not wait long for items to be
// encoded, all of them together, and get what can be said without.
func TestHangingStore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, testHangingStore)
}

func testHangingStore(t *testing.T) {
	directory, items := aStore(t)
	store := newMemoryStore()
	release := store.Hold()
	c := newCapabilities(t, store)
	s := newServer(t, publish.ServerOptions{Root: directory, Items: items, Capabilities: c, WaitFor: 1 << 30, TTL: time.Hour})
	var network sourcetest.Network
	l := network.Listen()
	h := &http.Server{Handler: s}
	go h.Serve(l)
	defer h.Close()
	client := http.Client{Transport: &http.Transport{DialContext: network.Dial}}
	defer client.CloseIdleConnections()
	ask := func(item int) (header http.Header, text string) {
		response, err := client.Get(fmt.Sprintf("http://%s/%032d.narinfo", l.Addr(), item))
		must(t, err)
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		must(t, err)
		return response.Header, string(body)
	}
	begin := time.Now()
	for i := range 100 {
		header, text := ask(i%5 + 1)
		if !strings.HasPrefix(text, "StorePath: ") || strings.Contains(text, "ERIS:") || header.Get("Cache-Control") != "max-age=60" {
			t.Fatalf("header %v, narinfo:\n%s", header, text)
		}
	}
	if took := time.Since(begin); took > time.Minute { // 100 waits would take minutes
		t.Errorf("100 requests took %v", took)
	}
	release()
	for i := range 5 {
		n := items[fmt.Sprintf("%032d", i+1)]
		path := filepath.Join(directory, filepath.Base(n.StorePath))
		sum, _, err := nar.HashTree(t.Context(), path)
		must(t, err)
		if _, err := find(c, path, sum); err != nil {
			t.Error(err)
		}
		header, text := ask(i + 1)
		if !strings.Contains(text, "\nERIS: urn:eris:B") || header.Get("Cache-Control") != "max-age=3600" {
			t.Errorf("header %v, narinfo:\n%s", header, text)
		}
	}
}

// TestHashParts checks that what a request calls a hash is nothing else.
func TestHashParts(t *testing.T) {
	directory, items := aStore(t)
	narinfos := t.TempDir()
	write := func(name, text string) {
		must(t, os.WriteFile(name, []byte(text), 0o644))
	}
	record := "StorePath: /gnu/store/00000000000000000000000000000001-file+plus\n" +
		"NarHash: sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw\nNarSize: 120\nReferences: \nURL: x\nCompression: none\n"
	write(narinfos+"/00000000000000000000000000000001.narinfo", record)
	write(narinfos+"/00000000000000000000000000000002.narinfo", record) // a lie
	// A file outside whose way there has 32 characters.
	outside := filepath.Join(narinfos, "..", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa.narinfo")
	write(outside, record)
	defer os.Remove(outside)
	for name, items := range map[string]publish.Items{"directory": publish.Directory(narinfos), "manifest": items} {
		h := server(t, publish.ServerOptions{Root: directory, Items: items})
		for path, want := range map[string]int{
			"/00000000000000000000000000000001.narinfo":                        200,
			"/00000000000000000000000000000002.narinfo":                        map[string]int{"directory": 404, "manifest": 200}[name],
			"/..%2faaaaaaaaaaaaaaaaaaaaaaaaaaaaa.narinfo":                      404,
			"/%00%00%00%00%00%00%00%0000000000000000000000000000000.narinfo":   404,
			"/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee.narinfo":                        404,
			"/0000000000000000000000000000000%C3%A9.narinfo":                   404,
			"/nar/..%2faaaaaaaaaaaaaaaaaaaaaaaaaaaaa-x":                        404,
			"/nar/gzip/00000000000000000000000000000001-file+plus%2fx":         404,
			"/nar/zstd/%2e%2e/00000000000000000000000000000001-file+plus":      404,
			"/nar/zstd/00000000000000000000000000000001-file+plus%00":          404,
			"/nar/lzip/00000000000000000000000000000001-file%2Bplus":           404,
			"/file/x/sha256/04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0": 404,
		} {
			wantStatus(t, h.URL+path, want)
		}
	}
}

// TestMethods checks that nothing but GET and HEAD is served, and that requests may come without
// waiting for answers.
func TestMethods(t *testing.T) {
	directory, items := aStore(t)
	h := server(t, publish.ServerOptions{Root: directory, Items: items, TTL: time.Minute})
	for _, method := range []string{"POST", "PUT", "DELETE", "OPTIONS"} {
		if status, _, _ := request(t, method, h.URL+"/00000000000000000000000000000001.narinfo"); status != 404 {
			t.Errorf("%s: status %d", method, status)
		}
	}
	conn, err := net.Dial("tcp", strings.TrimPrefix(h.URL, "http://"))
	must(t, err)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	order := []int{3, 1, 9, 2, 4, 1}
	for _, i := range order {
		fmt.Fprintf(conn, "GET /%032d.narinfo HTTP/1.1\r\nHost: x\r\n\r\n", i)
	}
	answers := bufio.NewReader(conn)
	for _, i := range order {
		response, err := http.ReadResponse(answers, nil)
		must(t, err)
		body, err := io.ReadAll(response.Body)
		must(t, err)
		if i == 9 && response.StatusCode != 404 || i != 9 && !strings.HasPrefix(string(body), fmt.Sprintf("StorePath: /gnu/store/%032d-", i)) {
			t.Errorf("item %d: status %d, body %.100q", i, response.StatusCode, body)
		}
	}
}

func TestItems(t *testing.T) {
	d := publish.Directory("../testdata/guix-mirror/all")
	n, err := d.Item(context.Background(), "lnqjid21cvqw4c4kh7xnj2ikp2d0qfnb")
	if err != nil || n.StorePath != "/gnu/store/lnqjid21cvqw4c4kh7xnj2ikp2d0qfnb-hello.txt" {
		t.Errorf("item %+v, error %v", n, err)
	}
	if _, err := d.Item(context.Background(), strings.Repeat("0", 32)); !errors.Is(err, publish.ErrNoItem) {
		t.Errorf("error %v", err)
	}
	for _, bad := range []string{"what", "StorePath: /gnu/store/x\nReferences: \n", "StorePath: /gnu/store/" + strings.Repeat("a", 32) + "-a\n",
		"StorePath: /gnu/store/" + strings.Repeat("a", 32) + "-a\nReferences: \nNarHash: md5:x\n"} {
		if m, err := publish.ParseManifest([]byte(bad)); err == nil {
			t.Errorf("%q is accepted as %v", bad, m)
		}
	}
}

// TestLogBounded has clients who ask in vain, or go away, not fill the log of a server and of an
// annotator.
func TestLogBounded(t *testing.T) {
	const name = "0000000000000000000000000000000a.narinfo"
	directory := t.TempDir()
	must(t, os.WriteFile(directory+"/"+name, []byte("damaged"), 0o644))
	lines := 0
	log := func(string, ...any) { lines++ }
	for of, handler := range map[string]http.Handler{
		"server":    newServer(t, publish.ServerOptions{Items: publish.Directory(directory), Log: log}),
		"annotator": newAnnotator(t, publish.AnnotatorOptions{Upstream: "http://127.0.0.1:1", Log: log}),
	} {
		ask := func(ctx context.Context, times int) int {
			lines = 0
			for range times {
				handler.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, "GET", "/"+name, nil))
			}
			return lines
		}
		gone, cancel := context.WithCancel(context.Background())
		cancel()
		if n := ask(gone, 10); n != 0 {
			t.Errorf("%s: %d lines about clients that have gone", of, n)
		}
		begin := time.Now()
		if n := ask(context.Background(), 100); n == 0 || n > 2+int(time.Since(begin).Seconds()) {
			t.Errorf("%s: %d lines about 100 requests", of, n)
		}
	}
}

// TestLogBoundedFull has those who ask for a nar that is kept not fill the log while nothing more
// can be kept.
func TestLogBoundedFull(t *testing.T) {
	directory, items := aStore(t)
	kept := t.TempDir()
	nars := publish.NewNars(kept, 1, 0, logger(t))
	defer nars.Close()
	var lines atomic.Int64
	s := server(t, publish.ServerOptions{
		Root: directory, Items: items, Nars: nars, Compressions: []string{"gzip"}, Log: func(string, ...any) { lines.Add(1) },
	})
	const hashPart = "00000000000000000000000000000001"
	ask := func() (header http.Header) {
		_, header, _ = request(t, "GET", s.URL+"/"+hashPart+".narinfo")
		return header
	}
	for ask().Get("Cache-Control") != "" { // until the nar is kept
		time.Sleep(time.Millisecond)
	}
	note := kept + "/" + hashPart + ".narinfo"
	must(t, errors.Join(os.Remove(note), os.Mkdir(note, 0o755)))
	begin := time.Now()
	for range 100 {
		ask()
	}
	if n := lines.Load(); n == 0 || n > 2+int64(time.Since(begin).Seconds()) {
		t.Errorf("%d lines about 100 requests", n)
	}
}
