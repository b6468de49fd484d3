// SPDX-License-Identifier: GPL-3.0-or-later

package mirror_test

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
)

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

// TestNarTrickles checks that a server that keeps sending, but nothing of use, is left.
func TestNarTrickles(t *testing.T) {
	for name, f := range map[string]func(n int, conn net.Conn, r *bufio.Reader){
		"header": func(n int, conn net.Conn, r *bufio.Reader) {
			http.ReadRequest(r)
			io.WriteString(conn, "HTTP/1.1 200 OK\r\n")
			trickle(conn, "X-Y: Z\r\n")
		},
		"interim answers": func(n int, conn net.Conn, r *bufio.Reader) {
			http.ReadRequest(r)
			trickle(conn, "HTTP/1.1 102 Processing\r\n\r\n")
		},
		"body of an error": func(n int, conn net.Conn, r *bufio.Reader) {
			http.ReadRequest(r)
			io.WriteString(conn, "HTTP/1.1 404 Not Found\r\nContent-Length: 60000\r\n\r\n")
			trickle(conn, "not found ")
		},
		"body of a redirection": func(n int, conn net.Conn, r *bufio.Reader) {
			http.ReadRequest(r)
			io.WriteString(conn, "HTTP/1.1 302 Found\r\nLocation: /nar\r\nContent-Length: 60000\r\n\r\n")
			trickle(conn, "go on ")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := rawServer(t, f)
			c := client(t, mirror.Options{NarTimeout: 200 * time.Millisecond})
			done := make(chan error, 1)
			go func() {
				_, err := read(t, c, server+"/nar")
				done <- err
			}()
			select {
			case err := <-done:
				if err == nil {
					t.Error("no error")
				}
			case <-time.After(20 * time.Second):
				t.Fatal("still at it")
			}
		})
	}
}

// TestSecrets checks that no message shows what stands before the host of a URL.
func TestSecrets(t *testing.T) {
	server := rawServer(t, func(n int, conn net.Conn, r *bufio.Reader) {
		for {
			request, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			switch request.URL.Path {
			case "/base/loop":
				io.WriteString(conn, "HTTP/1.1 302 Found\r\nLocation: loop\r\nContent-Length: 0\r\n\r\n")
			case "/base/away":
				io.WriteString(conn, "HTTP/1.1 302 Found\r\nLocation: ftp://alice:s3cret@x/\r\nContent-Length: 0\r\n\r\n")
			case "/base/bad":
				io.WriteString(conn, "HTTP/1.1 302 Found\r\nLocation: http://alice:s3cret@x:y/\r\nContent-Length: 0\r\n\r\n")
			case "/base/cut":
				io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n1")
				return
			case "/base/broken":
				return
			default:
				io.WriteString(conn, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
			}
		}
	})
	secret := strings.Replace(server, "http://", "http://alice:s3cret@", 1)
	var shown []string
	c := client(t, mirror.Options{OnRedirect: func(url string) { shown = append(shown, url) }})
	for _, name := range []string{"/loop", "/away", "/bad", "/cut", "/broken", "/absent"} {
		_, err := read(t, c, secret+name)
		if err == nil {
			t.Errorf("%s: no error", name)
			continue
		}
		shown = append(shown, err.Error())
	}
	for _, bad := range []string{"http://alice:s3cret@host:port/", "ftp://alice:s3cret@host/", "http://alice:s3cret@/", "http://alice:s3cret@[::1/"} {
		if err := mirror.CheckURL(bad); err == nil {
			t.Errorf("%q is a URL", bad)
		} else {
			shown = append(shown, err.Error())
		}
	}
	for _, message := range shown {
		if strings.Contains(message, "s3cret") || strings.Contains(message, "alice") {
			t.Errorf("shown: %s", message)
		}
	}
}

// TestLongMessages checks that what a server sends does not end up in a message as a whole.
func TestLongMessages(t *testing.T) {
	long := strings.Repeat("x", 100000)
	for name, answer := range map[string]string{
		"status line": long + "\r\n\r\n",
		"header":      "HTTP/1.1 200 OK\r\n" + long + "\r\n\r\n",
		"reason":      "HTTP/1.1 500 " + long + "\r\nContent-Length: 0\r\n\r\n",
		"location":    "HTTP/1.1 302 Found\r\nLocation: http://" + long + ":y/\r\nContent-Length: 0\r\n\r\n",
		"length":      "HTTP/1.1 200 OK\r\nContent-Length: " + long + "\r\n\r\n",
		"encoding":    "HTTP/1.1 200 OK\r\nTransfer-Encoding: " + long + "\r\n\r\n",
		"control":     "HTTP/1.1 200 OK\r\n\x1b[2J\n\x9b\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			server := rawServer(t, func(n int, conn net.Conn, r *bufio.Reader) {
				http.ReadRequest(r)
				io.WriteString(conn, answer)
				io.Copy(io.Discard, r)
			})
			c := client(t, mirror.Options{})
			_, err := read(t, c, server+"/nar")
			if err == nil || len(err.Error()) > 1000 || strings.ContainsAny(err.Error(), "\x1b\n") || strings.Contains(err.Error(), "\x9b") {
				t.Errorf("error %.2000q", err)
			}
		})
	}
}

// TestPipelinesKept checks that a server that has closed connections that were not used is still
// sent pipelines, and so is one that bounds the requests on a connection.
func TestPipelinesKept(t *testing.T) {
	run := func(t *testing.T, perConnection int, between func(closeAll func())) {
		var requests, piped atomic.Int64
		var mu sync.Mutex
		var open []net.Conn
		server := rawServer(t, func(n int, conn net.Conn, r *bufio.Reader) {
			mu.Lock()
			open = append(open, conn)
			mu.Unlock()
			for i := 1; ; i++ {
				request, err := http.ReadRequest(r)
				if err != nil {
					return
				}
				requests.Add(1)
				if r.Buffered() > 0 {
					piped.Add(1)
				}
				last := ""
				if i == perConnection {
					last = "Connection: close\r\n"
				}
				body := "narinfo of " + strings.TrimSuffix(strings.TrimPrefix(request.URL.Path, "/base/"), ".narinfo")
				fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n%s", len(body), last, body)
				if i == perConnection {
					return
				}
			}
		})
		c := client(t, mirror.Options{})
		for range 3 {
			requests.Store(0)
			piped.Store(0)
			hs := hashes(1000)
			answers, err := collect(t.Context(), c, server, hs)
			must(t, err)
			check(t, answers, hs)
			if piped.Load() < requests.Load()/4 {
				t.Errorf("%d of %d requests were in a pipeline", piped.Load(), requests.Load())
			}
			between(func() {
				mu.Lock()
				defer mu.Unlock()
				for _, conn := range open {
					conn.Close()
				}
			})
		}
	}
	t.Run("idle connections closed", func(t *testing.T) {
		run(t, 0, func(closeAll func()) { closeAll() })
	})
	t.Run("100 requests each", func(t *testing.T) { run(t, 100, func(func()) {}) })
}

// TestOneConnectionOnly asks a server that takes no connection beside the first.
func TestOneConnectionOnly(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var wait sync.WaitGroup
	defer wait.Wait()
	wait.Go(func() {
		conn, err := l.Accept()
		l.Close()
		if err != nil {
			return
		}
		defer conn.Close()
		r := bufio.NewReader(conn)
		for reply(conn, r) {
		}
	})
	c := mirror.NewClient(mirror.Options{})
	defer c.Close()
	server := "http://" + l.Addr().String() + "/base"
	hs := hashes(300)
	for range 2 {
		answers, err := collect(t.Context(), c, server, hs)
		must(t, err)
		check(t, answers, hs)
	}
	if err := c.Down(server); err != nil {
		t.Error(err)
	}
}

// TestOneSilentItem asks a server that never answers about one item: the others are answered for,
// and the server is asked again.
func TestOneSilentItem(t *testing.T) {
	hs := hashes(200)
	server := rawServer(t, func(n int, conn net.Conn, r *bufio.Reader) {
		for {
			b, err := r.Peek(60)
			if err != nil {
				return
			}
			if strings.Contains(string(b), hs[20]) {
				io.Copy(io.Discard, r)
				return
			}
			if !reply(conn, r) {
				return
			}
		}
	})
	c := client(t, mirror.Options{NarinfoTimeout: 500 * time.Millisecond})
	answers, err := collect(t.Context(), c, server, hs)
	var failure *mirror.ServerError
	if !errors.As(err, &failure) || !strings.Contains(err.Error(), hs[20]) {
		t.Errorf("error %v does not name the item", err)
	}
	check(t, answers, append(slices.Clone(hs[:20]), hs[21:]...))
	if err := c.Down(server); err != nil {
		t.Errorf("the server counts as down: %v", err)
	}
}

// TestLongPath asks a server whose URL is so long that a pipeline of requests does not fit into the
// buffers between us.
func TestLongPath(t *testing.T) {
	long := "/" + strings.Repeat("long/", 20000)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.URL.Path = "/base/" + strings.TrimPrefix(r.URL.Path, long)
		serve(w, r)
	}))
	server.Listener.Close()
	server.Listener = l
	server.Start()
	defer server.Close()
	hs := hashes(100)
	answers, err := collect(t.Context(), client(t, mirror.Options{}), server.URL+long, hs)
	must(t, err)
	check(t, answers, hs)
}

func TestMaxAge(t *testing.T) {
	const forever = 1 << 31 * time.Second
	tests := []struct {
		header string
		want   time.Duration
	}{
		{"max-age=60", time.Minute},
		{"public, max-age=60", time.Minute},
		{`MAX-AGE="60"`, time.Minute},
		{"max-age=0", 0},
		{"max-age=2147483648", forever},
		{"max-age=99999999999999999999999999", forever},
		{"max-age=-1", -1},
		{"max-age=+1", -1},
		{"max-age=1e3", -1},
		{"max-age=", -1},
		{"max-age", -1},
		{"max-age=x, max-age=5", 5 * time.Second},
		{"s-maxage=5", -1},
		{"", -1},
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var i int
		fmt.Sscanf(r.URL.Path, "/%d.narinfo", &i)
		w.Header().Set("Cache-Control", tests[i].header)
		io.WriteString(w, "x")
	}))
	defer server.Close()
	hs := hashes(len(tests))
	answers, err := collect(t.Context(), client(t, mirror.Options{}), server.URL, hs)
	must(t, err)
	for i, test := range tests {
		if got := answers[hs[i]].MaxAge; got != test.want {
			t.Errorf("%q: %v, want %v", test.header, got, test.want)
		}
	}
}

// TestTargets checks that servers see paths as they stand in URLs.
func TestTargets(t *testing.T) {
	var mu sync.Mutex
	var targets, hosts []string
	server := rawServer(t, func(n int, conn net.Conn, r *bufio.Reader) {
		for {
			request, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			mu.Lock()
			targets = append(targets, request.RequestURI)
			hosts = append(hosts, request.Host)
			mu.Unlock()
			io.WriteString(conn, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
		}
	})
	root := strings.TrimSuffix(server, "/base")
	for raw, want := range map[string]string{
		"/a%2Bb+c":          "/a%2Bb+c",
		"/a%2Bb|c":          "/a%2Bb|c",
		"/a%2fb\"%2F":       "/a%2fb\"%2F",
		"//x/../y/./z":      "//x/../y/./z",
		"/q?a=%2B+b?c":      "/q?a=%2B+b?c",
		"?q":                "/?q",
		"":                  "/",
		"/f#fragment":       "/f",
		"/a b":              "/a%20b",
		"/\xc3\xa4":         "/%C3%A4",
		"/at@sign:and:more": "/at@sign:and:more",
	} {
		targets = nil
		read(t, client(t, mirror.Options{}), root+raw)
		if len(targets) != 1 || targets[0] != want {
			t.Errorf("%q: the server was asked for %q, want %q", raw, targets, want)
		}
	}
	targets = nil
	collect(t.Context(), client(t, mirror.Options{}), root+"/a%2Bb|c/?q#f", hashes(1))
	if want := "/a%2Bb|c/" + hashes(1)[0] + ".narinfo"; len(targets) != 1 || targets[0] != want {
		t.Errorf("the server was asked for %q, want %q", targets, want)
	}
	for _, host := range hosts {
		if host != strings.TrimPrefix(root, "http://") {
			t.Errorf("Host: %s", host)
		}
	}
}

// TestIPv6 checks the form of addresses in requests.
func TestIPv6(t *testing.T) {
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Skipf("no IPv6: %v", err)
	}
	var host atomic.Value
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host.Store(r.Host)
		serve(w, r)
	})}
	go server.Serve(l)
	defer server.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	for _, name := range []string{"[::1]", "[0::1]", "[::1%25lo]"} {
		hs := hashes(5)
		answers, err := collect(t.Context(), client(t, mirror.Options{}), "http://"+name+":"+port+"/base", hs)
		if err != nil {
			t.Error(err)
			continue
		}
		check(t, answers, hs)
		if h := host.Load().(string); strings.Contains(h, "%") || !strings.HasPrefix(h, "[") {
			t.Errorf("%s: Host: %s", name, h)
		}
	}
}

// TestTLSWithoutNotice reads a body that ends when the connection does, from a server that does not
// say so by the means of TLS, as many do not.
func TestTLSWithoutNotice(t *testing.T) {
	certificates := httptest.NewTLSServer(nil)
	defer certificates.Close()
	config := certificates.TLS.Clone()
	config.NextProtos = nil
	server := rawServer(t, func(n int, raw net.Conn, _ *bufio.Reader) {
		conn := tls.Server(raw, config)
		if request, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
			io.WriteString(conn, "HTTP/1.1 200 OK\r\n")
			if strings.HasSuffix(request.URL.Path, "/known") {
				io.WriteString(conn, "Content-Length: 100\r\n")
			}
			io.WriteString(conn, "\r\nall of it")
		}
		raw.Close() // without an alert
	})
	server = strings.Replace(server, "http:", "https:", 1)
	c := client(t, mirror.Options{})
	if got, err := read(t, c, server+"/live"); err != nil || got != "all of it" {
		t.Errorf("%q, error %v", got, err)
	}
	if _, err := read(t, c, server+"/known"); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("of known length: error %v", err)
	}
}

// TestTunnel checks which answers of a proxy make a tunnel.
func TestTunnel(t *testing.T) {
	for answer, want := range map[string]string{
		"HTTP/1.1 200 Yes\r\n\r\n":                                   "",
		"HTTP/1.0 200 Yes\r\nContent-Length: 5\r\n\r\n":              "",
		"HTTP/1.1 204 Yes\r\n\r\n":                                   "",
		"HTTP/1.1 100 Wait\r\n\r\nHTTP/1.1 200 Yes\r\n\r\n":          "",
		"HTTP/1.1 407 Who are you?\r\nContent-Length: 0\r\n\r\n":     "407 Who are you?",
		"HTTP/1.1 302 There\r\nLocation: http://192.0.2.1/\r\n\r\n":  "302 There",
		"garbage\r\n\r\n":                                            "malformed",
		"HTTP/1.1 200 Yes\r\n" + strings.Repeat("X: y\r\n", 1<<17):   "",
		strings.Repeat("HTTP/1.1 100 Wait\r\n\r\n", 100) + "garbage": "",
	} {
		secure := httptest.NewTLSServer(http.HandlerFunc(serve))
		proxy := rawServer(t, func(n int, conn net.Conn, r *bufio.Reader) {
			if _, err := http.ReadRequest(r); err != nil {
				return
			}
			io.WriteString(conn, answer)
			to, err := net.Dial("tcp", secure.Listener.Addr().String())
			if err != nil {
				return
			}
			defer to.Close()
			go func() { io.Copy(to, r); to.Close() }()
			io.Copy(conn, to)
		})
		c := client(t, mirror.Options{Getenv: func(name string) string {
			if name == "https_proxy" {
				return strings.TrimSuffix(proxy, "/base")
			}
			return ""
		}})
		hs := hashes(3)
		answers, err := collect(t.Context(), c, secure.URL+"/base", hs)
		good := want == "" && len(answer) < 1000
		switch {
		case good && err != nil:
			t.Errorf("%.100q: error %v", answer, err)
		case good:
			check(t, answers, hs)
		case err == nil || !strings.Contains(err.Error(), want):
			t.Errorf("%.100q: error %v, want %q", answer, err, want)
		}
		secure.Close()
	}
}

// TestDirectoryOddities checks that nothing in a directory hangs us or takes the other files away.
func TestDirectoryOddities(t *testing.T) {
	d := t.TempDir() + "/of a stick"
	must(t, os.Mkdir(d, 0o755))
	hs := hashes(8)
	file := func(i int) string { return d + "/" + hs[i] + ".narinfo" }
	for _, i := range []int{0, 7} {
		must(t, os.WriteFile(file(i), []byte("narinfo of "+hs[i]), 0o644))
	}
	for _, err := range []error{
		os.Mkdir(file(1), 0o755),
		unix.Mkfifo(file(2), 0o644),
		os.Symlink("/dev/zero", file(3)),
		os.Symlink(hs[4]+".narinfo", file(4)),
		os.Symlink(file(0), file(5)),
	} {
		must(t, err)
	}
	c := client(t, mirror.Options{})
	for _, server := range []string{"file://" + d, "file://" + strings.ReplaceAll(d, " ", "%20") + "/"} {
		answers, err := collect(t.Context(), c, server, hs)
		if err == nil {
			t.Errorf("%s: no error about what is no file", server)
		}
		for i, h := range hs {
			a, ok := answers[h]
			switch i {
			case 0, 5, 7:
				if a.Status != 200 || !strings.HasPrefix(string(a.Body), "narinfo of ") {
					t.Errorf("%s: %d: %+v", server, i, a)
				}
			case 6:
				if !ok || a.Status != 404 {
					t.Errorf("%s: %d: %+v", server, i, a)
				}
			default:
				if ok && a.Status == 200 {
					t.Errorf("%s: %d: %+v", server, i, a)
				}
			}
		}
		for i := 1; i < 5; i++ {
			if _, err := read(t, c, server+"/"+hs[i]+".narinfo"); err == nil {
				t.Errorf("%s: %d can be read", server, i)
			}
		}
	}
}

// TestBoundedConnections checks that all that is asked of a server at the same time shares the
// connections that it gets.
func TestBoundedConnections(t *testing.T) {
	var open, most atomic.Int64
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(time.Millisecond)
		if strings.HasSuffix(r.URL.Path, ".narinfo") {
			serve(w, r)
			return
		}
		io.WriteString(w, "nar")
	}))
	server.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		switch s {
		case http.StateNew:
			n := open.Add(1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
		case http.StateClosed, http.StateHijacked:
			open.Add(-1)
		}
	}
	server.Start()
	defer server.Close()
	c := client(t, mirror.Options{MaxConnections: 3})
	var wait sync.WaitGroup
	for i := range 8 {
		wait.Go(func() {
			hs := hashes(100)
			answers, err := collect(t.Context(), c, server.URL+"/base", hs)
			if err != nil {
				t.Error(err)
			}
			check(t, answers, hs)
			for range 5 {
				if got, err := read(t, c, fmt.Sprint(server.URL, "/nar", i)); err != nil || got != "nar" {
					t.Error(got, err)
				}
			}
		})
	}
	wait.Wait()
	if most.Load() > 3 {
		t.Errorf("%d connections at the same time", most.Load())
	}
}
