// SPDX-License-Identifier: GPL-3.0-or-later

package substitute_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/narinfocache"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// itemPath is the file name of a store item that is not.
func itemPath(i int) string { return fmt.Sprintf("/gnu/store/%032d-item", i) }

func itemPaths(n int) []string {
	paths := make([]string, n)
	for i := range paths {
		paths[i] = itemPath(i)
	}
	return paths
}

// sign makes a narinfo; a nil key does not sign it.
func sign(t testing.TB, key *acl.SigningKey, path string, narSize uint64) string {
	t.Helper()
	return signInfo(t, key, &narinfo.Narinfo{StorePath: path, NarSize: narSize})
}

// signInfo makes a narinfo out of what is to be signed.
func signInfo(t testing.TB, key *acl.SigningKey, n *narinfo.Narinfo) string {
	t.Helper()
	part, err := narinfo.SignedPart(n)
	must(t, err)
	signature := ""
	if key != nil {
		if signature, err = key.Sign(sha256.Sum256([]byte(part)), "test"); err != nil {
			t.Fatal(err)
		}
	}
	text, err := narinfo.Text(part, signature, []narinfo.URL{{URL: "nar", Compression: "none"}})
	must(t, err)
	return text
}

// A testServer has narinfos, and notes what it is asked for.
type testServer struct {
	url   string
	asked atomic.Int64
	mu    sync.Mutex
	texts map[string]string // by path of the URL
	wait  func(r *http.Request)
}

func newTestServer(t testing.TB) *testServer {
	s := &testServer{texts: map[string]string{}}
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	s.url = server.URL
	return s
}

// testServer is [newTestServer] in the network.
func (n *testNetwork) testServer() *testServer {
	s := &testServer{texts: map[string]string{}}
	s.url = n.serve(s.ServeHTTP)
	return s
}

// ServeHTTP answers as a server of narinfos.
func (s *testServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.asked.Add(1)
	s.mu.Lock()
	text, ok := s.texts[r.URL.Path]
	wait := s.wait
	s.mu.Unlock()
	if wait != nil {
		wait(r)
	}
	if !ok {
		http.NotFound(w, r)
		return
	}
	fmt.Fprint(w, text)
}

// has gives the server a narinfo.
func (s *testServer) has(path, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.texts["/"+filepath.Base(path)[:32]+".narinfo"] = text
}

// wasAsked checks how often the server was asked since this was checked before.
func (s *testServer) wasAsked(t testing.TB, want int64) {
	t.Helper()
	if n := s.asked.Swap(0); n != want {
		t.Errorf("%d requests, want %d", n, want)
	}
}

// available checks how many of some items are.
func available(t testing.TB, s *substitute.Substituter, items []string, want int) {
	t.Helper()
	if have := s.Info(context.Background(), items); len(have) != want {
		t.Errorf("%d of %d items are available, want %d", len(have), len(items), want)
	}
}

func newSubstituter(t testing.TB, key *acl.SigningKey, servers ...*testServer) *substitute.Substituter {
	var urls []string
	for _, s := range servers {
		urls = append(urls, s.url)
	}
	s, _ := withLog(t, key, urls...)
	return s
}

// TestOrder checks that servers are asked in order and only for what is missing, and which narinfo
// the reply is made of.
func TestOrder(t *testing.T) {
	key := acl.GenerateSigningKey()
	a, b, c := newTestServer(t), newTestServer(t), newTestServer(t)
	a.has(itemPath(0), sign(t, key, itemPath(0), 100)) // a alone decides
	a.has(itemPath(1), sign(t, nil, itemPath(1), 201)) // not equivalent to what b vouches for
	a.has(itemPath(2), sign(t, nil, itemPath(2), 300)) // equivalent to it
	b.has(itemPath(0), sign(t, key, itemPath(0), 101)) // too late
	b.has(itemPath(1), sign(t, key, itemPath(1), 200))
	b.has(itemPath(2), sign(t, key, itemPath(2), 300))
	b.has(itemPath(3), sign(t, nil, itemPath(3), 400)) // nobody vouches for it
	c.has(itemPath(3), sign(t, nil, itemPath(3), 400))
	s := newSubstituter(t, key, a, b, c)
	records := s.Info(context.Background(), itemPaths(5))
	var got []string
	for _, r := range records {
		got = append(got, fmt.Sprint(r.Path, " ", r.NarSize))
	}
	want := []string{itemPath(0) + " 100", itemPath(1) + " 200", itemPath(2) + " 300"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	a.wasAsked(t, 5)
	b.wasAsked(t, 4)
	c.wasAsked(t, 2)
	// What is known need not be asked for.
	available(t, s, itemPaths(5), 3)
	for _, server := range []*testServer{a, b, c} {
		server.wasAsked(t, 0)
	}
}

// TestSlowServer checks that one that does not answer costs a second, once, although it has
// answered before, which is remembered.
func TestSlowServer(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNetwork) {
		key := acl.GenerateSigningKey()
		slow, good := n.testServer(), n.testServer()
		const items = 20
		known := itemPath(items)
		slow.has(known, sign(t, key, known, 2))
		slow.wait = func(r *http.Request) {
			if slow.asked.Load() > 1 {
				<-r.Context().Done()
			}
		}
		for _, path := range itemPaths(items) {
			slow.has(path, sign(t, key, path, 1))
			good.has(path, sign(t, key, path, 2))
		}
		s, _ := n.with(key, slow.url, good.url)
		begin := time.Now()
		for _, path := range itemPaths(items) {
			for _, path := range []string{known, path} {
				records := s.Info(context.Background(), []string{path})
				if len(records) != 1 || records[0].NarSize != 2 {
					t.Fatalf("records %+v", records)
				}
			}
		}
		if slow.asked.Load() == 0 {
			t.Error("the first server was not asked at all")
		}
		if took := time.Since(begin); took > 2*time.Second {
			t.Errorf("%d lookups took %v", items, took)
		}
	})
}

// TestSilentServers asks many servers before the one that answers.
func TestSilentServers(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNetwork) {
		key := acl.GenerateSigningKey()
		var urls []string
		for range 20 {
			urls = append(urls, n.serve(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
		}
		good := n.testServer()
		good.has(itemPath(0), sign(t, key, itemPath(0), 1))
		s, _ := n.with(key, append(urls, good.url)...)
		begin := time.Now()
		if records := s.Info(context.Background(), itemPaths(1)); len(records) != 1 {
			t.Errorf("records %+v", records)
		}
		if took := time.Since(begin); took > 5*time.Second { // a second for each would be 20
			t.Errorf("it took %v", took)
		}
	})
}

// TestOrderOfSlowServers checks that an answer that comes while others are waited for counts by its
// place in the list.
func TestOrderOfSlowServers(t *testing.T) {
	key := acl.GenerateSigningKey()
	first, second := newTestServer(t), newTestServer(t)
	answered := make(chan struct{})
	second.wait = func(*http.Request) { close(answered) }
	first.wait = func(*http.Request) { <-answered } // after the second one was asked
	for _, path := range itemPaths(1) {
		first.has(path, sign(t, key, path, 1))
	}
	s := newSubstituter(t, key, first, second)
	if records := s.Info(context.Background(), itemPaths(1)); len(records) != 1 || records[0].NarSize != 1 {
		t.Errorf("records %+v", records)
	}
}

func TestCancelledLookup(t *testing.T) {
	key := acl.GenerateSigningKey()
	silent := newTestServer(t)
	ctx, cancel := context.WithCancel(context.Background())
	silent.wait = func(r *http.Request) {
		cancel()
		<-r.Context().Done()
	}
	s := newSubstituter(t, key, silent)
	if have := s.Have(ctx, itemPaths(30)); len(have) > 0 {
		t.Errorf("available: %q", have)
	}
}

// withCache has narinfos kept in a directory, until the cache is closed.
func withCache(t testing.TB, s *substitute.Substituter, directory string) (closeCache func()) {
	cache, err := narinfocache.Open(directory)
	must(t, err)
	s.Cache = cache
	return cache.Close
}

// TestCache checks what is kept for how long.
func TestCache(t *testing.T) {
	key := acl.GenerateSigningKey()
	server := newTestServer(t)
	server.has(itemPath(0), sign(t, key, itemPath(0), 1))
	directory := t.TempDir()
	now := time.Now()
	ask := func(after time.Duration, paths []string) (have []string, asked int64) {
		t.Helper()
		s := newSubstituter(t, key, server)
		defer withCache(t, s, directory)()
		s.Now = func() time.Time { return now.Add(after) }
		before := server.asked.Load()
		have = s.Have(context.Background(), paths)
		return have, server.asked.Load() - before
	}
	for _, test := range []struct {
		after      time.Duration
		have, asks int
	}{
		{0, 1, 2},                            // nothing is known
		{time.Minute, 1, 0},                  // everything is
		{3 * time.Minute, 1, 1},              // perhaps it is there now
		{36*time.Hour + 4*time.Minute, 1, 2}, // the narinfo may have changed
		{36*time.Hour + 5*time.Minute, 1, 0}, // and again
		{100 * time.Hour, 1, 2},              // everything is old
		{-100 * time.Hour, 1, 2},             // or comes from the future
	} {
		have, asks := ask(test.after, itemPaths(2))
		if len(have) != test.have || asks != int64(test.asks) {
			t.Errorf("after %v: %d available, %d requests; want %d and %d", test.after, len(have), asks, test.have, test.asks)
		}
	}
	// A cached narinfo must still be signed by somebody who is authorised.
	s := newSubstituter(t, acl.GenerateSigningKey(), server)
	defer withCache(t, s, directory)()
	s.Now = func() time.Time { return now.Add(-100 * time.Hour) }
	available(t, s, itemPaths(1), 0)
	// What a server has given out for another item is not kept as a narinfo.
	server.has(itemPath(7), sign(t, key, itemPath(0), 1))
	if have, asks := ask(0, []string{itemPath(7)}); len(have) > 0 || asks != 1 {
		t.Errorf("available: %q after %d requests", have, asks)
	}
	// Nor is one on disk that nobody who counts has signed: strangers do not fill it.
	server.has(itemPath(8), sign(t, acl.GenerateSigningKey(), itemPath(8), 1))
	for range 2 {
		if have, asks := ask(0, []string{itemPath(8)}); len(have) > 0 || asks != 1 {
			t.Errorf("available: %q after %d requests", have, asks)
		}
	}
}

// BenchmarkWarmQuery asks about items whose narinfos are in the cache, as a new process does.
func BenchmarkWarmQuery(b *testing.B) {
	key := acl.GenerateSigningKey()
	server := newTestServer(b)
	const n = 1000
	for _, path := range itemPaths(n) {
		server.has(path, sign(b, key, path, 1))
	}
	cache, err := narinfocache.Open(b.TempDir())
	must(b, err)
	for i := 0; b.Loop(); i++ {
		s := newSubstituter(b, key, server)
		s.Cache = cache
		if have := s.Have(context.Background(), itemPaths(n)); len(have) != n {
			b.Fatalf("%d available", len(have))
		}
		if i == 0 {
			cache.Close()
			b.ResetTimer()
		}
	}
	b.ReportMetric(float64(n)*float64(b.N-1)/b.Elapsed().Seconds(), "narinfos/s")
}
