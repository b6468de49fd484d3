// SPDX-License-Identifier: GPL-3.0-or-later

package substitute_test

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// A fixture is an item with its archive, and a key.
type fixture struct {
	key     *acl.SigningKey
	archive []byte
	encoded erisfs.Result
	blocks  *memoryBlocks
}

// newFixture makes an item that is a file of so many bytes.
func newFixture(t *testing.T, size int) *fixture {
	t.Helper()
	f := &fixture{key: acl.GenerateSigningKey(), blocks: newMemoryBlocks(t, sourcetest.NewBackend(), 0)}
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, bytes.Repeat([]byte("contents "), size/9+1)[:size], 0o644))
	var err error
	if f.encoded, err = erisfs.Encode(t.Context(), nar.NewTree(file), f.blocks.Put, erisfs.EncodeOptions{}); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if _, err := nar.Write(&archive, nar.NewTree(file)); err != nil {
		t.Fatal(err)
	}
	f.archive = archive.Bytes()
	return f
}

// narinfo returns a signed narinfo of itemPath(0) with URLs of nars, "METHOD URL" each.
func (f *fixture) narinfo(t *testing.T, urls ...string) string {
	t.Helper()
	text := signInfo(t, f.key, &narinfo.Narinfo{
		StorePath: itemPath(0), NarDigest: f.encoded.NarHash, NarSize: f.encoded.NarSize,
	})
	head, _, _ := strings.Cut(text, "URL: ")
	for _, u := range urls {
		method, url, _ := strings.Cut(u, " ")
		head += "URL: " + url + "\nCompression: " + method + "\n"
	}
	return head
}

func gzipped(t *testing.T, b []byte, level int) []byte {
	var z bytes.Buffer
	w, err := gzip.NewWriterLevel(&z, level)
	must(t, err)
	w.Write(b)
	w.Close()
	return z.Bytes()
}

// serve serves the narinfo and lets nar serve all else.
func (f *fixture) serve(t *testing.T, text string, nar http.HandlerFunc) *httptest.Server {
	server := httptest.NewServer(f.handler(text, nar))
	t.Cleanup(server.Close)
	return server
}

func (f *fixture) handler(text string, nar http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, ".narinfo") {
			io.WriteString(w, text)
			return
		}
		nar(w, r)
	}
}

func (f *fixture) good(w http.ResponseWriter, r *http.Request) { w.Write(f.archive) }

// restore gets the item and checks what has become of it.
func (f *fixture) restore(t *testing.T, s *substitute.Substituter, want substitute.Status, log fmt.Stringer) {
	t.Helper()
	destination := filepath.Join(t.TempDir(), "item")
	outcome := s.Substitute(t.Context(), itemPath(0), destination)
	if outcome.Status != want {
		t.Fatalf("outcome %+v, want %d:\n%s", outcome, want, log)
	}
	if want == substitute.Success {
		checkRestored(t, destination, outcome.NarHash)
	}
}

// TestFailingForAWhile gets an item from the only server, all nars of which fail at first.
func TestFailingForAWhile(t *testing.T) {
	f := newFixture(t, 1000)
	for name, test := range map[string]struct {
		fail        func(w http.ResponseWriter)
		failures    int64
		least, most time.Duration
		want        substitute.Status
		requests    int64
	}{
		"503": {func(w http.ResponseWriter) { w.WriteHeader(503) }, 5, 750 * time.Millisecond, time.Second, substitute.Success, 6},
		"429, later please": {func(w http.ResponseWriter) { w.Header().Set("Retry-After", "9"); w.WriteHeader(429) },
			5, 18 * time.Second, 18 * time.Second, substitute.Success, 6},
		"503, after maintenance": {func(w http.ResponseWriter) { w.Header().Set("Retry-After", "3600"); w.WriteHeader(503) },
			1000, 0, 0, substitute.NotFound, 2},
		"500":      {func(w http.ResponseWriter) { w.WriteHeader(500) }, 5, 750 * time.Millisecond, time.Second, substitute.Success, 6},
		"closed":   {func(w http.ResponseWriter) { panic(http.ErrAbortHandler) }, 5, 750 * time.Millisecond, time.Second, substitute.Success, 6},
		"for ever": {func(w http.ResponseWriter) { w.WriteHeader(503) }, 1000, 0, 10 * time.Second, substitute.NotFound, 12},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, n *testNetwork) {
				var requests atomic.Int64
				s, log := n.with(f.key, n.serve(f.handler(f.narinfo(t, "none nar", "none other"), func(w http.ResponseWriter, r *http.Request) {
					if requests.Add(1) <= test.failures {
						test.fail(w)
						return
					}
					f.good(w, r)
				})))
				begin := time.Now()
				f.restore(t, s, test.want, log)
				if took := time.Since(begin); took < test.least || took > test.most || requests.Load() != test.requests {
					t.Errorf("it took %v and %d requests", took, requests.Load())
				}
			})
		})
	}
	t.Run("few requests each second", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(t *testing.T, n *testNetwork) {
			var last time.Time
			s, log := n.with(f.key, n.serve(f.handler(f.narinfo(t, "none nar"), func(w http.ResponseWriter, r *http.Request) {
				if time.Since(last) < 200*time.Millisecond {
					w.WriteHeader(429)
					return
				}
				last = time.Now()
				f.good(w, r)
			})))
			begin := time.Now()
			for range 20 {
				f.restore(t, s, substitute.Success, log)
			}
			if took := time.Since(begin); took > 8*time.Second {
				t.Errorf("20 items take %v", took)
			}
			if n := strings.Count(log.String(), "429"); n != 1 {
				t.Errorf("that it refuses some is said %d times:\n%s", n, log)
			}
		})
	})
	t.Run("refused", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(t *testing.T, n *testNetwork) {
			s, log := n.with(f.key, n.serve(f.handler(f.narinfo(t, "none http://192.0.2.2:80/nar"), http.NotFound)))
			time.AfterFunc(500*time.Millisecond, func() { n.serve(f.good) })
			f.restore(t, s, substitute.Success, log)
		})
	})
	t.Run("busy blocks", func(t *testing.T) {
		t.Parallel()
		bubble(t, func(t *testing.T, n *testNetwork) {
			free := time.Now().Add(9 * time.Second)
			blocks := fetch.NewWorkers("memory:", 1, func(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
				if left := time.Until(free); left > 0 {
					return nil, &fetch.BusyError{After: left, Err: io.EOF}
				}
				return f.blocks.Get(ctx, ref, size, dst)
			})
			defer blocks.Close()
			s, log := n.with(f.key, n.serve(f.handler(signERIS(t, f.key, itemPath(0), f.encoded), http.NotFound)))
			s.Blocks, s.Policy = blocks, substitute.ERISOnly
			f.restore(t, s, substitute.Success, log)
		})
	})
	for _, stop := range []time.Duration{6 * time.Second, 14 * time.Second, time.Hour} {
		t.Run(fmt.Sprint("blocks stop coming for ", stop), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, n *testNetwork) {
				var requests atomic.Int64
				begin := time.Now()
				back := begin.Add(stop)
				blocks := fetch.NewWorkers("memory:", 1, func(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
					if requests.Add(1) > 1 {
						select {
						case <-time.After(time.Until(back)):
						case <-ctx.Done():
							return nil, context.Cause(ctx)
						}
					}
					return f.blocks.Get(ctx, ref, size, dst)
				})
				s, log := n.with(f.key, n.serve(f.handler(signERIS(t, f.key, itemPath(0), f.encoded), http.NotFound)))
				p := pool.New([]pool.Member{{Source: blocks}}, pool.Options{})
				defer p.Close()
				s.Blocks, s.Policy = p, substitute.ERISOnly
				if stop < time.Minute {
					f.restore(t, s, substitute.Success, log)
					return
				}
				for range 20 {
					f.restore(t, s, substitute.NotFound, log)
				}
				if took := time.Since(begin); took > 40*time.Second {
					t.Errorf("twenty items took %v", took)
				}
			})
		})
	}
}

// TestWrongOnce gets an item from the only server, which brings wrong bytes at first, or always.
func TestWrongOnce(t *testing.T) {
	f := newFixture(t, 100_000)
	stored := gzipped(t, f.archive, gzip.DefaultCompression)
	for name, test := range map[string]struct {
		urls  []string
		at    int // the wrong byte; negative is another page altogether
		times int64
		want  substitute.Status
		most  int64 // requests
	}{
		"contents":           {[]string{"none none"}, 50_000, 1, substitute.Success, 2},
		"grammar":            {[]string{"none none"}, 9, 1, substitute.Success, 2},
		"compressed":         {[]string{"gzip gzip"}, 20, 1, substitute.Success, 2},
		"a page of a proxy":  {[]string{"gzip gzip"}, -1, 1, substitute.Success, 2},
		"two URLs":           {[]string{"none none", "gzip gzip"}, 50, 2, substitute.Success, 3},
		"always":             {[]string{"none none"}, 50_000, 1000, substitute.HashMismatch, 2},
		"always, compressed": {[]string{"gzip gzip"}, 20, 1000, substitute.NotFound, 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, network *testNetwork) {
				var requests atomic.Int64
				url := network.serve(f.handler(f.narinfo(t, test.urls...), func(w http.ResponseWriter, r *http.Request) {
					n := requests.Add(1)
					if anew := r.Header.Get("Cache-Control") == "no-cache"; anew != (n > int64(len(test.urls))) {
						t.Errorf("request %d is to pass caches: %v", n, anew)
					}
					body := f.archive
					if r.URL.Path == "/gzip" {
						body = stored
					}
					switch {
					case n > test.times:
					case test.at < 0:
						body = bytes.Repeat([]byte("<html>later</html>"), 1000)
					default:
						body = bytes.Clone(body)
						body[test.at] ^= 1
					}
					w.Write(body)
				}))
				s, log := network.with(f.key, url)
				f.restore(t, s, test.want, log)
				if n := requests.Load(); n != test.most {
					t.Errorf("%d requests instead of %d:\n%s", n, test.most, log)
				}
			})
		})
	}
}

// TestCompressedAnew gets an item from the only server, which breaks off, and then has compressed
// the nar in another way, as one of several behind the same name may.
func TestCompressedAnew(t *testing.T) {
	f := newFixture(t, 100_000)
	bubble(t, func(t *testing.T, network *testNetwork) {
		var requests atomic.Int64
		s, log := network.with(f.key, network.serve(f.handler(f.narinfo(t, "gzip nar"), func(w http.ResponseWriter, r *http.Request) {
			if requests.Add(1) == 1 {
				w.Write(gzipped(t, f.archive, gzip.BestCompression)[:200])
				w.(http.Flusher).Flush()
				panic(http.ErrAbortHandler)
			}
			w.Write(gzipped(t, f.archive, gzip.NoCompression))
		})))
		f.restore(t, s, substitute.Success, log)
		if n := requests.Load(); n != 3 {
			t.Errorf("%d requests:\n%s", n, log)
		}
	})
}

// drip sends a byte now and then.
func drip(w http.ResponseWriter, r *http.Request, b []byte) {
	for i := range b {
		w.Write(b[i : i+1])
		w.(http.Flusher).Flush()
		select {
		case <-time.After(5290 * time.Millisecond):
		case <-r.Context().Done():
			return
		}
	}
}

// TestSlowFirst gets an item from servers of which the first is slow or silent.
func TestSlowFirst(t *testing.T) {
	f := newFixture(t, 1_000_000)
	stored := gzipped(t, f.archive, gzip.NoCompression)
	silent := func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	slow := func(w http.ResponseWriter, r *http.Request) { drip(w, r, f.archive) }
	stalls := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(f.archive)))
		w.Write(f.archive[:900_000])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}
	endless := func(w http.ResponseWriter, r *http.Request) {
		w.Write(f.archive)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}
	var begun atomic.Pointer[time.Time]
	back := func(w http.ResponseWriter, r *http.Request) {
		now := time.Now()
		if begun.CompareAndSwap(nil, &now); now.Sub(*begun.Load()) < 4*time.Second {
			panic(http.ErrAbortHandler)
		}
		f.handler(f.narinfo(t, "none nar"), f.good)(w, r)
	}
	whole := func(w http.ResponseWriter, r *http.Request) { w.Write(stored) }
	longer := func(announced bool) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if announced {
				w.Header().Set("Content-Length", fmt.Sprint(len(stored)))
			}
			w.Write(stored[:900_000])
			drip(w, r, stored[900_000:])
		}
	}
	late := func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(18 * time.Second):
			f.good(w, r)
		case <-r.Context().Done():
		}
	}
	// Just when the other server has given its narinfo.
	begins := func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(5290 * time.Millisecond):
			w.Write(stored)
		case <-r.Context().Done():
		}
	}
	plain, two := f.narinfo(t, "none nar"), f.narinfo(t, "none 1", "none 2")
	six := f.narinfo(t, "none 1", "none 2", "none 3", "none 4", "none 5", "none 6")
	compressed := f.narinfo(t, "gzip nar")
	good := f.handler(plain, f.good)
	for name, test := range map[string]struct {
		servers []http.HandlerFunc
		most    time.Duration
		want    substitute.Status
	}{
		"slow":                       {[]http.HandlerFunc{f.handler(plain, slow), good}, 6 * time.Second, substitute.Success},
		"silent":                     {[]http.HandlerFunc{f.handler(plain, silent), good}, 6 * time.Second, substitute.Success},
		"silent, with two URLs":      {[]http.HandlerFunc{f.handler(two, silent), good}, 6 * time.Second, substitute.Success},
		"stalls":                     {[]http.HandlerFunc{f.handler(plain, stalls), good}, 11 * time.Second, substitute.Success},
		"does not end":               {[]http.HandlerFunc{f.handler(plain, endless), good}, 11 * time.Second, substitute.Success},
		"the good one is back later": {[]http.HandlerFunc{f.handler(plain, silent), back}, 16 * time.Second, substitute.Success},
		"longer than expected": {[]http.HandlerFunc{
			f.handler(compressed, longer(true)), f.handler(compressed, whole),
		}, 11 * time.Second, substitute.Success},
		"longer than expected, not announced": {[]http.HandlerFunc{
			f.handler(compressed, longer(false)), f.handler(compressed, whole),
		}, 11 * time.Second, substitute.Success},
		"the first, as is known, with two URLs": {[]http.HandlerFunc{f.handler(two, slow), good}, 11 * time.Second, substitute.Success},
		"servers that give no narinfos before the good one": {[]http.HandlerFunc{
			f.handler(plain, http.NotFound), silent, silent, silent, good,
		}, 4 * time.Second, substitute.Success},
		"three servers that are silent about nars before the good one": {[]http.HandlerFunc{
			f.handler(plain, silent), f.handler(plain, silent), f.handler(plain, silent), good,
		}, 10 * time.Second, substitute.Success},
		"six silent URLs":         {[]http.HandlerFunc{f.handler(six, silent)}, 30 * time.Second, substitute.NotFound},
		"six slow URLs":           {[]http.HandlerFunc{f.handler(six, slow)}, 100 * time.Second, substitute.NotFound},
		"slow to begin and alone": {[]http.HandlerFunc{f.handler(plain, late), f.handler(plain, http.NotFound)}, 30 * time.Second, substitute.Success},
		"begins while another server is asked": {[]http.HandlerFunc{f.handler(compressed, begins), func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(290 * time.Millisecond)
			good(w, r)
		}}, 30 * time.Second, substitute.Success},
		"all are slow": {[]http.HandlerFunc{f.handler(two, func(w http.ResponseWriter, r *http.Request) {
			for b := f.archive; len(b) > 0; b = b[min(len(b), 10_000):] {
				w.Write(b[:min(len(b), 10_000)])
				w.(http.Flusher).Flush()
				time.Sleep(time.Second)
			}
		})}, 2 * time.Minute, substitute.Success},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, n *testNetwork) {
				var urls []string
				for _, h := range test.servers {
					urls = append(urls, n.serve(h))
				}
				s, log := n.with(f.key, urls...)
				if strings.Contains(name, "as is known") {
					know(s, urls[0], substitute.Speed{Rate: 100})
				}
				begin := time.Now()
				f.restore(t, s, test.want, log)
				if took := time.Since(begin); took > test.most {
					t.Errorf("it took %v:\n%s", took, log)
				}
				if test.most > 11*time.Second {
					return // perhaps the first server was of use in the end
				}
				for _, next := range []*substitute.Substituter{s, substitute.New(s.Config)} {
					begin = time.Now()
					f.restore(t, next, test.want, log)
					if took := time.Since(begin); took > 5*time.Second {
						t.Errorf("the next item took %v:\n%s", took, log)
					}
				}
			})
		})
	}
}

// TestBeginsAgainSlowly gets an item from the only server, which breaks off and cannot go on where
// it was, over a slow line, and within a limit.
func TestBeginsAgainSlowly(t *testing.T) {
	f := newFixture(t, 1_000_000)
	for name, limit := range map[string]int64{"line": 0, "limit": 10_000} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *testNetwork) {
				var requests atomic.Int64
				s, log := n.with(f.key, n.serve(f.handler(f.narinfo(t, "none nar"), func(w http.ResponseWriter, r *http.Request) {
					first := requests.Add(1) == 1
					for b := f.archive; len(b) > 0; b = b[min(len(b), 10_000):] {
						if first && len(b) < 100_000 {
							panic(http.ErrAbortHandler)
						}
						w.Write(b[:min(len(b), 10_000)])
						w.(http.Flusher).Flush()
						if limit == 0 {
							time.Sleep(time.Second)
						}
					}
				})))
				s.Limiter = ratelimit.New(limit, 0)
				begin := time.Now()
				f.restore(t, s, substitute.Success, log)
				if took := time.Since(begin); took < 3*time.Minute || requests.Load() != 2 {
					t.Errorf("%v, %d requests:\n%s", took, requests.Load(), log)
				}
			})
		})
	}
}

// TestLastBlock gets an item from blocks of which the last one does not come, when as many bytes
// have come as the item has.
func TestLastBlock(t *testing.T) {
	f := newFixture(t, 9000)
	text := signERIS(t, f.key, itemPath(0), f.encoded)
	bubble(t, func(t *testing.T, n *testNetwork) {
		blocks := &lastless{memoryBlocks: f.blocks, left: 1000}
		blocks.Workers = fetch.NewWorkers("memory:", 1, blocks.Get)
		defer blocks.Close()
		for range 2 {
			s, log := n.with(f.key, n.serve(f.handler(text, f.good)))
			s.Blocks, s.Policy = blocks, substitute.ERISFirst
			begin := time.Now()
			f.restore(t, s, substitute.Success, log)
			if took := time.Since(begin); took > 12*time.Second {
				t.Errorf("it took %v:\n%s", took, log)
			}
			blocks.left = 1000 - blocks.left - 1
		}
	})
}

// lastless are blocks of which only so many come.
type lastless struct {
	*memoryBlocks
	*fetch.Workers
	left int
}

func (l *lastless) Get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	l.left--
	if l.left < 0 {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	return l.Backend.Get(ctx, ref, size, dst)
}

// TestUselessCache gets an item whose narinfo in the cache is of no use any more.
func TestUselessCache(t *testing.T) {
	f := newFixture(t, 1000)
	other := newFixture(t, 2000)
	renewed := *other
	other.key = f.key
	for name, test := range map[string]struct {
		before, after string
		key           *acl.SigningKey
		want          substitute.Status
	}{
		"the nar has gone elsewhere": {f.narinfo(t, "none old"), f.narinfo(t, "none 1000"), f.key, substitute.Success},
		"it was built again":         {f.narinfo(t, "none 2000"), other.narinfo(t, "none 2000"), f.key, substitute.Success},
		"its key was renewed":        {f.narinfo(t, "none 1000"), renewed.narinfo(t, "none 2000"), renewed.key, substitute.Success},
		"it has gone":                {f.narinfo(t, "none old"), f.narinfo(t, "none old"), f.key, substitute.NotFound},
	} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			text := test.before
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				defer mu.Unlock()
				switch {
				case strings.HasSuffix(r.URL.Path, ".narinfo"):
					io.WriteString(w, text)
				case r.URL.Path == "/1000":
					w.Write(f.archive)
				case r.URL.Path == "/2000":
					w.Write(other.archive)
				default:
					http.NotFound(w, r)
				}
			}))
			defer server.Close()
			directory := t.TempDir()
			// Another process each time.
			process := func(key *acl.SigningKey, use func(s *substitute.Substituter, log *sharedBuffer)) {
				s, log := withLog(t, key, server.URL)
				defer withCache(t, s, directory)()
				use(s, log)
			}
			process(f.key, func(s *substitute.Substituter, _ *sharedBuffer) { s.Info(t.Context(), itemPaths(1)) })
			mu.Lock()
			text = test.after
			mu.Unlock()
			process(test.key, func(s *substitute.Substituter, log *sharedBuffer) { f.restore(t, s, test.want, log) })
			process(test.key, func(s *substitute.Substituter, log *sharedBuffer) {
				if n := len(s.Info(t.Context(), itemPaths(1))); (n == 1) != (test.want == substitute.Success) {
					t.Errorf("%d items are offered afterwards", n)
				}
			})
		})
	}
}

// TestDamagedCache has the kept narinfos of two items change places.
func TestDamagedCache(t *testing.T) {
	f := newFixture(t, 1000)
	directory := t.TempDir()
	server := newTestServer(t)
	for _, path := range itemPaths(2) {
		server.has(path, sign(t, f.key, path, 1))
	}
	for range 2 {
		s := newSubstituter(t, f.key, server)
		keep := withCache(t, s, directory)
		if n := len(s.Info(t.Context(), itemPaths(2))); n != 2 {
			t.Errorf("%d items are offered", n)
		}
		keep()
		kept, err := filepath.Glob(directory + "/*/*")
		if err != nil || len(kept) != 2 {
			t.Fatalf("%q, error %v", kept, err)
		}
		for _, move := range [][2]string{{kept[0], kept[0] + "x"}, {kept[1], kept[0]}, {kept[0] + "x", kept[1]}} {
			must(t, os.Rename(move[0], move[1]))
		}
	}
}

// TestClockSetBack checks that what another process learnt while the clock was ahead is not
// believed.
func TestClockSetBack(t *testing.T) {
	f := newFixture(t, 10)
	server := newTestServer(t)
	directory := t.TempDir()
	before := newSubstituter(t, f.key, server)
	closeCache := withCache(t, before, directory)
	before.Now = func() time.Time { return time.Now().Add(1000 * time.Hour) }
	available(t, before, itemPaths(1), 0)
	closeCache()
	s := newSubstituter(t, f.key, server)
	defer withCache(t, s, directory)()
	server.has(itemPath(0), f.narinfo(t, "none nar"))
	available(t, s, itemPaths(1), 1)
}

// TestPortal asks through a network that wants us to log in first, and afterwards.
func TestPortal(t *testing.T) {
	f := newFixture(t, 10)
	server := newTestServer(t)
	server.has(itemPath(0), "<html>Please log in</html>")
	s, _ := withLog(t, f.key, server.url)
	later := time.Duration(0)
	s.Now = func() time.Time { return time.Now().Add(later) }
	available(t, s, itemPaths(1), 0)
	server.has(itemPath(0), f.narinfo(t, "none nar"))
	later = 6 * time.Second
	available(t, s, itemPaths(1), 1)
}

// TestOffered checks that only those items are offered that there is a way to.
func TestOffered(t *testing.T) {
	f := newFixture(t, 1000)
	hash := func(value string) string {
		before, after, _ := strings.Cut(f.narinfo(t, "none nar"), "NarHash: ")
		_, after, _ = strings.Cut(after, "\n")
		return before + "NarHash: " + value + "\n" + after
	}
	for name, test := range map[string]struct {
		text string
		want int
	}{
		"as usual":        {f.narinfo(t, "none nar"), 1},
		"hash in hex":     {hash(fmt.Sprintf("sha256:%x", f.encoded.NarHash)), 0},
		"SRI":             {hash("sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="), 0},
		"ftp":             {f.narinfo(t, "none ftp://127.0.0.1/nar"), 0},
		"a file of ours":  {f.narinfo(t, "none file:///nar"), 0},
		"one good of two": {f.narinfo(t, "none ftp://127.0.0.1/nar", "none nar"), 1},
	} {
		server := f.serve(t, test.text, f.good)
		s, log := withLog(t, f.key, server.URL+"/?query")
		s.AllowUnauthenticated = true
		if n := len(s.Info(t.Context(), itemPaths(1))); n != test.want {
			t.Errorf("%s: %d items are offered", name, n)
		}
		status := substitute.NotFound
		if test.want == 1 {
			status = substitute.Success
		}
		f.restore(t, s, status, log)
	}
}

// TestSaid checks that what goes wrong is said, and once.
func TestSaid(t *testing.T) {
	f := newFixture(t, 1000)
	mallory := acl.GenerateSigningKey()
	for name, test := range map[string]struct {
		serve http.HandlerFunc
		want  []string
	}{
		"forbidden": {func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(403) }, []string{"answered by status 403 Forbidden"}},
		"a proxy":   {func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(407) }, []string{"answered by status 407"}},
		"a gateway": {func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(504) }, []string{"answered by status 504"}},
		"a log-in":  {func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "<html>") }, []string{"ignored"}},
		"a bomb":    {func(w http.ResponseWriter, r *http.Request) { w.Write(make([]byte, mirror.MaxNarinfo+1)) }, []string{"longer than 1048576 bytes"}},
		"another key": {func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, sign(t, mallory, "/gnu/store"+strings.TrimSuffix(r.URL.Path, ".narinfo")+"-item", 1))
		}, []string{"/etc/guix/acl", fmt.Sprint(mallory.PublicKey()), `"test"`}},
		"unsigned": {func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, sign(t, nil, "/gnu/store"+strings.TrimSuffix(r.URL.Path, ".narinfo")+"-item", 1))
		}, []string{"unsigned narinfo"}},
	} {
		server := httptest.NewServer(test.serve)
		s, log := withLog(t, f.key, server.URL)
		s.KeysFile = "/etc/guix/acl"
		for range 2 {
			available(t, s, itemPaths(20), 0)
		}
		for _, want := range test.want {
			if strings.Count(log.String(), want) != 1 {
				t.Errorf("%s: shown, without %q or more than once: %s", name, want, log)
			}
		}
		server.Close()
	}
	wrong := newFixture(t, 2000)
	s, log := withLog(t, f.key, f.serve(t, f.narinfo(t, "none 1", "none 2"), wrong.good).URL)
	f.restore(t, s, substitute.HashMismatch, log)
	if n := strings.Count(log.String(), "\ntest: error: hash mismatch"); n != 1 || strings.Count(log.String(), "expected") != 1 {
		t.Errorf("shown: %s", log)
	}
}

// TestBlocksOfSecondServer checks that a capability that only the second server has is found if
// blocks are to be tried first.
func TestBlocksOfSecondServer(t *testing.T) {
	f := newFixture(t, 10000)
	nars := atomic.Int64{}
	nar := func(w http.ResponseWriter, r *http.Request) { nars.Add(1); f.good(w, r) }
	second := signERIS(t, f.key, itemPath(0), f.encoded)
	for _, policy := range []substitute.Policy{substitute.ERISFirst, substitute.ERISOnly} {
		s, log := withLog(t, f.key, f.serve(t, f.narinfo(t, "none nar"), nar).URL, f.serve(t, second, nar).URL)
		s.Policy, s.Blocks = policy, f.blocks
		f.restore(t, s, substitute.Success, log)
		if nars.Load() > 0 {
			t.Errorf("policy %s: a nar was fetched: %s", policy, log)
		}
	}
}

// TestEncodedNar gets a compressed nar from servers that call it encoded, which is true for one.
func TestEncodedNar(t *testing.T) {
	f := newFixture(t, 10000)
	compress := func(b []byte) []byte { return gzipped(t, b, gzip.DefaultCompression) }
	for _, c := range []struct {
		compression string
		body        []byte
	}{{"gzip", compress(f.archive)}, {"gzip", compress(compress(f.archive))}, {"none", f.archive}} {
		server := f.serve(t, f.narinfo(t, c.compression+" nar"), func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			w.Write(c.body)
		})
		s, log := withLog(t, f.key, server.URL)
		f.restore(t, s, substitute.Success, log)
	}
}

// TestNarWithoutEnd gets nars that are whole, while what should tell their end is wrong or does not
// come: it is right by its hash, and nobody waits. Bytes of a nar behind its end are refused.
func TestNarWithoutEnd(t *testing.T) {
	for _, size := range []int{10_000, 1_000_000} {
		f := newFixture(t, size)
		compressed := gzipped(t, f.archive, gzip.DefaultCompression)
		cut := compressed[:len(compressed)-8]
		for name, c := range map[string]struct {
			method string // gzip if empty
			body   []byte
			length int
			end    func(*http.Request)
			want   substitute.Status
		}{
			"a length that is too long":     {body: compressed, length: len(compressed) + 1, end: func(r *http.Request) { <-r.Context().Done() }, want: substitute.Success},
			"no last chunk":                 {body: compressed, end: func(*http.Request) { panic(http.ErrAbortHandler) }, want: substitute.Success},
			"a checksum that does not come": {body: cut, length: len(cut), want: substitute.Success},
			"a wrong checksum":              {body: append(cut[:len(cut):len(cut)], "12345678"...), want: substitute.Success},
			"a connection that is kept":     {method: "none", body: f.archive, length: -1, want: substitute.Success},
			"bytes behind the end":          {body: gzipped(t, append(f.archive[:len(f.archive):len(f.archive)], 0), gzip.DefaultCompression), want: substitute.NotFound},
		} {
			bubble(t, func(t *testing.T, n *testNetwork) {
				begin := time.Now()
				s, log := n.with(f.key, n.serve(f.handler(f.narinfo(t, cmp.Or(c.method, "gzip")+" nar"), func(w http.ResponseWriter, r *http.Request) {
					if c.length < 0 { // as guix publish does (Guix, guix/scripts/publish.scm: http-write)
						conn, _, err := w.(http.Hijacker).Hijack()
						must(t, err)
						io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Type: application/x-nix-archive\r\n\r\n")
						conn.Write(c.body)
						io.Copy(io.Discard, conn)
						conn.Close()
						return
					}
					if c.length > 0 {
						w.Header().Set("Content-Length", fmt.Sprint(c.length))
					}
					w.Write(c.body)
					w.(http.Flusher).Flush()
					if c.end != nil {
						c.end(r)
					}
				})))
				f.restore(t, s, c.want, log)
				if took := time.Since(begin); took > 2*time.Second || c.length < 0 && took >= time.Second {
					t.Errorf("%s: took %v: %s", name, took, log)
				}
			})
		}
	}
}

// TestUnknownSizes checks that a server that makes nars while it sends them is not asked for those
// that take it long.
func TestUnknownSizes(t *testing.T) {
	f := newFixture(t, 1_000_000)
	var mu sync.Mutex
	var paths []string
	server := f.serve(t, f.narinfo(t, "lzip lzip", "gzip gzip", "zstd zstd"), func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		paths = append(paths, r.URL.Path)
		http.NotFound(w, r)
	})
	s, log := withLog(t, f.key, server.URL)
	f.restore(t, s, substitute.NotFound, log)
	if want := []string{"/zstd", "/gzip", "/lzip"}; !slices.Equal(paths[:3], want) { // and then again
		t.Errorf("requested: %q, want %q", paths, want)
	}
}
