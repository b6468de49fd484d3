// SPDX-License-Identifier: GPL-3.0-or-later

package httpserver_test

import (
	"bytes"
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
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/httpserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

func openStore(t testing.TB) *blockstore.Store {
	s, err := blockstore.Open(t.TempDir(), blockstore.Options{})
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	return s
}

// serve starts a server, which ends with the test, and returns its address.
func serve(t testing.TB, config httpserver.Config, access httpserver.Access) (*httpserver.Server, string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	return serveAt(t, l, config, access), l.Addr().String()
}

func serveAt(t testing.TB, l net.Listener, config httpserver.Config, access httpserver.Access) *httpserver.Server {
	s := httpserver.New(config)
	var group sync.WaitGroup
	group.Go(func() {
		if err := s.Serve(t.Context(), l, access); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		group.Wait()
		s.Close()
	})
	return s
}

var readWrite = httpserver.Access{Get: true, Put: true}

func client(t testing.TB, http2 bool) *http.Client {
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetHTTP1(!http2)
	transport.Protocols.SetUnencryptedHTTP2(http2)
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// TestAnswers checks what is answered to what, by both versions of HTTP.
func TestAnswers(t *testing.T) {
	store := openStore(t)
	small, smallBlock := sourcetest.NewBlock(eris.BlockSize1KiB)
	large, largeBlock := sourcetest.NewBlock(eris.BlockSize32KiB)
	for ref, block := range map[eris.Reference][]byte{small: smallBlock, large: largeBlock} {
		must(t, store.Put(t.Context(), ref, block))
	}
	missing, _ := sourcetest.NewBlock(eris.BlockSize1KiB)
	failing := transport(t, func(context.Context) error { return errDisk })
	_, normal := serve(t, httpserver.Config{Source: store, Sink: store.Put}, readWrite)
	_, readOnly := serve(t, httpserver.Config{Source: store, Sink: store.Put}, httpserver.Access{Get: true})
	_, writeOnly := serve(t, httpserver.Config{Source: store, Sink: store.Put}, httpserver.Access{Put: true})
	_, broken := serve(t, httpserver.Config{Source: failing, Sink: sink(errDisk)}, readWrite)
	_, noSink := serve(t, httpserver.Config{Source: store}, readWrite)
	_, refusing := serve(t, httpserver.Config{Source: store, Sink: sink(fetch.ErrReadOnly)}, readWrite)
	query := func(ref eris.Reference) string { return "/uri-res/N2R?urn:blake2b:" + ref.String() }
	newSmall, newSmallBlock := sourcetest.NewBlock(eris.BlockSize1KiB)
	newLarge, newLargeBlock := sourcetest.NewBlock(eris.BlockSize32KiB)
	type headers map[string]string
	block := headers{"Content-Type": "application/octet-stream", "Cache-Control": "public, max-age=31536000, immutable"}
	for _, v := range []struct {
		name, method, server, target string
		body                         []byte
		send                         headers
		status                       int
		want                         []byte
		headers                      headers
	}{
		{"1 KiB", "GET", normal, query(small), nil, nil, 200, smallBlock, block},
		{"32 KiB", "GET", normal, query(large), nil, nil, 200, largeBlock, block},
		{"entity tag", "GET", normal, query(large), nil, nil, 200, largeBlock, headers{"Etag": `"` + large.String() + `"`, "Content-Length": "32768"}},
		{"head", "HEAD", normal, query(large), nil, nil, 200, []byte{}, headers{"Etag": `"` + large.String() + `"`, "Content-Length": "32768"}},
		{"head of a missing one", "HEAD", normal, query(missing), nil, nil, 404, []byte{}, nil},
		{"URN in capitals", "GET", normal, "/uri-res/N2R?URN:BLAKE2B:" + small.String(), nil, nil, 200, smallBlock, nil},
		{"colons encoded", "GET", normal, "/uri-res/N2R?urn%3Ablake2b%3a" + small.String(), nil, nil, 200, smallBlock, nil},
		{"path encoded", "GET", normal, "/uri%2dres/N2R?urn:blake2b:" + small.String(), nil, nil, 200, smallBlock, nil},
		{"known", "GET", normal, query(small), nil, headers{"If-None-Match": `"x", W/"` + small.String() + `"`}, 304, []byte{}, nil},
		{"other tag", "GET", normal, query(small), nil, headers{"If-None-Match": `"` + large.String() + `"`}, 200, smallBlock, nil},
		{"any tag", "HEAD", normal, query(small), nil, headers{"If-None-Match": "*"}, 304, []byte{}, nil},
		{"missing, any tag", "GET", normal, query(missing), nil, headers{"If-None-Match": "*"}, 404, nil, nil},
		{"range", "GET", normal, query(small), nil, headers{"Range": "bytes=1-2"}, 200, smallBlock, nil},
		{"missing", "GET", normal, query(missing), nil, nil, 404, nil, nil},
		{"read-only", "GET", readOnly, query(small), nil, nil, 200, smallBlock, nil},
		{"write-only", "GET", writeOnly, query(small), nil, nil, 403, nil, nil},
		{"failing", "GET", broken, query(small), nil, nil, 500, nil, nil},
		{"no query", "GET", normal, "/uri-res/N2R", nil, nil, 400, nil, nil},
		{"no reference", "GET", normal, "/uri-res/N2R?urn:blake2b:", nil, nil, 400, nil, nil},
		{"lower case", "GET", normal, "/uri-res/N2R?urn:blake2b:" + strings.ToLower(small.String()), nil, nil, 400, nil, nil},
		{"too short", "GET", normal, query(small)[:70], nil, nil, 400, nil, nil},
		{"too long", "GET", normal, query(small) + "A", nil, nil, 400, nil, nil},
		{"very long", "GET", normal, query(small) + strings.Repeat("A", 9000), nil, nil, 400, nil, nil},
		{"parameter", "GET", normal, "/uri-res/N2R?q=urn:blake2b:" + small.String(), nil, nil, 400, nil, nil},
		{"other hash", "GET", normal, "/uri-res/N2R?urn:sha256:" + small.String(), nil, nil, 400, nil, nil},
		{"read capability", "GET", normal, "/uri-res/N2R?urn:eris:BIAD77QDJMFAKZYH2DXBUZYAP3MXZ3DJZVFYQ5DFWC6T65WSFCU5S2IT4YZGJ7AC4SYQMP2DM2ANS2ZTCP3DJJIRV733CRAAHOSWIYZM3M", nil, nil, 403, nil, nil},
		{"put of a read capability", "PUT", normal, "/uri-res/N2R?urn:eris:BI", smallBlock, nil, 403, nil, nil},
		{"other path", "GET", normal, "/uri-res/N2L?urn:blake2b:" + small.String(), nil, nil, 404, nil, nil},
		{"root", "GET", normal, "/", nil, nil, 404, nil, nil},
		{"dots", "GET", normal, "/uri-res/../uri-res/N2R?urn:blake2b:" + small.String(), nil, nil, 404, nil, nil},
		{"delete", "DELETE", normal, query(small), nil, nil, 405, nil, headers{"Allow": "GET, HEAD, PUT"}},
		{"post", "POST", normal, query(small), smallBlock, nil, 405, nil, nil},
		{"put", "PUT", normal, query(newSmall), newSmallBlock, nil, 200, []byte{}, headers{"Content-Location": query(newSmall)}},
		{"put again", "PUT", normal, query(newSmall), newSmallBlock, nil, 200, []byte{}, headers{"Content-Location": query(newSmall)}},
		{"put by a page of this host", "PUT", normal, query(newSmall), newSmallBlock, headers{"Origin": "http://" + normal}, 200, []byte{}, nil},
		{"put by a page of a name that leads here", "PUT", normal, query(newSmall), newSmallBlock, headers{"Host": "evil.example", "Origin": "http://evil.example"}, 403, nil, nil},
		{"put without a reference", "PUT", normal, "/uri-res/N2R?urn:blake2b:", newLargeBlock, nil, 200, []byte{}, headers{"Content-Location": query(newLarge)}},
		{"put without a query", "PUT", normal, "/uri-res/N2R", newLargeBlock, nil, 200, []byte{}, headers{"Content-Location": query(newLarge)}},
		{"get what was put", "GET", normal, query(newLarge), nil, nil, 200, newLargeBlock, nil},
		{"put of something else", "PUT", normal, query(missing), newSmallBlock, nil, 400, nil, nil},
		{"put of nothing", "PUT", normal, query(small), nil, nil, 400, nil, nil},
		{"put that is short", "PUT", normal, query(small), smallBlock[:1023], nil, 400, nil, nil},
		{"put that is long", "PUT", normal, query(large), append(bytes.Clone(largeBlock), 0), nil, 400, nil, nil},
		{"put that is very long", "PUT", normal, query(large), make([]byte, 8<<20), nil, 400, nil, nil},
		{"put of nonsense", "PUT", normal, "/uri-res/N2R?hello", smallBlock, nil, 400, nil, nil},
		{"put elsewhere", "PUT", normal, "/other", smallBlock, nil, 403, nil, nil},
		{"put, read-only", "PUT", readOnly, query(newSmall), newSmallBlock, nil, 403, nil, nil},
		{"put, no sink", "PUT", noSink, query(newSmall), newSmallBlock, nil, 403, nil, nil},
		{"put, sink refuses", "PUT", refusing, query(newSmall), newSmallBlock, nil, 403, nil, nil},
		{"put, failing", "PUT", broken, query(newSmall), newSmallBlock, nil, 500, nil, nil},
		{"put, write-only", "PUT", writeOnly, query(newSmall), newSmallBlock, nil, 200, nil, nil},
	} {
		for _, http2 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/%v", v.name, http2), func(t *testing.T) {
				r, err := http.NewRequestWithContext(t.Context(), v.method, "http://"+v.server+v.target, bytes.NewReader(v.body))
				must(t, err)
				for name, value := range v.send {
					r.Header.Set(name, value)
				}
				if host := v.send["Host"]; host != "" {
					r.Host = host
				}
				answer, err := client(t, http2).Do(r)
				must(t, err)
				defer answer.Body.Close()
				body, err := io.ReadAll(answer.Body)
				must(t, err)
				if answer.StatusCode != v.status || (answer.ProtoMajor == 2) != http2 {
					t.Errorf("status %s by %s, want %d: %.100q", answer.Status, answer.Proto, v.status, body)
				}
				if v.want != nil && !bytes.Equal(body, v.want) {
					t.Errorf("%d bytes, want %d: %.100q", len(body), len(v.want), body)
				}
				if v.status >= 400 && answer.Header.Get("Cache-Control") != "" {
					t.Error("a refusal may be kept")
				}
				for name, want := range v.headers {
					if got := answer.Header.Get(name); got != want {
						t.Errorf("%s: %q, want %q", name, got, want)
					}
				}
			})
		}
	}
	if _, err := fetch.Get(t.Context(), store, missing, eris.BlockSize1KiB, nil); !errors.Is(err, eris.ErrNotFound) {
		t.Errorf("a block was stored under a reference that is not its own: %v", err)
	}
}

// TestHave asks what the server has: as docs/formats.md says, and otherwise. An answer may be
// shorter if the machine is slow.
func TestHave(t *testing.T) {
	store := openStore(t)
	ref, block := sourcetest.NewBlock(eris.BlockSize32KiB)
	must(t, store.Put(t.Context(), ref, block))
	_, open := serve(t, httpserver.Config{Source: store}, httpserver.Access{Get: true})
	_, closed := serve(t, httpserver.Config{Source: store}, httpserver.Access{Put: true})
	_, mute := serve(t, httpserver.Config{Source: transport(t, func(context.Context) error { return nil })}, httpserver.Access{Get: true})
	known, other := string(ref[:fetch.HavePrefix]), "12345678"
	for _, v := range []struct {
		address, path, body string
		status              int
		want                string
	}{
		{open, httpserver.HavePath, other + known + other, 200, "\x40"},
		{open, httpserver.HavePath, strings.Repeat(other, fetch.MaxHave-1) + known, 200, strings.Repeat("\x00", fetch.MaxHave/8-1) + "\x01"},
		{open, httpserver.HavePath, strings.Repeat(other, fetch.MaxHave) + known, 400, ""},
		{open, httpserver.HavePath, "", 400, ""},
		{open, httpserver.HavePath, known + "x", 400, ""},
		{open, httpserver.Path, known, 405, ""},
		{mute, httpserver.HavePath, known, 404, ""},
		{closed, httpserver.HavePath, known, 403, ""},
	} {
		answer, err := client(t, false).Post("http://"+v.address+v.path, "application/octet-stream", strings.NewReader(v.body))
		must(t, err)
		got, err := io.ReadAll(answer.Body)
		must(t, err)
		answer.Body.Close()
		if answer.StatusCode != v.status || v.status == 200 && (len(got) < min(len(v.want), 7) || !strings.HasPrefix(v.want, string(got))) {
			t.Errorf("%s with %d bytes: status %d, %q", v.path, len(v.body), answer.StatusCode, got)
		}
	}
}

// TestRelay checks from where a block comes where clients may have others asked, that the header
// Max-Forwards is obeyed, and that nobody is asked for the other size who has not answered.
func TestRelay(t *testing.T) {
	own := openStore(t)
	ref, _ := sourcetest.NewBlock(eris.BlockSize1KiB)
	var calls atomic.Int32
	var result error
	seen := ""
	_, address := serve(t, httpserver.Config{Source: own}, httpserver.Access{Get: true, Relay: func(client string, hops int) fetch.Source {
		seen = fmt.Sprint(client, " ", hops)
		return transport(t, func(context.Context) error {
			calls.Add(1)
			return result
		})
	}})
	_, plain := serve(t, httpserver.Config{Source: own}, httpserver.Access{Get: true})
	for _, v := range []struct {
		address, forwards string
		err               error
		seen, cache       string
		calls             int32
	}{
		{address, "", eris.ErrNotFound, "127.0.0.1/32 0", "no-store", 2},
		{address, "0", eris.ErrNotFound, "127.0.0.1/32 1", "no-store", 2},
		{address, "1", fetch.ErrUnanswered, "127.0.0.1/32 2", "no-store", 1},
		{address, "255", eris.ErrNotFound, "127.0.0.1/32 256", "no-store", 2},
		{address, "256", eris.ErrNotFound, "127.0.0.1/32 1", "no-store", 2},
		{address, "-1", eris.ErrNotFound, "127.0.0.1/32 1", "no-store", 2},
		{plain, "1", nil, "", "", 0},
	} {
		seen, result = "", v.err
		calls.Store(0)
		r, err := http.NewRequest("GET", "http://"+v.address+"/uri-res/N2R?urn:blake2b:"+ref.String(), nil)
		must(t, err)
		if v.forwards != "" {
			r.Header.Set("Max-Forwards", v.forwards)
		}
		answer, err := client(t, false).Do(r)
		must(t, err)
		answer.Body.Close()
		if n := calls.Load(); answer.StatusCode != 404 || seen != v.seen || answer.Header.Get("Cache-Control") != v.cache || n != v.calls {
			t.Errorf("%+v: status %d, seen %q, cache %q, %d calls", v, answer.StatusCode, seen, answer.Header.Get("Cache-Control"), n)
		}
	}
}

// transport is a source that gets blocks by calls that wait.
func transport(t testing.TB, get func(ctx context.Context) error) fetch.Source {
	w := fetch.NewWorkers("test:", 16, func(ctx context.Context, _ eris.Reference, _ eris.BlockSize, _ []byte) ([]byte, error) {
		return nil, get(ctx)
	})
	t.Cleanup(func() { w.Close() })
	return w
}

var errDisk = errors.New("disk is broken")

// sink is what Put returns.
func sink(err error) eris.Sink {
	return func(context.Context, eris.Reference, []byte) error { return err }
}

// raw sends bytes and returns all that is answered.
func raw(t *testing.T, conn net.Conn, text string) string {
	var group sync.WaitGroup
	defer group.Wait()
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	group.Go(func() { io.WriteString(conn, text) })
	b, err := io.ReadAll(conn)
	if err, ok := err.(net.Error); ok && err.Timeout() {
		t.Error("the server hangs")
	}
	return string(b)
}

// TestHostile sends what no good client sends.
func TestHostile(t *testing.T) {
	synctest.Test(t, testHostile)
}

func testHostile(t *testing.T) {
	store := openStore(t)
	var network sourcetest.Network
	listener := network.Listen()
	serveAt(t, listener, httpserver.Config{
		Source: store, Sink: store.Put, RequestTimeout: 300 * time.Millisecond,
	}, readWrite)
	const head = "PUT /uri-res/N2R HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
	kib := strings.Repeat("x", 1024)
	for _, v := range []struct{ name, send, want string }{
		{"header that does not end", "GET / HTTP/1.1\r\nHost: x\r\n", ""},
		{"header that is too long", "GET / HTTP/1.1\r\nHost: x\r\nA: " + strings.Repeat("a", 64<<10) + "\r\n", "HTTP/1.1 431 "},
		{"body that does not come", head + "Content-Length: 1024\r\n\r\n", "HTTP/1.1 400 "},
		{"body that stops at a block", head + "Content-Length: 32768\r\n\r\n" + kib, "HTTP/1.1 400 "},
		{"chunks that stop at a block", head + "Transfer-Encoding: chunked\r\n\r\n400\r\n" + kib + "\r\n", "HTTP/1.1 400 "},
		{"chunk of exabytes", head + "Transfer-Encoding: chunked\r\n\r\nfffffffffffffff\r\n" + kib, "HTTP/1.1 400 "},
		{"body of exabytes", head + "Content-Length: 9223372036854775807\r\n\r\n" + kib, "HTTP/1.1 400 "},
		{"two lengths", head + "Content-Length: 1024\r\nContent-Length: 1025\r\n\r\n" + kib, "HTTP/1.1 400 "},
		{"nonsense", "\x00\x01\x02\r\n\r\n", "HTTP/1.1 400 "},
		{"chunks of a block", head + "Transfer-Encoding: chunked\r\n\r\n400\r\n" + kib + "\r\n0\r\n\r\n", "HTTP/1.1 200 "},
	} {
		conn, err := network.Dial(t.Context(), "tcp", listener.Addr().String())
		must(t, err)
		if got := raw(t, conn, v.send); !strings.HasPrefix(got, v.want) {
			t.Errorf("%s: %.100q, want %q", v.name, got, v.want)
		}
	}
	if stats := store.Stats(); stats.Blocks1KiB != 1 || stats.Blocks32KiB != 0 {
		t.Errorf("there are %d and %d blocks", stats.Blocks1KiB, stats.Blocks32KiB)
	}
}

// TestBounds has more requests than are allowed; package admission bounds connections.
func TestBounds(t *testing.T) {
	backend := sourcetest.NewBackend()
	release := backend.Hold()
	store := backend.Open(16)
	defer store.Close()
	_, address := serve(t, httpserver.Config{Source: store, MaxRequests: 3}, readWrite)
	var group sync.WaitGroup
	for i := range 3 {
		group.Go(func() { getNothing(t, address, 404) })
		backend.AwaitHeld(i + 1)
	}
	getNothing(t, address, 503)
	release()
	group.Wait()
	getNothing(t, address, 404)
}

// getNothing asks for a block that is nowhere, and wants a status.
func getNothing(t *testing.T, address string, want int) {
	t.Helper()
	answer, err := client(t, false).Get("http://" + address + "/uri-res/N2R?" + eris.Sum(nil).URN())
	if err != nil {
		t.Error(err)
		return
	}
	answer.Body.Close()
	if answer.StatusCode != want {
		t.Errorf("status %d instead of %d", answer.StatusCode, want)
	}
}

// TestHostBounds has one host make half as many requests as are allowed in all, whose bodies do not
// come: it may make no more, and another one is answered.
func TestHostBounds(t *testing.T) {
	backend := sourcetest.NewBackend()
	store := backend.Open(16)
	defer store.Close()
	server := httpserver.New(httpserver.Config{Source: store, Sink: store.Put, MaxRequests: 4})
	defer server.Close()
	handler := server.Handler(readWrite)
	ask := func(host, method string, body io.Reader) int {
		r := httptest.NewRequest(method, "/uri-res/N2R?urn:blake2b:"+eris.Sum(nil).String(), body)
		r.RemoteAddr = host + ":1"
		answer := httptest.NewRecorder()
		handler.ServeHTTP(answer, r)
		return answer.Code
	}
	var group sync.WaitGroup
	defer group.Wait()
	for range 2 {
		slow, end := io.Pipe()
		defer end.Close()
		group.Go(func() { ask("192.0.2.1", "PUT", slow) })
		io.WriteString(end, "x") // when this is over it has been read
	}
	if got := ask("192.0.2.1", "GET", nil); got != 503 {
		t.Errorf("a further request of the host is answered by %d", got)
	}
	if got := ask("192.0.2.2", "GET", nil); got != 404 {
		t.Errorf("another host is answered by %d", got)
	}
}

// TestClose closes a server whose store never answers.
func TestClose(t *testing.T) {
	backend := sourcetest.NewBackend()
	backend.Hold()
	store := backend.Open(1)
	defer store.Close()
	server, address := serve(t, httpserver.Config{Source: store}, readWrite)
	var group sync.WaitGroup
	group.Go(func() { getNothing(t, address, 503) })
	backend.AwaitHeld(1)
	server.Close()
	group.Wait()
}

// TestMany puts and gets many blocks, many at a time, on connections of HTTP/2.
func TestMany(t *testing.T) {
	store := openStore(t)
	_, address := serve(t, httpserver.Config{Source: store, Sink: store.Put}, readWrite)
	c := client(t, true)
	do := func(method, url string, body []byte) ([]byte, error) {
		r, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
		if err != nil {
			return nil, err
		}
		answer, err := c.Do(r)
		if err != nil {
			return nil, err
		}
		defer answer.Body.Close()
		return io.ReadAll(answer.Body)
	}
	var group sync.WaitGroup
	for range 200 {
		group.Go(func() {
			for range 5 {
				ref, block := sourcetest.NewBlock(eris.BlockSize1KiB)
				url := "http://" + address + "/uri-res/N2R?" + ref.URN()
				_, putError := do("PUT", url, block)
				got, err := do("GET", url, nil)
				if putError != nil || err != nil || !bytes.Equal(got, block) {
					t.Errorf("PUT: %v; GET: %d bytes, %v", putError, len(got), err)
				}
			}
		})
	}
	group.Wait()
}
