// SPDX-License-Identifier: GPL-3.0-or-later

package mirror_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

// hashes returns n different hash parts.
func hashes(n int) []string {
	hs := make([]string, n)
	for i := range hs {
		hs[i] = fmt.Sprintf("%032d", i)
	}
	return hs
}

// hash0 is the first of them.
const hash0 = "00000000000000000000000000000000"

// collect asks for narinfos and returns the answers by hash part.
func collect(ctx context.Context, c *mirror.Client, server string, hs []string) (map[string]mirror.Answer, error) {
	var mu sync.Mutex
	answers := map[string]mirror.Answer{}
	err := c.Narinfos(ctx, server, hs, mirror.Wanted, func(a mirror.Answer) {
		mu.Lock()
		defer mu.Unlock()
		if _, twice := answers[a.Hash]; twice {
			panic("answered twice: " + a.Hash)
		}
		answers[a.Hash] = a
	})
	return answers, err
}

// check makes sure that each item has the answer that serve gives.
func check(t *testing.T, answers map[string]mirror.Answer, hs []string) {
	t.Helper()
	if len(answers) != len(hs) {
		t.Errorf("%d answers, want %d", len(answers), len(hs))
	}
	for _, h := range hs {
		a := answers[h]
		if want := "narinfo of " + h; a.Status != 200 || string(a.Body) != want {
			t.Errorf("%s: status %d, body %.100q, want %q", h, a.Status, a.Body, want)
		}
	}
}

// collectAll asks for narinfos and checks that each item has the answer that serve gives.
func collectAll(t *testing.T, c *mirror.Client, server string, hs []string) {
	t.Helper()
	answers, err := collect(t.Context(), c, server, hs)
	must(t, err)
	check(t, answers, hs)
}

// serve answers requests for narinfos below /base/.
func serve(w http.ResponseWriter, r *http.Request) {
	hash, ok := strings.CutPrefix(r.URL.Path, "/base/")
	hash, ok2 := strings.CutSuffix(hash, ".narinfo")
	if !ok || !ok2 || len(hash) != 32 {
		http.Error(w, "what?", http.StatusBadRequest)
		return
	}
	io.WriteString(w, "narinfo of "+hash)
}

func serving(t testing.TB, h http.HandlerFunc) *httptest.Server {
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	return server
}

// servingAt serves at an address of a network, and returns the URL.
func servingAt(t *testing.T, l net.Listener, h http.HandlerFunc) string {
	server := &http.Server{Handler: h}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	return "http://" + l.Addr().String()
}

// inNetwork runs a test in a bubble with a network.
func inNetwork(t *testing.T, test func(t *testing.T, network *sourcetest.Network)) {
	synctest.Test(t, func(t *testing.T) { test(t, new(sourcetest.Network)) })
}

// partInNetwork runs a part of a test in a bubble with a network, beside other parts.
func partInNetwork(t *testing.T, name string, test func(t *testing.T, network *sourcetest.Network)) {
	t.Run(name, func(t *testing.T) {
		t.Parallel()
		inNetwork(t, test)
	})
}

// serveBoth answers requests for nars as well.
func serveBoth(w http.ResponseWriter, r *http.Request) {
	if strings.HasSuffix(r.URL.Path, ".narinfo") {
		serve(w, r)
		return
	}
	io.WriteString(w, "nar")
}

func client(t *testing.T, o mirror.Options) *mirror.Client {
	c := mirror.NewClient(o)
	t.Cleanup(c.Close)
	return c
}

// counts tells how many there are of something, how many there were at once at most, and in all.
type counts struct{ now, most, all atomic.Int64 }

func (c *counts) begin() {
	c.all.Add(1)
	n := c.now.Add(1)
	for m := c.most.Load(); n > m && !c.most.CompareAndSwap(m, n); m = c.most.Load() {
	}
}

// countingServer serves in a network, and counts connections.
func countingServer(t *testing.T, network *sourcetest.Network, h http.HandlerFunc) (*httptest.Server, *counts) {
	var c counts
	server := &httptest.Server{Listener: network.Listen(), Config: &http.Server{Handler: h}}
	server.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		switch s {
		case http.StateNew:
			c.begin()
		case http.StateClosed, http.StateHijacked:
			c.now.Add(-1)
		}
	}
	server.Start()
	t.Cleanup(server.Close)
	return server, &c
}

func TestNarinfos(t *testing.T) {
	inNetwork(t, func(t *testing.T, network *sourcetest.Network) {
		var requests counts
		server, connections := countingServer(t, network, func(w http.ResponseWriter, r *http.Request) {
			requests.begin()
			defer requests.now.Add(-1)
			time.Sleep(time.Millisecond)
			serve(w, r)
		})
		c := client(t, mirror.Options{Dial: network.Dial, MaxConnections: 7})
		for _, base := range []string{"/base", "/base/"} {
			for _, n := range []int{0, 1, 2, 5, 300} {
				collectAll(t, c, server.URL+base, hashes(n))
			}
		}
		if most := requests.most.Load(); most > 7 || most < 2 {
			t.Errorf("%d requests at the same time, want at most 7, and several: the server is slow", most)
		}
		if n := connections.all.Load(); n > 7 {
			t.Errorf("%d connections, want at most 7: they are to be used again", n)
		}
	})
}

func TestAnswers(t *testing.T) {
	server := serving(t, func(w http.ResponseWriter, r *http.Request) {
		i, _ := strconv.Atoi(strings.Trim(strings.TrimSuffix(r.URL.Path, ".narinfo"), "/"))
		switch i {
		case 0:
			w.Header().Set("Cache-Control", `public, Max-Age="77"`)
			io.WriteString(w, "text")
		case 1:
			w.Header().Set("Cache-Control", "max-age=12")
			w.Header().Set("X-Baking", "1")
			http.NotFound(w, r)
		case 2:
			http.Redirect(w, r, strings.Replace(r.URL.Path, "2", "0", 1), http.StatusFound)
		case 3:
			w.WriteHeader(http.StatusForbidden)
			w.Write(make([]byte, 100000))
		case 4: // chunked
			io.WriteString(w, "a")
			w.(http.Flusher).Flush()
			io.WriteString(w, "b")
		case 5:
			w.Write(make([]byte, mirror.MaxNarinfo+1))
		case 6:
			w.Write(make([]byte, mirror.MaxNarinfo))
		case 7:
			w.WriteHeader(http.StatusEarlyHints)
			io.WriteString(w, "after hints")
		case 8:
			w.Header().Set("Cache-Control", "max-age=-5")
			w.Header().Set("Connection", "close")
			io.WriteString(w, "")
		}
	})
	answers, err := collect(t.Context(), client(t, mirror.Options{}), server.URL, hashes(9))
	must(t, err)
	want := []struct {
		status, length int
		age            time.Duration
		baking         bool
	}{
		{200, 4, 77 * time.Second, false},
		{404, -1, 12 * time.Second, true},
		{200, 4, 77 * time.Second, false}, // redirected to the first
		{403, -1, -1, false},
		{200, 2, -1, false},
		{200, -1, -1, false}, // too long
		{200, mirror.MaxNarinfo, -1, false},
		{200, 11, -1, false},
		{200, 0, -1, false},
	}
	for i, h := range hashes(9) {
		a, w := answers[h], want[i]
		length := -1
		if a.Body != nil {
			length = len(a.Body)
		}
		if a.Status != w.status || length != w.length || a.MaxAge != w.age || a.Baking != w.baking {
			t.Errorf("answer %d: status %d, %d bytes, max-age %v, baking %v; want %+v", i, a.Status, length, a.MaxAge, a.Baking, w)
		}
	}
}

// rawServer serves connections with a function; each gets the number of the connection.
func rawServer(t *testing.T, f func(n int, conn net.Conn, r *bufio.Reader)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	return rawServerAt(t, l, f)
}

func rawServerAt(t *testing.T, l net.Listener, f func(n int, conn net.Conn, r *bufio.Reader)) string {
	var wait sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	wait.Go(func() {
		for n := 0; ; n++ {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, conn)
			mu.Unlock()
			wait.Go(func() {
				defer conn.Close()
				f(n, conn, bufio.NewReader(conn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range open {
			c.Close()
		}
		mu.Unlock()
		wait.Wait()
	})
	return "http://" + l.Addr().String() + "/base"
}

// reply reads a request and answers it; false when there is none.
func reply(conn net.Conn, r *bufio.Reader) bool {
	request, err := http.ReadRequest(r)
	if err != nil {
		return false
	}
	return answer(conn, request, "") == nil
}

// answer answers a request with some fields.
func answer(conn net.Conn, request *http.Request, fields string) error {
	body := "narinfo of " + strings.TrimSuffix(strings.TrimPrefix(request.URL.Path, "/base/"), ".narinfo")
	_, err := fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n%s", len(body), fields, body)
	return err
}

// TestUnwillingServers asks servers that do not like many requests on a connection, each in its own
// way.
func TestUnwillingServers(t *testing.T) {
	servers := map[string]func(n int, conn net.Conn, r *bufio.Reader){
		"one answer per connection": func(n int, conn net.Conn, r *bufio.Reader) {
			reply(conn, r)
		},
		"says that it closes": func(n int, conn net.Conn, r *bufio.Reader) {
			request, err := http.ReadRequest(r)
			if err == nil {
				body := "narinfo of " + strings.TrimSuffix(strings.TrimPrefix(request.URL.Path, "/base/"), ".narinfo")
				fmt.Fprintf(conn, "HTTP/1.0 200 OK\r\n\r\n%s", body)
			}
		},
		"drops what follows a request": func(n int, conn net.Conn, r *bufio.Reader) {
			for reply(conn, r) {
				if r.Buffered() > 0 {
					return
				}
			}
		},
		"three answers": func(n int, conn net.Conn, r *bufio.Reader) {
			for range 3 {
				reply(conn, r)
			}
		},
		"refuses the first connections": func(n int, conn net.Conn, r *bufio.Reader) {
			if n >= 2 {
				for reply(conn, r) {
				}
			}
		},
		"cuts the first answers": func(n int, conn net.Conn, r *bufio.Reader) {
			if n < 3 {
				r.Peek(1)
				io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nnot all")
				return
			}
			for reply(conn, r) {
			}
		},
		"cuts an answer now and then": func(n int, conn net.Conn, r *bufio.Reader) {
			for i := 0; reply(conn, r); i++ {
				if i == 5 && n < 5 {
					io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nnot all")
					return
				}
			}
		},
	}
	for name, f := range servers {
		t.Run(name, func(t *testing.T) {
			server := rawServer(t, f)
			collectAll(t, client(t, mirror.Options{}), server, hashes(100))
		})
	}
}

// TestEndlessBodies asks a server that sends bodies without end: they are answers that say nothing,
// and not waited for. The further items are asked for on another connection.
func TestEndlessBodies(t *testing.T) {
	for _, header := range []string{
		"200 OK\r\nContent-Length: 1000000000000", "404 Not Found\r\nContent-Length: 1000000000000",
		"200 OK\r\nTransfer-Encoding: chunked", "200 OK",
	} {
		t.Run(header, func(t *testing.T) {
			t.Parallel()
			server := rawServer(t, func(_ int, conn net.Conn, r *bufio.Reader) {
				request, err := http.ReadRequest(r)
				for ; err == nil && !strings.Contains(request.URL.Path, hash0); request, err = http.ReadRequest(r) {
					answer(conn, request, "")
				}
				if err == nil {
					_, err = io.WriteString(conn, "HTTP/1.1 "+header+"\r\n\r\n")
				}
				for err == nil {
					_, err = io.WriteString(conn, "400\r\n"+strings.Repeat("x", 1<<10)+"\r\n")
				}
			})
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			answers, err := collect(ctx, client(t, mirror.Options{NarinfoTimeout: time.Hour}), server, hashes(10))
			must(t, err)
			if len(answers) != 10 || answers[hash0].Body != nil {
				t.Errorf("%d answers, of the first one a body of %d bytes", len(answers), len(answers[hash0].Body))
			}
		})
	}
}

// TestBrokenServers checks that nothing a server does makes a look-up fail to end, and that a
// broken server is not asked again.
func TestBrokenServers(t *testing.T) {
	endless := func(conn net.Conn, s string) {
		for {
			if _, err := io.WriteString(conn, s); err != nil {
				return
			}
		}
	}
	servers := map[string]func(n int, conn net.Conn, r *bufio.Reader){
		"closes at once":  func(n int, conn net.Conn, r *bufio.Reader) {},
		"no HTTP":         func(n int, conn net.Conn, r *bufio.Reader) { io.WriteString(conn, "220 smtp.example.org ESMTP\r\n") },
		"endless header":  func(n int, conn net.Conn, r *bufio.Reader) { endless(conn, "HTTP/1.1 200 OK\r\nX: 1\r\n") },
		"endless line":    func(n int, conn net.Conn, r *bufio.Reader) { endless(conn, "HTTP/1.1 ") },
		"endless interim": func(n int, conn net.Conn, r *bufio.Reader) { endless(conn, "HTTP/1.1 100 Continue\r\n\r\n") },
		"silent":          func(n int, conn net.Conn, r *bufio.Reader) { io.Copy(io.Discard, r) },
		"silent in a body": func(n int, conn net.Conn, r *bufio.Reader) {
			io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx")
			io.Copy(io.Discard, r)
		},
		"trickles": func(n int, conn net.Conn, r *bufio.Reader) {
			for _, c := range "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + strings.Repeat("x", 1000) {
				time.Sleep(20 * time.Millisecond)
				if _, err := io.WriteString(conn, string(c)); err != nil {
					return
				}
			}
		},
	}
	for name, f := range servers {
		partInNetwork(t, name, func(t *testing.T, network *sourcetest.Network) {
			server := rawServerAt(t, network.Listen(), f)
			c := client(t, mirror.Options{Dial: network.Dial, NarinfoTimeout: 300 * time.Millisecond})
			var failure *mirror.ServerError
			answers, err := collect(t.Context(), c, server, hashes(50))
			if !errors.As(err, &failure) || len(answers) > 0 {
				t.Fatalf("error %v, %d answers", err, len(answers))
			}
			if !strings.HasPrefix(failure.Server, "http://192.0.2.1") {
				t.Errorf("the error is about %q", failure.Server)
			}
			if c.Down(server) == nil {
				t.Error("the server would be asked again")
			}
			if _, err := collect(t.Context(), c, server, hashes(1)); !errors.As(err, &failure) {
				t.Errorf("second time: error %v", err)
			}
		})
	}
}

func TestCancel(t *testing.T) {
	asked := make(chan bool, 100)
	server := rawServer(t, func(n int, conn net.Conn, r *bufio.Reader) {
		asked <- true
		io.Copy(io.Discard, r)
	})
	cause := errors.New("enough")
	for _, f := range []func(ctx context.Context, c *mirror.Client) error{
		func(ctx context.Context, c *mirror.Client) error {
			_, err := collect(ctx, c, server, hashes(30))
			return err
		},
		func(ctx context.Context, c *mirror.Client) error {
			_, err := c.OpenNar(ctx, server+"/nar", false)
			return err
		},
	} {
		ctx, cancel := context.WithCancelCause(t.Context())
		done := make(chan error)
		c := client(t, mirror.Options{})
		go func() { done <- f(ctx, c) }()
		<-asked
		cancel(cause)
		if err := <-done; err != cause {
			t.Errorf("error %v, want %v", err, cause)
		}
		if err := c.Down(server); err != nil {
			t.Errorf("the server counts as down: %v", err)
		}
	}
}

func TestScheme(t *testing.T) {
	c := client(t, mirror.Options{})
	for _, bad := range []string{"ftp://example.org", "gopher://x", "example.org", "/path", ""} {
		if err := mirror.CheckURL(bad); !errors.Is(err, mirror.ErrUnsupportedScheme) {
			t.Errorf("%q: error %v", bad, err)
		}
		if _, err := collect(t.Context(), c, bad, hashes(1)); !errors.Is(err, mirror.ErrUnsupportedScheme) {
			t.Errorf("%q: error %v", bad, err)
		}
		if _, err := c.OpenNar(t.Context(), bad, false); !errors.Is(err, mirror.ErrUnsupportedScheme) {
			t.Errorf("%q: error %v", bad, err)
		}
	}
	for _, bad := range []string{"http://", "https:///path", "http://a b/", "http://[::1", "http://x\x00y/", "http://%zz/"} {
		if err := mirror.CheckURL(bad); err == nil || strings.ContainsAny(err.Error(), "\x00\n") {
			t.Errorf("%q: error %q", bad, err)
		}
	}
}

func read(t *testing.T, c *mirror.Client, url string) (string, error) {
	t.Helper()
	n, err := c.OpenNar(t.Context(), url, false)
	if err != nil {
		return "", err
	}
	defer n.Close()
	b, err := io.ReadAll(n)
	return string(b), err
}

// expect reads a nar and checks what it has.
func expect(t *testing.T, c *mirror.Client, url, want string) {
	t.Helper()
	if got, err := read(t, c, url); err != nil || got != want {
		t.Errorf("%s: %.100q, error %v; want %.100q", url, got, err, want)
	}
}

func TestNar(t *testing.T) {
	var requests []string
	mux := http.NewServeMux()
	server := serving(t, func(w http.ResponseWriter, r *http.Request) {
		requests = append(requests, r.RequestURI)
		mux.ServeHTTP(w, r)
	})
	mux.HandleFunc("/nar/", func(w http.ResponseWriter, r *http.Request) {
		user, password, _ := r.BasicAuth()
		fmt.Fprintf(w, "%s %s %s", r.RequestURI, user, password)
	})
	mux.HandleFunc("/redirect", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "nar/x?a=b%20c", http.StatusTemporaryRedirect)
	})
	mux.HandleFunc("/far", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, server.URL+"/redirect", http.StatusMovedPermanently)
	})
	mux.HandleFunc("/loop", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/loop", http.StatusFound) })
	mux.HandleFunc("/file", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "file:///etc/hostname", http.StatusFound)
	})
	mux.HandleFunc("/long", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "3145728")
		w.Write(make([]byte, 3<<20))
	})
	mux.HandleFunc("/live", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		io.WriteString(w, "a")
		w.(http.Flusher).Flush()
		io.WriteString(w, "b")
	})
	var redirected []string
	c := client(t, mirror.Options{Note: func(format string, a ...any) { redirected = append(redirected, fmt.Sprintf(format, a...)) }})
	tests := []struct{ url, want string }{
		{"/nar/plain", "/nar/plain  "},
		{"/nar/what%3Fis%3Dthis%2Bthing", "/nar/what%3Fis%3Dthis%2Bthing  "},
		{"/redirect", "/nar/x?a=b%20c  "},
		{"/far", "/nar/x?a=b%20c  "},
		{"/live", "ab"},
	}
	for _, test := range tests {
		expect(t, c, server.URL+test.url, test.want)
	}
	expect(t, c, strings.Replace(server.URL, "http://", "http://alice:s%20cret@", 1)+"/nar/x", "/nar/x alice s cret")
	if len(redirected) != 3 || strings.Contains(fmt.Sprint(redirected), "s%20cret") {
		t.Errorf("redirections shown: %q", redirected)
	}
	// Servers see targets as they stand in the URL.
	requests = nil
	read(t, c, server.URL+"//nar/a%2fb/../c")
	if len(requests) == 0 || requests[0] != "//nar/a%2fb/../c" {
		t.Errorf("requests %q", requests)
	}
	if _, err := read(t, c, server.URL+"/loop"); err == nil || !strings.Contains(err.Error(), "redirections") {
		t.Errorf("loop: error %v", err)
	}
	if _, err := read(t, c, server.URL+"/file"); !errors.Is(err, mirror.ErrUnsupportedScheme) {
		t.Errorf("redirected to a file: error %v", err)
	}
	var status *mirror.StatusError
	if _, err := read(t, c, server.URL+"/absent"); !errors.As(err, &status) || status.Code != 404 {
		t.Errorf("absent: error %v", err)
	}
	// One that is left early does no harm to the next.
	n, err := c.OpenNar(t.Context(), server.URL+"/long", false)
	must(t, err)
	if n.Size != 3<<20 {
		t.Errorf("size %d", n.Size)
	}
	n.Close()
	expect(t, c, server.URL+"/nar/after", "/nar/after  ")
}

// TestNarReusesConnections fetches many nars over one connection, and narinfos over another.
func TestNarReusesConnections(t *testing.T) {
	inNetwork(t, func(t *testing.T, network *sourcetest.Network) {
		server, connections := countingServer(t, network, serveBoth)
		c := client(t, mirror.Options{Dial: network.Dial})
		for range 20 {
			_, err := collect(t.Context(), c, server.URL+"/base", hashes(1))
			must(t, err)
			expect(t, c, server.URL+"/nar", "nar")
		}
		if n := connections.all.Load(); n != 2 {
			t.Errorf("%d connections", n)
		}
		// A server that has closed meanwhile costs nothing but another connection.
		server.CloseClientConnections()
		expect(t, c, server.URL+"/nar", "nar")
	})
}

// trickle writes a byte now and then until the other end is gone.
func trickle(conn net.Conn, s string) {
	for {
		for i := range len(s) {
			time.Sleep(10 * time.Millisecond)
			if _, err := conn.Write([]byte{s[i]}); err != nil {
				return
			}
		}
	}
}

// TestNarFaults checks that there is an end to whatever a server does, and that what it sends does
// not end up in a message as a whole.
func TestNarFaults(t *testing.T) {
	long := strings.Repeat("x", 100000)
	for name, test := range map[string]struct {
		answer  string // to a request
		trickle string // is sent after it again and again, or nothing, in silence
		closes  bool
		want    string
	}{
		"cut":                      {"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345", "", true, "connection was closed too early"},
		"chunk":                    {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n", "", true, "connection was closed too early"},
		"silent":                   {"", "", false, "no answer within 200ms"},
		"stalls":                   {"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345", "", false, "timeout"},
		"closes":                   {"", "", true, ""},
		"trickles a header":        {"HTTP/1.1 200 OK\r\n", "X-Y: Z\r\n", false, ""},
		"trickles interim answers": {"", "HTTP/1.1 102 Processing\r\n\r\n", false, ""},
		"another protocol":         {"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", "", false, "101"},
		"trickles an error":        {"HTTP/1.1 404 Not Found\r\nContent-Length: 60000\r\n\r\n", "not found ", false, "404"},
		"trickles a redirection":   {"HTTP/1.1 302 Found\r\nLocation: ftp://x/\r\nContent-Length: 60000\r\n\r\n", "go on ", false, ""},
		"long status line":         {long + "\r\n\r\n", "", false, ""},
		"long header":              {"HTTP/1.1 200 OK\r\n" + long + "\r\n\r\n", "", false, ""},
		"long reason":              {"HTTP/1.1 500 " + long + "\r\nContent-Length: 0\r\n\r\n", "", false, "500 xxx"},
		"long location":            {"HTTP/1.1 302 Found\r\nLocation: http://" + long + ":y/\r\nContent-Length: 0\r\n\r\n", "", false, ""},
		"long length":              {"HTTP/1.1 200 OK\r\nContent-Length: " + long + "\r\n\r\n", "", false, ""},
		"long encoding":            {"HTTP/1.1 200 OK\r\nTransfer-Encoding: " + long + "\r\n\r\n", "", false, ""},
		"control characters":       {"HTTP/1.1 200 OK\r\n\x1b[2J\n\x9b\r\n\r\n", "", false, ""},
	} {
		partInNetwork(t, name, func(t *testing.T, network *sourcetest.Network) {
			server := rawServerAt(t, network.Listen(), func(n int, conn net.Conn, r *bufio.Reader) {
				http.ReadRequest(r)
				io.WriteString(conn, test.answer)
				switch {
				case test.trickle != "":
					trickle(conn, test.trickle)
				case !test.closes:
					io.Copy(io.Discard, r)
				}
			})
			slow := make(chan string, 10)
			c := client(t, mirror.Options{
				Dial: network.Dial, NarTimeout: 200 * time.Millisecond, ResumeDelay: time.Millisecond,
				Note: func(format string, a ...any) { slow <- fmt.Sprintf(format, a...) },
			})
			_, err := read(t, c, server+"/nar")
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("error %v, want %q", err, test.want)
			}
			if len(err.Error()) > 1000 || strings.ContainsAny(err.Error(), "\x1b\n") || strings.Contains(err.Error(), "\x9b") {
				t.Errorf("error %.2000q", err)
			}
			if name == "silent" && len(slow) != 1 {
				t.Errorf("%d warnings that the server is slow", len(slow))
			}
		})
	}
}

func TestTLS(t *testing.T) {
	// Its certificate is one that nobody knows.
	server := httptest.NewTLSServer(http.HandlerFunc(serve))
	defer server.Close()
	old := httptest.NewUnstartedServer(http.HandlerFunc(serve))
	old.TLS = &tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_RSA_WITH_AES_256_CBC_SHA}}
	old.StartTLS()
	defer old.Close()
	c := client(t, mirror.Options{})
	for _, url := range []string{server.URL, old.URL} {
		collectAll(t, c, url+"/base", hashes(100))
		expect(t, c, url+"/base/"+hash0+".narinfo", "narinfo of "+hash0)
	}
	// A redirection from a server without TLS is followed as well.
	plain := httptest.NewServer(http.RedirectHandler(server.URL+"/base/"+hash0+".narinfo", http.StatusFound))
	defer plain.Close()
	expect(t, c, plain.URL, "narinfo of "+hash0)
}

// proxy is an HTTP proxy that notes what it is asked for.
func proxy(t *testing.T) (string, func() []string) {
	var mu sync.Mutex
	var seen []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen = append(seen, r.Method+" "+r.RequestURI+" "+r.Header.Get("Proxy-Authorization"))
		mu.Unlock()
		if r.Method == http.MethodConnect {
			to, err := net.Dial("tcp", r.Host)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadGateway)
				return
			}
			defer to.Close()
			from, buffered, err := w.(http.Hijacker).Hijack()
			if err != nil {
				return
			}
			defer from.Close()
			io.WriteString(from, "HTTP/1.1 200 Connection established\r\n\r\n")
			go io.Copy(to, buffered)
			io.Copy(from, to)
			return
		}
		out, err := http.Get(r.RequestURI)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer out.Body.Close()
		w.WriteHeader(out.StatusCode)
		io.Copy(w, out.Body)
	}))
	t.Cleanup(server.Close)
	return server.URL, func() []string {
		mu.Lock()
		defer mu.Unlock()
		defer func() { seen = nil }()
		return seen
	}
}

func TestProxy(t *testing.T) {
	plain := serving(t, serve)
	secure := httptest.NewTLSServer(http.HandlerFunc(serve))
	defer secure.Close()
	hs := hashes(30)
	for _, test := range []struct {
		url, want string
		exempt    string
	}{
		{plain.URL, "GET " + plain.URL + "/base/" + hs[0] + ".narinfo Basic dXNlcjpwdw==", ""},
		{secure.URL, "CONNECT " + strings.TrimPrefix(secure.URL, "https://") + " ", "example.org, 10.0.0.0/8"},
		{plain.URL, "", "127.0.0.1"},
		{secure.URL, "", "example.org,127.0.0.0/8"},
		{secure.URL, "", "*"},
	} {
		// One each: a client may still begin a connection that turns out not to be needed.
		proxyURL, seen := proxy(t)
		environment := map[string]string{
			"http_proxy":  strings.Replace(proxyURL, "http://", "http://user:pw@", 1),
			"https_proxy": strings.TrimPrefix(proxyURL, "http://"), "no_proxy": test.exempt,
		}
		c := client(t, mirror.Options{Getenv: func(name string) string { return environment[name] }})
		collectAll(t, c, test.url+"/base", hs)
		expect(t, c, test.url+"/base/"+hs[0]+".narinfo", "narinfo of "+hs[0])
		got := seen()
		if test.want == "" && len(got) > 0 || test.want != "" && !slices.Contains(got, test.want) {
			t.Errorf("no_proxy=%q: the proxy was asked for %q, want %q", test.exempt, got, test.want)
		}
	}
	for _, bad := range []string{"socks5://127.0.0.1:1", "http://", "http://%zz"} {
		c := client(t, mirror.Options{Getenv: func(string) string { return bad }})
		if _, err := read(t, c, plain.URL); err == nil || !strings.Contains(err.Error(), "http_proxy") {
			t.Errorf("proxy %q: error %v", bad, err)
		}
	}
}

func TestNarFiles(t *testing.T) {
	d := t.TempDir()
	must(t, os.WriteFile(d+"/what?is=this", []byte("odd"), 0o644))
	must(t, os.WriteFile(d+"/a%3Fb", []byte("literal"), 0o644))
	c := client(t, mirror.Options{})
	for name, want := range map[string]string{"what?is=this": "odd", "what%3Fis%3Dthis": "odd", "a%3Fb": "literal"} {
		expect(t, c, "file://"+d+"/"+name, want)
	}
	if _, err := read(t, c, "file://"+d+"/absent"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
	if _, err := read(t, c, "file:relative"); err == nil {
		t.Error("a relative file name is accepted")
	}
}

// BenchmarkNarinfos looks 300 narinfos up.
func BenchmarkNarinfos(b *testing.B) {
	server := serving(b, serve)
	hs := hashes(300)
	for _, rtt := range []time.Duration{0, 50 * time.Millisecond} {
		b.Run(fmt.Sprintf("rtt=%v", rtt), func(b *testing.B) {
			for b.Loop() {
				c := mirror.NewClient(mirror.Options{Dial: sourcetest.Far(rtt)})
				must(b, c.Narinfos(b.Context(), server.URL+"/base", hs, mirror.Wanted, func(mirror.Answer) {}))
				c.Close()
			}
		})
	}
}
