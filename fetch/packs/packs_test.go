// SPDX-License-Identifier: GPL-3.0-or-later

package packs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dump"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/web"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

var must = testhelp.Must

func mustOpen(tb testing.TB, url string) *Store {
	tb.Helper()
	s, err := Open(url, web.Options{ConnectTimeout: time.Minute, Timeout: 5 * time.Minute, Getenv: func(string) string { return "" }})
	must(tb, err)
	tb.Cleanup(func() { s.Close() })
	return s
}

// packOf returns a pack of one block, as it might be.
func packOf(ref eris.Reference, block []byte) []byte {
	var b bytes.Buffer
	s := dump.Stream{W: &b}
	s.Put(context.Background(), ref, block)
	s.EndWith(appendTable(nil, []entry{newEntry(ref, int64(b.Len()-len(block)), len(block))}))
	return b.Bytes()
}

const secretPath = "/hidden-away"

// backend serves each block of a backend as a pack.
func backendServer(t *testing.T, backend *sourcetest.Backend) *httptest.Server {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, ok := strings.CutPrefix(r.URL.Path, secretPath+"/")
		ref, err := eris.ParseReference(strings.TrimSuffix(name, suffix))
		if !ok || err != nil || r.Method != http.MethodGet {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		block, err := backend.Get(r.Context(), ref, 0, nil)
		switch {
		case errors.Is(err, eris.ErrNotFound):
			w.WriteHeader(http.StatusNotFound)
		case err != nil:
			w.WriteHeader(http.StatusInternalServerError)
		default:
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(packOf(ref, block)))
		}
	}))
	t.Cleanup(server.Close)
	return server
}

// source is a store without Put.
type source struct{ fetch.Source }

func TestConformance(t *testing.T) {
	sourcetest.Test(t, func(t *testing.T, backend *sourcetest.Backend) sourcetest.Fixture {
		server := backendServer(t, backend)
		return sourcetest.Fixture{
			Source: source{mustOpen(t, server.URL+secretPath+"?packed")},
			Break:  server.CloseClientConnections,
			Secret: secretPath,
			Held:   maxPacks,
		}
	})
}

// encode puts a tree into a store of packs in a directory, and returns its capability.
func encode(tb testing.TB, tree, directory string) eris.ReadCapability {
	tb.Helper()
	s := mustOpen(tb, "file:"+directory+"?packed")
	nodes := nar.NewTree(tree)
	defer nodes.Close()
	result, err := erisfs.Encode(tb.Context(), nodes, s.Put, erisfs.EncodeOptions{})
	must(tb, err)
	must(tb, s.Finish(tb.Context(), []eris.ReadCapability{result.Capability}))
	return result.Capability
}

// fill writes a file with noise.
func fill(tb testing.TB, name string, seed byte, size int64) {
	tb.Helper()
	file, err := os.Create(name)
	must(tb, err)
	_, err = io.CopyN(file, rand.NewChaCha8([32]byte{seed, byte(size), byte(size >> 8)}), size)
	must(tb, err)
	must(tb, file.Close())
}

// counter serves a directory, and counts the requests and the bytes that it is asked for.
type counter struct {
	*httptest.Server
	requests atomic.Int64
}

func serve(tb testing.TB, directory string) *counter {
	c := &counter{}
	files := http.FileServer(http.Dir(directory))
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.requests.Add(1)
		files.ServeHTTP(w, r)
	}))
	tb.Cleanup(c.Close)
	return c
}

// read reads all that a capability denotes, as substitution does, and returns how many bytes the
// files have.
func read(ctx context.Context, blocks fetch.Source, c eris.ReadCapability) (files, length int64, err error) {
	x, err := image.Open(ctx, fetch.Within(blocks, c.Root, nil), c, erisfs.Limits{NarSize: 1 << 40}, fetch.Window{})
	if err != nil {
		return 0, 0, err
	}
	nodes, done, err := x.Nodes(ctx)
	if err != nil {
		return 0, 0, err
	}
	defer done()
	for {
		n, err := nodes.Next()
		if err == io.EOF {
			return files, length, nil
		} else if err != nil {
			return 0, 0, err
		}
		if n.Kind != nar.Regular {
			continue
		}
		files++
		for {
			chunk, err := nodes.Contents()
			if err == io.EOF {
				break
			} else if err != nil {
				return 0, 0, err
			}
			length += int64(len(chunk.Bytes))
			chunk.Release()
		}
	}
}

// An item of 200 MB takes at most 40 requests, and one of 5 000 small files at most 10; blocks that
// are cached already do not make it more.
func TestRequests(t *testing.T) {
	small, large, packs := t.TempDir(), t.TempDir(), t.TempDir()
	fill(t, filepath.Join(large, "large"), 0, 50e6)
	for i := range 5000 {
		directory := filepath.Join(small, fmt.Sprint(i%50))
		must(t, os.MkdirAll(directory, 0o777))
		fill(t, filepath.Join(directory, fmt.Sprint(i)), byte(i/256), int64(100+i%4000))
	}
	for _, test := range []struct {
		tree  string
		files int64
		most  int64
	}{{large, 1, 15}, {small, 5000, 10}} {
		c := encode(t, test.tree, packs)
		least := int64(math.MaxInt64)
		for try := 0; try < 5 && least > test.most; try++ { // a busy machine takes answers for lost
			server := serve(t, packs)
			blocks := pool.New([]pool.Member{{Source: mustOpen(t, server.URL+"?packed")}}, pool.Options{})
			files, length, err := read(t.Context(), blocks, c)
			must(t, err)
			must(t, blocks.Close())
			least = min(least, server.requests.Load())
			t.Logf("%d requests for %d files of %d bytes", server.requests.Load(), files, length)
			if files != test.files {
				t.Errorf("%d files instead of %d", files, test.files)
			}
		}
		if least > test.most {
			t.Errorf("%d requests, want at most %d", least, test.most)
		}
	}
}

// A pack is a dump that every reader of dumps takes, with the inner nodes of the index first.
func TestPackIsDump(t *testing.T) {
	tree, packs := t.TempDir(), t.TempDir()
	for i := range 40 {
		fill(t, filepath.Join(tree, fmt.Sprint(i)), byte(i), int64(i)*700)
	}
	c := encode(t, tree, packs)
	file, err := os.Open(filepath.Join(packs, c.Root.String()+suffix))
	must(t, err)
	defer file.Close()
	var refs []eris.Reference
	_, err = dump.Read(file, func(ref eris.Reference, block []byte) error {
		refs = append(refs, ref)
		return eris.Verify(ref, block)
	})
	must(t, err)
	if len(refs) < 100 || refs[0] != c.Root {
		t.Errorf("there are %d blocks, the first of which is %v", len(refs), refs[0])
	}
	store := mustOpen(t, "file:"+packs+"?packed")
	for _, ref := range refs {
		for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
			if _, err = fetch.Get(t.Context(), fetch.Within(store, c.Root, nil), ref, size, nil); err == nil {
				break
			}
		}
		must(t, err)
	}
}

// A pack that is not there is looked for once, whatever is asked of it; and which one it is is
// known without its root being asked for.
func TestRoot(t *testing.T) {
	tree, packs := t.TempDir(), t.TempDir()
	fill(t, filepath.Join(tree, "a"), 1, 100<<10)
	c := encode(t, tree, packs)
	store := mustOpen(t, "file:"+packs+"?packed")
	s := store.packs
	if _, _, err := read(t.Context(), store, c); err != nil || len(s) != 1 {
		t.Fatal(len(s), err)
	}
	var leaf eris.Reference
	file, err := os.Open(filepath.Join(packs, c.Root.String()+suffix))
	must(t, err)
	defer file.Close()
	_, err = dump.Read(file, func(ref eris.Reference, block []byte) error {
		if len(block) == int(eris.BlockSize32KiB) {
			leaf = ref
		}
		return nil
	})
	must(t, err)
	server := serve(t, packs)
	fresh := mustOpen(t, server.URL+"?packed")
	if _, err := fetch.Get(t.Context(), fetch.Within(fresh, c.Root, nil), leaf, eris.BlockSize32KiB, nil); err != nil {
		t.Errorf("a leaf whose root is known: %v", err)
	}
	server.requests.Store(0)
	for i := range 100 {
		_, err := fetch.Get(t.Context(), fetch.Within(fresh, eris.Reference{1}, nil), eris.Reference{byte(i)}, eris.BlockSize1KiB, nil)
		if !errors.Is(err, eris.ErrNotFound) {
			t.Errorf("error is %v, not that the block is missing", err)
		}
	}
	if n := server.requests.Load(); n > 2 {
		t.Errorf("%d requests for a pack that is not there", n)
	}
}

// A block that many wait for is there for all of them.
func TestSameBlock(t *testing.T) {
	tree, packs := t.TempDir(), t.TempDir()
	fill(t, filepath.Join(tree, "a"), 1, 100<<10)
	c := encode(t, tree, packs)
	store := mustOpen(t, "file:"+packs+"?packed")
	var group sync.WaitGroup
	for range 64 {
		group.Go(func() {
			block, err := fetch.Get(t.Context(), fetch.Within(store, c.Root, nil), c.Root, c.BlockSize, nil)
			if err != nil || eris.Verify(c.Root, block) != nil {
				t.Errorf("%d bytes, error %v", len(block), err)
			}
		})
	}
	group.Wait()
}

// Servers that answer something else make requests fail, and no more.
func TestHostile(t *testing.T) {
	block := bytes.Repeat([]byte{7}, int(eris.BlockSize1KiB))
	ref := eris.Sum(block)
	whole := packOf(ref, block)
	part := func(rest string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Range", rest)
			w.WriteHeader(http.StatusPartialContent)
			w.Write(whole)
		}
	}
	for name, handler := range map[string]http.HandlerFunc{
		"negative":   part("bytes -5-10/20"),
		"other part": part("bytes 5-10/2000"),
		"huge":       part("bytes 9223372036854513663-9223372036854775806/9223372036854775807"),
		"no number":  part("bytes */*"),
		"not a pack": func(w http.ResponseWriter, _ *http.Request) { w.Write(bytes.Repeat([]byte("x"), 5000)) },
		"empty":      func(http.ResponseWriter, *http.Request) {},
		"endless":    func(w http.ResponseWriter, _ *http.Request) { w.Write(whole); w.(http.Flusher).Flush(); w.Write(whole) },
		"cut": func(w http.ResponseWriter, r *http.Request) {
			if strings.HasPrefix(r.Header.Get("Range"), "bytes=-") {
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(whole))
			} else {
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(whole[:100]))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(handler)
			defer server.Close()
			store := mustOpen(t, server.URL+"?packed")
			if _, err := fetch.Get(t.Context(), store, ref, eris.BlockSize1KiB, nil); err == nil && name != "cut" { // the block is in the end, too
				t.Error("there is no error")
			} else {
				t.Log(err)
			}
		})
	}
	// One that knows no ranges serves packs whose end it can give.
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(whole)))
		w.Write(whole)
	}))
	defer server.Close()
	if _, err := fetch.Get(t.Context(), mustOpen(t, server.URL+"?packed"), ref, eris.BlockSize1KiB, nil); err != nil {
		t.Errorf("from a server without ranges: %v", err)
	}
}

// What a bucket finds wrong with a signature is no answer to whether it has something.
func TestRefused(t *testing.T) {
	t.Setenv("AWS_ACCESS_KEY_ID", "KEY")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	for code, missing := range map[string]bool{"SignatureDoesNotMatch": false, "RequestTimeTooSkewed": false, "AccessDenied": true, "<&": true} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprintf(w, "<Error><Code>%s</Code><Message>KEY</Message></Error>", code)
		}))
		defer server.Close()
		store := mustOpen(t, "s3://bucket/packs?endpoint="+url.QueryEscape(server.URL))
		_, err := fetch.Get(t.Context(), store, eris.Reference{1}, eris.BlockSize1KiB, nil)
		if errors.Is(err, eris.ErrNotFound) != missing || !missing && !strings.HasSuffix(err.Error(), fmt.Sprintf("403 Forbidden: %q", code)) {
			t.Errorf("%s: %v", code, err)
		}
	}
}

// TestKilled checks that a process that is killed while it sends a pack leaves nothing, and that
// what one has left in a directory is removed a day later.
func TestKilled(t *testing.T) {
	temporary, packs := t.TempDir(), t.TempDir()
	t.Setenv("TMPDIR", temporary)
	put := func(url string) {
		s := mustOpen(t, url)
		c, err := eris.Encode(t.Context(), strings.NewReader("a pack"), s.Put, eris.EncodeOptions{})
		must(t, err)
		must(t, s.Finish(t.Context(), []eris.ReadCapability{c}))
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if entries, err := os.ReadDir(temporary); len(entries) > 0 {
			t.Errorf("in the middle of %s there is %s, %v", r.Method, entries, err)
		}
		w.WriteHeader(http.StatusCreated)
	}))
	defer server.Close()
	put(server.URL + "?packed")
	left, foreign := filepath.Join(packs, files.TemporaryPrefix+strings.Repeat("A", 26)), filepath.Join(packs, ".new-notes")
	for _, name := range []string{left, foreign} {
		must(t, os.WriteFile(name, nil, 0o600))
		must(t, os.Chtimes(name, time.Time{}, time.Now().Add(-25*time.Hour)))
	}
	put("file:" + packs + "?packed")
	if entries, err := os.ReadDir(packs); err != nil || len(entries) != 2 || entries[0].Name() != filepath.Base(foreign) {
		t.Errorf("there is %s, %v", entries, err)
	}
}

// A connection that breaks in the middle of the first pack is no reason to give it up: to send one
// takes long, perhaps, and there has been no answer then.
func TestBreak(t *testing.T) {
	var begun atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if begun.Add(1) == 1 {
			r.Body.Read(make([]byte, 1))
			panic(http.ErrAbortHandler)
		}
		io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusCreated)
	}))
	defer server.Close()
	s := mustOpen(t, server.URL+"?packed")
	c, err := eris.Encode(t.Context(), io.LimitReader(rand.NewChaCha8([32]byte{}), 10<<20), s.Put, eris.EncodeOptions{})
	must(t, err)
	must(t, s.Finish(t.Context(), []eris.ReadCapability{c}))
}

func TestFinishWithoutRoot(t *testing.T) {
	s := mustOpen(t, "file:"+t.TempDir()+"?packed")
	block := make([]byte, eris.BlockSize1KiB)
	must(t, s.Put(t.Context(), eris.Sum(block), block))
	if err := s.Finish(t.Context(), nil); !errors.Is(err, errNoRoot) {
		t.Errorf("error is %v", err)
	}
}

// FuzzTable reads tables that others have made: what is found lies within the pack, in order.
func FuzzTable(f *testing.F) {
	block := make([]byte, eris.BlockSize1KiB)
	whole := packOf(eris.Sum(block), block)
	f.Add(whole[len(whole)-33:], int64(len(whole)))
	f.Add([]byte("\xff\xff\xff\xff\xff\xff\xff\xffERISpack\xff"), int64(1)<<62)
	f.Fuzz(func(t *testing.T, tail []byte, total int64) {
		n, err := tableLength(tail, total)
		if err != nil || n > len(tail) {
			return
		}
		table, err := parseTable(tail[len(tail)-n:], total)
		if err != nil {
			return
		}
		end := int64(0)
		for _, e := range table.entries {
			if e.Offset() < end || e.End() > total-int64(n) {
				t.Fatalf("a block at %d of %d bytes in a pack of %d", e.Offset(), e.Size(), total)
			}
			end = e.End()
		}
	})
}
