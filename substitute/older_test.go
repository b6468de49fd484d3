// SPDX-License-Identifier: GPL-3.0-or-later

package substitute_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/delta"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// itemName is the name of an item in a store.
func itemName(i int, name string) string { return fmt.Sprintf("%032d-%s", i, name) }

// makeItem makes an item of one file that mentions another item, with more contents, and returns
// its narinfo and archive.
func makeItem(t *testing.T, store string, name, reference, more string) (*narinfo.Narinfo, []byte) {
	t.Helper()
	built := t.TempDir() + "/item"
	must(t, os.WriteFile(built, []byte("uses "+store+"/"+reference+more), 0o444))
	var archive bytes.Buffer
	if _, err := nar.Write(&archive, nar.NewTree(built)); err != nil {
		t.Fatal(err)
	}
	if _, err := restore.Restore(t.Context(), nar.NewTree(built), store+"/"+name, restore.Options{}); err != nil {
		t.Fatal(err)
	}
	return &narinfo.Narinfo{
		StorePath: store + "/" + name, NarDigest: sha256.Sum256(archive.Bytes()), NarSize: uint64(archive.Len()), NarSizeKnown: true,
		References: []string{reference},
	}, archive.Bytes()
}

// finderOf finds one older item in a store.
func finderOf(t *testing.T, store string, old *narinfo.Narinfo) *reuse.Finder {
	return reuse.New(reuse.Config{
		StoreDir: store, MissesFile: t.TempDir() + "/reuse",
		Database: func(_ context.Context, hashPart string) (*narinfo.Narinfo, error) {
			if hashPart != filepath.Base(old.StorePath)[:32] {
				return nil, fmt.Errorf("no item %s", hashPart)
			}
			return old, nil
		},
	})
}

// TestRewritten gets an item from an older one where that works, without a request for it, and from
// the server where it does not, without a warning, unless the old item is to blame.
func TestRewritten(t *testing.T) {
	for _, test := range []struct {
		name      string
		policy    substitute.Policy
		off       bool
		more      string // contents of the new item
		corrupt   bool
		rewritten bool
	}{
		{name: "rewritten", rewritten: true},
		{name: "also from blocks alone", policy: substitute.ERISOnly, rewritten: true},
		{name: "turned off", off: true},
		{name: "other contents", more: "!"},
		{name: "corrupt", corrupt: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *testNetwork) {
				store := t.TempDir()
				old, _ := makeItem(t, store, itemName(1, "x"), itemName(2, "y"), ".")
				want, archive := makeItem(t, store, itemName(3, "x"), itemName(4, "y"), "."+test.more)
				old.NarSize = want.NarSize // the gate is no matter here
				must(t, restore.Remove(want.StorePath))
				if test.corrupt {
					must(t, os.Chmod(old.StorePath, 0o644))
					must(t, os.WriteFile(old.StorePath, []byte("uses "+store+"/"+itemName(2, "y")+"?"), 0o644))
				}
				key := acl.GenerateSigningKey()
				server := n.testServer()
				server.has(want.StorePath, signInfo(t, key, want))
				server.texts["/nar"] = string(archive)
				var finder *reuse.Finder
				if !test.off {
					finder = finderOf(t, store, old)
				}
				for attempt := range 2 {
					s, log := n.with(key, server.url)
					s.StoreDir, s.Policy, s.Reuse = store, cmp.Or(test.policy, substitute.Fastest), finder
					outcome := s.Substitute(t.Context(), want.StorePath, want.StorePath)
					if outcome.Status != substitute.Success {
						t.Fatalf("status %d:\n%s", outcome.Status, log)
					}
					checkRestored(t, want.StorePath, outcome.NarHash)
					requests := int64(2)
					if test.rewritten {
						requests = 1
					}
					server.wasAsked(t, requests)
					tried := strings.Contains(log.String(), "file://"+old.StorePath)
					if tried != (!test.off && (attempt == 0 || test.rewritten)) {
						t.Errorf("attempt %d: the old item is tried: %t", attempt, tried)
					}
					if warned := strings.Contains(log.String(), filepath.Base(old.StorePath)+" is corrupt"); warned != (test.corrupt && attempt == 0) {
						t.Errorf("attempt %d: a warning about the old item: %t", attempt, warned)
					}
					if !test.corrupt {
						log.warned(t)
					}
				}
			})
		})
	}
}

// silent is a source that answers nothing any more once so many bytes were requested.
type silent struct {
	fetch.Source
	after int64

	mu   sync.Mutex
	held []*fetch.Request
}

func (s *silent) Start(r *fetch.Request) {
	s.mu.Lock()
	s.after -= int64(r.Size)
	hold := s.after < 0
	if hold {
		s.held = append(s.held, r)
	}
	s.mu.Unlock()
	if !hold {
		s.Source.Start(r)
	}
}

func (s *silent) Cancel(r *fetch.Request) {
	s.mu.Lock()
	i := slices.Index(s.held, r)
	if i >= 0 {
		s.held = slices.Delete(s.held, i, i+1)
	}
	s.mu.Unlock()
	if i < 0 {
		s.Source.Cancel(r)
		return
	}
	r.Err = context.Canceled
	r.Done(r)
}

// TestLeaves gets an item that differs from an older one in more than hashes.
func TestLeaves(t *testing.T) {
	random := make([]byte, 4<<20)
	for i := range random {
		random[i] = byte(rand.Uint32())
	}
	some := string(random)
	random[2<<20] ^= 1
	other := string(random)
	slow := func() substitute.Speed {
		return substitute.Speed{Rate: 2e6, Latency: time.Millisecond, Known: true}
	}
	for _, test := range []struct {
		name   string
		policy substitute.Policy
		off    bool
		nar    bool                    // the blocks are a nar
		liar   bool                    // a capability of something else is listed before
		more   string                  // contents of the new item
		length uint64                  // of the old one, differs by that
		speed  func() substitute.Speed // of the stores
		ahead  bool
		most   int64 // bytes of blocks that may be fetched
		listed bool  // among the ways
		given  bool  // up for the nar
	}{
		{name: "by leaves", more: other, most: 100 << 10, listed: true},
		{name: "ahead of the daemon", more: other, most: 100 << 10, listed: true, ahead: true},
		{name: "blocks alone", more: other, policy: substitute.ERISOnly, most: 100 << 10, listed: true},
		{name: "an old item of another length", more: some + "!", length: 8, most: 100 << 10, listed: true},
		{name: "rewritten", more: some},
		{name: "nars first", more: other, policy: substitute.HTTPFirst, listed: true},
		{name: "nars alone", more: other, policy: substitute.HTTPOnly},
		{name: "turned off", more: other, policy: substitute.ERISOnly, off: true, most: 5 << 20},
		{name: "a nar in blocks", more: other, policy: substitute.ERISOnly, nar: true, most: 5 << 20, listed: true},
		{name: "one capability of something else", more: other, liar: true, speed: slow, most: 5 << 20, listed: true},
		{name: "others all over", more: "-" + some, policy: substitute.ERISOnly, most: 5 << 20, listed: true},
		{name: "others all over, slowly", more: "-" + some, speed: slow, most: 3 << 20, listed: true, given: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *testNetwork) {
				store := t.TempDir()
				old, _ := makeItem(t, store, itemName(1, "x"), itemName(2, "y"), some)
				want, archive := makeItem(t, store, itemName(3, "x"), itemName(4, "y"), test.more)
				old.NarSize = want.NarSize + test.length
				backend := sourcetest.NewBackend()
				encoded, err := erisfs.Encode(t.Context(), nar.NewTree(want.StorePath), backend.Put, erisfs.EncodeOptions{})
				if test.nar {
					encoded.Capability, err = eris.Encode(t.Context(), bytes.NewReader(archive), backend.Put, eris.EncodeOptions{})
				}
				want.ERIS = []narinfo.ERIS{{URN: encoded.Capability.URN()}}
				if test.liar {
					lie, _ := makeItem(t, t.TempDir(), itemName(3, "x"), itemName(4, "y"), "-"+some)
					other, err := erisfs.Encode(t.Context(), nar.NewTree(lie.StorePath), backend.Put, erisfs.EncodeOptions{})
					must(t, err)
					want.ERIS = []narinfo.ERIS{{URN: other.Capability.URN()}, want.ERIS[0]}
				}
				must(t, errors.Join(err, restore.Remove(want.StorePath)))
				key, server := acl.GenerateSigningKey(), n.testServer()
				server.has(want.StorePath, signInfo(t, key, want))
				server.texts["/nar"] = string(archive)
				blocks := &silent{Source: pool.New([]pool.Member{{Source: backend.Open(16)}}, pool.Options{})}
				defer blocks.Close()
				var fetched atomic.Int64
				var finder *reuse.Finder
				if !test.off {
					finder = finderOf(t, store, old)
				}
				for attempt := range 2 {
					place := want.StorePath
					blocks.after = test.most
					s, log := n.with(key, server.url)
					s.StoreDir, s.Policy, s.Reuse, s.UnsignedCapabilities, s.Verbose, s.StoreSpeed = store, cmp.Or(test.policy, substitute.Fastest), finder, true, true, test.speed
					s.Blocks = fetch.Within(blocks, eris.Reference{}, func(n int) { fetched.Add(int64(n)) })
					var outcome substitute.Outcome
					if test.ahead {
						place = store + "/staged"
						r := s.Prepare(want.StorePath, place)
						outcome = r.Run(t.Context())
						r.Show()
					} else {
						outcome = s.Substitute(t.Context(), want.StorePath, place)
					}
					if outcome.Status != substitute.Success {
						t.Fatalf("status %d:\n%s", outcome.Status, log)
					}
					if text, err := os.ReadFile(place); err != nil || !strings.HasSuffix(string(text), itemName(4, "y")+test.more) {
						t.Error("other contents")
					}
					must(t, restore.Remove(place))
					// The second time it is known what is of no use.
					listed := strings.Contains(log.String(), " with "+old.StorePath)
					if listed != (test.listed && !(test.given && attempt == 1)) && test.more != some {
						t.Errorf("attempt %d: leaves are among the ways: %t", attempt, listed)
					}
					// Of 4096 times one, what is known of leaves takes the place of what is known of rewriting.
					forgotten := test.given && attempt == 1
					if rewriting := strings.Contains(log.String(), "file://"); !forgotten && rewriting != (!test.off && test.length == 0 && (attempt == 0 || test.more == some)) {
						t.Errorf("attempt %d: rewriting is tried: %t", attempt, rewriting)
					}
					if test.liar && attempt == 1 {
						test.most = 100 << 10
					}
					if n := fetched.Swap(0); n > test.most || (n == 0) != (test.most == 0) && attempt == 0 {
						t.Errorf("attempt %d: %d bytes of blocks", attempt, n)
					}
					log.warned(t)
				}
				if text, err := os.ReadFile(old.StorePath); err != nil || string(text) != "uses "+store+"/"+itemName(2, "y")+some {
					t.Error("the old item has changed")
				}
			})
		})
	}
}

// TestDelta gets an item by a delta where there is one that can be used, and from the nar
// elsewhere, without a warning.
func TestDelta(t *testing.T) {
	t.Parallel()
	base, url := itemName(1, "x-1"), "delta"
	for _, test := range []struct {
		name     string
		policy   substitute.Policy
		line     narinfo.Delta // Size 1 stands for the right one
		unsigned bool          // capabilities that nobody has signed are used
		offers   int           // of further ones
		silent   bool          // the server is, when it is asked for it
		half     bool          // another server is, after half of it
		busy     int           // how many requests it refuses, but for narinfos
		change   func(store string, served map[string]string)
		delta    bool  // it comes from there
		asked    int64 // how often the server is asked for one
	}{
		{name: "a file", line: narinfo.Delta{Base: base, URL: url, Size: 1}, delta: true, asked: 1},
		{name: "a file, with nars first", policy: substitute.HTTPFirst, line: narinfo.Delta{Base: base, URL: url, Size: 1}, delta: true, asked: 1},
		{name: "a file, with blocks only", policy: substitute.ERISOnly, line: narinfo.Delta{Base: base, URL: url, Size: 1}},
		{name: "blocks", line: narinfo.Delta{Base: base, URL: "urn", Size: 1}, unsigned: true, delta: true},
		{name: "blocks only", policy: substitute.ERISOnly, line: narinfo.Delta{Base: base, URL: "urn", Size: 1}, unsigned: true, delta: true},
		{name: "blocks that nobody has signed", line: narinfo.Delta{Base: base, URL: "urn", Size: 1}},
		{name: "blocks, with nars only", policy: substitute.HTTPOnly, line: narinfo.Delta{Base: base, URL: "urn", Size: 1}, unsigned: true},
		{name: "a draft", line: narinfo.Delta{Base: base, URL: "urn:erisx2:AAAA", Size: 1}, unsigned: true},
		{name: "no base", line: narinfo.Delta{Base: itemName(7, "x-1"), URL: url, Size: 1}},
		{name: "larger than the nar", line: narinfo.Delta{Base: base, URL: url, Size: 1e9}},
		{name: "of a file of ours", line: narinfo.Delta{Base: base, URL: "file:///etc/passwd", Size: 1}},
		{name: "gone", line: narinfo.Delta{Base: base, URL: url, Size: 1}, asked: 1,
			change: func(_ string, served map[string]string) { delete(served, "/delta") }},
		{name: "no delta", line: narinfo.Delta{Base: base, URL: url, Size: 1}, asked: 1,
			change: func(_ string, served map[string]string) { served["/delta"] = "not found, but here is a page" }},
		{name: "cut off", line: narinfo.Delta{Base: base, URL: url, Size: 1}, asked: 1,
			change: func(_ string, served map[string]string) { served["/delta"] = served["/delta"][:40] }},
		{name: "longer than it is said to be", line: narinfo.Delta{Base: base, URL: url, Size: 60}, asked: 1},
		{name: "silent", line: narinfo.Delta{Base: base, URL: url, Size: 1}, asked: 1, silent: true},
		{name: "silent after half of it", line: narinfo.Delta{Base: base, Size: 1}, half: true},
		{name: "refused with the nar", line: narinfo.Delta{Base: base, URL: url, Size: 1}, busy: 2, delta: true, asked: 3},
		{name: "too many", line: narinfo.Delta{Base: base, URL: url, Size: 1}, offers: 9, asked: 2,
			change: func(_ string, served map[string]string) { delete(served, "/delta") }},
		{name: "another base", line: narinfo.Delta{Base: base, URL: url, Size: 1}, asked: 1,
			change: func(store string, _ map[string]string) {
				os.Remove(store + "/" + base)
				os.WriteFile(store+"/"+base, []byte(strings.Repeat("?", 30e3)), 0o444)
			}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, n *testNetwork) {
				store := t.TempDir()
				numbers := ""
				for i := range 5000 {
					numbers += fmt.Sprintln(i)
				}
				makeItem(t, store, base, itemName(2, "y"), numbers)
				want, archive := makeItem(t, store, itemName(3, "x-2"), itemName(2, "y"), numbers+"and more")
				var made bytes.Buffer
				size, err := delta.Write(t.Context(), &made, want.StorePath, store+"/"+base, delta.WriteOptions{})
				must(t, err)
				must(t, restore.Remove(want.StorePath))
				blocks := sourcetest.NewBackend()
				c, err := eris.Encode(t.Context(), bytes.NewReader(made.Bytes()), blocks.Put, eris.EncodeOptions{})
				must(t, err)
				line := test.line
				if line.Size == 1 {
					line.Size = uint64(size)
				}
				if line.URL == "urn" {
					line.URL = c.URN()
				}
				rate := 1e5
				if test.half {
					rate = 1e4 // the nar should not take less than a tenth of what half a delta does
					line.URL = n.serve(func(w http.ResponseWriter, r *http.Request) {
						w.Header().Set("Content-Length", fmt.Sprint(size))
						w.Write(made.Bytes()[:size/2])
						w.(http.Flusher).Flush()
						<-r.Context().Done()
					})
				}
				key := acl.GenerateSigningKey()
				server := n.testServer()
				lines := line.Text() + "\n"
				for i := range test.offers {
					lines += narinfo.Delta{Base: line.Base, Size: line.Size, URL: fmt.Sprintf("%s?%d", line.URL, i)}.Text() + "\n"
				}
				server.has(want.StorePath, signInfo(t, key, want)+lines)
				if test.silent {
					server.wait = func(r *http.Request) {
						if r.URL.Path == "/delta" {
							<-r.Context().Done()
						}
					}
				}
				url := server.url
				if test.busy > 0 {
					var refused atomic.Int64
					url = n.serve(func(w http.ResponseWriter, r *http.Request) {
						if !strings.HasSuffix(r.URL.Path, ".narinfo") && refused.Add(1) <= int64(test.busy) {
							server.asked.Add(1)
							w.WriteHeader(http.StatusTooManyRequests)
							return
						}
						server.ServeHTTP(w, r)
					})
				}
				server.texts["/nar"], server.texts["/delta"] = string(archive), made.String()
				if test.change != nil {
					test.change(store, server.texts)
				}
				s, log := n.with(key, url)
				s.StoreDir, s.Policy, s.UnsignedCapabilities = store, cmp.Or(test.policy, substitute.Fastest), test.unsigned
				s.Blocks = newMemoryBlocks(t, blocks, 0)
				know(s, url, substitute.Speed{Rate: rate})
				if test.half {
					know(s, line.URL, substitute.Speed{Rate: rate})
				}
				begin := time.Now()
				outcome := s.Substitute(t.Context(), want.StorePath, want.StorePath)
				if took := time.Since(begin); took > 15*time.Second {
					t.Errorf("it took %v", took)
				}
				if test.policy == substitute.ERISOnly && !test.delta {
					if outcome.Status != substitute.NotFound {
						t.Errorf("status %d", outcome.Status)
					}
					return
				}
				if outcome.Status != substitute.Success {
					t.Fatalf("status %d:\n%s", outcome.Status, log)
				}
				checkRestored(t, want.StorePath, outcome.NarHash)
				if nar := strings.Contains(log.String(), "/nar..."); nar == test.delta {
					t.Errorf("the nar is used: %t:\n%s", nar, log)
				}
				requests := 1 + test.asked // one for the narinfo
				if !test.delta {
					requests++
				}
				server.wasAsked(t, requests)
				if test.busy == 0 {
					log.warned(t)
				}
			})
		})
	}
}
