// SPDX-License-Identifier: GPL-3.0-or-later

package substitute_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// signReferring makes a narinfo of an item that refers to others.
func signReferring(t testing.TB, key *acl.SigningKey, path string, references []string) string {
	t.Helper()
	n := &narinfo.Narinfo{StorePath: path, NarSize: 1}
	for _, r := range references {
		n.References = append(n.References, filepath.Base(r))
	}
	return signInfo(t, key, n)
}

// closure gives servers a closure of n items, of which the farthest are depth steps from the first,
// itemPath(0). Each item has several references, and one is to itself. It returns the items.
func closure(t testing.TB, key *acl.SigningKey, n, depth int, server func(i int) *testServer) []string {
	t.Helper()
	r := rand.New(rand.NewPCG(1, uint64(n)))
	references := make([][]string, n)
	level := func(i int) int { // 0 for the first alone
		if i == 0 {
			return 0
		}
		return 1 + (i-1)*(depth-1)/(n-1)
	}
	var levels [][]int
	for i := range n {
		if l := level(i); l == len(levels) {
			levels = append(levels, nil)
		}
		l := level(i)
		levels[l] = append(levels[l], i)
		references[i] = append(references[i], itemPath(i))
		if l == 0 {
			continue
		}
		for range min(3, len(levels[l-1])) {
			from := levels[l-1][r.IntN(len(levels[l-1]))]
			references[from] = append(references[from], itemPath(i))
		}
	}
	if len(levels) != depth {
		t.Fatalf("%d levels", len(levels))
	}
	for i, refs := range references {
		if s := server(i); s != nil {
			s.has(itemPath(i), signReferring(t, key, itemPath(i), refs))
		}
	}
	return itemPaths(n)
}

// askOneByOne asks about items as the daemon does, each when it is referred to. It returns how many
// are available.
func askOneByOne(t testing.TB, s *substitute.Substituter, first string) int {
	t.Helper()
	seen := map[string]bool{first: true}
	available := 0
	for queue := []string{first}; len(queue) > 0; queue = queue[1:] {
		for _, r := range s.Info(context.Background(), queue[:1]) {
			available++
			for _, ref := range r.References {
				if !seen[ref] {
					seen[ref] = true
					queue = append(queue, ref)
				}
			}
		}
	}
	return available
}

// onOneConnection has narinfos requested on one connection, where requests are counted: of several,
// one that seems to have no server behind it is given up, and what was requested there is requested
// again.
func onOneConnection(n *testNetwork, s *substitute.Substituter) {
	s.Mirrors = mirror.NewClient(mirror.Options{Dial: n.Dial, MaxConnections: 2})
	n.t.Cleanup(s.Mirrors.Close)
}

// TestLookAhead asks about a closure one item at a time. Each narinfo is asked for once, those
// ahead as well, and nothing is shown between requests.
func TestLookAhead(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNetwork) {
		key := acl.GenerateSigningKey()
		server := n.testServer()
		closure(t, key, 300, 10, func(int) *testServer { return server })
		s, log := n.with(key, server.url)
		onOneConnection(n, s)
		s.LookAhead = 1000
		defer s.Close()
		if available := askOneByOne(t, s, itemPath(0)); available != 300 {
			t.Errorf("%d available", available)
		}
		server.wasAsked(t, 300)
		if n := strings.Count(log.String(), "%"); n > 2 { // of the first item alone
			t.Errorf("progress was shown %d times", n)
		}
	})
}

// until waits for a condition.
func until(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for range 6000 {
		if condition() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s does not happen", what)
}

// TestLookAheadBounds checks what is not looked up ahead.
func TestLookAheadBounds(t *testing.T) {
	key := acl.GenerateSigningKey()
	items := itemPaths(300)
	for name, test := range map[string]struct {
		most int
		ask  func(s *substitute.Substituter)
		want int64
	}{
		"none":          {0, func(s *substitute.Substituter) { s.Info(context.Background(), items[:1]) }, 1},
		"some":          {50, func(s *substitute.Substituter) { s.Info(context.Background(), items[:1]) }, 50},
		"availability":  {1000, func(s *substitute.Substituter) { s.Have(context.Background(), items[:1]) }, 1},
		"many at once":  {1000, func(s *substitute.Substituter) { s.Info(context.Background(), items[:100]) }, 100},
		"all there is":  {1000, func(s *substitute.Substituter) { s.Info(context.Background(), items[:1]) }, 300},
		"not available": {1000, func(s *substitute.Substituter) { s.Info(context.Background(), []string{itemPath(1000)}) }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *testNetwork) {
				server := n.testServer()
				closure(t, key, 300, 5, func(int) *testServer { return server })
				s, _ := n.with(key, server.url)
				onOneConnection(n, s)
				s.LookAhead = test.most
				before := server.asked.Load()
				test.ask(s)
				until(t, "asking", func() bool { return server.asked.Load()-before >= test.want })
				time.Sleep(20 * time.Millisecond) // for more, which would be wrong
				s.Close()
				if n := server.asked.Load() - before; n != test.want {
					t.Errorf("%d requests, want %d", n, test.want)
				}
			})
		})
	}
	// What is in the store is not looked up, nor what it refers to.
	store := t.TempDir()
	here := func(path string) string { return store + "/" + filepath.Base(path) }
	other := newTestServer(t)
	for i := range 4 {
		other.has(itemPath(i), signReferring(t, key, here(itemPath(i)), []string{here(itemPath(2*i + 1)), here(itemPath(2*i + 2))}))
	}
	must(t, os.Mkdir(here(itemPath(1)), 0o755))
	s, _ := withLog(t, key, other.url)
	s.StoreDir, s.LookAhead = store, 1000
	s.Info(t.Context(), []string{here(itemPath(0))})
	// 0, 2, and what 2 refers to, 5 and 6; not 1, 3 and 4.
	until(t, "asking", func() bool { return other.asked.Load() >= 4 })
	time.Sleep(20 * time.Millisecond)
	s.Close()
	other.wasAsked(t, 4)
}

// TestLookAheadOrder checks that what was looked up ahead has the answers of the servers that would
// have been asked.
func TestLookAheadOrder(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNetwork) {
		key := acl.GenerateSigningKey()
		a, b := n.testServer(), n.testServer()
		closure(t, key, 100, 6, func(i int) *testServer { return []*testServer{a, b}[i%2] })
		s, _ := n.with(key, a.url, b.url)
		onOneConnection(n, s)
		s.LookAhead = 1000
		defer s.Close()
		if available := askOneByOne(t, s, itemPath(0)); available != 100 {
			t.Errorf("%d available", available)
		}
		// A question that meets the end of a lookup may be asked once more.
		if n, m := a.asked.Load(), b.asked.Load(); n < 100 || n > 103 || m < 50 || m > 53 {
			t.Errorf("the servers were asked %d and %d times", a.asked.Load(), b.asked.Load())
		}
	})
}

// TestLookAheadJoined checks that a request waits for what is being looked up ahead rather than
// asking again, and asks again if nothing comes of that.
func TestLookAheadJoined(t *testing.T) {
	key := acl.GenerateSigningKey()
	server := newTestServer(t)
	server.has(itemPath(0), signReferring(t, key, itemPath(0), []string{itemPath(1)}))
	server.has(itemPath(1), signReferring(t, key, itemPath(1), nil))
	asked, release := make(chan bool, 10), make(chan bool)
	server.wait = func(r *http.Request) {
		if strings.Contains(r.URL.Path, filepath.Base(itemPath(1))[:32]) {
			asked <- true
			select {
			case <-release:
			case <-r.Context().Done():
			}
		}
	}
	s := newSubstituter(t, key, server)
	s.LookAhead = 1000
	defer s.Close()
	s.Info(t.Context(), []string{itemPath(0)})
	<-asked
	done := make(chan int)
	go func() { done <- len(s.Info(t.Context(), []string{itemPath(1)})) }()
	select {
	case <-asked:
		t.Error("asked twice")
	case <-time.After(50 * time.Millisecond):
	}
	release <- true
	if n := <-done; n != 1 {
		t.Errorf("%d available", n)
	}
	server.wasAsked(t, 2)
}

// TestLookAheadClosed checks that closing does not wait for a server.
func TestLookAheadClosed(t *testing.T) {
	key := acl.GenerateSigningKey()
	server := newTestServer(t)
	closure(t, key, 200, 5, func(int) *testServer { return server })
	silent := make(chan bool, 1000)
	server.wait = func(r *http.Request) {
		if !strings.Contains(r.URL.Path, filepath.Base(itemPath(0))[:32]) {
			silent <- true
			<-r.Context().Done()
		}
	}
	for range 3 {
		s, log := withLog(t, key, server.url)
		s.LookAhead = 1000
		available(t, s, []string{itemPath(0)}, 1)
		shown := log.String()
		<-silent
		s.Close()
		s.Close()
		if log.String() != shown {
			t.Errorf("shown between requests: %q", strings.TrimPrefix(log.String(), shown))
		}
		// Another request begins anew.
		s.Info(t.Context(), []string{itemPath(0)})
		s.SetKeys(acl.NewACL(acl.GenerateSigningKey().PublicKey()))
		available(t, s, []string{itemPath(0)}, 0)
		s.Close()
	}
}

// TestLookAheadWarnings checks that what goes wrong ahead is said with the next request, and not
// before.
func TestLookAheadWarnings(t *testing.T) {
	key := acl.GenerateSigningKey()
	server := newTestServer(t)
	server.has(itemPath(0), signReferring(t, key, itemPath(0), []string{itemPath(1), itemPath(2)}))
	server.has(itemPath(1), "nonsense")
	s, log := withLog(t, key, server.url)
	s.LookAhead = 1000
	s.Debug = true
	requests := s.Log.Requests(strings.NewReader("info one\ninfo another\n"))
	requests.Next()
	s.Info(t.Context(), []string{itemPath(0)})
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	must(t, err)
	defer null.Close()
	requests.Reply(int(null.Fd()), "")
	shown := log.String()
	until(t, "asking", func() bool { return server.asked.Load() >= 3 })
	s.Close()
	if log.String() != shown {
		t.Errorf("shown between requests: %q", strings.TrimPrefix(log.String(), shown))
	}
	requests.Next()
	s.Info(t.Context(), []string{itemPath(1)})
	s.Close()
	if n := strings.Count(log.String(), "ignored"); n != 1 {
		t.Errorf("%d warnings: %s", n, log)
	}
}

// TestLookAheadFillsCache checks that what was looked up ahead is there for the next process, as
// the one that restores items.
func TestLookAheadFillsCache(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNetwork) {
		key := acl.GenerateSigningKey()
		server := n.testServer()
		items := closure(t, key, 50, 5, func(int) *testServer { return server })
		directory := t.TempDir()
		with := func() (*substitute.Substituter, func()) {
			s, _ := n.with(key, server.url)
			onOneConnection(n, s)
			closeCache := withCache(t, s, directory)
			return s, func() { s.Close(); closeCache() }
		}
		s, closeIt := with()
		s.LookAhead = 1000
		s.Info(t.Context(), items[:1])
		until(t, "asking", func() bool { return server.asked.Load() >= 50 })
		if have := s.Have(t.Context(), items); len(have) != 50 || server.asked.Load() != 50 { // waits for answers
			t.Errorf("%d available after %d requests", len(have), server.asked.Load())
		}
		closeIt()
		s, closeIt = with()
		defer closeIt()
		available(t, s, items, 50)
		for _, item := range items {
			s.Substitute(t.Context(), item, t.TempDir()+"/item") // the nar is 404
		}
		// Two requests for each nar, and one to see whether the narinfo is still the same.
		if requests := server.asked.Load() - 50; requests != 150 {
			t.Errorf("%d requests for 50 nars", requests)
		}
	})
}

// BenchmarkClosure asks about a closure of 1000 items one at a time, as the daemon does, from a
// server that is 50 ms away. "depths" is the time in units of round trips times steps from the
// first item to the farthest: one that is perfect has 1, or a bit more for the first connection.
func BenchmarkClosure(b *testing.B) {
	key := acl.GenerateSigningKey()
	const rtt = 50 * time.Millisecond
	for _, depth := range []int{10, 25} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			server := newTestServer(b)
			closure(b, key, 1000, depth, func(int) *testServer { return server })
			b.ResetTimer()
			for b.Loop() {
				s := newSubstituter(b, key, server)
				s.LookAhead = 10000
				s.Mirrors = mirror.NewClient(mirror.Options{Dial: sourcetest.Far(rtt)})
				if n := askOneByOne(b, s, itemPath(0)); n != 1000 {
					b.Fatalf("%d available", n)
				}
				s.Close()
				s.Mirrors.Close()
			}
			b.ReportMetric(float64(b.Elapsed())/float64(b.N)/float64(time.Duration(depth)*rtt), "depths")
		})
	}
}
