// SPDX-License-Identifier: GPL-3.0-or-later

package publish_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// memoryStore is a fetch.Store in memory.
type memoryStore struct {
	mu     sync.Mutex
	blocks map[eris.Reference][]byte
	fail   error
	puts   int
}

func (m *memoryStore) Put(_ context.Context, ref eris.Reference, block []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.puts++
	if m.fail != nil {
		return m.fail
	}
	if m.blocks == nil {
		m.blocks = map[eris.Reference][]byte{}
	}
	m.blocks[ref] = bytes.Clone(block)
	return nil
}

func (m *memoryStore) Get(_ context.Context, ref eris.Reference, _ eris.BlockSize, _ []byte) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if b, ok := m.blocks[ref]; ok {
		return b, nil
	}
	return nil, eris.ErrNotFound
}

func (m *memoryStore) String() string { return "memory:" }
func (m *memoryStore) Close() error   { return nil }

// logger shows messages in the log of a test.
func logger(t testing.TB) func(string, ...any) {
	return func(format string, a ...any) { t.Logf(format, a...) }
}

// aStore is a store with some items.
func aStore(t *testing.T) (directory string, items publish.Manifest) {
	directory = filepath.Join(t.TempDir(), "store")
	var manifest strings.Builder
	add := func(i int, name string, make func(path string) error, references ...string) {
		base := fmt.Sprintf("%032d-%s", i, name)
		if err := make(filepath.Join(directory, base)); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&manifest, "StorePath: /gnu/store/%s\nReferences: %s\n\n", base, strings.Join(references, " "))
	}
	if err := os.Mkdir(directory, 0o755); err != nil {
		t.Fatal(err)
	}
	add(1, "file+plus", func(p string) error { return os.WriteFile(p, []byte("hello\n"), 0o644) })
	add(2, "tree", func(p string) error {
		return errors.Join(os.MkdirAll(p+"/bin", 0o755), os.WriteFile(p+"/bin/x", bytes.Repeat([]byte("x"), 100000), 0o755),
			os.Symlink("x", p+"/bin/y"), os.WriteFile(p+"/empty", nil, 0o644))
	}, "00000000000000000000000000000001-file+plus", "00000000000000000000000000000002-tree")
	add(3, "link", func(p string) error { return os.Symlink("/gnu/store/x", p) })
	add(4, "empty-directory", func(p string) error { return os.MkdirAll(p+"/empty", 0o755) })
	add(5, "large", func(p string) error { return os.WriteFile(p, bytes.Repeat([]byte("0123456789"), 200000), 0o644) })
	items, err := publish.ParseManifest([]byte(manifest.String()))
	if err != nil {
		t.Fatal(err)
	}
	return directory, items
}

// get returns an answer of a server.
func get(t *testing.T, url string) (status int, header http.Header, body string) {
	t.Helper()
	response, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, response.Header, string(b)
}

// server starts a server.
func server(t *testing.T, o publish.ServerOptions) *httptest.Server {
	t.Helper()
	o.StoreDir, o.Log = "/gnu/store", logger(t)
	s, err := publish.NewServer(o)
	if err != nil {
		t.Fatal(err)
	}
	h := httptest.NewServer(s)
	t.Cleanup(h.Close)
	return h
}

// TestPublishAndSubstitute takes items from one store to another one, through
// blocks and through nars.
func TestPublishAndSubstitute(t *testing.T) {
	directory, items := aStore(t)
	key := acl.GenerateSigningKey()
	store := &memoryStore{}
	capabilities := publish.NewCapabilities(t.TempDir()+"/capabilities", store, logger(t))
	defer capabilities.Close()
	h := server(t, publish.ServerOptions{
		Root: directory, Items: items, Key: key, Host: "example", Capabilities: capabilities,
		WaitFor: 1 << 30, Compressions: []string{"zstd", "gzip", "none"},
	})
	for _, policy := range []substitute.Policy{substitute.ERISOnly, substitute.HTTPOnly} {
		mirrors := mirror.NewClient(mirror.Options{})
		var log bytes.Buffer
		s := substitute.New(substitute.Config{
			StoreDir: "/gnu/store", URLs: []string{h.URL}, Keys: acl.NewACL(key.PublicKey()), Mirrors: mirrors,
			Blocks: fetch.NewInOrder([]fetch.Source{store}, nil), Policy: policy,
			Log: protocol.NewLog(&log, protocol.LogStyle{}),
		})
		destination := t.TempDir()
		for _, item := range items {
			to := filepath.Join(destination, filepath.Base(item.StorePath))
			outcome := s.Substitute(context.Background(), item.StorePath, to)
			if outcome.Status != substitute.Success {
				t.Fatalf("%s, %v: %+v\n%s", item.StorePath, policy, outcome, log.String())
			}
			var want, got bytes.Buffer
			nar.Write(&want, nar.NewTree(filepath.Join(directory, filepath.Base(item.StorePath))))
			nar.Write(&got, nar.NewTree(to))
			if !bytes.Equal(got.Bytes(), want.Bytes()) {
				t.Errorf("%s comes back as another tree", item.StorePath)
			}
		}
		if policy == substitute.ERISOnly && !strings.Contains(log.String(), "Downloading urn:eris:B") {
			t.Errorf("the log does not name a URN:\n%s", log.String())
		}
		if err := restore.Remove(destination); err != nil {
			t.Error(err)
		}
		mirrors.Close()
	}
}

func TestNarinfo(t *testing.T) {
	directory, items := aStore(t)
	key := acl.GenerateSigningKey()
	capabilities := publish.NewCapabilities(t.TempDir(), nil, logger(t))
	defer capabilities.Close()
	h := server(t, publish.ServerOptions{
		Root: directory, Items: items, Key: key, Host: "example", Capabilities: capabilities, WaitFor: 1 << 20,
		Compressions: []string{"gzip", "none"}, TTL: time.Hour,
	})
	status, header, text := get(t, h.URL+"/00000000000000000000000000000001.narinfo")
	if status != 200 || header.Get("Cache-Control") != "max-age=3600" || header.Get("Content-Type") != "application/x-nix-narinfo" {
		t.Errorf("status %d, header %v", status, header)
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
	n, err := narinfo.Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Authorise(acl.NewACL(key.PublicKey())); err != nil {
		t.Error(err)
	}

	// What takes long to encode comes later; until then the answer is temporary.
	url := h.URL + "/00000000000000000000000000000005.narinfo"
	_, header, text = get(t, url)
	if strings.Contains(text, "ERIS:") || header.Get("Cache-Control") != "max-age=60" {
		t.Errorf("header %v, narinfo:\n%s", header, text)
	}
	for range 1000 {
		if _, header, text = get(t, url); strings.Contains(text, "\nERIS: urn:eris:B") {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
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
		if status, _, body := get(t, h.URL+path); status != want {
			t.Errorf("%s: status %d, body %.100q; want %d", path, status, body, want)
		}
	}
	if response, err := http.Post(h.URL+"/nix-cache-info", "text/plain", nil); err != nil || response.StatusCode != 404 {
		t.Errorf("POST: %v, error %v", response, err)
	}
	if _, _, body := get(t, h.URL+"/nix-cache-info"); body != "StoreDir: /gnu/store\nWantMassQuery: 0\nPriority: 100\n" {
		t.Errorf("nix-cache-info: %q", body)
	}
	// An item that has gone from the store is not offered any more.
	if err := os.Remove(filepath.Join(directory, "00000000000000000000000000000001-file+plus")); err != nil {
		t.Fatal(err)
	}
	if status, _, _ := get(t, h.URL+"/00000000000000000000000000000001.narinfo"); status != 404 {
		t.Errorf("status %d of an item that has gone", status)
	}
}

// TestCapabilities checks what is encoded when.
func TestCapabilities(t *testing.T) {
	directory, items := aStore(t)
	path := filepath.Join(directory, filepath.Base(items["00000000000000000000000000000002"].StorePath))
	h := sha256.New()
	if _, err := nar.Write(h, nar.NewTree(path)); err != nil {
		t.Fatal(err)
	}
	narHash := [32]byte(h.Sum(nil))
	cache := t.TempDir() + "/a/b"
	ctx := context.Background()

	// Without a store.
	c := publish.NewCapabilities(cache, nil, logger(t))
	if _, ok := c.Known(path, narHash); ok {
		t.Error("the capability is known from nowhere")
	}
	first, err := c.Find(ctx, path, narHash)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()

	// Another process knows it; with a store the blocks are needed, once.
	c = publish.NewCapabilities(cache, nil, logger(t))
	if got, ok := c.Known(path, narHash); !ok || got != first {
		t.Errorf("%v, %v", got, ok)
	}
	if _, ok := c.Known(path, [32]byte{1}); ok {
		t.Error("the capability of other contents is known")
	}
	c.Close()
	store := &memoryStore{fail: errors.New("store is full")}
	c = publish.NewCapabilities(cache, store, logger(t))
	if _, ok := c.Known(path, narHash); ok {
		t.Error("nobody has put the blocks into the store")
	}
	for range 2 { // the second time without trying
		if _, err := c.Find(ctx, path, narHash); err == nil || !strings.Contains(err.Error(), "store is full") {
			t.Errorf("error %v", err)
		}
	}
	c.Close()
	store.fail = nil
	c = publish.NewCapabilities(cache, store, logger(t))
	var wait sync.WaitGroup
	for range 20 {
		wait.Go(func() {
			if got, err := c.Find(ctx, path, narHash); err != nil || got != first {
				t.Errorf("%v, error %v", got, err)
			}
		})
	}
	wait.Wait()
	if store.puts > 2*len(store.blocks)+1 {
		t.Errorf("%d blocks were put %d times", len(store.blocks), store.puts)
	}
	if _, err := c.Find(ctx, path, [32]byte{1}); err == nil || !strings.Contains(err.Error(), "other contents") {
		t.Errorf("error %v", err)
	}
	c.Close()
}

// TestEncodeForms checks that a tree that ERIS-FS cannot express is encoded as
// its archive.
func TestEncodeForms(t *testing.T) {
	directory, items := aStore(t)
	for hash, want := range map[string]string{
		"00000000000000000000000000000001": "eris-fs",
		"00000000000000000000000000000003": "eris-fs",
		"00000000000000000000000000000004": "nar",
	} {
		path := filepath.Join(directory, filepath.Base(items[hash].StorePath))
		store := &memoryStore{}
		e, err := publish.Encode(context.Background(), path, store, eris.ConvergenceSecret{})
		if err != nil {
			t.Fatal(err)
		}
		var archive bytes.Buffer
		nar.Write(&archive, nar.NewTree(path))
		if e.Form != want || e.NarHash != sha256.Sum256(archive.Bytes()) || e.NarSize != uint64(archive.Len()) {
			t.Errorf("%s: %+v", path, e)
		}
		if want == "nar" {
			content, err := eris.Open(context.Background(), store, e.Capability, 1<<20, eris.Window{})
			if err != nil {
				t.Fatal(err)
			}
			var got bytes.Buffer
			if _, err := content.WriteTo(context.Background(), &got); err != nil || !bytes.Equal(got.Bytes(), archive.Bytes()) {
				t.Errorf("%s: %d bytes, error %v", path, got.Len(), err)
			}
		}
	}
	if _, err := publish.Encode(context.Background(), directory+"/absent", nil, eris.ConvergenceSecret{}); err == nil {
		t.Error("nothing can be encoded")
	}
	failing := &memoryStore{fail: errors.New("no")}
	for _, name := range []string{"00000000000000000000000000000004-empty-directory", "00000000000000000000000000000005-large"} {
		if _, err := publish.Encode(context.Background(), directory+"/"+name, failing, eris.ConvergenceSecret{}); err == nil {
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
	if err := os.WriteFile(local+"/00000000000000000000000000000001-file+plus", []byte("another build"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(local + "/00000000000000000000000000000003-link"); err != nil {
		t.Fatal(err)
	}
	store := &memoryStore{}
	capabilities := publish.NewCapabilities(t.TempDir(), store, logger(t))
	defer capabilities.Close()
	a, err := publish.NewAnnotator(publish.AnnotatorOptions{
		Upstream: upstream.URL + "/", StoreDir: "/gnu/store", Root: local, Capabilities: capabilities, WaitFor: 1 << 30, Log: logger(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	h := httptest.NewServer(a)
	defer h.Close()
	for hash, want := range map[string]bool{
		"00000000000000000000000000000001": false,
		"00000000000000000000000000000002": true,
		"00000000000000000000000000000003": false,
		"00000000000000000000000000000004": true,
		"00000000000000000000000000000005": true,
	} {
		_, _, plain := get(t, upstream.URL+"/"+hash+".narinfo")
		_, _, text := get(t, h.URL+"/"+hash+".narinfo")
		rest, ok := strings.CutPrefix(text, plain)
		if !ok || (rest != "") != want || want && !strings.HasPrefix(rest, "ERIS: urn:eris:B") {
			t.Errorf("%s: annotated:\n%s", hash, text)
		}
		n, err := narinfo.Parse([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if err := n.Authorise(acl.NewACL(key.PublicKey())); err != nil {
			t.Errorf("%s: the signature is not good any more: %v", hash, err)
		}
		if want && n.ERIS[0].Signed {
			t.Errorf("%s: the capability counts as signed", hash)
		}
	}
	if status, _, _ := get(t, h.URL+"/00000000000000000000000000000009.narinfo"); status != 404 {
		t.Errorf("status %d", status)
	}
	if status, _, body := get(t, h.URL+"/nar/gzip/00000000000000000000000000000001-file%2Bplus"); status != 200 || body == "" {
		t.Errorf("nar: status %d, %d bytes", status, len(body))
	}
	// A substituter takes the blocks on the word of the narinfo above them.
	mirrors := mirror.NewClient(mirror.Options{})
	defer mirrors.Close()
	var log bytes.Buffer
	for _, unsigned := range []bool{true, false} {
		s := substitute.New(substitute.Config{
			StoreDir: "/gnu/store", URLs: []string{h.URL}, Keys: acl.NewACL(key.PublicKey()), Mirrors: mirrors,
			Blocks: fetch.NewInOrder([]fetch.Source{store}, nil), Policy: substitute.ERISOnly, UnsignedCapabilities: unsigned,
			Log: protocol.NewLog(&log, protocol.LogStyle{}),
		})
		to := t.TempDir() + "/item"
		outcome := s.Substitute(context.Background(), items["00000000000000000000000000000002"].StorePath, to)
		if (outcome.Status == substitute.Success) != unsigned {
			t.Errorf("unsigned capabilities %v: %+v\n%s", unsigned, outcome, log.String())
		}
		if err := restore.Remove(to); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"", "ftp://x", "http://", "%"} {
		if _, err := publish.NewAnnotator(publish.AnnotatorOptions{Upstream: bad}); err == nil {
			t.Errorf("%q is accepted as a server", bad)
		}
	}
	upstream.Close()
	if status, _, _ := get(t, h.URL+"/00000000000000000000000000000001.narinfo"); status != http.StatusBadGateway {
		t.Errorf("status %d without the other server", status)
	}
}

// TestDatabase reads a database like the daemon's.
func TestDatabase(t *testing.T) {
	name := t.TempDir() + "/db with space?.sqlite"
	db, err := sql.Open("sqlite", "file:"+strings.ReplaceAll(strings.ReplaceAll(name, "?", "%3f"), " ", "%20"))
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("x"))
	a, b := "/gnu/store/"+strings.Repeat("a", 32)+"-a", "/gnu/store/"+strings.Repeat("b", 32)+"-b"
	for _, statement := range []string{
		"PRAGMA journal_mode = wal",
		// The tables of Guix, nix/libstore/schema.sql.
		`CREATE TABLE ValidPaths (id integer primary key autoincrement not null, path text unique not null, hash text not null,
			registrationTime integer not null, deriver text, narSize integer)`,
		`CREATE TABLE Refs (referrer integer not null, reference integer not null, primary key (referrer, reference),
			foreign key (referrer) references ValidPaths(id) on delete cascade, foreign key (reference) references ValidPaths(id) on delete restrict)`,
		"INSERT INTO ValidPaths VALUES (1, '" + a + "', 'sha256:" + hex.EncodeToString(digest[:]) + "', 0, '/gnu/store/" + strings.Repeat("d", 32) + "-a.drv', 123)",
		"INSERT INTO ValidPaths VALUES (2, '" + b + "', 'sha256:" + hex.EncodeToString(digest[:]) + "', 0, NULL, 5)",
		"INSERT INTO ValidPaths VALUES (3, '/gnu/store/" + strings.Repeat("c", 32) + "-bad', 'md5:00', 0, NULL, 5)",
		"INSERT INTO Refs VALUES (1, 2)",
		"INSERT INTO Refs VALUES (1, 1)",
	} {
		if _, err := db.Exec(statement); err != nil {
			t.Fatal(err)
		}
	}
	defer db.Close() // the daemon has it open too
	d, err := publish.OpenDatabase(name, "/gnu/store")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	n, err := d.Item(context.Background(), strings.Repeat("a", 32))
	if err != nil {
		t.Fatal(err)
	}
	if n.StorePath != a || n.NarDigest != digest || n.NarSize != 123 || n.Deriver != strings.Repeat("d", 32)+"-a.drv" ||
		strings.Join(n.References, " ") != filepath.Base(a)+" "+filepath.Base(b) {
		t.Errorf("item %+v", n)
	}
	if n, err := d.Item(context.Background(), strings.Repeat("b", 32)); err != nil || n.Deriver != "" || len(n.References) != 0 {
		t.Errorf("item %+v, error %v", n, err)
	}
	for _, hash := range []string{strings.Repeat("0", 32), strings.Repeat("z", 32), strings.Repeat("a", 31), "%"} {
		if n, err := d.Item(context.Background(), hash); !errors.Is(err, publish.ErrNoItem) {
			t.Errorf("%s: item %+v, error %v", hash, n, err)
		}
	}
	if _, err := d.Item(context.Background(), strings.Repeat("c", 32)); err == nil || errors.Is(err, publish.ErrNoItem) {
		t.Errorf("error %v", err)
	}
	if _, err := publish.OpenDatabase(name+".absent", "/gnu/store"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v", err)
	}
	if err := os.WriteFile(name+".bad", []byte(strings.Repeat("no database ", 1000)), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := publish.OpenDatabase(name+".bad", "/gnu/store"); err == nil {
		t.Error("anything is a database")
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
