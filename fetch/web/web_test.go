// SPDX-License-Identifier: GPL-3.0-or-later

package web_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/httpclient"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/web"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

func newBlock(size eris.BlockSize, n byte) (eris.Reference, []byte) {
	block := bytes.Repeat([]byte{n, 1, 2, 3}, int(size)/4)
	return eris.Sum(block), block
}

// openHandler opens a store whose server is a handler.
func openHandler(t *testing.T, suffix string, options web.Options, handler http.HandlerFunc) *web.Store {
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return mustOpen(t, server.URL+suffix, options)
}

func get(t *testing.T, store fetch.Source, ref eris.Reference, size eris.BlockSize) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	return fetch.Get(ctx, store, ref, size, nil)
}

// TestRequests checks what is asked for (https://eris.codeberg.page/eer/http.xml).
func TestRequests(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 7)
	name := ref.String()
	for suffix, want := range map[string]string{
		"":                              "/uri-res/N2R?urn:blake2b:" + name,
		"/":                             "/uri-res/N2R?urn:blake2b:" + name,
		"/a%20b/c?get&put":              "/a%20b/c/uri-res/N2R?urn:blake2b:" + name,
		"/a/uri-res/N2R":                "/a/uri-res/N2R?urn:blake2b:" + name,
		"?static":                       "/" + name,
		"/a%2Fb/?static&layout=flat":    "/a%2Fb/" + name,
		"/bucket?static&layout=sharded": "/bucket/" + name[:2] + "/" + name,
	} {
		for _, method := range []string{http.MethodGet, http.MethodPut} {
			var got string
			store := openHandler(t, suffix, web.Options{}, func(w http.ResponseWriter, r *http.Request) {
				got = r.RequestURI
				if r.Method != method || r.Header.Get("Referer") != "" || r.Header.Get("Accept-Encoding") != "identity" {
					t.Errorf("%s %s has %v", r.Method, r.RequestURI, r.Header)
				}
				if body, err := io.ReadAll(r.Body); r.Method == http.MethodPut && (err != nil || !bytes.Equal(body, block)) {
					t.Errorf("%s: the body is something else, %v", suffix, err)
				}
				w.Write(block)
			})
			var err error
			if method == http.MethodGet {
				_, err = get(t, store, ref, eris.BlockSize1KiB)
			} else {
				err = store.Put(t.Context(), ref, block)
			}
			if err != nil || got != want {
				t.Errorf("%s %q: %v, asked for %s, want %s", method, suffix, err, got, want)
			}
		}
	}
}

func TestURLs(t *testing.T) {
	for url, want := range map[string]string{
		"http://Example.org/secret":                   "http://example.org",
		"https://user:secret@example.org:8443/secret": "https://example.org:8443",
		"http://[::1]:80/secret?static&get":           "http://[::1]?static",
		"HTTPS://example.org/?verify":                 "https://example.org",
	} {
		store := mustOpen(t, url, web.Options{})
		if got := store.String(); got != want {
			t.Errorf("%s is shown as %s, want %s", url, got, want)
		}
	}
	for _, url := range []string{"file:x", "http://example.org/?layout=flat"} {
		if _, err := web.Open(url, web.Options{}); err == nil {
			t.Errorf("%s is taken", url)
		}
	}
}

// TestStaticLayouts checks that both layouts are found by one URL, and that the one that works is
// asked first.
func TestStaticLayouts(t *testing.T) {
	var asked atomic.Int32
	contents := map[string][]byte{}
	var refs []eris.Reference
	for i := range byte(20) {
		ref, block := newBlock(eris.BlockSize1KiB, i)
		name := ref.String()
		if i < 10 {
			contents["/"+name] = block
		} else {
			contents["/"+name[:2]+"/"+name] = block
		}
		refs = append(refs, ref)
	}
	store := openHandler(t, "?static", web.Options{}, func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if block, ok := contents[r.URL.Path]; ok {
			w.Write(block)
		} else {
			w.WriteHeader(http.StatusForbidden) // as buckets do that cannot be listed
		}
	})
	for _, ref := range refs {
		if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil {
			t.Error(err)
		}
	}
	if n := asked.Load(); n != 21 {
		t.Errorf("%d requests for 20 blocks, the 11th of which is the first in the other layout", n)
	}
	missing, _ := newBlock(eris.BlockSize1KiB, 99)
	if _, err := get(t, store, missing, eris.BlockSize1KiB); !errors.Is(err, eris.ErrNotFound) {
		t.Error(err)
	}
}

// packed returns the bytes in gzip.
func packed(b []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	w.Write(b)
	w.Close()
	return out.Bytes()
}

// encoded answers with a content encoding, as proxies do that do not heed what was asked for.
func encoded(encoding string, body []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Encoding", encoding)
		w.Write(body)
	}
}

// TestAnswers has servers answer in all ways.
func TestAnswers(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 7)
	raw := func(text string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			io.WriteString(conn, text)
			if strings.Contains(text, "101") {
				io.Copy(io.Discard, conn)
			}
			conn.Close()
		}
	}
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(code) }
	}
	var wrong *eris.BlockError
	isWrong := func(err error) bool { return errors.As(err, &wrong) && wrong.Reference == ref }
	isMissing := func(err error) bool { return errors.Is(err, eris.ErrNotFound) }
	isRight := func(err error) bool { return err == nil }
	isOther := func(err error) bool { return err != nil && !isWrong(err) && !isMissing(err) }
	isStatus := func(err error) bool {
		return isOther(err) && errors.As(err, new(*httpclient.StatusError))
	}
	for name, test := range map[string]struct {
		answer http.HandlerFunc
		want   func(error) bool
	}{
		"404":     {status(404), isMissing},
		"410":     {status(410), isMissing},
		"403":     {status(403), isStatus},
		"204":     {status(204), isStatus},
		"304":     {status(304), isStatus},
		"500":     {status(500), isStatus},
		"429":     {status(429), isStatus},
		"999":     {status(999), isStatus},
		"nothing": {status(200), isWrong},
		"short":   {func(w http.ResponseWriter, r *http.Request) { w.Write(block[1:]) }, isWrong},
		"short in chunks": {func(w http.ResponseWriter, r *http.Request) {
			w.(http.Flusher).Flush()
			w.Write(block[1:])
		}, isWrong},
		"long": {func(w http.ResponseWriter, r *http.Request) { w.Write(append(block, 0)) }, isWrong},
		"without end": {func(w http.ResponseWriter, r *http.Request) {
			for {
				if _, err := w.Write(block); err != nil {
					return
				}
			}
		}, isWrong},
		"chunks without end": {raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFF\r\n" + strings.Repeat("x", 100000)), isWrong},
		"huge":               {raw("HTTP/1.1 200 OK\r\nContent-Length: 9223372036854775807\r\n\r\n"), isWrong},
		"cut":                {raw("HTTP/1.1 200 OK\r\nContent-Length: 1024\r\n\r\nabc"), isOther},
		"cut without length": {raw("HTTP/1.1 200 OK\r\n\r\nabc"), isOther},
		"cut in chunks":      {raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nabc"), isOther},
		"whole without length": {func(w http.ResponseWriter, r *http.Request) {
			raw("HTTP/1.0 200 OK\r\n\r\n"+string(block))(w, r)
		}, isRight},
		"other bytes":       {func(w http.ResponseWriter, r *http.Request) { w.Write(make([]byte, 1024)) }, isWrong},
		"gzip that is none": {encoded("gzip", block), isOther},
		"gzip":              {encoded("gzip", packed(block)), isRight},
		"gzip in chunks": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "x-gzip")
			w.(http.Flusher).Flush()
			w.Write(packed(block))
		}, isRight},
		"gzip of too much":   {encoded("gzip", packed(bytes.Repeat(block, 1000))), isWrong},
		"gzip of too little": {encoded("gzip", packed(block[1:])), isWrong},
		"gzip that is cut":   {encoded("gzip", packed(block)[:30]), isOther},
		"brotli":             {encoded("br", block), isOther},
		"not HTTP":           {raw("SSH-2.0-secret-path\r\n"), isOther},
		"endless header":     {raw("HTTP/1.1 200 OK\r\nA: " + strings.Repeat("x", 1<<20)), isOther},
		"endless interim":    {raw(strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 1000)), isOther},
		"another protocol":   {raw("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"), isStatus},
		"hangs up":           {raw(""), isOther},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			var spoilt atomic.Bool
			spoilt.Store(true)
			store := openHandler(t, "/secret-path", web.Options{}, func(w http.ResponseWriter, r *http.Request) {
				if spoilt.Load() {
					test.answer(w, r)
				} else {
					w.Write(block)
				}
			})
			memory := bytes.Repeat([]byte{0xa5}, 1024+64)
			_, err := fetch.Get(t.Context(), store, ref, eris.BlockSize1KiB, memory[:0])
			if !test.want(err) {
				t.Errorf("error is %v", err)
			}
			if err != nil && (strings.Contains(err.Error(), "secret-path") || len(err.Error()) > 500) {
				t.Errorf("the error is not fit to be shown: %.1000v", err)
			}
			if !bytes.Equal(memory[1024:], bytes.Repeat([]byte{0xa5}, 64)) {
				t.Error("Get wrote behind the block")
			}
			// That was that; the next time it works.
			spoilt.Store(false)
			if got, err := get(t, store, ref, eris.BlockSize1KiB); err != nil || !bytes.Equal(got, block) {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

func TestPutAnswers(t *testing.T) {
	ref, block := newBlock(eris.BlockSize32KiB, 7)
	for code, want := range map[int]string{
		200: "stored", 201: "stored", 204: "stored",
		401: "read-only", 403: "read-only", 404: "read-only", 405: "read-only", 501: "read-only",
		202: "failed", 301: "failed", 302: "failed", 303: "failed", 400: "failed", 413: "failed", 500: "failed", 507: "failed",
	} {
		store := openHandler(t, "", web.Options{}, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "/elsewhere")
			w.WriteHeader(code)
		})
		err := store.Put(t.Context(), ref, block)
		got := "failed"
		if err == nil {
			got = "stored"
		} else if errors.Is(err, fetch.ErrReadOnly) {
			got = "read-only"
		}
		if got != want {
			t.Errorf("%d: %s, want %s; %v", code, got, want, err)
		}
	}
}

func TestRedirects(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 7)
	var credentials atomic.Int32
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" || r.Header.Get("Referer") != "" {
			credentials.Add(1)
		}
		if r.Method == http.MethodGet {
			w.Write(block)
		}
	}))
	defer other.Close()
	for location, works := range map[string]bool{
		other.URL + "/x":                      true,
		"/again/3":                            true,
		"//" + other.Listener.Addr().String(): true,
		"/again/1000000":                      false,
		"file:///etc/passwd":                  false,
		"gopher://example.org/":               false,
		"http://":                             false,
		"":                                    false,
		"http://%zz/":                         false,
		"/" + strings.Repeat("x", 9000):       false,
		strings.Replace(other.URL, "http://", "http://u:p@", 1): true,
	} {
		for _, code := range []int{301, 302, 303, 307, 308} {
			store := openHandler(t, "", web.Options{}, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Location", location)
				var n int
				if _, err := fmt.Sscanf(r.URL.Path, "/again/%d", &n); err == nil {
					if n == 0 {
						w.Write(block)
						return
					}
					w.Header().Set("Location", fmt.Sprintf("/again/%d", n-1))
				}
				w.WriteHeader(code)
			})
			withUser := mustOpen(t, strings.Replace(store.String(), "http://", "http://user:password@", 1), web.Options{})
			got, err := get(t, withUser, ref, eris.BlockSize1KiB)
			if works != (err == nil && bytes.Equal(got, block)) {
				t.Errorf("%d to %.50q: %v", code, location, err)
			}
		}
	}
	if n := credentials.Load(); n > 0 {
		t.Errorf("%d requests had credentials or the address of another server", n)
	}
	// What is put goes nowhere else, but elsewhere on the same server.
	for location, works := range map[string]bool{other.URL + "/x": false, "/x": true} {
		store := openHandler(t, "/store", web.Options{}, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/x" {
				if got, err := io.ReadAll(r.Body); err != nil || !bytes.Equal(got, block) {
					t.Errorf("the body is something else, %v", err)
				}
				return
			}
			w.Header().Set("Location", location)
			w.WriteHeader(http.StatusTemporaryRedirect)
		})
		if err := store.Put(t.Context(), ref, block); works != (err == nil) {
			t.Errorf("Put redirected to %s: %v", location, err)
		}
	}
}

func TestCredentials(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 7)
	stranger := openHandler(t, "", web.Options{}, func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "me" || password != "p@ss" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.Write(block)
	})
	store := mustOpen(t, strings.Replace(stranger.String(), "//", "//me:p%40ss@", 1), web.Options{})
	if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil {
		t.Error(err)
	}
	must(t, store.Put(t.Context(), ref, block))
	if err := stranger.Put(t.Context(), ref, block); !errors.Is(err, fetch.ErrReadOnly) {
		t.Error(err)
	}
}

// TestSilence has servers stop in the middle of everything.
func TestSilence(t *testing.T) {
	t.Parallel()
	ref, block := newBlock(eris.BlockSize1KiB, 7)
	for name, before := range map[string]func(w http.ResponseWriter){
		"before the header": func(w http.ResponseWriter) {},
		"in the body": func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", "1024")
			w.Write(block[:100])
			w.(http.Flusher).Flush()
		},
		"dripping": func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", "1024")
			for i := range block {
				if _, err := w.Write(block[i : i+1]); err != nil {
					return
				}
				w.(http.Flusher).Flush()
				time.Sleep(20 * time.Millisecond)
			}
		},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			t.Parallel()
			want := "the answer takes more than"
			if name == "before the header" {
				want = "not answered for"
			}
			// A machine that is busy may not get to where the server stops: then for longer.
			var err error
			for timeout := 2 * time.Second; timeout < time.Minute; timeout *= 2 {
				store := openHandler(t, "", web.Options{Timeout: timeout}, func(w http.ResponseWriter, r *http.Request) {
					before(w)
					<-r.Context().Done()
				})
				_, err = get(t, store, ref, eris.BlockSize1KiB)
				if err != nil && !errors.Is(err, context.DeadlineExceeded) && strings.Contains(err.Error(), want) {
					return
				}
			}
			t.Errorf("error is %v", err)
		})
	}
}

// TestDeadServer checks that a host that takes no connection costs no connection per call.
func TestDeadServer(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	// A host that lets everybody wait, as soon as its queue is full.
	var waiting atomic.Int32
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			waiting.Add(1)
			defer conn.Close() // all in the end
		}
	}()
	defer listener.Close()
	store := mustOpen(t, "https://"+listener.Addr().String(), web.Options{ConnectTimeout: 300 * time.Millisecond})
	ref, _ := newBlock(eris.BlockSize1KiB, 7)
	var group sync.WaitGroup
	for range 100 {
		group.Go(func() {
			if _, err := get(t, store, ref, eris.BlockSize1KiB); err == nil || errors.Is(err, eris.ErrNotFound) {
				t.Errorf("error is %v", err)
			}
		})
	}
	group.Wait()
	if n := waiting.Load(); n > 2 {
		t.Errorf("%d connections were made in a time in which one fails", n)
	}
}

// TestRefused checks that the error says what can be done where no server runs, and names it once.
func TestRefused(t *testing.T) {
	address := testhelp.FreeAddress()
	store := mustOpen(t, "http://"+address+"/secret", web.Options{})
	ref, _ := newBlock(eris.BlockSize1KiB, 7)
	_, err := get(t, store, ref, eris.BlockSize1KiB)
	want := "http://" + address + ": connection refused; is a server running there?"
	if err == nil || err.Error() != want {
		t.Errorf("error is %v, want %s", err, want)
	}
}

// TestNameUnanswered says of a name about which no server answers that it is the name.
func TestNameUnanswered(t *testing.T) {
	before := net.DefaultResolver
	defer func() { net.DefaultResolver = before }()
	net.DefaultResolver = &net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		},
	}
	store := mustOpen(t, "http://server.example./secret", web.Options{ConnectTimeout: 100 * time.Millisecond})
	ref, _ := newBlock(eris.BlockSize1KiB, 7)
	_, err := get(t, store, ref, eris.BlockSize1KiB)
	want := "http://server.example.: host name lookup: no answer within 100ms"
	if err == nil || err.Error() != want {
		t.Errorf("error is %v, want %s", err, want)
	}
}

// TestRestAfterQueue ends a server while a request waits for its only connection: how long the
// source rests has to do with how long it took to connect, not with how long the request waited.
func TestRestAfterQueue(t *testing.T) {
	backend := sourcetest.NewBackend()
	ref, block := newBlock(eris.BlockSize1KiB, 7)
	backend.Set(ref, block)
	server := startServer(t, serve("", backend, true), "http/1.1", "tls")
	store := mustOpen(t, server.url(""), web.Options{Connections: 1})
	release := backend.Hold()
	defer release()
	began := time.Now()
	var group sync.WaitGroup
	for range 3 {
		group.Go(func() {
			if _, err := get(t, store, ref, eris.BlockSize1KiB); err == nil {
				t.Error("no request failed")
			}
		})
	}
	backend.AwaitHeld(1)
	time.Sleep(time.Second)
	server.server.Config.Close()
	group.Wait()
	took, ended := time.Since(began), time.Now()
	release()
	server.restart()
	comesBack(t, store, ref, took, ended)
}

// comesBack gets a block of a store that answers again, and rests since requests to it have ended,
// before six times as long has passed as these took.
func comesBack(t *testing.T, store *web.Store, ref eris.Reference, took time.Duration, ended time.Time) {
	t.Helper()
	for ; ; time.Sleep(10 * time.Millisecond) {
		after := time.Since(ended)
		_, err := get(t, store, ref, eris.BlockSize1KiB)
		if err == nil {
			return
		}
		if after > 5*took {
			t.Fatalf("%v after requests of %v: %v", after, took, err)
		}
	}
}

// TestRestAfterAnswer has no connection come about to a server that has answered before, as where a
// line is away for a moment: it is not left alone for long.
func TestRestAfterAnswer(t *testing.T) {
	backend := sourcetest.NewBackend()
	ref, block := newBlock(eris.BlockSize1KiB, 7)
	backend.Set(ref, block)
	server := startServer(t, serve("", backend, true), "http/1.1", "tls")
	store := mustOpen(t, server.url(""), web.Options{ConnectTimeout: 3 * time.Second})
	if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil {
		t.Fatal(err)
	}
	server.server.Config.Close()
	store.Renew()
	silent, err := net.Listen("tcp", server.address)
	must(t, err)
	began := time.Now()
	if _, err := get(t, store, ref, eris.BlockSize1KiB); err == nil {
		t.Error("a silent server has answered")
	}
	took, ended := time.Since(began), time.Now()
	silent.Close()
	server.restart()
	comesBack(t, store, ref, took, ended)
}

// TestCutOff has a server cut each connection off in the second answer on it: when one was, no
// request is made on others that have had an answer.
func TestCutOff(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 7)
	const connections = 4
	var mu sync.Mutex
	answers := make(map[string]int)
	together := make(chan struct{})
	store := openHandler(t, "", web.Options{Connections: connections}, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		answers[r.RemoteAddr]++
		again := answers[r.RemoteAddr] > 1
		if len(answers) == connections && !again {
			close(together)
		}
		mu.Unlock()
		<-together
		w.Header().Set("Content-Length", "1024")
		if again {
			w.Write(block[:100])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		w.Write(block)
	})
	var group sync.WaitGroup
	for range connections {
		group.Go(func() {
			if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if _, err := get(t, store, ref, eris.BlockSize1KiB); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("error %v", err)
	}
	if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil {
		t.Error(err)
	}
}

// TestRenew has a store make new connections.
func TestRenew(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 7)
	for _, protocol := range []string{"http/1.1", "h2"} {
		t.Run(protocol, func(t *testing.T) {
			seen := make(chan string, 1)
			server := startServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				seen <- r.RemoteAddr
				w.Write(block)
			}), protocol, "tls")
			store := mustOpen(t, server.url(""), web.Options{Connections: 1})
			var from [3]string
			for i := range from {
				if i == 2 {
					store.Renew()
				}
				if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil {
					t.Fatal(err)
				}
				from[i] = <-seen
			}
			if from[0] != from[1] || from[1] == from[2] {
				t.Errorf("requests came from %v", from)
			}
		})
	}
}

// TestRetryAfter has a server refuse all requests for a second, as one that is busy: all of them
// succeed nevertheless, the server is left alone meanwhile, and nobody takes it for silent.
func TestRetryAfter(t *testing.T) {
	for _, code := range []int{http.StatusTooManyRequests, http.StatusServiceUnavailable} {
		const connections, requests = 4, 223
		var mu sync.Mutex
		var asked, refused int
		var until time.Time
		blocks := map[string][]byte{}
		store := openHandler(t, "", web.Options{Connections: connections}, func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			defer mu.Unlock()
			now := time.Now()
			if asked++; asked == 20 {
				until = now.Add(time.Second)
			}
			if now.Before(until) {
				refused++
				w.Header().Set("Retry-After", "1")
				w.WriteHeader(code)
				return
			}
			w.Write(blocks[r.URL.RawQuery])
		})
		p := pool.New([]pool.Member{{Source: store}}, pool.Options{OnRest: func(source string, err error) { t.Errorf("%s rests: %v", source, err) }})
		var group sync.WaitGroup
		for i := range requests {
			ref, block := newBlock(eris.BlockSize1KiB, byte(i))
			mu.Lock()
			blocks["urn:blake2b:"+ref.String()] = block
			mu.Unlock()
			group.Go(func() {
				if _, err := get(t, p, ref, eris.BlockSize1KiB); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
		must(t, p.Close())
		// A busy machine may ask twice for what it takes for lost.
		if asked < requests+refused || refused == 0 || refused > connections {
			t.Errorf("%d: %d requests, of which %d were refused", code, asked, refused)
		}
	}
}

// TestBusy checks that a server that wants to be left alone is, and that the error says so at once:
// who waits here looks silent to a pool.
func TestBusy(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 7)
	for after, least := range map[string]time.Duration{"1000000": 20 * time.Second, "1": 0} {
		var asked atomic.Int32
		store := openHandler(t, "", web.Options{}, func(w http.ResponseWriter, r *http.Request) {
			asked.Add(1)
			w.Header().Set("Retry-After", after)
			w.WriteHeader(http.StatusTooManyRequests)
		})
		_, err := get(t, store, ref, eris.BlockSize1KiB)
		busy, ok := errors.AsType[*fetch.BusyError](err)
		if !ok || busy.After <= least || busy.After > 30*time.Second || errors.Is(err, eris.ErrNotFound) || asked.Load() != 1 {
			t.Errorf("error is %v after %d requests", err, asked.Load())
		}
		if least == 0 {
			continue
		}
		for range 4 {
			if _, err = get(t, store, ref, eris.BlockSize1KiB); !errors.As(err, &busy) {
				t.Errorf("error is %v", err)
			}
		}
		if busy, ok := errors.AsType[*fetch.BusyError](store.Put(t.Context(), ref, block)); !ok {
			t.Errorf("Put: error is %v", busy)
		}
		if n := asked.Load(); n != 1 {
			t.Errorf("%d requests", n)
		}
	}
}

// TestLimited puts blocks into a server that refuses more than some requests at a time, and says
// for how long or not: all of them are stored, although all are put at the same time. One that
// refuses everything is given up, after few requests.
func TestLimited(t *testing.T) {
	for _, most := range []int64{0, 2, 5} {
		for _, after := range []string{"", "1"} {
			t.Run(fmt.Sprintf("%d at a time, later %q", most, after), func(t *testing.T) {
				t.Parallel()
				var now, stored, refused atomic.Int64
				store := openHandler(t, "", web.Options{Connections: 8}, func(w http.ResponseWriter, r *http.Request) {
					defer now.Add(-1)
					if now.Add(1) > most {
						refused.Add(1)
						w.Header().Set("Retry-After", after)
						w.WriteHeader(http.StatusServiceUnavailable)
						return
					}
					io.Copy(io.Discard, r.Body)
					time.Sleep(time.Millisecond)
					stored.Add(1)
				})
				const blocks = 200
				var group sync.WaitGroup
				for i := range blocks {
					group.Go(func() {
						ref, block := newBlock(eris.BlockSize1KiB, byte(i))
						if err := store.Put(t.Context(), ref, block); (err == nil) != (most > 0) {
							t.Error(err)
						}
					})
				}
				group.Wait()
				if n := refused.Load(); stored.Load() < blocks && most > 0 || n == 0 || n > 2*blocks {
					t.Errorf("%d are stored, %d requests were refused", stored.Load(), n)
				}
			})
		}
	}
}

// TestConnections counts connections: one where HTTP/2 is offered, and otherwise no more than
// allowed, used again and again.
func TestConnections(t *testing.T) {
	backend := sourcetest.NewBackend()
	for _, test := range []struct {
		protocols []string
		query     string
		most      int
	}{
		{[]string{"http/1.1", "h2"}, "", 1},
		{[]string{"h2c"}, "?h2c", 1},
		{[]string{"http/1.1"}, "", 5 + 3}, // one may be given up and made again
		{[]string{"http/1.1", "tls"}, "", 5 + 3},
	} {
		server := startServer(t, serve("", backend, true), test.protocols...)
		store := mustOpen(t, server.url(test.query), web.Options{Connections: 5})
		for range 5 {
			var group sync.WaitGroup
			for i := range 100 { // as many as HTTP/2 permits before the server has said how many
				ref, block := newBlock(eris.BlockSize1KiB, byte(i))
				backend.Set(ref, block)
				group.Go(func() {
					if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil {
						t.Error(err)
					}
				})
			}
			group.Wait()
		}
		if n := server.made.Load(); int(n) > test.most {
			t.Errorf("%v: %d connections, at most %d are allowed", test.protocols, n, test.most)
		}
	}
}

func TestVerifiedCertificate(t *testing.T) {
	backend := sourcetest.NewBackend()
	ref, block := newBlock(eris.BlockSize1KiB, 7)
	backend.Set(ref, block)
	server := startServer(t, serve("", backend, true), "h2")
	store := mustOpen(t, server.url("?verify"), web.Options{})
	if _, err := get(t, store, ref, eris.BlockSize1KiB); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("error is %v", err)
	}
}

// TestProxy checks that the proxy is asked that the variables name, unless they make an exception.
func TestProxy(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 7)
	var asked atomic.Value
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.Method + " " + r.RequestURI + " " + r.Header.Get("Proxy-Authorization"))
		if r.Method == http.MethodConnect {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		w.Write(block)
	}))
	defer proxy.Close()
	withPassword := strings.Replace(proxy.URL, "http://", "http://user:pw@", 1)
	for _, test := range []struct{ url, exempt, want string }{
		{"http://blocks.example:99/base", "", "GET http://blocks.example:99/base/uri-res/N2R?urn:blake2b:" + ref.String() + " Basic dXNlcjpwdw=="},
		{"https://blocks.example", "", "CONNECT blocks.example:443 "},
		{"http://127.0.0.1:1", "example.org, 127.0.0.0/8", ""},
		{"http://localhost:1", "other:1,localhost:1", ""},
		{"http://localhost:1", "localhost:2,.localhost.example", "GET http://localhost:1/uri-res/N2R?urn:blake2b:" + ref.String() + " Basic dXNlcjpwdw=="},
		{"http://127.0.0.1:1", "*", ""},
	} {
		asked.Store("")
		store := mustOpen(t, test.url, web.Options{Getenv: func(name string) string {
			return map[string]string{"http_proxy": withPassword, "https_proxy": proxy.Listener.Addr().String(), "no_proxy": test.exempt}[name]
		}})
		_, err := get(t, store, ref, eris.BlockSize1KiB)
		if got := asked.Load(); got != test.want || (err == nil) != strings.HasPrefix(test.want, "GET") {
			t.Errorf("%s, no_proxy=%s: the proxy was asked for %q, want %q; %v", test.url, test.exempt, got, test.want, err)
		}
		if err != nil && strings.Contains(err.Error(), "pw") {
			t.Errorf("the password is shown: %v", err)
		}
	}
	store := mustOpen(t, "http://127.0.0.1:1", web.Options{Getenv: func(string) string { return "socks5://user:pw@127.0.0.1" }})
	if _, err := get(t, store, ref, eris.BlockSize1KiB); err == nil || !strings.Contains(err.Error(), "http_proxy") || strings.Contains(err.Error(), "pw@") {
		t.Errorf("error is %v", err)
	}
}

// TestGetOnlyAndPutOnly checks that what the URL does not permit is not asked for.
func TestGetOnlyAndPutOnly(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 7)
	for query, want := range map[string]string{"?get": "GET ", "?put": "PUT ", "?get&put": "GET PUT "} {
		asked := ""
		store := openHandler(t, query, web.Options{}, func(w http.ResponseWriter, r *http.Request) {
			asked += r.Method + " "
			if r.Method == http.MethodGet {
				w.Write(block)
			}
		})
		if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil && !errors.Is(err, eris.ErrNotFound) {
			t.Error(err)
		}
		if err := store.Put(t.Context(), ref, block); err != nil && !errors.Is(err, fetch.ErrReadOnly) {
			t.Error(err)
		}
		if asked != want {
			t.Errorf("%s: %s, want %s", query, asked, want)
		}
	}
}

// TestCannotSay asks servers that do not know what is meant.
func TestCannotSay(t *testing.T) {
	for name, handler := range map[string]http.HandlerFunc{
		"not found":    http.NotFound,
		"not allowed":  func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusMethodNotAllowed) },
		"page":         func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>we have everything</html>") },
		"other status": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) },
	} {
		done := make(chan struct{})
		r := &fetch.Request{Have: make([]byte, 10*fetch.HavePrefix), Size: 2, Dst: make([]byte, 0, 2), Done: func(*fetch.Request) { close(done) }}
		openHandler(t, "", web.Options{}, handler).Start(r)
		if <-done; !errors.Is(r.Err, fetch.ErrCannotSay) {
			t.Errorf("%s: %x, %v", name, r.Block, r.Err)
		}
	}
}
